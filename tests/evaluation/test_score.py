"""Outputs that are not finite are nobody's class: every command refuses them and writes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastflower.runtime.checkpoint import load_checkpoint, save_checkpoint
from tests.conftest import ROOT, TinyNet, copy_run, fastflower, shared_run, write_dataset
from tests.processes import in_ranks
from tests.training import tiny_worker

FIRST = "000034"  # of the brightest class, the first in val
COMMANDS = [
    "eval RUN",
    "eval RUN --json --crops 10",
    "eval RUN --scales 40,48",
    "predict RUN --split val --submission OUT.csv --out OUT.parquet",
    "predict RUN --split val --crops 10 --out OUT.parquet",
    "ensemble RUN/checkpoints/best.pt RUN/checkpoints/changed.pt --split val --out OUT.parquet --submission OUT.csv",
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run on three classes of different brightness."""
    folder = tmp_path_factory.mktemp("score")
    write_dataset(folder / "data", {"train": 32, "val": 12, "test": 4})
    with shared_run(folder, "--train.epochs", 1, "--data.val_resize", 40) as run:
        yield run


@pytest.fixture
def run(shared: Path, tmp_path: Path, tiny_net: None) -> Path:
    return copy_run(shared, tmp_path / "run")


def arguments(command: str, run: Path) -> list[str]:
    return command.replace("RUN", str(run)).replace("OUT", str(run.parent / "out")).split()


def with_weights(run: Path, change: Any) -> Path:
    """A copy of the best checkpoint with changed weights."""
    saved = load_checkpoint(run / "checkpoints/best.pt")
    change(saved["model"])
    path = run / "checkpoints/changed.pt"
    save_checkpoint(path, {key: value for key, value in saved.items() if key != "format"})
    return path


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_run_and_the_first_record_are_named_and_nothing_is_written(
    run: Path, command: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = TinyNet.features

    def overflowing(self: TinyNet, x: torch.Tensor) -> torch.Tensor:
        bright = x.mean((1, 2, 3)) > 0.5
        return torch.where(bright[:, None, None, None], value, features(self, x))

    monkeypatch.setattr(TinyNet, "features", overflowing)
    with_weights(run, lambda model: model["fc.bias"].add_(1))  # another network, for an ensemble
    before = sorted(run.rglob("*"))
    result = fastflower(*arguments(command, run))
    assert result.code == 2
    assert result.out == ""
    assert f"{run}/checkpoints/best.pt gives outputs that are not finite" in result.err
    assert "for 4 of 12 records" in result.err
    assert f"(id {FIRST})" in result.err
    assert sorted(run.rglob("*")) == before
    assert not list(run.parent.glob("out*"))


def test_outputs_overflow_alike_on_two_processes(run: Path, tmp_path: Path) -> None:
    path = with_weights(run, lambda model: model["fc.weight"].fill_(3e38))
    command = ("predict", path, "--out", tmp_path / "out.parquet", "--submission", tmp_path / "out.csv")
    done = in_ranks(tiny_worker.main, *command)
    assert done.code == 2
    assert done.err.count("gives outputs that are not finite") == 1
    assert "the first being " in done.err
    assert "(id 000044)" in done.err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_where_outputs_would_hide_them(run: Path, value: float) -> None:
    path = with_weights(run, lambda model: model["bn2.running_var"].fill_(value))
    for command in ("eval", "predict"):
        result = fastflower(command, path)
        assert result.code == 2
        assert f"{path} holds weights that are not finite (bn2.running_var)" in result.err


def test_pictures_without_records_are_named_by_their_paths(run: Path, tmp_path: Path) -> None:
    path = with_weights(run, lambda model: model["fc.weight"].fill_(3e38))
    picture = ROOT / "docs/synthetic_flowers.jpg"
    result = fastflower("predict", path, picture)
    assert result.code == 2
    assert f"1 of 1 records, the first being {picture}" in result.err
