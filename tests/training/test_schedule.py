"""Learning rates against torch's own schedulers."""

from __future__ import annotations

import math

import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau

from fastflower.config import TrainConfig
from fastflower.training.schedule import Schedule, learning_rate


def optimizer(lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def test_plateau_is_torchs_on_the_validation_loss() -> None:
    losses = [3, 2, 2.5, 2.1, 2.2, 2.0001, 1.99995, 1.9, 2, 2, 2, 2, 2, 2, math.inf, 1]
    ours, theirs = optimizer(), optimizer()
    schedule = Schedule(ours, TrainConfig(lr=0.1, patience=2, factor=0.5))
    reference = ReduceLROnPlateau(theirs, factor=0.5, patience=2)
    seen = []
    for loss in losses:
        schedule.before_step(0.0)  # a curve's business; plateau keeps its rate
        schedule.after_epoch(loss)
        reference.step(loss)
        seen.append(schedule.lr)
        assert schedule.lr == theirs.param_groups[0]["lr"]
    assert len(set(seen)) > 2, "the losses must lower the rate at least twice"


@pytest.mark.parametrize("stop", range(9))
def test_plateau_goes_on_from_its_state_with_changed_patience(stop: int) -> None:
    losses = [3.0, 2, 2.5, 2.1, 2.2, 2.3, 2.4, 2.2, 2.1, 2.5]
    whole = Schedule(optimizer(), TrainConfig(patience=3))
    first_optimizer = optimizer()
    first = Schedule(first_optimizer, TrainConfig(patience=9))
    for loss in losses[:stop]:
        first.after_epoch(loss)
        whole.after_epoch(loss)
    second_optimizer = optimizer()
    second = Schedule(second_optimizer, TrainConfig(patience=3))
    second.load_state_dict(first.state_dict())
    second_optimizer.load_state_dict(first_optimizer.state_dict())
    # as long as the longer patience made no difference, the resumed schedule is that of the shorter from the start
    if whole.lr == first.lr:
        for loss in losses[stop:]:
            second.after_epoch(loss)
            whole.after_epoch(loss)
            assert second.lr == whole.lr


def test_onecycle_is_torchs_curve() -> None:
    steps, share = 400, 0.25
    train = TrainConfig(schedule="onecycle", lr=0.4, epochs=10, warmup_epochs=share * 10)
    theirs = optimizer()
    reference = OneCycleLR(theirs, 0.4, total_steps=steps + 1, pct_start=share, cycle_momentum=False)
    for step in range(steps):
        # torch's turning point lies one step earlier, so that the curves are at most a step apart
        ours = learning_rate(train, 10 * step / steps)
        near = [learning_rate(train, 10 * (step + d) / steps) for d in (0, 1)]
        wanted = reference.get_last_lr()[0]
        assert min(near) - 1e-3 <= wanted <= max(near) + 1e-3, (step, ours, wanted)
        theirs.step()
        reference.step()


def test_cosine_warms_up_linearly_and_ends_at_zero() -> None:
    train = TrainConfig(schedule="cosine", lr=0.2, epochs=10, warmup_epochs=2)
    assert learning_rate(train, 0.0) == 0
    assert learning_rate(train, 1.0) == pytest.approx(0.1)
    assert learning_rate(train, 2.0) == pytest.approx(0.2)
    assert learning_rate(train, 6.0) == pytest.approx(0.1)
    assert learning_rate(train, 10.0) == pytest.approx(0.0)
    rates = [learning_rate(train, epoch / 10) for epoch in range(20, 101)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("schedule", ["cosine", "onecycle"])
def test_no_warmup_starts_at_the_peak(schedule: str) -> None:
    assert learning_rate(TrainConfig(schedule=schedule, lr=0.3, epochs=5, warmup_epochs=0), 0.0) == 0.3  # type: ignore[arg-type]
