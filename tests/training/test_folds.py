"""Runs on one fold, from the command line."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
import yaml

from fastflower.config import DataConfig
from fastflower.data.dataset import open_dataset
from fastflower.data.sources.tfrecord import write_tfrecord
from fastflower.data.stats import pixel_statistics
from fastflower.data.view import Engine
from fastflower.runtime.checkpoint import load_checkpoint
from fastflower.training.metrics import TrainingSums
from tests.conftest import example, fastflower, train_arguments, write_folders
from tests.training.test_folders import assert_logged, evaluated
from tests.training.test_resume import signal_at
from tests.training.test_run import assert_same_run

pytestmark = pytest.mark.usefixtures("tiny_net")

ONE_EPOCH = ("--train.epochs", "1")
FOLD = ("--data.folds", "3", "--data.fold", "1")


def test_a_folds_run_is_evaluated_to_the_logged_figures(small: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = fastflower(*train_arguments(small, run), *ONE_EPOCH, *FOLD, "--seed", 3)
    assert result.code == 0, result.err
    dataset = open_dataset(DataConfig(root=(small,), folds=3, fold=1), seed=3)
    assert dataset.val is not None
    assert f"train: {len(dataset.train)} pictures" in result.out
    assert f"val: {len(dataset.val)} pictures" in result.out
    assert "Fold 1 of 0 to 2 validates, the others train.\n" in result.out
    assert_logged(run, evaluated(run))
    metrics = [evaluated(run, "--split", split)["n"] for split in ("train", "val")]
    assert metrics == [len(dataset.train), len(dataset.val)]
    assert sum(metrics) == 68
    saved = load_checkpoint(run / "checkpoints/best.pt")
    measured = pixel_statistics(dataset.train, Engine()).normalization
    assert saved["normalization"] == {"mean": list(measured.mean), "std": list(measured.std)}
    written = yaml.safe_load((run / "config.yaml").read_text())["data"]
    assert (written["folds"], written["fold"]) == (3, 1)


def test_class_folders_with_both_splits_are_pooled(tmp_path: Path) -> None:
    counts = {"train/rose": 12, "train/tulip": 12, "val/rose": 6, "val/tulip": 6}
    root, run = write_folders(tmp_path / "data", counts), tmp_path / "run"
    result = fastflower(*train_arguments(root, run), *ONE_EPOCH, *FOLD)
    assert result.code == 0, result.err
    assert "train: 24 pictures" in result.out
    assert_logged(run, evaluated(run))
    assert evaluated(run, "--data.root", root.rename(tmp_path / "moved"))["n"] == 12


def test_resuming_keeps_the_fold_and_refuses_another(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert fastflower(*train_arguments(small, whole), *FOLD, "--train.epochs", "2").code == 0
    with monkeypatch.context() as patch:
        signal_at(patch, TrainingSums, 7, signal.SIGINT)
        assert fastflower(*train_arguments(small, stopped), *FOLD, "--train.epochs", "2").code == 128 + signal.SIGINT
    for other in (["--data.fold", 0], ["--data.folds", 4], ["--seed", 1], ["--data.folds", "None", "--data.fold", 0]):
        refused = fastflower("train", "--resume", stopped, *other)
        assert refused.code == 2, refused.out
        assert "was trained on other training records" in refused.err
        assert "data.folds, data.fold, data.train_on" in " ".join(refused.err.split())
    assert fastflower("train", "--resume", stopped).code == 0
    assert_same_run(whole, stopped)


def test_a_class_of_one_picture_is_evaluated_by_the_fold_that_never_saw_it(tmp_path: Path) -> None:
    rare = [example(i, i % 2) for i in range(24)] + [example(24, 2)]
    write_tfrecord(tmp_path / "data/train/a.tfrec", rare)
    options = ["--train.class_weights", "balanced", "--data.sampling", "balanced", "--data.folds", 2]
    sizes = set()
    for fold in range(2):
        run = tmp_path / f"run{fold}"
        result = fastflower(*train_arguments(tmp_path / "data", run), *ONE_EPOCH, *options, "--data.fold", fold)
        assert result.code == 0, result.err
        assert len(load_checkpoint(run / "checkpoints/best.pt")["classes"]) == 3
        metrics = evaluated(run)
        assert_logged(run, metrics)
        sizes.add(metrics["n"])
        assert np.isfinite(metrics["loss"])
    assert sizes == {12, 13}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--data.folds 1", "data.folds is 1: it takes a whole number from 2 on"),
        ("--data.folds 3 --data.fold 3", "data.fold is 3, not below data.folds (3): the first fold is 0, lower it"),
        ("--data.folds 3 --data.fold -1", "data.fold is -1: it takes a whole number from 0 on"),
        ("--data.fold 2", "data.fold is 2, but there is no data.folds: give the number of folds too"),
        (
            "--data.folds 3 --data.train_on train+val --train.schedule cosine --train.warmup_epochs 0",
            "drop one of them",
        ),
        ("--data.folds 69", "data.folds is 69, but there are only 68 different pictures: lower it"),
    ],
)
def test_folds_that_cannot_be_are_refused(small: Path, tmp_path: Path, options: str, sentence: str) -> None:
    refused = fastflower(*train_arguments(small, tmp_path / "run"), *options.split())
    assert refused.code == 2
    assert sentence in " ".join(refused.err.split())
    assert "Traceback" not in refused.err
    assert not (tmp_path / "run").exists()
