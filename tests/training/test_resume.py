"""Runs that stop and go on: signals at any step, older checkpoints, changed settings."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastflower.report.history import read_history
from fastflower.runtime.checkpoint import load_checkpoint
from fastflower.runtime.run_folder import RunFolder, find_checkpoint
from fastflower.tables import NOTHING
from fastflower.training import step
from fastflower.training.metrics import Evaluation, EvaluationSums, TrainingSums
from tests.conftest import fastflower, train_arguments, write_dataset
from tests.training.test_run import assert_same_run, rows, without_times

pytestmark = pytest.mark.usefixtures("tiny_net")


def signal_at(monkeypatch: pytest.MonkeyPatch, sums: type, call: int, number: signal.Signals) -> None:
    """Send this process a signal during the given call of `sums.add`."""
    original: Callable[..., None] = sums.add  # type: ignore[attr-defined]
    calls = []

    def add(*args: Any) -> None:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        original(*args)

    monkeypatch.setattr(sums, "add", add)


@pytest.mark.parametrize(
    ("sums", "call", "number"),
    [
        (TrainingSums, 2, signal.SIGINT),  # in the first epoch
        (TrainingSums, 9, signal.SIGTERM),  # in the second
        (TrainingSums, 6, signal.SIGINT),  # its last step
        (EvaluationSums, 1, signal.SIGTERM),  # validation
        (EvaluationSums, 3, signal.SIGINT),  # its last batch
    ],
)
@pytest.mark.parametrize("schedule", ["plateau", "onecycle"])
def test_a_run_that_was_stopped_and_resumed_equals_an_undisturbed_one(
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sums: type,
    call: int,
    number: signal.Signals,
    schedule: str,
) -> None:
    options = ["--train.epochs", "2", "--train.schedule", schedule, "--train.warmup_epochs", "0.5"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert fastflower(*train_arguments(small, whole), *options).code == 0
    with monkeypatch.context() as patch:
        signal_at(patch, sums, call, number)
        result = fastflower(*train_arguments(small, stopped), *options)
    assert result.code == 128 + number
    assert f"fastflower train --resume {stopped}" in result.out
    assert fastflower("train", "--resume", stopped).code == 0
    assert_same_run(whole, stopped)


def test_going_on_from_an_older_checkpoint_takes_later_rows_and_steps_back(small: Path, tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert fastflower(*train_arguments(small, run), "--train.epochs", "1").code == 0
    older = tmp_path / "run/checkpoints/after1.pt"
    older.write_bytes((run / "checkpoints/last.pt").read_bytes())
    for _ in range(2):
        assert fastflower("train", "--resume", older, "--train.epochs", "3").code == 0
    assert [row["epoch"] for row in rows(run)] == [1, 2, 3]
    events = EventAccumulator(str(run))
    events.Reload()
    assert [scalar.step for scalar in events.Scalars("loss/val")] == [1, 2, 3]
    assert fastflower(*train_arguments(small, whole), "--train.epochs", "3").code == 0
    assert without_times(run) == without_times(whole)


def test_what_an_editor_made_of_the_log_and_the_settings_does_not_stop_a_run(finished: Path) -> None:
    with (finished / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 1, "step": 6}\n5\n{}\n')
    settings = (finished / "config.yaml").read_bytes()
    (finished / "config.yaml").write_bytes(b"# caf\xe9\n" + settings)
    result = fastflower("train", "--resume", finished, "--train.epochs", "3", "--train.best", "accuracy")
    assert result.code == 0, result.err
    assert "metrics.jsonl lacks epochs: what is best by another train.best begins anew" in result.out
    assert [row["epoch"] for row in rows(finished)] == [1, 2, 3]
    assert yaml.safe_load((finished / "config.yaml").read_text())["train"]["epochs"] == 3


def test_changed_settings_are_used_and_recorded(finished: Path) -> None:
    result = fastflower(
        "train", "--resume", finished, "--train.epochs", "3", "--train.lr", "0.004", "--train.patience", "1"
    )
    assert result.code == 0
    assert rows(finished)[2]["lr"] == 0.004
    text = (finished / "config.yaml").read_text()
    assert "# resumed at epoch 3, step 12: train.epochs 2 → 3, train.lr 0.02 → 0.004, train.patience 7 → 1" in text
    assert yaml.safe_load(text)["train"]["lr"] == 0.004
    assert len((finished / "environment.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_run_in_mixed_precision_goes_on_as_it_was(small: Path, tmp_path: Path, dtype: str) -> None:
    options = ["--amp", "--amp_dtype", dtype, "--train.epochs", "2"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert fastflower(*train_arguments(small, whole), *options).code == 0
    assert fastflower(*train_arguments(small, stopped), *options, "--train.max_steps", "8").code == 0
    assert fastflower("train", "--resume", stopped, "--train.max_steps", "None").code == 0
    assert_same_run(whole, stopped)
    scalers = [load_checkpoint(run / "checkpoints/last.pt")["scaler"] for run in (whole, stopped)]
    assert scalers[0] == scalers[1]
    assert bool(scalers[0]) == (dtype == "fp16")


@pytest.mark.parametrize("curve", ["cosine", "onecycle"])
def test_plateau_after_a_curve_begins_with_the_rate_of_the_settings(small: Path, tmp_path: Path, curve: str) -> None:
    run = tmp_path / "run"
    options = ["--train.schedule", curve, "--train.warmup_epochs", "0", "--train.epochs", "1"]
    assert fastflower(*train_arguments(small, run), *options).code == 0
    assert rows(run)[0]["lr"] < 0.02
    assert fastflower("train", "--resume", run, "--train.schedule", "plateau", "--train.epochs", "2").code == 0
    assert rows(run)[1]["lr"] == 0.02


def test_where_nothing_is_trained_nothing_is_written(small: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert fastflower(*train_arguments(small, run), "--train.epochs", "2", "--train.max_steps", "8").code == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for options, sentence in (
        (["--train.epochs", "1"], "All 1 epochs are done; give a larger --train.epochs to go on."),
        (["--train.lr", "1"], "stopped after 8 steps and saved; give a larger --train.max-steps"),
    ):
        result = fastflower("train", "--resume", run, *options)
        assert result.code == 0
        assert sentence in result.out
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("stopped", [False, True])  # in validation, so that no step is trained before it is over
def test_a_validation_loss_that_is_not_finite_saves_nothing_and_names_where_to_go_on(
    finished: Path, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    if stopped:
        with monkeypatch.context() as patch:
            signal_at(patch, EvaluationSums, 1, signal.SIGTERM)
            assert fastflower("train", "--resume", finished, "--train.epochs", "3").code == 128 + signal.SIGTERM
    last = (finished / "checkpoints/last.pt").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(step, "evaluate", lambda *_, **__: Evaluation(20, float("nan"), 0.5, 1.0, 0.5))
        result = fastflower("train", "--resume", finished, "--train.epochs", "3")
    assert result.code == 2
    assert "the validation loss of epoch 3 is nan; nothing of it was saved" in result.err
    assert (finished / "checkpoints/last.pt").read_bytes() == last
    assert len(rows(finished)) == 2
    named = "checkpoints/best.pt" if stopped else "the last checkpoint"
    assert f"Resume from {named}, or start again" in result.err
    checkpoint = finished / "checkpoints" / ("best.pt" if stopped else "last.pt")
    assert fastflower("train", "--resume", checkpoint, "--train.epochs", "3").code == 0
    assert len(rows(finished)) == 3


def test_after_a_stop_in_validation_no_rate_is_logged(small: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, EvaluationSums, 1, signal.SIGTERM)
        assert fastflower(*train_arguments(small, run), "--train.epochs", "2").code == 128 + signal.SIGTERM
    result = fastflower("train", "--resume", run)
    assert [row["images_per_s"] is None for row in rows(run)] == [True, False]
    line = next(line for line in result.out.splitlines() if line.startswith("    1 "))
    assert line.split()[-3] == NOTHING  # images a second
    history = read_history(run, "run")
    assert np.isnan(history.images_per_s).tolist() == [True, False]
    events = EventAccumulator(str(run))
    events.Reload()
    assert [scalar.step for scalar in events.Scalars("images_per_s")] == [2]


def test_steps_limited_to_those_of_an_epoch_whose_validation_was_stopped_do_not_leave_it_out(
    small: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = ["--train.epochs", "2", "--train.max_steps", "6"]
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, EvaluationSums, 1, signal.SIGTERM)
        assert fastflower(*train_arguments(small, run), *options).code == 128 + signal.SIGTERM
    assert fastflower("train", "--resume", run).code == 0
    assert [row["step"] for row in rows(run)] == [6]


def test_a_log_that_counts_from_0_is_renumbered(small: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert fastflower(*train_arguments(small, run), "--train.epochs", "2").code == 0
    before = without_times(run)
    text = "".join(json.dumps(row | {"epoch": row["epoch"] - 1}) + "\n" for row in rows(run))
    (run / "metrics.jsonl").write_text(text + '{"epoch": 2, "tra')  # and the last line is cut off
    assert read_history(run, "run").epochs.tolist() == [1, 2]
    assert fastflower("train", "--resume", run, "--train.epochs", "3").code == 0
    assert without_times(run)[:2] == before
    assert [row["epoch"] for row in rows(run)] == [1, 2, 3]
    events = EventAccumulator(str(run))
    events.Reload()
    assert [scalar.step for scalar in events.Scalars("loss/val")] == [1, 2, 3]


def test_resume_finds_or_names_what_is_missing(
    finished: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "All 2 epochs are done" in fastflower("train", "--resume", finished).out
    assert "there is no" in fastflower("train", "--resume", tmp_path / "no").err
    other = fastflower("train", "--resume", finished, "--model.name", "resnet34")
    assert other.code == 2
    assert "another network" in other.err
    data = write_dataset(tmp_path / "data", {"train": 12, "val": 4}, classes=4)
    assert "other classes" in fastflower("train", "--resume", finished, "--data.root", data).err
    data = write_dataset(tmp_path / "data3", {"train": 12, "val": 4})
    assert "other training records" in fastflower("train", "--resume", finished, "--data.root", data).err
    damaged = finished / "checkpoints/damaged.pt"
    whole = (finished / "checkpoints/last.pt").read_bytes()
    # \x80\x02 begins a pickle: what follows pops an empty stack, and takes a value that nobody put
    for content in (whole[:5000], b"\x80\x02a.", b"\x80\x02h\x05.", b"\x80\x02]K\x01t."):
        damaged.write_bytes(content)
        assert "is not a checkpoint or is damaged" in fastflower("train", "--resume", damaged).err
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "auto"
    arguments = [*train_arguments(small, run), "--train.epochs", "1", "--resume", "auto"]
    assert "Resuming" not in fastflower(*arguments).out
    assert "All 1 epochs are done" in fastflower(*arguments).out


def test_auto_without_a_folder_takes_the_newest_of_the_same_configuration(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [*train_arguments(small, None), "--train.epochs", "1", "--resume", "auto"]
    assert fastflower(*arguments).code == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("train-")
    assert fastflower(*arguments).code == 0
    assert fastflower(*arguments, "--train.epochs", "2").code == 0
    assert len(list((tmp_path / "runs").iterdir())) == 1
    assert len(rows(run)) == 2


def test_auto_takes_no_run_whose_name_only_begins_alike(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stamp = "20300101-120000"
    for number, name in enumerate((f"train-{stamp}", f"train-{stamp}-2", f"train-wide-{stamp}", "train-mine")):
        checkpoint = RunFolder(tmp_path / "runs" / name).last
        checkpoint.parent.mkdir(parents=True)
        checkpoint.write_text("")
        os.utime(checkpoint, (number, number))
    assert find_checkpoint("auto", None, "train") == Path(f"runs/train-{stamp}-2/checkpoints/last.pt")
    assert find_checkpoint("auto", None, "train-wide") == Path(f"runs/train-wide-{stamp}/checkpoints/last.pt")
    assert find_checkpoint("auto", None, "t[r]ain") is None


def test_a_checkpoint_in_no_run_folder_is_not_gone_on_from(finished: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied.pt"
    copied.write_bytes((finished / "checkpoints/last.pt").read_bytes())
    refused = fastflower("train", "--resume", copied)
    assert refused.code == 2
    assert f"--resume {copied} is in no run folder" in refused.err
    assert fastflower("eval", copied, "--json").code == 0


@pytest.mark.parametrize("given", ["auto", "run"])
def test_resume_and_overwrite_contradict_each_other(finished: Path, small: Path, tmp_path: Path, given: str) -> None:
    log = (finished / "metrics.jsonl").read_bytes()
    resume = given if given == "auto" else finished
    for run in (finished, tmp_path / "new") if given == "auto" else (finished,):
        refused = fastflower(*train_arguments(small, run), "--resume", resume, "--overwrite")
        assert refused.code == 2
        assert "--overwrite replaces it by a new one: give one of them" in refused.err
    assert (finished / "metrics.jsonl").read_bytes() == log
    assert not (tmp_path / "new").exists()
