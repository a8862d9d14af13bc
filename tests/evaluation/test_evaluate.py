"""What eval prints and leaves: figures, confusion, calibration, and the most confident mistakes with their names."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix, f1_score

from fastflower.evaluation.predictions import read_predictions
from tests.conftest import copy_run, fastflower, train_arguments, write_dataset


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
    assert list(printed) == ["split", "n", "loss", "accuracy", "top5", "macro_f1"]
    assert metrics.items() >= printed.items()
    line = result.out.splitlines()[0]
    for key, text in (("accuracy", f"top-1 {metrics['accuracy']:.1%}"), ("ece", f"error {metrics['ece']:.3f}")):
        assert text in line, key
    assert line.endswith(f"(1 crop, {finished / 'checkpoints/best.pt'})")
    # an evaluation says how it was made, as predictions do
    source = predictions.source
    assert (metrics["crops"], metrics["scales"], metrics["checkpoint"]) == (1, [], "best.pt")
    assert (metrics["weights"], metrics["records"]) == (source["weights"], source["records"])
    root = str(source["data"]["root"][0])
    assert metrics["data"] == {"root": [root], "split": "val", "sizes": "auto", "trained_on": False}
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
    pictures = fastflower("predict", run, tmp_path / "out", "--names", "kaggle104")
    assert "pink primrose" in pictures.out


def test_bad_names_stop_before_the_evaluation(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "two.txt").write_text("rose\ntulip\n")
    refused = fastflower("eval", finished, "--names", tmp_path / "two.txt")
    assert refused.code == 2
    assert "has 2 class names for 3 classes" in refused.err
    assert not (finished / "eval-val").exists()


def test_a_folder_that_cannot_be_written_is_found_before_anything_is_scored(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("fastflower.evaluation.evaluate.scored", lambda *_: pytest.fail("a picture is scored"))
    result = fastflower("eval", finished, "--json", "--out", tmp_path / "file" / "out")
    assert result.code == 2
    assert result.out == ""
    assert f"{tmp_path / 'file' / 'out'} cannot be written: name a folder with --out" in result.err


def test_a_folder_of_runs_or_of_cross_validation_is_explained(finished: Path, tmp_path: Path) -> None:
    folds = [copy_run(finished, tmp_path / f"runs/cv/fold-{k}") for k in range(2)]
    cv = tmp_path / "runs/cv"

    def sentence(folder: Path) -> str:
        refused = fastflower("eval", folder)
        assert refused.code == 2
        return " ".join(refused.err.split())

    assert f"{cv} holds the folds of a cross-validation: give one of them, such as {folds[0]}." in sentence(cv)
    for name in ("cv.json", "cv-10-crops.json"):
        (cv / name).write_text("{}")
    figures = f"its figures are in {cv / 'cv-10-crops.json'}, {cv / 'cv.json'}"
    assert f"{cv} holds the folds of a cross-validation; {figures}: give one of them" in sentence(cv)
    runs = cv.parent
    assert f"{runs} has no {runs / 'checkpoints/best.pt'}: give a run folder that has finished" in sentence(runs)
    copy_run(finished, runs / "plain")
    assert f"{runs} holds 1 run: give one of them, such as {runs / 'plain'}." in sentence(runs)
    copy_run(finished, runs / "another")
    assert f"{runs} holds 2 runs: give one of them, such as {runs / 'another'}." in sentence(runs)


def test_results_of_other_views_stay(finished: Path) -> None:
    results = {}
    for options, name in (
        ((), "eval-val"),
        (("--crops", 10), "eval-val-10-crops"),
        (("--scales", "40"), "eval-val-scales-40"),
    ):
        assert fastflower("eval", finished, *options).code == 0
        results[name] = json.loads((finished / name / "figures.json").read_text())
    assert results == {name: json.loads((finished / name / "figures.json").read_text()) for name in results}
    assert [(made["crops"], made["scales"]) for made in results.values()] == [(1, []), (10, []), (1, [40])]
    data = results["eval-val"]["data"]["root"][0]
    again = fastflower(*train_arguments(Path(data), finished), "--overwrite", "--train.epochs", 1)
    assert again.code == 0, again.err
    assert not list(finished.glob("eval-*"))


def test_a_run_that_trained_on_val_says_so(small: Path, tmp_path: Path, tiny_net: None) -> None:
    final = tmp_path / "final"
    options = ["--train.epochs", 1, "--train.schedule", "step", "--data.train_on", "train+val"]
    assert fastflower(*train_arguments(small, final), *options).code == 0
    told = fastflower("eval", final, "--json")
    assert f"{final} trained on val too (data.train_on train+val): these figures" in told.err
    assert json.loads(told.out)["n"] == 20
    assert json.loads((final / "eval-val/figures.json").read_text())["data"]["trained_on"] is True
    other = write_dataset(tmp_path / "other", {"val": 6}, first=900)
    new = fastflower("eval", final, "--data.root", other, "--out", tmp_path / "new")
    assert new.code == 0, new.err
    assert "trained on val" not in new.err
    assert json.loads((tmp_path / "new/figures.json").read_text())["data"]["trained_on"] is False


def test_scores_are_looked_at_part_by_part(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whatever size the parts are: 20 records of 3 classes, 7 records at once, one record at once."""
    figures, files = [], []
    for at_once in (2**24, 21, 1):
        monkeypatch.setattr("fastflower.evaluation.score.AT_ONCE", at_once)
        for options in ((), ("--scales", "40,48")):
            result = fastflower("eval", finished, "--json", *options)
            assert result.code == 0, result.err
            figures.append(json.loads(result.out) | {"views": options})
        assert fastflower("predict", finished, "--split", "val").code == 0
        files.append(read_predictions(finished / "predictions-val.parquet").probabilities)
    for part in figures[2:]:
        whole = figures[0] if part["views"] == () else figures[1]
        assert {**part, "loss": 0} == {**whole, "loss": 0}
        assert abs(part["loss"] - whole["loss"]) < 1e-6
    for probabilities in files[1:]:
        np.testing.assert_allclose(probabilities, files[0], atol=1e-6)


def test_a_checkpoint_elsewhere_leaves_its_results_beside_it(finished: Path, tmp_path: Path) -> None:
    lone = tmp_path / "lone" / "mine.pt"
    lone.parent.mkdir()
    lone.write_bytes((finished / "checkpoints/best.pt").read_bytes())
    assert fastflower("eval", lone).code == 0
    assert (tmp_path / "lone/eval-val-mine/figures.json").is_file()
    assert fastflower("eval", finished / "checkpoints/best.pt").code == 0
    assert (finished / "eval-val/figures.json").is_file()
