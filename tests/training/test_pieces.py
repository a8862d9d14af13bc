"""Batches in pieces: of equal size, and refused before training where BatchNorm could not take its statistics."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastflower.config import Config
from fastflower.data.batches import TrainingBatches, training_batches
from fastflower.data.loader import Batch, Loading
from fastflower.data.records import Records
from fastflower.data.view import Engine, Normalization
from fastflower.errors import UserError
from fastflower.runtime.device import Precision
from fastflower.runtime.distributed import Ranks
from fastflower.training.setup import require_two_values
from fastflower.training.state import new_state
from fastflower.training.step import training_step
from tests.conftest import fastflower, train_arguments, write_dataset
from tests.training.no_data import setup_without_data

CPU = torch.device("cpu")


class LastNorm(nn.Module):
    """A network that ends as a residual one does: one position for each 32 pixels, and BatchNorm of that."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.BatchNorm2d(3), nn.Linear(3, 4)
        self.seen: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 3, S, S] to [N, 4]."""
        self.seen.append(len(x))
        logits: torch.Tensor = self.fc(self.norm(nn.functional.avg_pool2d(x, 32, ceil_mode=True)).mean((2, 3)))
        return logits


def config_of(batch_size: int, accumulate: int, crop: int, *, name: Any = "resnet18", sync: bool = False) -> Config:
    config = Config()
    return replace(
        config,
        data=replace(config.data, crop=crop),
        model=replace(config.model, name=name, sync_norm=sync),
        train=replace(config.train, batch_size=batch_size, accumulate=accumulate, lr=0.1),
    )


def batches_of(config: Config, records: int, ranks: Ranks) -> TrainingBatches:
    """A rank's training batches of so many records, which nobody reads."""
    numbers = np.zeros(records, np.int64)
    dataset = Records((), (), (), (), (), (), numbers, numbers, numbers, numbers, numbers.astype(str), numbers)
    loading = Loading(Normalization((0.5,) * 3, (0.5,) * 3), Engine(threads=1), CPU, ranks)
    return training_batches(config.data, dataset, loading, batch_size=config.train.pictures, seed=0)


def train_a_step(config: Config, pictures: int) -> list[int]:
    """How many pictures the network saw at a time."""
    network = LastNorm()
    state = new_state(network, config, CPU, Precision(None))
    setup = setup_without_data(config, pictures)
    images = torch.randn(pictures, 3, config.data.crop, config.data.crop)
    training_step(setup, state, network, Batch(images, torch.arange(pictures) % 4, np.arange(pictures)))
    return network.seen


@st.composite
def cases(draw: st.DrawFn) -> tuple[Config, int, Ranks]:
    """Settings that go together, so many records, and processes; the split may be smaller than a batch."""
    world_size = draw(st.integers(1, 3))
    batch_size = world_size * draw(st.integers(1, 12))
    accumulate = draw(st.sampled_from([k for k in range(1, batch_size + 1) if batch_size % k == 0]))
    config = config_of(batch_size, accumulate, draw(st.sampled_from([32, 33, 64])))
    return config, draw(st.integers(world_size, 40)), Ranks(0, world_size)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_pieces_are_even_and_refused_where_batch_norm_would_not_train(case: tuple[Config, int, Ranks]) -> None:
    config, records, ranks = case
    batches = batches_of(config, records, ranks)
    share = batches.loader.batch
    try:
        seen = train_a_step(config, share)
    except ValueError:  # torch's: it expects more than one value
        with pytest.raises(UserError, match="a single value at data.crop 32"):
            require_two_values(config, batches)
        return
    require_two_values(config, batches)
    assert sum(seen) == share
    assert max(seen) - min(seen) <= 1
    assert len(seen) == min(config.train.accumulate, share)


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "records", "world_size", "causes", "mends"),
    [
        (1, 1, 9, 1, "train.batch_size 1: ", "raise train.batch_size or raise data.crop above 32"),
        (8, 8, 48, 1, "train.batch_size 8, train.accumulate 8: ", "lower train.accumulate or raise train.batch_size"),
        (8, 4, 48, 2, "train.batch_size 8, 2 processes, train.accumulate 4: ", "or start fewer processes or raise"),
        (64, 4, 7, 1, "a training split of 7, train.accumulate 4: ", "lower train.accumulate or raise data.crop"),
        (64, 1, 3, 2, "a training split of 3, 2 processes: ", "start fewer processes or raise data.crop above 32"),
    ],
)
def test_a_refusal_names_what_makes_pieces_of_one_picture(
    batch_size: int, accumulate: int, records: int, world_size: int, causes: str, mends: str
) -> None:
    config, ranks = config_of(batch_size, accumulate, 32), Ranks(0, world_size)
    with pytest.raises(UserError) as caught:
        require_two_values(config, batches_of(config, records, ranks))
    assert str(caught.value).startswith(causes)
    assert mends in str(caught.value)
    require_two_values(config_of(batch_size, accumulate, 64), batches_of(config, records, ranks))
    require_two_values(config_of(batch_size, accumulate, 32, name="vgg16"), batches_of(config, records, ranks))
    if world_size > 1:  # of whose pictures common statistics are taken
        require_two_values(config_of(batch_size, accumulate, 32, sync=True), batches_of(config, records, ranks))


def test_a_real_network_trains_in_pieces_of_two_and_pieces_of_one_stop_before_training(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "data", {"train": 8, "val": 4})
    options = ("--train.epochs", "1", "--train.no_compile", "--train.accumulate")
    result = fastflower(*train_arguments(root, tmp_path / "ones"), *options, "8")
    assert result.code == 2
    assert "train.batch_size 8, train.accumulate 8: the network would see one picture at a time" in result.err
    assert not (tmp_path / "ones").exists()
    result = fastflower(*train_arguments(root, tmp_path / "twos"), *options, "4")
    assert result.code == 0, result.err
