"""Learning rates against torch's own schedulers."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau

from fastflower.config import TrainConfig
from fastflower.training.optimizer import LR_SCALE
from fastflower.training.schedule import Moment, Schedule, learning_rate, share_over


def optimizer(lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], LR_SCALE: 1.0}], lr=lr)


def test_plateau_is_torchs_on_the_validation_loss() -> None:
    losses = [3, 2, 2.5, 2.1, 2.2, 2.0001, 1.99995, 1.9, 2, 2, 2, 2, 2, 2, math.inf, 1]
    ours, theirs = optimizer(), optimizer()
    schedule = Schedule(ours, TrainConfig(lr=0.1, patience=2, factor=0.5))
    reference = ReduceLROnPlateau(theirs, factor=0.5, patience=2)
    seen = []
    for loss in losses:
        schedule.before_step(Moment(0.0))  # a curve's business; plateau keeps its rate
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
        ours = learning_rate(train, Moment(10 * step / steps))
        near = [learning_rate(train, Moment(10 * (step + d) / steps)) for d in (0, 1)]
        wanted = reference.get_last_lr()[0]
        assert min(near) - 1e-3 <= wanted <= max(near) + 1e-3, (step, ours, wanted)
        theirs.step()
        reference.step()


def test_cosine_warms_up_linearly_and_ends_at_zero() -> None:
    train = TrainConfig(schedule="cosine", lr=0.2, epochs=10, warmup_epochs=2)
    assert learning_rate(train, Moment(0.0)) == 0
    assert learning_rate(train, Moment(1.0)) == pytest.approx(0.1)
    assert learning_rate(train, Moment(2.0)) == pytest.approx(0.2)
    assert learning_rate(train, Moment(6.0)) == pytest.approx(0.1)
    assert learning_rate(train, Moment(10.0)) == pytest.approx(0.0)
    rates = [learning_rate(train, Moment(epoch / 10)) for epoch in range(20, 101)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("schedule", ["cosine", "onecycle"])
def test_no_warmup_starts_at_the_peak(schedule: str) -> None:
    assert learning_rate(TrainConfig(schedule=schedule, lr=0.3, epochs=5, warmup_epochs=0), Moment(0.0)) == 0.3  # type: ignore[arg-type]


HOURS = st.floats(0.01, 100)


@st.composite
def timed_runs(draw: st.DrawFn) -> tuple[TrainConfig, list[tuple[Moment, float]]]:
    """Settings with train.hours, and the moments of some steps with what was known of the closing (s) at each."""
    epochs = draw(st.none() | st.integers(1, 100))
    warmup = draw(st.floats(0, 5) if epochs is None else st.floats(0, 0.9).map(lambda share: share * epochs))
    schedule: Any = draw(st.sampled_from(["cosine", "onecycle"]))
    train = TrainConfig(lr=0.1, schedule=schedule, epochs=epochs, hours=draw(HOURS), warmup_epochs=warmup)
    steps = draw(
        st.lists(st.tuples(st.floats(1e-3, 3), st.floats(0, 20_000), st.floats(0, 30)), min_size=2, max_size=30)
    )
    moments, done, spent_s, closing_s = [], 0.0, 0.0, 0.0
    for epochs_done, s, closing in steps:
        done, spent_s, closing_s = done + epochs_done, spent_s + s, max(closing_s, closing)
        moments.append((Moment(done, spent_s), closing_s))
    return train, moments


def rates(train: TrainConfig, moments: list[tuple[Moment, float]], resumed_at: int | None = None) -> list[float]:
    """What a schedule sets before each of these steps, with a checkpoint in between where it is resumed."""
    schedule, seen = Schedule(optimizer(), train), []
    for number, (moment, closing_s) in enumerate(moments):
        if number == resumed_at:
            before, schedule = schedule, Schedule(optimizer(), train)
            schedule.load_state_dict(before.state_dict())
        schedule.before_step(moment, closing_s)
        seen.append(schedule.lr)
    return seen


@given(timed_runs(), st.integers(0, 29))
def test_a_timed_curve_goes_up_then_down_and_goes_on_from_its_state(
    run: tuple[TrainConfig, list[tuple[Moment, float]]], stop: int
) -> None:
    train, moments = run
    seen = rates(train, moments)
    top = seen.index(max(seen))
    assert all(later >= earlier for earlier, later in pairwise(seen[: top + 1]))
    assert all(later <= earlier for earlier, later in pairwise(seen[top:]))
    assert rates(train, moments, stop) == seen


@given(timed_runs())
def test_a_timed_curve_is_at_its_end_when_the_epochs_or_the_time_are(
    run: tuple[TrainConfig, list[tuple[Moment, float]]],
) -> None:
    train, moments = run
    last, closing_s = moments[-1]
    assert train.hours
    for end in (Moment(last.epochs, 3600 * train.hours - closing_s), Moment(float(train.epochs or 0), last.spent_s)):
        assume(end.spent_s > last.spent_s or end.epochs > last.epochs)
        if train.epochs is None and end.epochs == 0:
            continue
        if share_over(train, end, closing_s) == 1:
            rate = rates(train, [*moments, (end, closing_s)])[-1]
            assert rate <= 0.1 / 250_000 + 1e-12
    assert share_over(train, Moment(0.0, 3600 * train.hours - closing_s), closing_s) == 1


@given(st.integers(1, 200), st.floats(0, 0.95), st.floats(0.01, 1), st.sampled_from(["cosine", "onecycle"]))
def test_time_that_is_not_short_changes_nothing(epochs: int, warmup: float, done: float, schedule: str) -> None:
    """Where the epochs end first."""
    settings = {"lr": 0.1, "schedule": schedule, "epochs": epochs, "warmup_epochs": warmup * epochs}
    plain, timed = TrainConfig(**settings), TrainConfig(**settings, hours=1e6)  # type: ignore[arg-type]
    moments = [(Moment(epochs * done * k / 5 + 1e-6, 10.0 * k), 0.0) for k in range(6)]
    assert rates(plain, moments) == pytest.approx(rates(timed, moments), rel=1e-6)


def test_a_warmup_longer_than_the_time_takes_a_quarter_of_it() -> None:
    train = TrainConfig(lr=0.4, schedule="cosine", hours=1, warmup_epochs=2)
    moments = [(Moment(0.001 * minute, 60.0 * minute), 0.0) for minute in range(61)]  # no epoch ends in the hour
    seen = rates(train, moments)
    assert seen[:16] == pytest.approx([0.4 * minute / 15 for minute in range(16)])
    assert seen[15:] == pytest.approx([0.2 * (1 + math.cos(math.pi * minute / 45)) for minute in range(46)], abs=1e-9)


def test_a_warmup_that_is_short_is_by_epochs() -> None:
    train = TrainConfig(lr=0.4, schedule="cosine", hours=1, warmup_epochs=2)
    moments = [(Moment(0.5 * minute, 60.0 * minute), 0.0) for minute in range(61)]
    seen = rates(train, moments)
    assert seen[:5] == pytest.approx([0.4 * minute / 4 for minute in range(5)])
    assert seen[4:] == pytest.approx([0.2 * (1 + math.cos(math.pi * minute / 56)) for minute in range(57)], abs=1e-9)


def test_hours_that_are_named_later_go_on_after_the_warmup() -> None:
    """As if they had been named from the start, if epochs took equally long."""
    train = TrainConfig(lr=0.4, schedule="cosine", hours=1, warmup_epochs=2)
    moments = [(Moment(0.5 * minute, 60.0 * minute), 0.0) for minute in range(61)]
    assert rates(train, moments[20:]) == pytest.approx(rates(train, moments)[20:])


def test_more_hours_stretch_what_is_left_of_the_curve() -> None:
    before = TrainConfig(lr=0.4, schedule="cosine", hours=1, warmup_epochs=2)
    after = TrainConfig(lr=0.4, schedule="cosine", hours=2, warmup_epochs=2)
    moments = [(Moment(0.5 * minute, 60.0 * minute), 0.0) for minute in range(121)]
    schedule = Schedule(optimizer(), before)
    for moment, closing_s in moments[:30]:
        schedule.before_step(moment, closing_s)
    resumed = Schedule(optimizer(), after)
    resumed.load_state_dict(schedule.state_dict())
    for moment, closing_s in moments[30:]:
        resumed.before_step(moment, closing_s)
        assert resumed.lr == pytest.approx(rates(after, moments)[round(moment.spent_s / 60)], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("before", ["plateau", "onecycle"])
@pytest.mark.parametrize("after", ["plateau", "cosine", "step"])
def test_what_another_schedule_remembers_is_passed_over(before: str, after: str) -> None:
    first = Schedule(optimizer(), TrainConfig(lr=0.1, schedule=before, hours=1))  # type: ignore[arg-type]
    first.before_step(Moment(5.0, 1800.0))
    first.after_epoch(1.0)
    second = Schedule(optimizer(), TrainConfig(lr=0.1, schedule=after, hours=1))  # type: ignore[arg-type]
    second.load_state_dict(first.state_dict())
    second.before_step(Moment(6.0, 1900.0))
    second.after_epoch(2.0)
    assert 0 < second.lr <= 0.1
