"""What a run says on screen: a moving line and one table row an epoch; plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from fastflower.tables import NOTHING, TITLES, written

T = TypeVar("T")

# Of the table, 79 characters: each column's name in metrics.jsonl, its heading and its width.
_COLUMNS = {
    "epoch": ("epoch", 5),
    "lr": ("lr", 7),
    "train_loss": ("loss", 7),
    "train_accuracy": (TITLES["accuracy"], 6),
    "val_loss": ("loss", 7),
    "val_accuracy": (TITLES["accuracy"], 6),
    "val_top5": (TITLES["top5"], 6),
    "val_macro_f1": ("F1", 5),
    "images_per_s": ("img/s", 6),
    "data_wait": ("wait", 4),
    "epoch_s": ("time", 7),
}
_AFTER_A_GAP = ("train_loss", "val_loss", "images_per_s")  # of two spaces, where another kind of figures begins
_ABOVE = {"train_accuracy": "training", "val_top5": "validation"}
PLAIN_LINE_S = 10  # a log file wants a sign of life, not a line a second


@dataclass(frozen=True)
class StepMetrics:
    """What is shown at a logging interval."""

    loss: float  # mean of the epoch so far
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
            BarColumn(bar_width=None, table_column=Column(min_width=4, max_width=12)),  # gives way to what is said
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
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
            f"ETA {clock(metrics.eta_s)} loss {_fitting(metrics.loss, 6, decimals=3)} "
            f"{_rate(metrics.images_per_s)} img/s wait {metrics.data_wait:.0%}"
        )
        if self._live:
            self._progress.update(self._task, metrics=text)
        elif time.monotonic() - self._last_line > PLAIN_LINE_S:
            self._last_line = time.monotonic()
            self.say(f"{epoch} step {step}/{steps}  {text}")

    def row(self, row: Mapping[str, float | None]) -> None:
        """The table row of a finished epoch; a dash for what was not measured."""
        if self._header_due:
            self.say(_line({name: _ABOVE.get(name, "") for name in _COLUMNS}))
            self.say(_line({name: heading for name, (heading, _) in _COLUMNS.items()}))
            self._header_due = False
        self.say(_line({name: _written(name, row[name]) for name in _COLUMNS}))


def _line(texts: Mapping[str, str]) -> str:
    """A line of the table: a text for each column, on its right side."""
    cells = (f"{' ' * (name in _AFTER_A_GAP)}{texts[name]:>{width}}" for name, (_, width) in _COLUMNS.items())
    return " ".join(cells).rstrip()


def _written(name: str, value: float | None) -> str:
    """A figure of an epoch, in no more characters than its column has (an epoch's number is as long as it is)."""
    if value is None:
        return NOTHING
    match name:
        case "epoch":
            return f"{value:.0f}"
        case "lr":
            return f"{value:.2g}"
        case "train_loss" | "val_loss":
            return _fitting(value, _COLUMNS[name][1], decimals=4)
        case "images_per_s":
            return _rate(value)
        case "data_wait":
            return f"{value:.0%}"
        case "epoch_s":
            return clock(value)
    return written(name, value)


def _fitting(value: float, width: int, *, decimals: int) -> str:
    """A value with so many decimals, or as many of them as fit, or by powers of ten."""
    texts = (f"{value:.{places}f}" for places in range(decimals, -1, -1))
    return next((text for text in texts if len(text) <= width), f"{value:.0e}")


def _rate(images_per_s: float) -> str:
    """Images a second, in at most six characters up to a hundred million."""
    text = f"{images_per_s:,.0f}"
    return text if len(text) <= 6 else f"{images_per_s / 1000:,.0f}k"


def clock(seconds: float) -> str:
    """A time as minutes and seconds, hours where there are some, and no seconds beside ten of them or more."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 10:
        return f"{hours}h{minutes:02}m"
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
