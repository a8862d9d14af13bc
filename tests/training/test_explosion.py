"""When a validation loss is said to have exploded."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fastflower.config import TrainConfig
from fastflower.training.explosion import explosion, has_exploded
from fastflower.training.optimizer import LR_SCALE
from fastflower.training.schedule import Moment, Schedule
from tests.conftest import fastflower, train_arguments
from tests.training.test_run import rows


def said(train: TrainConfig, *, epochs_done: int, steps: int, loss: float, classes: int = 12) -> str | None:
    """What is said at the end of an epoch after which so many epochs and steps are done."""
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], LR_SCALE: 1.0}], lr=train.peak_lr)
    schedule = Schedule(optimizer, train)
    for epoch in range(epochs_done):
        schedule.before_step(Moment(epoch + 0.5, 100.0 * epoch))
    setup: Any = SimpleNamespace(
        config=SimpleNamespace(train=train), provenance=SimpleNamespace(classes=[""] * classes)
    )
    state: Any = SimpleNamespace(
        epoch=epochs_done - 1, step=steps, schedule=schedule, clock=SimpleNamespace(agreed_s=100.0 * epochs_done)
    )
    return explosion(setup, state, loss)


@given(st.integers(2, 104), st.integers(0, 2**31))
def test_networks_that_guess_or_learn_have_not_exploded_and_those_that_are_sure_and_wrong_have(
    classes: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (200,), generator=generator)
    guess = F.cross_entropy(torch.zeros(200, classes), labels).item()
    noise = torch.randn(200, classes, generator=generator)
    assert not has_exploded(guess, classes)
    assert not has_exploded(F.cross_entropy(noise, labels).item(), classes)
    assert not has_exploded(9.9 * guess, classes)
    assert has_exploded(F.cross_entropy(1000 * noise, labels).item(), classes)


@pytest.mark.parametrize("schedule", ["plateau", "step", "cosine", "onecycle"])
@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.3}, {"class_weights": "balanced"}, {"mixup": 1.0}, {"hours": 1.0}],
    ids=lambda options: next(iter(options), "plain"),
)
def test_it_is_said_after_the_warmup_whatever_the_training_loss_is_made_of(schedule: Any, options: Any) -> None:
    train = TrainConfig(lr=0.4, schedule=schedule, epochs=10, warmup_epochs=2, **options)
    limit = 10 * math.log(12)
    assert said(train, epochs_done=5, steps=50, loss=limit - 0.01) is None
    sentence = said(train, epochs_done=5, steps=50, loss=1029.4)
    assert sentence
    for words in ("1,029.4 after epoch 5", "12 classes would cost 2.48", "0.04 instead of 0.4", "fastflower lr"):
        assert words in sentence
    early = said(train, epochs_done=2, steps=50, loss=1e9)
    assert (early is None) == (schedule in ("cosine", "onecycle"))


def test_it_is_too_early_while_statistics_settle_or_the_backbone_rests() -> None:
    train = TrainConfig(lr=0.4, epochs=10, freeze_epochs=3)
    assert said(train, epochs_done=4, steps=29, loss=1e9) is None
    assert said(train, epochs_done=3, steps=300, loss=1e9) is None
    assert said(train, epochs_done=4, steps=30, loss=1e9)
    assert said(TrainConfig(lr=0.4, epochs=9), epochs_done=1, steps=30, loss=30.0, classes=1)


def test_a_run_says_it_once_and_goes_on(small: Path, tmp_path: Path, tiny_net: None) -> None:
    run = tmp_path / "run"
    options = ("--train.epochs", 8, "--train.lr", 30, "--train.schedule", "step", "--train.momentum", 0.99)
    result = fastflower(*train_arguments(small, run), *options)
    losses = [row["val_loss"] for row in rows(run)]
    assert result.code == 0, result.err
    assert sum(loss > 10 * math.log(3) for loss in losses[4:]) > 1, losses
    assert result.out.count("The validation loss has exploded") == 1
    assert "such as 3 instead of 30" in result.out
