"""The run folder: config.yaml, metrics.jsonl, TensorBoard events, checkpoints."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastflower.config import SPLITS, Config
from fastflower.errors import UserError
from fastflower.files import as_word, atomic_write, remove_temporaries, to_json
from fastflower.runtime.events import EventFile
from fastflower.settings import flattened, to_plain, to_yaml

RUNS = Path("runs")
STAMP = "%Y%m%d-%H%M%S"  # in the name of a new folder, after the run's
_BY_VIEWS = r"(-10-crops|-scales(-\d+)+)?"
_RESULT = re.compile(
    rf"(eval-SPLIT{_BY_VIEWS}(-last)?|predictions-SPLIT{_BY_VIEWS}(-last)?\.parquet)".replace(
        "SPLIT", f"({'|'.join(SPLITS)})"
    )
)


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run."""

    path: Path

    @property
    def last(self) -> Path:
        """Checkpoint to go on from."""
        return self.path / "checkpoints" / "last.pt"

    @property
    def best(self) -> Path:
        """Checkpoint of the best validation figure."""
        return self.path / "checkpoints" / "best.pt"

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint to go on from that is there; best holds all that last does."""
        if self._clearing.exists():
            return None
        return next((path for path in (self.last, self.best) if path.is_file()), None)

    @property
    def _clearing(self) -> Path:
        """It is there while `clear` works: what a kill leaves of the run that goes is none any more."""
        return self.path / ".clearing"

    @property
    def best_weights(self) -> Path:
        """The weights of `best` alone."""
        return self.path / "checkpoints" / "best.safetensors"

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object a line, one line an epoch."""
        return self.path / "metrics.jsonl"

    @property
    def trace(self) -> Path:
        """What torch's profiler recorded."""
        return self.path / "trace.json"

    @property
    def environment(self) -> Path:
        """Versions and hardware of each start of the run, one JSON object a line."""
        return self.path / "environment.jsonl"

    def predictions(self, split: str, views: str = "") -> Path:
        """Class probabilities of a split's pictures, by views whose results' names end like this."""
        return self.path / f"predictions-{split}{views}.parquet"

    def evaluation(self, split: str, views: str = "") -> Path:
        """Folder of where the network errs on a split, by such views."""
        return self.path / f"eval-{split}{views}"

    def results(self) -> list[Path]:
        """What `predict` and `eval` left here: of each split, by any views, of the best checkpoint and the last."""
        return sorted(path for path in self.path.glob("*-*") if _RESULT.fullmatch(path.name))

    @property
    def exists(self) -> bool:
        """Whether a run has left results here: more than the log's first row, after which a kill may come."""
        if self._clearing.exists():
            return False
        rows = self.metrics.read_bytes().splitlines() if self.metrics.is_file() else []
        checkpoints = (self.last, self.best, self.best_weights)
        return len(rows) > 1 or any(path.exists() for path in checkpoints) or bool(self.results())

    def require_own(self) -> None:
        """Raise UserError where the folder is neither empty nor a run's; hidden files are of no account."""
        if self.exists or self._clearing.exists():
            return
        own = {path.name for path in (self.config, self.metrics, self.trace, self.environment)} | {"checkpoints"}
        others = sorted(
            name
            for name in os.listdir(self.path)
            if not name.startswith((".", "events.out.tfevents.")) and name.partition(".tmp")[0] not in own
        )
        if others:
            some = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
            raise UserError(f"--run {self.path} holds no run, but {some}: name a new folder, or an empty one.")

    def clear(self) -> None:
        """Remove what an earlier run wrote, and nothing else."""
        self._clearing.touch()
        results = self.results()
        for folder in (self.path / "checkpoints", *(path for path in results if path.is_dir())):
            shutil.rmtree(folder, ignore_errors=True)
        logs = (self.config, self.environment, self.trace, *self.path.glob("events.out.tfevents.*"), self.metrics)
        for path in (*(path for path in results if not path.is_dir()), *logs):
            path.unlink(missing_ok=True)
        self._clearing.unlink()

    def clear_temporaries(self) -> None:
        """Remove what killed saves left."""
        for path in (self.config, self.metrics, self.environment, self.last, self.best, self.best_weights):
            remove_temporaries(path)
        for split in SPLITS:
            remove_temporaries(self.predictions(split))
        self.trace.with_suffix(".json.tmp").unlink(missing_ok=True)  # the profiler's own

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Where the block meets a full disk, say how to go on.

        Raises:
            UserError: a file cannot be written.
        """
        try:
            yield
        except OSError as error:
            kept = "what was saved before is whole" if self.checkpoint else "nothing was saved before"
            then = f"go on with --resume {as_word(self.path)}" if self.checkpoint else "start again"
            reason = f"{error.filename or self.path} cannot be written ({error.strerror or error})"
            raise UserError(f"{reason}; {kept}. Make room and {then}.") from error

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        """Add what this start of the run runs on."""
        before = self.environment.read_bytes() if self.environment.exists() else b""
        with atomic_write(self.environment) as file:
            file.write(before + to_json(environment).encode() + b"\n")

    def write_config(self, config: Config, note: str | None = None) -> None:
        """Write the configuration; the notes on earlier changes stay above it, and `note` joins them."""
        notes = []
        if self.config.exists():
            before = self.config.read_text(encoding="utf-8", errors="replace")  # whatever an editor made of it
            notes = [line for line in before.splitlines() if line.startswith("# ")]
        if note:
            notes.append(f"# {note}")
        with atomic_write(self.config) as file:
            file.write("".join(f"{line}\n" for line in notes).encode() + to_yaml(config).encode())


def find_checkpoint(given: str, run: Path | None, name: str) -> Path | None:
    """The checkpoint that `--resume` means.

    Args:
        given: a run folder (its last checkpoint, else its best), a checkpoint file, or "auto".
        run: the folder given with `--run`; "auto" looks there.
        name: without `run`, "auto" takes the folder runs/NAME-DATE-TIME that has the newest checkpoint.

    Returns:
        The file, or None where "auto" finds nothing to go on from.

    Raises:
        UserError: no such run or checkpoint, or it is not in the folder given with `--run`.
    """
    if given == "auto":
        stamped = f"{glob.escape(name)}-{'[0-9]' * 8}-{'[0-9]' * 6}*"  # as in STAMP, of no name that begins like this
        folders = [run] if run else RUNS.glob(stamped)
        checkpoints = [checkpoint for folder in folders if (checkpoint := RunFolder(folder).checkpoint)]
        return max(checkpoints, key=lambda path: path.stat().st_mtime, default=None)
    path, folder = Path(given), RunFolder(Path(given))
    checkpoint = path.absolute() if path.is_file() else folder.checkpoint
    if not checkpoint and folder.config.is_file() and not folder.exists:
        raise UserError(
            f"--resume {as_word(given)}: nothing was saved there yet; start again with "
            f"--config {as_word(folder.config)} --run {as_word(given)}."
        )
    if not checkpoint:
        raise UserError(f"--resume {given}: there is no {folder.last}; give a run folder, a checkpoint file or auto.")
    if checkpoint.absolute().parent.name != "checkpoints":
        raise UserError(f"--resume {given} is in no run folder: put it into the folder checkpoints of one.")
    if run and run.resolve() != checkpoint.resolve().parents[1]:
        raise UserError(f"--run {run} and --resume {given} are two runs: a resumed run goes on in its own folder.")
    return checkpoint


def read_rows(metrics: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, one for each epoch, by their epochs from 1; none where there is no file.

    Lines that a kill or a full disk cut off are left out, and so is whatever else is no row. Earlier versions counted
    epochs from 0.
    """
    text = metrics.read_text(encoding="utf-8", errors="replace") if metrics.is_file() else ""
    rows: dict[int, dict[str, Any]] = {}
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line, parse_constant=lambda _: None)  # NaN, which earlier versions wrote
            if _is_row(row):
                rows[row["epoch"]] = row
    first = 1 if 0 in rows else 0
    return [rows[epoch] | {"epoch": epoch + first} for epoch in sorted(rows)]


def _is_row(value: Any) -> bool:
    """Whether it is what `RunLog` writes of an epoch: counts, and figures or null where nothing was measured."""
    return (
        isinstance(value, dict)
        and all(type(value.get(key)) is int and value[key] >= 0 for key in ("epoch", "step"))
        and all(value.get(key) is None or type(value[key]) in (int, float) for key in FIGURES)
    )


class RunLog:
    """Writes an epoch's figures to metrics.jsonl and TensorBoard."""

    def __init__(self, folder: RunFolder, epochs: int) -> None:
        """Open the logs of a run that has done so many epochs; rows of later ones, left by a run that was cut off, are
        taken back.
        """
        self._metrics = folder.metrics
        before = self._metrics.read_bytes() if self._metrics.exists() else b""
        rows = [row for row in read_rows(self._metrics) if row["epoch"] <= epochs]
        kept = "".join(to_json(row) + "\n" for row in rows).encode()
        if kept != before:
            with atomic_write(self._metrics) as file:
                file.write(kept)
        renumbered = before.startswith(b'{"epoch": 0,')  # by an earlier version
        # TensorBoard hides steps from here on that are already in its files
        self._writer = EventFile(folder.path, purge_step=0 if renumbered else epochs + 1 if before else None)
        if renumbered:
            for row in rows:
                self._show(row)

    def write(self, row: Mapping[str, float | None]) -> None:
        """One epoch: a line, and TensorBoard's tags at the epoch's number; what was not measured is None."""
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(to_json(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._show(row)

    def _show(self, row: Mapping[str, float | None]) -> None:
        for tag, key in TAGS.items():
            if (value := row.get(key)) is not None:
                self._writer.add_scalar(tag, value, int(row["epoch"] or 0))
        self._writer.flush()


TAGS = {
    "loss/train": "train_loss",
    "loss/val": "val_loss",
    "accuracy/train": "train_accuracy",
    "accuracy/val": "val_accuracy",
    "top5/val": "val_top5",
    "macro_f1/val": "val_macro_f1",
    "lr": "lr",
    "images_per_s": "images_per_s",
    "data_wait": "data_wait",
}
FIGURES = (*TAGS.values(), "epoch_s")  # of a row, beside its epoch and step


def changes(before: Mapping[str, Any], after: Config) -> list[str]:
    """Settings that differ, as "train.lr 0.1 → 0.01"."""
    old, new = flattened(before), flattened(to_plain(after))
    return [f"{key} {old.get(key)} → {value}" for key, value in new.items() if old.get(key) != value]
