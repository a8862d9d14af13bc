"""What eval prints and leaves: figures, confusion, calibration, and the most confident mistakes with their names."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.metrics import confusion_matrix, f1_score

from fastflower.evaluation.predictions import read_predictions
from tests.conftest import fastflower, train_arguments, write_dataset


def read_csv(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_eval_writes_where_the_network_errs(finished: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("rose\ntulip, red\ndaisy\n")
    result = fastflower("eval", finished, "--names", names)
    assert result.code == 0, result.err
    assert f"Confusion matrix, classes and mistakes: {finished / 'eval-val'}" in result.out
    assert "tulip, red" in result.out
    assert fastflower("predict", finished, "--split", "val").code == 0
    predictions = read_predictions(finished / "predictions-val.parquet")
    folder = finished / "eval-val"
    header, *rows = read_csv(folder / "confusion.csv")
    assert header[1:] == ["rose", "tulip, red", "daisy"]
    wanted = confusion_matrix(predictions.labels, predictions.likeliest, labels=range(3))
    assert [[int(cell) for cell in row[1:]] for row in rows] == wanted.tolist()
    classes = read_csv(folder / "classes.csv")[1:]
    f1 = f1_score(predictions.labels, predictions.likeliest, labels=range(3), average=None, zero_division=0)
    np.testing.assert_allclose([float(row[3]) for row in classes], f1)
    metrics = json.loads((folder / "figures.json").read_text())
    printed = json.loads(fastflower("eval", finished, "--json").out)
    assert metrics == printed | {"ece": metrics["ece"]}
    assert f"ece {metrics['ece']:.4g}" in result.out
    assert list(metrics) == ["split", "n", "loss", "accuracy", "top5", "macro_f1", "ece"]
    # an evaluation says what it is of as predictions do (validation pictures have one stored size here)
    assert json.loads((folder / "source.json").read_text()) == predictions.source
    with Image.open(folder / "confusion.png") as picture:
        assert min(picture.size) > 300
    assert (folder / "mistakes.jpg").is_file() == (metrics["accuracy"] < 1)


def test_names_come_from_the_data_where_it_has_them(tmp_path: Path, tiny_net: None) -> None:
    root = write_dataset(tmp_path / "data", {"train": 32, "val": 12})
    (root / "class_names.json").write_text('["wild rose", "tulip", "daisy"]')
    run = tmp_path / "run"
    assert fastflower(*train_arguments(root, run), "--train.epochs", 1).code == 0
    result = fastflower("eval", run, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    assert read_csv(tmp_path / "out/classes.csv")[1][0] == "wild rose"
    assert not (run / "eval-val").exists()
    pictures = fastflower("predict", run, "--names", "kaggle104", "--images", *sorted(tmp_path.glob("out/*.jpg")))
    assert "pink primrose" in pictures.out or not list(tmp_path.glob("out/*.jpg"))


def test_bad_names_stop_before_the_evaluation(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "two.txt").write_text("rose\ntulip\n")
    refused = fastflower("eval", finished, "--names", tmp_path / "two.txt")
    assert refused.code == 2
    assert "has 2 class names for 3 classes" in refused.err
    assert not (finished / "eval-val").exists()


def test_a_folder_that_cannot_be_written_costs_no_figures(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = fastflower("eval", finished, "--json", "--out", tmp_path / "file" / "out")
    assert result.code == 2
    assert json.loads(result.out)["n"] == 20
    assert str(tmp_path / "file") in result.err


def test_a_checkpoint_elsewhere_leaves_its_results_beside_it(finished: Path, tmp_path: Path) -> None:
    lone = tmp_path / "lone" / "mine.pt"
    lone.parent.mkdir()
    lone.write_bytes((finished / "checkpoints/best.pt").read_bytes())
    assert fastflower("eval", lone).code == 0
    assert (tmp_path / "lone/eval-val-mine/figures.json").is_file()
    assert fastflower("eval", finished / "checkpoints/best.pt").code == 0
    assert (finished / "eval-val/figures.json").is_file()
