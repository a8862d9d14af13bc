"""Choices of how to train, as runs from the command line."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastflower.runtime.checkpoint import load_checkpoint
from fastflower.training.metrics import TrainingSums
from tests.conftest import fastflower, train_arguments, write_dataset
from tests.training.test_resume import signal_at
from tests.training.test_run import assert_same_run, rows

pytestmark = pytest.mark.usefixtures("tiny_net")

EVERYTHING = (
    *("--train.optimizer", "adamw", "--train.lr", "0.003", "--train.head_lr", "0.01", "--train.freeze_epochs", "1"),
    *("--train.schedule", "cosine", "--train.ema", "0.9", "--train.mixup", "0.2", "--train.cutmix", "1"),
    *(
        "--train.label_smoothing",
        "0.1",
        "--train.clip_grad",
        "1",
        "--train.accumulate",
        "2",
        "--train.best",
        "macro_f1",
    ),
    *("--train.class_weights", "balanced", "--train.no_decay_norm_and_bias"),
    *("--data.sampling", "balanced", "--data.lighting", "0.1"),
)


def weights(run: Path, name: str = "last", key: Literal["model", "ema"] = "model") -> dict[str, torch.Tensor]:
    state = load_checkpoint(run / f"checkpoints/{name}.pt")[key]
    assert state
    return state


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in a if not torch.equal(a[name], b[name])}


@pytest.mark.parametrize("call", [3, 15])  # of the pieces: in the first, frozen epoch and in the second
def test_with_everything_on_a_resumed_run_equals_an_undisturbed_one(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    options = [*EVERYTHING, "--train.epochs", "2"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert fastflower(*train_arguments(small, whole), *options).code == 0
    with monkeypatch.context() as patch:
        signal_at(patch, TrainingSums, call, signal.SIGINT)
        assert fastflower(*train_arguments(small, stopped), *options).code == 130
    assert fastflower("train", "--resume", stopped).code == 0
    assert_same_run(whole, stopped)
    assert not differing(weights(whole, key="ema"), weights(stopped, key="ema"))


def test_the_average_validates_is_best_and_is_what_eval_uses(small: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = fastflower(*train_arguments(small, run), "--train.epochs", "2", "--train.ema", "0.8")
    assert "The moving average of the weights validates" in result.out
    averaged = weights(run, "best", "ema")
    assert differing(averaged, weights(run, "best"))
    assert not differing(averaged, load_file(run / "checkpoints/best.safetensors"))
    best = min(rows(run), key=lambda row: row["val_loss"])
    metrics = json.loads(fastflower("eval", run, "--json").out)
    assert metrics["loss"] == pytest.approx(best["val_loss"], abs=1e-6)
    without = tmp_path / "without"
    fastflower(*train_arguments(small, without), "--train.epochs", "2")
    assert not differing(weights(without), weights(run)), "the average must not disturb training"
    assert rows(without)[1]["val_loss"] != rows(run)[1]["val_loss"]


def test_the_backbone_is_frozen_for_some_epochs(small: Path, tmp_path: Path) -> None:
    runs = {}
    for epochs in (1, 2):
        runs[epochs] = tmp_path / str(epochs)
        options = ("--train.epochs", "3", "--train.freeze_epochs", "2", "--train.max_steps", 6 * epochs)
        assert fastflower(*train_arguments(small, runs[epochs]), *options).code == 0
    assert differing(weights(runs[1]), weights(runs[2])) == {"fc.weight", "fc.bias"}
    assert fastflower("train", "--resume", runs[2], "--train.max_steps", "18").code == 0
    assert "conv1.weight" in differing(weights(runs[1]), weights(runs[2]))
    assert weights(runs[2])["bn1.num_batches_tracked"] == 6, "statistics rest while frozen"


@pytest.mark.parametrize("figure", ["loss", "accuracy", "macro_f1"])
def test_best_is_by_the_chosen_figure(tmp_path: Path, figure: str) -> None:
    data, run = write_dataset(tmp_path / "data", {"train": 24, "val": 7}), tmp_path / "run"
    options = ("--train.epochs", "6", "--train.lr", "0.1", "--train.best", figure)
    assert fastflower(*train_arguments(data, run), *options).code == 0
    values = [row[f"val_{figure}"] for row in rows(run)]
    best = values.index(min(values) if figure == "loss" else max(values))
    saved = load_checkpoint(run / "checkpoints/best.pt")
    assert (saved["epoch"], saved["best"]) == (best + 1, values[best])


def test_early_stop_ends_after_epochs_without_improvement_also_when_resumed(small: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ("--train.epochs", "9", "--train.lr", "1e-9", "--train.best", "accuracy", "--train.early_stop", "2")
    result = fastflower(*train_arguments(small, run), *options)  # so low a rate that no picture changes its class
    assert result.code == 0
    assert "No better validation accuracy in 2 epochs" in result.out
    accuracies = [row["val_accuracy"] for row in rows(run)]
    best = accuracies.index(max(accuracies))
    assert len(accuracies) == best + 3 < 9
    result = fastflower("train", "--resume", run, "--train.early_stop", "4")
    assert len(rows(run)) == best + 5


@pytest.mark.parametrize("steps", [4, 6, 9])  # 6 an epoch
def test_max_steps_ends_and_can_be_gone_on_from(small: Path, tmp_path: Path, steps: int) -> None:
    whole, limited = tmp_path / "whole", tmp_path / "limited"
    assert fastflower(*train_arguments(small, whole), "--train.epochs", "2").code == 0
    result = fastflower(*train_arguments(small, limited), "--train.epochs", "2", "--train.max_steps", steps)
    assert result.code == 0
    assert load_checkpoint(limited / "checkpoints/last.pt")["step"] == steps
    assert f"stopped after {steps} steps" in result.out
    resume = f"fastflower train --resume {limited} --train.max-steps none"
    follows = f"Go on with: {resume}" if steps < 6 else f"Next: fastflower eval {limited}"
    assert result.out.splitlines()[-1] == follows
    assert fastflower(*resume.split()[1:]).code == 0
    assert_same_run(whole, limited)


def test_a_final_fit_trains_on_both_splits_to_its_end(small: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ("--data.train_on", "train+val", "--train.schedule", "cosine")
    result = fastflower(*train_arguments(small, run), *options, "--train.epochs", "2")
    assert result.code == 0
    assert "train: 68 pictures" in result.out
    assert "val:" not in result.out
    assert "Done. Trained for 2 epochs" in result.out
    assert result.out.splitlines()[-1] == f"Next: fastflower predict {run} NEWPICTURES --out names.csv"
    for row in rows(run):
        assert row["step"] == 8 * row["epoch"]
        assert row["train_loss"] > 0
        assert [row[f"val_{figure}"] for figure in ("loss", "accuracy", "top5", "macro_f1")] == [None] * 4
    events = EventAccumulator(str(run))
    events.Reload()
    assert not [tag for tag in events.Tags()["scalars"] if tag.endswith("/val")]
    assert not differing(weights(run), weights(run, "best"))
    assert json.loads(fastflower("eval", run, "--json").out)["n"] == 20
    assert fastflower("train", "--resume", run, "--train.epochs", "3").code == 0
    assert load_checkpoint(run / "checkpoints/best.pt")["epoch"] == 3


def test_a_changed_weight_decay_acts_in_a_resumed_run(small: Path, tmp_path: Path) -> None:
    runs = [tmp_path / name for name in "ab"]
    for run, decay in zip(runs, ("0", "0.5"), strict=True):
        assert fastflower(*train_arguments(small, run), "--train.epochs", "1").code == 0
        assert fastflower("train", "--resume", run, "--train.epochs", "2", "--train.weight_decay", decay).code == 0
    assert "conv1.weight" in differing(weights(runs[0]), weights(runs[1]))
    result = fastflower("train", "--resume", runs[0], "--train.epochs", "3", "--train.optimizer", "adamw")
    assert result.code == 2
    assert "was trained by sgd: a resumed run keeps its train.optimizer" in result.err


def test_a_dry_run_says_what_it_takes_and_leaves_nothing(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    result = fastflower(*train_arguments(small, None), "--dry-run")
    assert result.code == 0
    for words in ("First step", "second", "images/s", "A batch of validation", "Peak memory", "no run folder was made"):
        assert words in result.out
    assert sorted(tmp_path.rglob("*")) == before


def test_a_profile_records_steps_and_lists_the_heaviest_operations(small: Path, tmp_path: Path) -> None:
    run, short = tmp_path / "run", tmp_path / "short"
    result = fastflower(*train_arguments(small, run), "--train.epochs", "2", "--train.profile")
    assert result.code == 0
    assert "aten::" in result.out
    names = {event.get("name") for event in json.loads((run / "trace.json").read_text())["traceEvents"]}
    assert any("convolution" in str(name) for name in names)
    result = fastflower(*train_arguments(small, short), "--train.max_steps", "3", "--train.profile")
    assert result.code == 0
    assert "nothing recorded" in result.out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--train.accumulate 3", "train.batch_size is 8, no multiple of train.accumulate (3)"),
        ("--data.train_on train+val --train.schedule plateau", "train.schedule plateau needs a validation loss"),
        ("--data.train_on train+val --train.schedule step --train.early_stop 2", "train.early_stop needs"),
        ("--train.epochs 3 --train.freeze_epochs 3", "train.freeze_epochs is 3, not below train.epochs (3)"),
        ("--train.nesterov --train.momentum 0", "train.nesterov needs a train.momentum above 0"),
        ("--train.optimizer apex_sgd", "runs on a GPU only"),
    ],
)
def test_what_does_not_go_together_is_refused(small: Path, options: str, sentence: str) -> None:
    result = fastflower(*train_arguments(small, None), "--device", "cpu", *options.split())
    assert result.code == 2
    assert sentence in result.err
