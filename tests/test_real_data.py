"""From a run to a hand-in on real photographs at the four Kaggle sizes."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

from fastflower.data.sources.kaggle import load_split
from fastflower.evaluation.predictions import read_predictions
from tests.conftest import fastflower, train_arguments

pytestmark = pytest.mark.usefixtures("tiny_net")


@pytest.fixture
def runs(flowers5: Path, tmp_path: Path) -> list[Path]:
    """Two runs on the smallest pictures."""
    made = [tmp_path / f"run{seed}" for seed in range(2)]
    for seed, run in enumerate(made):
        arguments = [*train_arguments(flowers5, run), "--train.epochs", 1, "--seed", seed, "--data.sizes", 192]
        result = fastflower(*arguments)
        assert result.code == 0, result.err
    return made


def test_each_test_id_once_from_its_largest_record(runs: list[Path], flowers5: Path, tmp_path: Path) -> None:
    ids = sorted(set(load_split(flowers5, "test", sizes="all").ids.tolist()))
    assert len(ids) == 50
    sample = tmp_path / "sample.csv"
    sample.write_text("id,label\n" + "".join(f"{name},0\n" for name in ids[::-1]))
    for views in ((), ("--crops", 10), ("--scales", "36,48")):
        probabilities = {}
        for sizes in ((), ("--sizes", 512), ("--sizes", 192)):
            out, handed = tmp_path / "p.parquet", tmp_path / "s.csv"
            options = ("--out", out, "--submission", handed, "--sample", sample, *views, *sizes)
            result = fastflower("predict", runs[0], *options)
            assert result.code == 0, result.err
            with handed.open(newline="") as file:
                assert [row[0] for row in csv.reader(file)] == ["id", *ids[::-1]]  # in the order of the sample
            probabilities[sizes] = read_predictions(out).probabilities
        np.testing.assert_array_equal(probabilities[()], probabilities["--sizes", 512])
        assert np.abs(probabilities[()] - probabilities["--sizes", 192]).max() > 1e-3


def test_figures_are_scikit_learns(runs: list[Path]) -> None:
    printed = json.loads(fastflower("eval", runs[0], "--sizes", 512, "--json").out)
    assert fastflower("predict", runs[0], "--split", "val").code == 0
    predictions = read_predictions(runs[0] / "predictions-val.parquet")
    true, predicted = predictions.labels, predictions.likeliest
    assert printed["n"] == 50
    assert printed["accuracy"] == pytest.approx(accuracy_score(true, predicted))
    assert printed["macro_f1"] == pytest.approx(f1_score(true, predicted, average="macro"))
    with (runs[0] / "eval-val/classes.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    wanted = precision_recall_fscore_support(true, predicted, labels=range(5), zero_division=0)
    assert header == ["name", "precision", "recall", "f1", "support"]
    np.testing.assert_allclose([[float(cell) for cell in row[1:]] for row in rows], np.transpose(wanted))
    assert [row[0] for row in rows] == predictions.classes
    ensembled = fastflower("ensemble", *runs, "--split", "val", "--json")
    assert json.loads(ensembled.out)[0]["macro_f1"] == pytest.approx(printed["macro_f1"])


def test_folds_keep_a_picture_at_all_its_sizes_together(flowers5: Path, tmp_path: Path) -> None:
    run = tmp_path / "cv"
    settings = ["--data.sizes", "all", "--folds", 2, "--train.epochs", 1, "--train.batch_size", 64]
    result = fastflower("cv", *train_arguments(flowers5, run)[1:], *settings, "--test")
    assert result.code == 0, result.err
    parts = [set(read_predictions(run / f"fold-{fold}/predictions-val.parquet").ids.tolist()) for fold in range(2)]
    pooled = {name for split in ("train", "val") for name in load_split(flowers5, split).ids.tolist()}
    assert parts[0] | parts[1] == pooled
    assert not parts[0] & parts[1]
    assert len(read_predictions(run / "predictions-test.parquet").ids) == 50
    assert json.loads((run / "cv.json").read_text())["together"]["n"] == 270
