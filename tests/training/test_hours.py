"""Runs that end by the clock: a stand-in, which only steps and validation move on."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from fastflower.errors import UserError
from fastflower.runtime.checkpoint import load_checkpoint
from fastflower.training import loop
from fastflower.training.step import evaluate_in, training_step
from tests.conftest import PLAIN, fastflower, train_arguments
from tests.processes import in_ranks
from tests.training import tiny_worker
from tests.training.test_run import assert_same_run, rows

CURVE = ("--train.schedule", "onecycle", "--train.warmup_epochs", 0.5)


@dataclass
class StandIn:
    """A clock, and what it shows at each step."""

    step_s: float = 10.0
    validation_s: float = 25.0
    start_s: float = 1e5
    now_s: float = 1e5
    rates: list[float] = field(default_factory=list)

    def monotonic(self) -> float:
        return self.now_s

    @property
    def passed_s(self) -> float:
        return self.now_s - self.start_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    clock = StandIn()

    def step(setup: Any, state: Any, *others: Any) -> None:
        clock.rates.append(state.schedule.lr)
        training_step(setup, state, *others)
        clock.now_s += clock.step_s

    def evaluated(*arguments: Any) -> Any:
        clock.now_s += clock.validation_s
        return evaluate_in(*arguments)

    monkeypatch.setattr("fastflower.runtime.clock.time", clock)
    monkeypatch.setattr(loop, "training_step", step)
    monkeypatch.setattr(loop, "evaluate_in", evaluated)
    return clock


def hours(seconds: float) -> tuple[object, ...]:
    return "--train.hours", seconds / 3600


@pytest.mark.parametrize("budget_s", [25, 35, 60, 85, 90, 171, 175, 200, 256, 400])
def test_a_run_ends_in_time_validated_saved_and_with_its_schedule_completed(
    budget_s: float, small: Path, tmp_path: Path, tiny_net: None, clock: StandIn
) -> None:
    """An epoch is six steps of 10 s and a validation of 25 s, which cannot be foreseen before the sixth step."""
    run = tmp_path / "run"
    result = fastflower(*train_arguments(small, run), *CURVE, *hours(budget_s))
    assert result.code == 0, result.err
    assert min(budget_s, 140) <= clock.passed_s + 35
    assert clock.passed_s <= max(budget_s + 10, 6 * 10 + 25)
    saved = load_checkpoint(run / "checkpoints/last.pt")
    assert saved["position"] == 0
    assert saved["epoch"] == len(rows(run)) == -(-saved["step"] // 6)
    assert all(row["val_loss"] is not None for row in rows(run))
    assert (run / "checkpoints/best.pt").is_file()
    assert f"The time of train.hours, {budget_s / 3600:g}, is over" in result.out
    assert clock.rates[-1] < (0.2 if budget_s > 100 else 0.6) * max(clock.rates)
    assert "epoch 1/" not in result.out
    again = fastflower("train", "--resume", run)
    assert again.code == 0
    assert "give a larger --train.hours to go on" in again.out
    assert load_checkpoint(run / "checkpoints/last.pt")["step"] == saved["step"]


def test_epochs_that_come_first_end_the_run(small: Path, tmp_path: Path, tiny_net: None, clock: StandIn) -> None:
    plain, timed = tmp_path / "plain", tmp_path / "timed"
    for run, options in ((plain, ()), (timed, hours(1e5))):
        assert fastflower(*train_arguments(small, run), *CURVE, "--train.epochs", 2, *options).code == 0
    assert [row["step"] for row in rows(timed)] == [6, 12]
    assert clock.rates[:12] == pytest.approx(clock.rates[12:], rel=1e-6)


@pytest.mark.parametrize("stop", [6, 7, 9, 12, 13])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(
    stop: int, small: Path, tmp_path: Path, tiny_net: None, clock: StandIn
) -> None:
    """The time between its sessions does not count."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert fastflower(*train_arguments(small, whole), *CURVE, *hours(240)).code == 0
    undisturbed = list(clock.rates)
    assert len(undisturbed) > 15
    clock.rates.clear()
    options = (*CURVE, *hours(240), "--train.max_steps", stop)
    assert fastflower(*train_arguments(small, stopped), *options).code == 0
    clock.now_s += 1e6
    assert fastflower("train", "--resume", stopped, "--train.max_steps", "None").code == 0
    assert clock.rates == undisturbed
    assert_same_run(whole, stopped)


def test_more_hours_go_on(small: Path, tmp_path: Path, tiny_net: None, clock: StandIn) -> None:
    run = tmp_path / "run"
    assert fastflower(*train_arguments(small, run), *CURVE, *hours(120)).code == 0
    before, passed_s = len(rows(run)), clock.passed_s
    assert fastflower("train", "--resume", run, *hours(400)).code == 0
    assert len(rows(run)) > before
    assert passed_s < 350 < clock.passed_s <= 410
    assert clock.rates[-1] < 0.05 * max(clock.rates)


@pytest.mark.parametrize("schedule", ["plateau", "step"])
def test_other_schedules_just_end(schedule: str, small: Path, tmp_path: Path, tiny_net: None, clock: StandIn) -> None:
    run = tmp_path / "run"
    assert fastflower(*train_arguments(small, run), "--train.schedule", schedule, *hours(200)).code == 0
    assert set(clock.rates) == {0.02}
    assert rows(run)[-1]["val_loss"] is not None
    assert clock.passed_s <= 210


def test_a_signal_in_the_last_validation_leaves_it_to_the_next_session(
    small: Path, tmp_path: Path, tiny_net: None, clock: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def fails(*arguments: Any) -> Any:
        if clock.passed_s > 120:
            raise UserError("a record is bad.")
        clock.now_s += clock.validation_s
        return evaluate_in(*arguments)

    monkeypatch.setattr(loop, "evaluate_in", fails)
    assert fastflower(*train_arguments(small, run), *CURVE, *hours(160)).code == 2
    assert load_checkpoint(run / "checkpoints/last.pt")["position"] > 0
    monkeypatch.setattr(loop, "evaluate_in", evaluate_in)
    assert fastflower("train", "--resume", run).code == 0
    assert load_checkpoint(run / "checkpoints/last.pt")["position"] == 0
    assert rows(run)[-1]["val_loss"] is not None


def test_ranks_whose_clocks_differ_end_together(small: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = (*train_arguments(small, run), *CURVE, *hours(100))
    result = in_ranks(tiny_worker.main, *options, TINY_CLOCK="10:70")  # seconds a step of each rank
    assert result.code == 0, result.err
    ends: list[Any] = [json.loads((run / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert ends[0] == ends[1]
    assert 8 <= ends[0]["step"] <= 10  # by the main rank's clock; by the other's there would be two


def test_an_older_checkpoint_has_spent_nothing(finished: Path) -> None:
    path = finished / "checkpoints/last.pt"
    saved: dict[str, Any] = torch.load(path, weights_only=True)
    assert saved.pop("spent_s") > 0
    assert saved.pop("closing_s") > 0
    torch.save(saved, path)
    assert load_checkpoint(path)["spent_s"] == load_checkpoint(path)["closing_s"] == 0
    assert fastflower("train", "--resume", finished, "--train.epochs", "None", *hours(0.001)).code == 0


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ((), 0),
        (("--train.epochs", 70), 2),
        (("--train.hours", 1), 0),
        (("--train.hours", 1, "--train.epochs", 9), 2),
        (("--train.epochs", 99), 0),
    ],
)
def test_more_frozen_epochs_than_epochs_are_refused(options: tuple[object, ...], code: int, small: Path) -> None:
    result = fastflower(
        "train", "--config", PLAIN, "--data.root", small, "--train.freeze_epochs", 80, *options, "--print_config"
    )
    assert result.code == code, result.err
