"""The learning-rate range test: its rates, when it ends, and what it suggests."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastflower.errors import UserError
from fastflower.training import range_test as running
from fastflower.training.lr_range import LEAST_STEPS, Range, RangeTest, conclusion
from fastflower.training.step import training_step
from tests.conftest import fastflower, train_arguments
from tests.processes import in_ranks
from tests.training import tiny_worker


@given(st.floats(1e-9, 1e-2), st.floats(1, 1e6), st.integers(20, 500))
def test_rates_rise_by_one_factor_from_the_lowest_to_the_highest(low: float, factor: float, steps: int) -> None:
    high = low * (1 + factor)
    rates = [Range(low, high, steps).rate(step) for step in range(steps)]
    assert rates[0] == pytest.approx(low)
    assert rates[-1] == pytest.approx(high)
    assert all(
        later / earlier == pytest.approx((high / low) ** (1 / (steps - 1)))
        for earlier, later in itertools.pairwise(rates)
    )


@pytest.mark.parametrize("wrong", [{"low": 1.0, "high": 0.1}, {"low": 0.0}, {"steps": 3}, {"high": math.inf}])
def test_what_is_no_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="give"):
        Range(**wrong)


@given(st.integers(30, 150), st.floats(1.5, 5), st.floats(0, 0.02))
def test_the_suggestion_is_a_tenth_of_the_rate_at_which_the_loss_turns(turn: int, start: float, noise: float) -> None:
    """A valley whose lowest place is known: smoothing finds it some steps late, since it looks back."""
    rates = [Range().rate(step) for step in range(200)]
    losses = [start * abs(step - turn) / 200 + 0.1 + noise * (-1) ** step for step in range(200)]
    test = RangeTest(rates, losses)
    assert test.lowest is not None
    assert turn <= test.lowest <= turn + 15
    assert test.suggestion == pytest.approx(rates[test.lowest] / 10, rel=0.05)
    assert f"--train.lr {test.suggestion:g}" in conclusion(test)


def test_the_smoothed_loss_is_the_mean_by_weights_that_fall() -> None:
    losses = [3.0, 1.0, 2.0]
    weights = [[1.0], [0.9, 1.0], [0.81, 0.9, 1.0]]
    wanted = [sum(w * loss for w, loss in zip(row, losses, strict=False)) / sum(row) for row in weights]
    assert RangeTest([1, 2, 3], losses).smoothed == pytest.approx(wanted)


@pytest.mark.parametrize("exploded", [False, True])
def test_nothing_is_suggested_where_the_loss_only_rose(exploded: bool) -> None:
    rising = RangeTest([0.1 * k for k in range(1, 60)], [1.0 + k for k in range(59)], exploded)
    assert rising.suggestion is None
    assert "nothing to suggest" in conclusion(rising)
    assert ("lower --low" in conclusion(rising)) == exploded


def test_the_command_tries_the_settings_and_leaves_a_plot_and_numbers_alone(
    small: Path, tmp_path: Path, tiny_net: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also over more steps than an epoch has, with layers at rates of their own and settings that training has."""
    rates: list[tuple[float, float]] = []

    def step(setup: Any, state: Any, network: Any, batch: Any) -> None:
        groups = state.optimizer.param_groups
        rates.append((groups[0]["lr"], groups[-1]["lr"]))
        assert all(parameter.requires_grad for parameter in network.parameters())
        training_step(setup, state, network, batch)

    monkeypatch.setattr(running, "training_step", step)
    out = tmp_path / "found/plot.png"
    out.parent.mkdir()
    before = set(tmp_path.rglob("*"))
    arguments = ["lr", *train_arguments(small, None)[1:], "--train.head_lr", 0.2, "--train.freeze_epochs", 1]
    monkeypatch.chdir(tmp_path)
    result = fastflower(*arguments, "--train.ema", 0.9, "--steps", 40, "--high", 0.5, "--out", out)
    assert result.code == 0, result.err
    assert set(tmp_path.rglob("*")) - before == {out, out.with_suffix(".json")}
    numbers = json.loads(out.with_suffix(".json").read_text())
    assert numbers["lr"] == pytest.approx([1e-5 * 5e4 ** (k / 39) for k in range(40)])
    assert [rate for rate, _ in rates] == pytest.approx(numbers["lr"])
    assert all(head == pytest.approx(10 * rate) for rate, head in rates)
    assert len(numbers["loss"]) == len(numbers["smoothed"]) == 40
    assert Image.open(out).format == "PNG"
    assert f"Plot and numbers: {out}" in result.out


def test_it_ends_where_the_loss_explodes(small: Path, tmp_path: Path, tiny_net: None) -> None:
    out = tmp_path / "plot.png"
    arguments = ["lr", *train_arguments(small, None)[1:], "--low", 1e-3, "--high", 1e12, "--steps", 120, "--out", out]
    result = fastflower(*arguments)
    assert result.code == 0, result.err
    numbers = json.loads(out.with_suffix(".json").read_text())
    assert numbers["exploded"]
    assert LEAST_STEPS <= len(numbers["loss"]) < 120
    assert all(map(math.isfinite, numbers["loss"]))
    assert 1e-3 / 10 < numbers["suggestion"] < 10
    assert f"try --train.lr {numbers['suggestion']:g}" in result.out


def test_a_run_gives_its_settings(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "plot.png"
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    result = fastflower("lr", finished, "--steps", 20, "--out", out)
    assert result.code == 0, result.err
    assert "train: 48 pictures" in result.out
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
    result = fastflower("lr", finished, "--config", "demo", "--out", out)
    assert result.code == 2
    assert "is a run, which has settings: give it without --config" in " ".join(result.err.split())
    assert fastflower("lr", tmp_path / "nowhere", "--out", out).code == 2


def test_a_folder_of_pictures_is_tried_by_the_recipe(small: Path, tmp_path: Path, tiny_net: None) -> None:
    out = tmp_path / "plot.png"
    result = fastflower("lr", small, "--steps", 20, "--train.batch_size", 8, "--out", out)
    assert result.code == 0, result.err
    assert "Recipe: " in result.out
    assert len(json.loads(out.with_suffix(".json").read_text())["lr"]) == 20


def test_two_ranks_find_what_one_finds(small: Path, tmp_path: Path, tiny_net: None) -> None:
    """The losses are of the whole batch, whichever rank has a picture; BatchNorm sees each rank's alone."""
    out = tmp_path / "plot.png"
    arguments = ["lr", *train_arguments(small, None)[1:], "--steps", 20, "--high", 0.1, "--out", out]
    result = in_ranks(tiny_worker.main, *arguments)
    assert result.code == 0, result.err
    assert result.out.count("Plot and numbers") == 1
    assert len(json.loads(out.with_suffix(".json").read_text())["loss"]) == 20
