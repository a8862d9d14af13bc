"""A run on a large table goes on in the order that it began with, be it computed or sorted."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastflower.data import batches
from fastflower.data.sampler import keyed_order, permutation
from fastflower.runtime.checkpoint import load_checkpoint
from tests.conftest import fastflower, train_arguments, write_dataset
from tests.training.test_changed_settings import record
from tests.training.test_run import assert_same_run

pytestmark = pytest.mark.usefixtures("tiny_net")

COUNT = 50  # six batches of 8


def expected(epoch: int, *, keyed: bool) -> list[int]:
    order = keyed_order(COUNT, seed=0, epoch=epoch).part(0, COUNT) if keyed else permutation(COUNT, seed=0, epoch=epoch)
    return [int(index) for index in order[:48]]


@pytest.mark.parametrize("began_keyed", [True, False])
def test_a_resumed_run_keeps_its_order(tmp_path: Path, began_keyed: bool) -> None:
    root, run, whole = (
        write_dataset(tmp_path / "data", {"train": COUNT, "val": 8}),
        tmp_path / "run",
        tmp_path / "whole",
    )
    limits = (10, COUNT) if began_keyed else (COUNT, 10)  # of the records, at its beginning and when it goes on
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "KEYED_ABOVE", limits[0])
        before = record(patch)
        assert fastflower(*train_arguments(root, run), "--train.epochs", 2, "--train.max_steps", 9).code == 0
    assert load_checkpoint(run / "checkpoints/last.pt")["train_records"].get("keyed", False) is began_keyed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "KEYED_ABOVE", limits[1])
        after = record(patch)
        result = fastflower("train", "--resume", run, "--train.max_steps", None)
    assert result.code == 0, result.err
    assert before.pictures[0] == expected(0, keyed=began_keyed)
    assert before.pictures[1] + after.pictures[1] == expected(1, keyed=began_keyed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "KEYED_ABOVE", limits[0])
        assert fastflower(*train_arguments(root, whole), "--train.epochs", 2).code == 0
    assert_same_run(whole, run)
