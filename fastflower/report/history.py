"""What a run's logs say of each epoch: those of a run folder, or any TensorBoard events with the same tags."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from fastflower.arrays import Floats, Ints
from fastflower.errors import UserError
from fastflower.runtime.run_folder import RUNS, TAGS, RunFolder, read_rows
from fastflower.settings import build, flattened, load_yaml, to_plain

REQUIRED = [tag for tag in TAGS if tag.startswith(("loss/", "accuracy/"))]  # one of them makes events those of a run
NO_RUN = (
    "no metrics.jsonl with a finished epoch and no TensorBoard events with a tag of "
    f"{', '.join(REQUIRED)}: give the folder of a run."
)
DEPTH = 2  # folders below a given one in which runs are looked for: runs/cv/fold-0
DROP = 2  # the learning rate drops where it is divided by at least this
ROUNDING = 1e-6  # TensorBoard keeps float32, in which 0.7 is a little less
TOGETHER_S = 0.1  # events this close say nothing about the time of what they report

Row = Mapping[str, Any]  # figures, None where one was not measured


@dataclass(frozen=True)
class History:
    """The figures of a run's epochs; each array is [E], with NaN where a figure was not measured."""

    path: Path
    name: str  # to show; no other run of the report has it
    epochs: Ints  # [E], rising, the first is 1
    lr: Floats
    train_loss: Floats
    train_accuracy: Floats
    val_loss: Floats
    val_accuracy: Floats
    val_macro_f1: Floats
    images_per_s: Floats  # in training
    epoch_s: Floats  # seconds, training and validation
    training_s: Floats  # seconds
    waited_s: Floats  # seconds of training and validation in which the next batch was waited for
    settings: dict[str, Any]  # by dotted keys; empty where it has no config.yaml

    @property
    def best(self) -> tuple[float, int] | None:
        """Highest validation accuracy and the first epoch that has it; None without validation."""
        if np.isnan(self.val_accuracy).all():
            return None
        place = np.nanargmax(self.val_accuracy)
        return float(self.val_accuracy[place]), int(self.epochs[place])

    @property
    def best_macro_f1(self) -> float | None:
        """Macro F1 of the epoch with the highest validation accuracy; None where it was not measured."""
        value = float(self.val_macro_f1[np.nanargmax(self.val_accuracy)]) if self.best else np.nan
        return None if np.isnan(value) else value

    def first_at(self, accuracy: float) -> int | None:
        """The first epoch whose validation accuracy is at least this; None if there is none."""
        reached = self.epochs[self.val_accuracy >= accuracy - ROUNDING]
        return int(reached[0]) if len(reached) else None

    def drops(self) -> list[int]:
        """Epochs that begin at a learning rate of half the last one's or less.

        The rate must have stood still before or after: a cosine also halves from epoch to epoch, at its end.
        """
        same = np.concatenate([[False], self.lr[1:] == self.lr[:-1], [False]])  # as the epoch before; padded
        fell = (self.lr[1:] <= self.lr[:-1] / DROP) & ~same[1:-1]
        epochs: list[int] = self.epochs[1:][fell & (same[:-2] | same[2:])].tolist()
        return epochs


def median(values: Floats) -> float | None:
    """Of the measured ones of [E] values; None if there are none."""
    measured = values[~np.isnan(values)]
    return float(np.median(measured)) if len(measured) else None


def last(values: Floats) -> float | None:
    """The last measured one of [E] values; None if there are none."""
    measured = values[~np.isnan(values)]
    return float(measured[-1]) if len(measured) else None


def read_histories(folders: Sequence[Path]) -> tuple[list[History], list[Path]]:
    """The runs in these folders, in their order, and which of the folders (or files) hold none.

    A folder may also hold runs, or folders of cross-validation; what is given twice counts once. The runs' names are
    their folders', with as many of the folders above as tell equal ones apart.

    Raises:
        UserError: there is no run at all, or a config.yaml that cannot be read.
    """
    if not folders:
        raise UserError(f"no run is named: give folders of runs, or one that they lie in, such as {RUNS}.")
    runs: dict[Path, dict[int, Row]] = {}
    without = []
    for folder in folders:
        of_folder = _runs_below(folder.resolve(), DEPTH)
        runs |= {path: rows for path, rows in of_folder.items() if path not in runs}
        without += [] if of_folder else [folder]
    if not runs:
        raise UserError(f"{', '.join(map(str, folders))} hold{'s' * (len(folders) == 1)} {NO_RUN}")
    return [_history(path, _name(path, runs), rows) for path, rows in runs.items()], without


def _runs_below(folder: Path, depth: int) -> dict[Path, dict[int, Row]]:
    """The rows of a folder, if it has figures of an epoch; else of those in it that do, in the order of their names."""
    if not folder.is_dir():
        return {}
    if rows := _rows(folder):
        return {folder: rows}
    below = sorted(path for path in folder.iterdir() if path.is_dir()) if depth else []
    return {path: rows for inner in below for path, rows in _runs_below(inner, depth - 1).items()}


def _name(path: Path, paths: Iterable[Path]) -> str:
    others = [other for other in paths if other != path]
    for depth in count(1):
        name = path.parts[-depth:]
        if all(other.parts[-depth:] != name for other in others):
            return "/".join(name)
    raise AssertionError  # different paths differ somewhere


def read_history(path: Path, name: str) -> History:
    """A run's metrics.jsonl or, where it has none, its TensorBoard events.

    Raises:
        UserError: the folder holds no figures of any epoch, or a config.yaml that cannot be read.
    """
    if rows := _rows(path):
        return _history(path, name, rows)
    raise UserError(f"{path} holds {NO_RUN}")


def _rows(path: Path) -> dict[int, Row]:
    """By epoch from 1 what the logs of a folder say; nothing where they are no run's."""
    return {row["epoch"]: row for row in read_rows(RunFolder(path).metrics)} or _event_rows(path)


def _history(path: Path, name: str, rows: Mapping[int, Row]) -> History:
    """What these rows are, with the settings of the run where they are known."""
    file, config = RunFolder(path).config, None
    if file.is_file():
        config = build(load_yaml(file), str(file))
    timed = _timed(rows, config.train.pictures if config else None)
    figures = [field.name for field in fields(History) if field.type == "Floats"]
    arrays = {key: _column(timed, key) for key in figures}
    settings = flattened(to_plain(config)) if config else {}
    return History(path, name, np.array(list(rows)), **arrays, settings=settings)


def _column(rows: Iterable[Row], key: str) -> Floats:
    return np.array([row.get(key) for row in rows], np.float64)  # None becomes NaN


def _timed(rows: Mapping[int, Row], batch: int | None) -> list[Row]:
    """The rows, with what follows from a row of metrics.jsonl: how long training took, and waiting for data."""
    done = {0: 0} | {epoch: row["step"] for epoch, row in rows.items() if row.get("step") is not None}
    steps = {epoch: done[epoch] - done[epoch - 1] for epoch in rows if {epoch, epoch - 1} <= done.keys()}
    timed: list[Row] = []
    for epoch, row in rows.items():
        more: dict[str, float | None] = {}
        # the batch is that of the last epoch; one of another number of steps had another
        if batch and epoch in steps and steps[epoch] == steps.get(max(rows)):
            more["training_s"] = _training_s(row, steps[epoch] * batch)
        if "step" in row and row.get("data_wait") is not None and row.get("epoch_s") is not None:
            more["waited_s"] = row["data_wait"] * row["epoch_s"]
        timed.append({**row, **more})
    return timed


def _training_s(row: Row, pictures: float) -> float | None:
    """Seconds of an epoch's training, from its rate; None where an epoch that was resumed in its middle did less."""
    seconds = pictures / (row.get("images_per_s") or float("inf"))
    return seconds if 0 < seconds <= (row.get("epoch_s") or 0) else None


def _event_rows(path: Path) -> dict[int, Row]:
    """The same from TensorBoard's events; of two at one step the later one counts.

    An epoch's time is that between its last event and the last one of the epoch before; its training ends with
    training's event, where validation's did not come at the same moment.
    """
    events = {TAGS[tag]: of_tag for tag, of_tag in _read_events(path).items()}
    if not any(TAGS[tag] in events for tag in REQUIRED):
        return {}
    rows: dict[int, dict[str, float | None]] = defaultdict(dict)
    times: dict[int, dict[str, float]] = defaultdict(dict)
    for key, of_key in events.items():
        for step, time, value in of_key:
            rows[step][key], times[step][key] = value, time
    for step in rows.keys() & {step + 1 for step in rows}:
        began, ended = max(times[step - 1].values()), max(times[step].values())
        rows[step]["epoch_s"] = ended - began
        trained = times[step].get("train_loss", ended)
        if ended - trained > TOGETHER_S:
            rows[step]["training_s"] = trained - began
    first = 1 if 0 in rows else 0  # earlier versions counted from 0
    return {step + first: rows[step] for step in sorted(rows)}


def _read_events(path: Path) -> dict[str, list[tuple[int, float, float]]]:
    """(step, seconds since 1970, value) of the tags that a folder's event files hold, in the order of writing."""
    if not any(path.glob("*tfevents*")):
        return {}
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, TENSORS, EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    accumulator = EventAccumulator(str(path), size_guidance={SCALARS: 0, TENSORS: 0})  # 0 = keep all
    accumulator.Reload()
    events = {}
    for tag in TAGS.keys() & accumulator.Tags()[SCALARS]:
        events[tag] = [(event.step, event.wall_time, event.value) for event in accumulator.Scalars(tag)]
    for tag in TAGS.keys() & accumulator.Tags()[TENSORS]:  # where TensorFlow 2 keeps scalars
        events[tag] = [
            (event.step, event.wall_time, float(make_ndarray(event.tensor_proto))) for event in accumulator.Tensors(tag)
        ]
    return events
