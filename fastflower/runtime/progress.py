"""What a run says on screen: a moving line and one table row an epoch; plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

T = TypeVar("T")

_HEADER = (
    f"{'epoch':>5} {'lr':>9} │ {'train loss':>10} {'acc':>6} │ {'val loss':>8} {'acc':>6} {'top-5':>6} {'F1':>6} │ "
    f"{'images/s':>8} {'wait':>5} {'time':>7}"
)
_ROW = (
    "{epoch:>5} {lr:>9} │ {train_loss:>10} {train_accuracy:>6} │ {val_loss:>8} {val_accuracy:>6} {val_top5:>6} "
    "{val_macro_f1:>6} │ {images_per_s:>8} {data_wait:>5} {epoch_s:>7}"
)
_FORMATS = {"lr": ".2g", "images_per_s": ",.0f", "data_wait": ".0%", "epoch": "", "step": "", "epoch_s": ""} | {
    f"{split}_{metric}": spec
    for split in ("train", "val")
    for metric, spec in {"loss": ".4f", "accuracy": ".1%", "top5": ".1%", "macro_f1": ".3f"}.items()
}
PLAIN_LINE_S = 10  # a log file wants a sign of life, not a line a second


@dataclass(frozen=True)
class StepMetrics:
    """What is shown at a logging interval."""

    loss: float  # mean of the epoch so far
    lr: float
    images_per_s: float
    data_wait: float  # share of the time
    eta_s: float  # to the end of the run


class Display:
    """Progress of a run on the main rank; silent on the others."""

    def __init__(self, console: Console, *, shown: bool, speaks: bool = True) -> None:
        """Prepare; one that does not speak shows the moving line alone."""
        self._console, self._shown = console, shown and speaks
        self._live = shown and console.is_terminal
        self._header_due = True
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            console=console,
            transient=True,
            disable=not self._live,
        )
        self._task = self._progress.add_task("", metrics="")
        self._last_line = 0.0

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """A line of its own."""
        if self._shown:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def task(self, description: str, total: int, completed: int = 0) -> None:
        """Begin something of `total` steps."""
        self._progress.reset(self._task, description=description, total=total, completed=completed, metrics="")

    def advance(self, steps: int = 1) -> None:
        """So many steps are done (or on their way to the device)."""
        self._progress.advance(self._task, steps)

    def follow(self, description: str) -> Callable[[int, int], None]:
        """A callback (done, total) that shows how far something is."""

        def show(done: int, total: int) -> None:
            if done == 1:
                self.task(description, total)
            self.advance()

        return show

    def counted(self, items: Iterable[T]) -> Iterator[T]:
        """The same items; each is a step done."""
        for item in items:
            yield item
            self.advance()

    def step(self, epoch: str, step: int, steps: int, metrics: StepMetrics) -> None:
        """The state at a logging interval, `step` of `steps` steps into `epoch` (such as "epoch 1/6")."""
        text = (
            f"loss {metrics.loss:.3f} lr {metrics.lr:.2g} {metrics.images_per_s:,.0f} images/s "
            f"wait {metrics.data_wait:.0%} ETA {_clock(metrics.eta_s)}"
        )
        if self._live:
            self._progress.update(self._task, metrics=text)
        elif time.monotonic() - self._last_line > PLAIN_LINE_S:
            self._last_line = time.monotonic()
            self.say(f"{epoch} step {step}/{steps}  {text}")

    def row(self, row: Mapping[str, float | None]) -> None:
        """The table row of a finished epoch; a dash for what was not measured."""
        if self._header_due:
            self.say(_HEADER)
            self._header_due = False
        texts = {key: "-" if value is None else format(value, _FORMATS[key]) for key, value in row.items()}
        self.say(_ROW.format(**texts | {"epoch_s": _clock(row["epoch_s"] or 0)}))


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
