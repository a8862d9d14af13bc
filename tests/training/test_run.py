"""Whole runs through the command line, in this process: what they write, how they stop, go on and fail."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastflower.data.sources.kaggle import load_split
from fastflower.models import create_model
from fastflower.runtime.checkpoint import load_checkpoint, save_checkpoint
from fastflower.settings import build, to_plain
from fastflower.training import saving, step
from fastflower.training.ema import Ema
from fastflower.training.validate import evaluate
from tests.conftest import fastflower, train_arguments, write_dataset

ROW = (
    *("epoch", "step", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_top5", "val_macro_f1"),
    *("images_per_s", "epoch_s", "data_wait"),
)
pytestmark = pytest.mark.usefixtures("tiny_net")

TIMES = ("images_per_s", "epoch_s", "data_wait")


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_times(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows(run)]


def assert_same_run(a: Path, b: Path) -> None:
    """Weights, optimizer and figures, bit for bit."""
    left: Any = load_checkpoint(a / "checkpoints/last.pt")
    right: Any = load_checkpoint(b / "checkpoints/last.pt")
    for name, tensor in left["model"].items():
        assert torch.equal(tensor, right["model"][name]), name
    assert left["optimizer"]["state"].keys() == right["optimizer"]["state"].keys()
    for key, state in left["optimizer"]["state"].items():
        for name, tensor in state.items():
            assert torch.equal(tensor, right["optimizer"]["state"][key][name]), (key, name)
    for key in ("epoch", "position", "step", "best", "schedule", "classes", "normalization"):
        assert left[key] == right[key], key
    assert without_times(a) == without_times(b)


def test_a_run_leaves_what_later_commands_need(finished: Path, shared_finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "environment.jsonl", "checkpoints"} <= names
    assert {p.name for p in (finished / "checkpoints").iterdir()} == {"last.pt", "best.pt", "best.safetensors"}

    written = rows(finished)
    assert [tuple(row) for row in written] == [ROW] * 2
    assert [row["epoch"] for row in written] == [1, 2]
    assert [row["step"] for row in written] == [6, 12]
    assert all(0 <= row["data_wait"] <= 1 and row["images_per_s"] > 0 for row in written)

    settings = yaml.safe_load((finished / "config.yaml").read_text())
    rebuilt = build(settings, "config.yaml")
    assert rebuilt.data.root == (shared_finished.parent / "data",)
    assert to_plain(rebuilt) == settings

    saved = torch.load(finished / "checkpoints/last.pt", weights_only=True)
    assert saved["epoch"] == 2
    assert saved["position"] == 0
    assert saved["classes"] == ["0", "1", "2"]
    assert saved["best"] == min(row["val_loss"] for row in written)


def test_best_weights_load_into_torchvision(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastflower.training.network.create_model", create_model)  # the real one
    run = tmp_path / "run"
    assert fastflower(*train_arguments(small, run), "--train.epochs", "1", "--train.batch_size", "24").code == 0
    path = run / "checkpoints/best.safetensors"
    network = torchvision.models.resnet18(num_classes=3)
    network.load_state_dict(load_file(path))
    best = load_checkpoint(run / "checkpoints/best.pt")["model"]
    assert all(torch.equal(tensor, best[name]) for name, tensor in network.state_dict().items())
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["classes"]) == ["0", "1", "2"]
        assert json.loads(file.metadata()["architecture"])["name"] == "resnet18"


def test_best_is_the_epoch_of_the_lowest_validation_loss(small: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # a rate this high makes the later epochs worse
    assert fastflower(*train_arguments(small, run), "--train.epochs", "4", "--train.lr", "0.3").code == 0
    losses = [row["val_loss"] for row in rows(run)]
    assert load_checkpoint(run / "checkpoints/best.pt")["epoch"] == losses.index(min(losses)) + 1


def test_tensorboard_has_the_seeds_tags_with_the_epochs_figures(finished: Path) -> None:
    events = EventAccumulator(str(finished))
    events.Reload()
    for tag, key in {
        "loss/train": "train_loss",
        "loss/val": "val_loss",
        "accuracy/train": "train_accuracy",
        "accuracy/val": "val_accuracy",
    }.items():
        scalars = events.Scalars(tag)
        assert [scalar.step for scalar in scalars] == [1, 2]
        assert [scalar.value for scalar in scalars] == pytest.approx([row[key] for row in rows(finished)])


def test_the_network_learns(tmp_path: Path) -> None:
    """Brightness tells the fixture's classes apart, so a few epochs must do much better than chance."""
    root = write_dataset(tmp_path / "data", {"train": 96, "val": 30})
    run = tmp_path / "run"
    assert fastflower(*train_arguments(root, run), "--train.epochs", "5").code == 0
    assert max(row["val_accuracy"] for row in rows(run)) > 0.6


def test_eval_gives_the_logged_figures(finished: Path) -> None:
    best = min(rows(finished), key=lambda row: row["val_loss"])
    result = fastflower("eval", finished, "--json")
    metrics = json.loads(result.out)
    assert list(metrics) == ["split", "n", "loss", "accuracy", "top5", "macro_f1"]
    assert (metrics["split"], metrics["n"]) == ("val", 20)
    for key in ("loss", "accuracy", "top5", "macro_f1"):
        assert metrics[key] == pytest.approx(best[f"val_{key}"], abs=1e-5)
    assert f"top-1 {metrics['accuracy']:.1%}" in fastflower("eval", finished).out


def test_eval_on_other_data_and_what_it_refuses(finished: Path, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "other", {"train": 6, "val": 7, "test": 4})
    metrics = json.loads(fastflower("eval", finished, "--data.root", other, "--json").out)
    assert metrics["n"] == 7
    refused = fastflower("eval", finished, "--data.root", other, "--split", "test")
    assert refused.code == 2
    assert "no feature 'class'" in refused.err
    assert fastflower("eval", tmp_path / "nothing").code == 2
    more = write_dataset(tmp_path / "more", {"train": 8, "val": 8}, classes=4)
    refused = fastflower("eval", finished, "--data.root", more)
    assert "has class 3, outside 0..2" in refused.err


def test_a_run_is_overwritten_only_when_told_to(finished: Path, small: Path) -> None:
    before = rows(finished)
    note = finished / "my-notes.txt"
    note.write_text("keep")
    refused = fastflower(*train_arguments(small, finished))
    assert refused.code == 2
    assert "already holds a run" in refused.err
    assert rows(finished) == before
    assert fastflower(*train_arguments(small, finished), "--train.epochs", "1", "--overwrite").code == 0
    assert len(rows(finished)) == 1
    assert note.read_text() == "keep"


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(finished: Path) -> None:
    last, best = ((finished / f"checkpoints/{name}.pt").read_bytes() for name in ("last", "best"))
    result = fastflower(
        "train", "--resume", finished, "--train.epochs", "4", "--train.lr", "1e30", "--train.log_every", "2"
    )
    assert result.code == 2
    # the step after the first explodes: steps 12 and 13 are the third epoch's first two
    assert "not finite for the first time at step 13 (epoch 3, lr 1e+30)" in result.err
    assert (finished / "checkpoints/last.pt").read_bytes() == last
    assert (finished / "checkpoints/best.pt").read_bytes() == best
    assert len(rows(finished)) == 2


def test_a_statistic_that_is_not_finite_is_never_saved(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last = (finished / "checkpoints/last.pt").read_bytes()

    def poisoned(network: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = evaluate(network, *args, **kwargs)
        network.bn1.running_var.fill_(math.inf)  # type: ignore[union-attr,operator]
        return result

    monkeypatch.setattr(step, "evaluate", poisoned)
    result = fastflower("train", "--resume", finished, "--train.epochs", "3")
    assert result.code == 2
    assert "model.bn1.running_var is not finite at step 18 (epoch 3, lr" in result.err
    assert (finished / "checkpoints/last.pt").read_bytes() == last
    assert len(rows(finished)) == 2


def test_an_average_that_is_not_finite_is_never_saved_as_the_best(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It validates well, since what is divided by an infinite deviation is 0."""
    run, options = tmp_path / "run", ("--train.ema", "0.9", "--train.epochs", "1")
    update = Ema.update

    def poisoned(ema: Ema, steps: int) -> None:
        update(ema, steps)
        ema.network.bn1.running_var.fill_(math.inf)  # type: ignore[union-attr,operator]

    with monkeypatch.context() as patch:
        patch.setattr(Ema, "update", poisoned)
        result = fastflower(*train_arguments(small, run), *options)
    assert result.code == 2
    assert "ema.bn1.running_var is not finite at step 6" in result.err
    assert not list((run / "checkpoints").glob("*"))
    assert fastflower(*train_arguments(small, run), *options).code == 0


def test_a_full_disk_is_a_sentence_and_loses_nothing(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last = (finished / "checkpoints/last.pt").read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:

        def save(path: Path, state: Any) -> None:
            with pytest.MonkeyPatch.context() as inner:
                inner.setattr(os, "fsync", full)
                save_checkpoint(path, state)

        patch.setattr(saving, "save_checkpoint", save)
        result = fastflower("train", "--resume", finished, "--train.epochs", "3")
    assert result.code == 2
    assert "cannot be written (No space left on device)" in result.err
    assert (finished / "checkpoints/last.pt").read_bytes() == last
    assert not list((finished / "checkpoints").glob(".*tmp"))
    assert fastflower("train", "--resume", finished, "--train.epochs", "3").code == 0
    assert [row["epoch"] for row in rows(finished)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("count", "batch", "pictures"),
    [(9, 8, 8), (5, 8, 5), (8, 8, 8)],
)
def test_odd_numbers_of_pictures(tmp_path: Path, count: int, batch: int, pictures: int) -> None:
    root, run = write_dataset(tmp_path / "data", {"train": count, "val": 7}), tmp_path / "run"
    result = fastflower(*train_arguments(root, run), "--train.epochs", "1", "--train.batch_size", batch)
    assert result.code == 0
    assert rows(run)[0]["step"] == 1
    assert ("smaller than a batch of 8: a batch is 5 pictures" in result.out) == (count < batch)
    saved = load_checkpoint(run / "checkpoints/last.pt")
    assert saved["model"]["bn1.num_batches_tracked"] == 1
    assert json.loads(fastflower("eval", run, "--json").out)["n"] == 7


def test_batch_of_one(tmp_path: Path) -> None:
    root, run = write_dataset(tmp_path / "data", {"train": 2, "val": 1}, files=1, classes=2), tmp_path / "run"
    one = ("--train.epochs", "1", "--train.batch_size", "1")
    refused = fastflower(*train_arguments(root, run), *one)
    assert refused.code == 2
    assert "BatchNorm" in refused.err
    assert not run.exists()
    size = ("--data.crop", "40", "--data.scale", "40", "48", "--data.val_resize", "40")
    assert fastflower(*train_arguments(root, run), *one, *size).code == 0


def test_loss_is_the_mean_over_records_not_over_batches(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "data", {"train": 9, "val": 9})
    losses = []
    for batch in (4, 9):
        run = tmp_path / f"run{batch}"
        fastflower(
            *train_arguments(root, run), "--train.epochs", "1", "--train.batch_size", batch, "--train.lr", "1e-12"
        )
        losses.append(json.loads(fastflower("eval", run, "--json").out)["loss"])
    # the weights are the same but for rounding, yet not the running statistics: compare with another batch size
    saved = tmp_path / "run9/checkpoints/best.pt"
    state = load_checkpoint(saved)
    state["config"]["train"]["batch_size"] = 4
    save_checkpoint(tmp_path / "rebatched.pt", {k: v for k, v in state.items() if k != "format"})
    again = json.loads(fastflower("eval", tmp_path / "rebatched.pt", "--json").out)
    assert again["n"] == 9
    assert again["loss"] == pytest.approx(losses[1], abs=1e-5)


def test_amp_without_bf16_instructions_says_so_and_runs_in_fp32(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastflower.runtime.device.cpu_has_bf16", lambda: False)
    result = fastflower(*train_arguments(small, tmp_path / "run"), "--train.epochs", "1", "--amp")
    assert result.code == 0
    assert "this CPU has no bf16 instructions" in result.out
    assert "fp32 on cpu" in result.out


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_forced_amp_keeps_statistics_and_weights_in_float32(small: Path, tmp_path: Path, dtype: str) -> None:
    run = tmp_path / "run"
    options = ("--train.epochs", "1", "--train.batch_size", "24", "--amp", "--amp_dtype", dtype)
    result = fastflower(*train_arguments(small, run), *options)
    assert result.code == 0
    assert f"{dtype} on cpu" in result.out
    saved = load_checkpoint(run / "checkpoints/last.pt")
    kinds = {tensor.dtype for tensor in saved["model"].values()}
    assert kinds == {torch.float32, torch.int64}
    assert ("scale" in saved["scaler"]) == (dtype == "fp16")
    assert fastflower("train", "--resume", run, "--train.epochs", "2").code == 0


def test_pictures_and_records_are_counted_apart(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for size in (40, 48):
        write_dataset(root, {"train": 8, "val": 4}, size=size)
    result = fastflower(*train_arguments(root, tmp_path / "run"), "--train.epochs", "1", "--data.sizes", "all")
    assert "train: 8 pictures, 16 records (40x40, 48x48)" in result.out
    assert "val: 4 pictures, 8 records (40x40, 48x48)" in result.out


def test_a_root_without_size_folders_trains_and_names_no_size(small: Path, tmp_path: Path) -> None:
    flat = small / "tfrecords-jpeg-40x40"
    flat = flat.rename(tmp_path / "my-flowers")
    result = fastflower(*train_arguments(flat, tmp_path / "run"), "--train.epochs", "1")
    assert result.code == 0
    assert "train: 48 pictures, 48 records\n" in result.out


def test_no_data_means_the_built_in_synthetic_flowers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastflower.data import dataset

    drawn = []

    def draw(root: Path, progress: object) -> None:
        drawn.append(root)
        write_dataset(root, {"train": 24, "val": 8})

    monkeypatch.setattr(dataset, "write_demo", draw)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        result = fastflower("train", "--train.epochs", "1", "--train.batch_size", "8", "--train.warmup_epochs", "0")
        assert result.code == 0
        assert "built-in synthetic flowers" in result.out
    assert len(drawn) == 1
    monkeypatch.setattr(dataset, "code_digest", lambda *_: "another")  # as after a change of the drawing's code
    assert dataset.ensure_builtin() not in drawn[:1]
    assert len(drawn) == 2
    assert len(load_split(drawn[0], "train")) == 24
    assert all(path.name.startswith("demo-") for path in (tmp_path / "runs").iterdir())


def test_real_photographs_at_all_sizes_from_the_command_line(flowers5: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    geometry = ("--data.crop", "56", "--data.scale", "64", "96", "--data.val_resize", "64")
    training = ("--train.batch_size", "64", "--train.epochs", "2", "--train.lr", "0.05")
    result = fastflower("train", "--data.root", flowers5, "--data.sizes", "all", "--run", run, *geometry, *training)
    assert result.code == 0
    assert "train: 220 pictures, 880 records (192x192, 224x224, 331x331, 512x512)" in result.out
    assert "val: 50 pictures, 200 records" in result.out
    assert [row["step"] for row in rows(run)] == [13, 26]  # 880 // 64 steps, the last 48 records left out
    assert rows(run)[1]["train_loss"] < rows(run)[0]["train_loss"]
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["val_top5"] == 1  # of five classes
    names = load_checkpoint(run / "checkpoints/best.pt")["classes"]
    assert names == ["daisy", "dandelion", "rose", "sunflower", "tulip"]
    smallest = json.loads(fastflower("eval", run, "--json").out)
    assert smallest["n"] == 200
