"""How long a run waits for the first batch of a pass: made ahead, as it is in training, and made when it is asked for.

    python bench/passes.py
    python bench/passes.py --crop 224 --step-s 0.1 --out bench/results/local.jsonl

No network is used: for each batch the host sleeps, as if a device computed. Both ways take turns.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where `bench` lies

import torch
from rich.console import Console
from rich.table import Table

from bench.harness.common import append, circumstances, describe, require_positive, start
from fastflower.config import Config, DataConfig, ModelConfig, TrainConfig, resolve
from fastflower.data.loader import Batch
from fastflower.errors import UserError
from fastflower.runtime.distributed import Ranks
from fastflower.runtime.progress import Display
from fastflower.training.passes import Passes
from fastflower.training.setup import prepare
from fastflower.training.state import Setup, State


@dataclass(frozen=True)
class Command:
    """Settings of a run."""

    root: Path | None = None
    """Folder with the pictures; None = the built-in flowers."""
    crop: int = 56
    """Side of the crops (pixels); shorter sides are drawn from 8/7 to 15/7 of it."""
    batch: int = 64
    """Pictures in a batch."""
    step_s: float = 0.02
    """Seconds for each batch."""
    epochs: int = 4
    """Epochs at once; the first one, which may build the pipelines, is not counted."""
    repeats: int = 3
    """How often it is each way's turn."""
    out: Path | None = None
    """File to append one JSON line a way to."""


class Waits(NamedTuple):
    """Seconds until the first batch of an epoch's training and of its validation."""

    training: float
    validation: float


def run(command: Command, console: Console) -> int:
    """Measure and print, and write what --out asks for; the exit code. Raises UserError for unsuitable settings."""
    require_positive(command, "crop", "batch", "repeats")
    if command.epochs < 2:
        raise UserError("--epochs must be at least 2.")
    around = circumstances(command, torch.device("cpu"), {})
    setup, state = prepare(_config(command), torch.device("cpu"), Ranks(), Display(console, shown=True))
    waits: dict[str, list[Waits]] = {"made ahead": [], "made when asked for": []}
    for _ in range(command.repeats):
        for name, waited in waits.items():
            waited += turn(setup, replace(state), command.step_s, ahead=name == "made ahead")[1:]
    rows = [_row(name, waited) for name, waited in waits.items()]
    if command.out:
        append(command.out, ({**row, **around} for row in rows))
    console.print(f"On {describe(around['machine'])}:")
    console.print(_table(rows))
    return 0


def _config(command: Command) -> Config:
    sides = command.crop * 8 // 7, command.crop * 15 // 7
    root = (command.root,) if command.root else None
    data = DataConfig(root=root, crop=command.crop, scale=sides, val_resize=sides[0])
    train = TrainConfig(epochs=command.epochs, batch_size=command.batch)
    return resolve(Config(data=data, model=ModelConfig("resnet18"), train=train))


def turn(setup: Setup, state: State, step_s: float, *, ahead: bool) -> list[Waits]:
    """What all epochs of a run wait for; a step is a sleep."""
    train, val, epochs, waits = setup.train, setup.val, setup.config.train.epochs, []
    assert val  # which only data.train_on takes away
    assert epochs  # which only train.hours takes away
    with Passes(setup, state) as passes:
        for _ in range(epochs):
            training = use(passes.training() if ahead else train.epoch(state.epoch), step_s)
            state.step, state.position = state.step + train.steps, train.steps * train.global_batch
            waits.append(Waits(training, use(passes.validation() if ahead else val.once(), step_s)))
            state.epoch, state.position = state.epoch + 1, 0
    return waits


def use(batches: Iterator[Batch], step_s: float) -> float:
    """Seconds until the first batch comes; all of them are used."""
    asked = time.perf_counter()
    for _ in itertools.islice(batches, 1):
        waited = time.perf_counter() - asked
        time.sleep(step_s)
    for _ in batches:
        time.sleep(step_s)
    return waited


def _row(name: str, waits: Sequence[Waits]) -> dict[str, Any]:
    """Medians and ranges, in milliseconds."""
    row: dict[str, Any] = {"way": name}
    for split in ("validation", "training"):
        waited = [1000 * getattr(epoch, split) for epoch in waits]
        row |= {f"{split}_ms": statistics.median(waited), f"{split}_range_ms": [min(waited), max(waited)]}
    return row


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    grid = Table("first batches", show_edge=False, caption="Milliseconds that a run waits: median (range).")
    for heading in ("of validation", "of an epoch"):
        grid.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        figures = (
            "{:.1f} ({:.1f} to {:.1f})".format(row[f"{split}_ms"], *row[f"{split}_range_ms"])
            for split in ("validation", "training")
        )
        grid.add_row(row["way"], *figures)
    return grid


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit code, 2 for a user's mistake."""
    return start(Command, run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
