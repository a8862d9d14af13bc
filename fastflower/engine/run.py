"""The run folder: config.yaml, metrics.jsonl, TensorBoard events, checkpoints."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from fastflower.config import Config, to_plain, to_yaml
from fastflower.data.records import SPLITS
from fastflower.errors import UserError
from fastflower.files import atomic_write, to_json

RUNS = Path("runs")


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

    def predictions(self, split: str) -> Path:
        """Class probabilities of a split's pictures."""
        return self.path / f"predictions-{split}.parquet"

    def evaluation(self, split: str) -> Path:
        """Folder of where the network errs on a split."""
        return self.path / f"eval-{split}"

    @property
    def exists(self) -> bool:
        """Whether a run has left results here."""
        return any(path.exists() for path in (self.metrics, self.last, self.best))

    def clear(self) -> None:
        """Remove what an earlier run wrote, and nothing else."""
        for folder in (self.path / "checkpoints", *map(self.evaluation, SPLITS)):
            shutil.rmtree(folder, ignore_errors=True)
        logs = (self.config, self.metrics, self.environment, self.trace, *self.path.glob("events.out.tfevents.*"))
        for path in (*logs, *map(self.predictions, SPLITS)):
            path.unlink(missing_ok=True)

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        """Add what this start of the run runs on."""
        with self.environment.open("a", encoding="utf-8") as file:
            file.write(to_json(environment) + "\n")

    def write_config(self, config: Config, note: str | None = None) -> None:
        """Write the configuration; the notes on earlier changes stay above it, and `note` joins them."""
        notes = []
        if self.config.exists():
            notes = [line for line in self.config.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
        if note:
            notes.append(f"# {note}")
        with atomic_write(self.config) as file:
            file.write("".join(f"{line}\n" for line in notes).encode() + to_yaml(config).encode())


def new_run(name: str) -> RunFolder:
    """A folder that is not there yet: runs/NAME-DATE-TIME."""
    base = RUNS / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, number = base, 1
    while path.exists():
        number += 1
        path = base.with_name(f"{base.name}-{number}")
    return RunFolder(path)


def find_checkpoint(given: str, run: Path | None, name: str) -> Path | None:
    """The checkpoint that `--resume` means.

    Args:
        given: a run folder (its last checkpoint), a checkpoint file, or "auto".
        run: the folder given with `--run`; "auto" looks there.
        name: without `run`, "auto" takes the newest folder runs/NAME-* that has a checkpoint.

    Returns:
        The file, or None where "auto" finds nothing to go on from.

    Raises:
        UserError: no such run or checkpoint, or it is not in the folder given with `--run`.
    """
    if given == "auto":
        folders = [run] if run else sorted(RUNS.glob(f"{name}-*"), key=lambda path: path.stat().st_mtime, reverse=True)
        return next((last for folder in folders if (last := RunFolder(folder).last).is_file()), None)
    path = Path(given)
    checkpoint = path.absolute() if path.is_file() else RunFolder(path).last
    if not checkpoint.is_file():
        raise UserError(f"--resume {given}: there is no {checkpoint}; give a run folder, a checkpoint file or auto.")
    if run and run.resolve() != checkpoint.resolve().parents[1]:
        raise UserError(f"--run {run} and --resume {given} are two runs: a resumed run goes on in its own folder.")
    return checkpoint


class RunLog:
    """Writes an epoch's figures to metrics.jsonl and TensorBoard."""

    def __init__(self, folder: RunFolder, first_epoch: int) -> None:
        """Open the logs; rows of `first_epoch` and later, left by a run that was cut off, are taken back."""
        self._metrics = folder.metrics
        before = self._metrics.read_text(encoding="utf-8") if self._metrics.exists() else ""
        kept = "".join(line for line in before.splitlines(keepends=True) if _epoch_of(line) < first_epoch)
        if kept != before:
            with atomic_write(self._metrics) as file:
                file.write(kept.encode())
        # TensorBoard hides steps from here on that are already in its files
        self._writer = SummaryWriter(str(folder.path), purge_step=first_epoch if before else None)

    def write(self, row: Mapping[str, float | None]) -> None:
        """One epoch: a line, and TensorBoard's tags at the epoch's number; what was not measured is None."""
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(to_json(row) + "\n")
        epoch = int(row["epoch"] or 0)
        for tag, key in _TAGS.items():
            if row[key] is not None:
                self._writer.add_scalar(tag, row[key], epoch)
        self._writer.flush()

    def close(self) -> None:
        """Flush TensorBoard's file."""
        self._writer.close()


_TAGS = {
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


def changes(before: Mapping[str, Any], after: Config) -> list[str]:
    """Settings that differ, as "train.lr 0.1 → 0.01"."""
    old, new = _flat(before), _flat(to_plain(after))
    return [f"{key} {old.get(key)} → {value}" for key, value in new.items() if old.get(key) != value]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _epoch_of(line: str) -> float:
    try:
        return json.loads(line)["epoch"]
    except ValueError:
        return float("inf")  # cut off by a kill or a full disk
