"""Ensembles as a command: runs, checkpoints and files, on validation and for a submission."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastflower.data.sources.tfrecord import write_tfrecord
from fastflower.evaluation.predictions import read_predictions, write_predictions
from tests.conftest import example, fastflower, jpeg, train_arguments, write_dataset


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data", {"train": 32, "val": 12, "test": 9})


@pytest.fixture
def runs(data: Path, tmp_path: Path, tiny_net: None) -> list[Path]:
    """Three runs that differ in their seed."""
    folders = [tmp_path / f"run{seed}" for seed in range(3)]
    for seed, run in enumerate(folders):
        result = fastflower(*train_arguments(data, run), "--train.epochs", 1, "--seed", seed)
        assert result.code == 0, result.err
    return folders


def ensemble(*arguments: object) -> list[dict[str, Any]]:
    result = fastflower("ensemble", *arguments, "--json")
    assert result.code == 0, result.err
    rows: list[dict[str, Any]] = json.loads(result.out)
    return rows


@pytest.mark.parametrize("method", ["vote", "mean", "weighted"])
def test_members_and_ensemble_are_measured_in_any_order(runs: list[Path], method: str, tmp_path: Path) -> None:
    seen = []
    for order in itertools.permutations(range(3)):
        members = [runs[k] for k in order]
        out = tmp_path / f"{'-'.join(map(str, order))}.parquet"
        rows = ensemble(*members, "--split", "val", "--method", method, "--out", out)
        assert [row["name"] for row in rows] == [*map(str, members), method]
        seen.append((rows[-1], read_predictions(out).probabilities.tolist()))
    assert all(outcome == seen[0] for outcome in seen)
    for run, row in zip(members, rows, strict=False):
        own = json.loads(fastflower("eval", run, "--json").out)
        assert {key: row[key] for key in ("n", "accuracy", "top5", "macro_f1")} == pytest.approx(
            {key: own[key] for key in ("n", "accuracy", "top5", "macro_f1")}
        )
        assert row["loss"] == pytest.approx(own["loss"], rel=1e-5)


def test_a_submission_comes_from_runs_and_from_files(runs: list[Path], tmp_path: Path) -> None:
    files = []
    for run in runs:
        files.append(tmp_path / f"{run.name}.parquet")
        assert fastflower("predict", run, "--out", files[-1]).code == 0
    ensemble(*runs, "--submission", tmp_path / "a.csv")
    ensemble(*files, "--submission", tmp_path / "b.csv")
    ensemble(runs[0], files[1], runs[2] / "checkpoints/best.pt", "--submission", tmp_path / "c.csv")
    texts = [(tmp_path / f"{name}.csv").read_text() for name in "abc"]
    assert texts[0] == texts[1] == texts[2]
    assert len(texts[0].splitlines()) == 10
    assert texts[0].startswith("id,label\n000044,")


def test_weights_for_test_are_fitted_on_validation(runs: list[Path], tmp_path: Path) -> None:
    val = [tmp_path / f"{k}.parquet" for k in range(3)]
    for run, path in zip(runs, val, strict=True):
        assert fastflower("predict", run, "--split", "val", "--out", path).code == 0
        assert fastflower("predict", run).code == 0
    files = [run / "predictions-test.parquet" for run in runs]
    ensemble(*runs, "--method", "weighted", "--out", tmp_path / "runs.parquet")
    ensemble(*files, "--method", "weighted", "--fit_on", *val, "--out", tmp_path / "files.parquet")
    predictions = [read_predictions(tmp_path / f"{name}.parquet") for name in ("runs", "files")]
    np.testing.assert_array_equal(predictions[0].probabilities, predictions[1].probabilities)
    on_val = ensemble(*val, "--split", "val", "--method", "weighted")
    weights = list(predictions[0].source["weights"].values())
    assert weights == pytest.approx([row["weight"] for row in on_val[:-1]])
    refused = fastflower("ensemble", *files, "--method", "weighted", "--out", tmp_path / "x.parquet")
    assert refused.code == 2
    assert f"{files[0]} has no true classes to fit weights on" in refused.err
    refused = fastflower("ensemble", *files, "--method", "weighted", "--fit_on", val[0], val[1])
    assert "--fit-on names 2 predictions for 3 members" in refused.err


def test_predictions_of_older_weights_are_made_again(runs: list[Path], data: Path) -> None:
    ensemble(*runs, "--split", "val")
    before = read_predictions(runs[0] / "predictions-val.parquet")
    result = fastflower("train", "--resume", runs[0], "--train.epochs", 4, "--train.lr", 0.1)
    assert result.code == 0, result.err
    ensemble(*runs, "--split", "val")
    after = read_predictions(runs[0] / "predictions-val.parquet")
    assert after.source["weights"] != before.source["weights"]
    kept = (runs[1] / "predictions-val.parquet").stat().st_mtime_ns
    ensemble(*runs, "--split", "val")
    assert (runs[1] / "predictions-val.parquet").stat().st_mtime_ns == kept


def padded(image: bytes, length: int) -> bytes:
    """The same picture in so many bytes: what follows the end of a JPEG is not read."""
    return image + bytes(length - len(image))


def times(runs: list[Path], split: str) -> list[int]:
    return [(run / f"predictions-{split}.parquet").stat().st_mtime_ns for run in runs]


def test_predictions_of_pictures_that_were_replaced_are_made_again(
    runs: list[Path], data: Path, tmp_path: Path
) -> None:
    """The same ids and lengths in the same files: only the pictures are others."""
    folder = data / "tfrecords-jpeg-40x40/test"
    pictures = {name: [padded(jpeg(40, 40, seed + i), 4000) for i in range(9)] for name, seed in (("a", 0), ("b", 50))}

    def stored(images: list[bytes]) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        write_tfrecord(folder / "00.tfrec", [example(44 + i, None, image) for i, image in enumerate(images)])

    def predicted() -> np.ndarray:
        ensemble(*runs, "--method", "mean", "--out", tmp_path / "out.parquet")
        return read_predictions(tmp_path / "out.parquet").probabilities

    stored(pictures["a"])
    first, made = predicted(), times(runs, "test")
    stored(pictures["a"])  # the same, written anew
    np.testing.assert_array_equal(predicted(), first)
    assert times(runs, "test") == made
    stored(pictures["b"])
    second = predicted()
    assert np.abs(second - first).min(axis=1).max() > 1e-5
    stored([*pictures["b"][:4], pictures["a"][4], *pictures["b"][5:]])
    third = predicted()
    np.testing.assert_allclose(np.delete(third, 4, 0), np.delete(second, 4, 0), atol=1e-6)
    np.testing.assert_allclose(third[4], first[4], atol=1e-6)


@pytest.mark.parametrize(
    "key", ["weights", "model", "records", "geometry", "normalization", "views", "precision", None]
)
def test_what_is_kept_of_another_input_or_an_earlier_version_is_made_again(key: str, runs: list[Path]) -> None:
    ensemble(*runs, "--split", "val")
    path = runs[0] / "predictions-val.parquet"
    kept = read_predictions(path)
    if key is None:  # as an earlier version left it
        source = {
            "run": "run0",
            "weights": kept.source["weights"],
            "records": "0123abcd",
            "views": kept.source["views"],
        }
    else:
        source = kept.source | {key: "another"}
    write_predictions(path, replace(kept, source=source))
    ensemble(*runs, "--split", "val")
    rewritten = read_predictions(path)
    assert rewritten.source == (source if key == "precision" else kept.source)
    np.testing.assert_array_equal(rewritten.probabilities, kept.probabilities)


def test_what_cannot_be_combined_is_refused_before_anything_is_predicted(
    runs: list[Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_file(name: str, split: str, *options: object, run: Path = runs[2]) -> Path:
        assert fastflower("predict", run, "--split", split, "--out", tmp_path / f"{name}.parquet", *options).code == 0
        return tmp_path / f"{name}.parquet"

    test, val, train = (as_file(split, split) for split in ("test", "val", "train"))
    other = as_file("other", "test", run=runs[1])
    more = as_file("more", "test", "--data.root", write_dataset(tmp_path / "more_data", {"test": 10}, first=44))
    named = tmp_path / "named"
    predictions = read_predictions(test)
    write_predictions(named, replace(predictions, classes=["0", "1", "rose"]))
    cut = tmp_path / "cut.pt"
    cut.write_bytes((runs[0] / "checkpoints/best.pt").read_bytes()[:-100])
    copy = tmp_path / "elsewhere" / runs[0].name
    shutil.copytree(runs[0], copy)
    sample = tmp_path / "sample.csv"
    sample.write_text("id,label\n" + "".join(f"{44 + i:06},{i}\n" for i in range(9)))
    monkeypatch.setattr("fastflower.evaluation.predict.score", lambda *_: pytest.fail("a picture is scored"))
    weighted = ("--method", "weighted", "--fit_on")
    for arguments, words in [
        ((runs[0], runs[1], more), "which other members have"),
        ((runs[0], runs[1], named), "has the class"),
        ((runs[0], runs[1], val), "which other members have"),
        ((runs[0], runs[1], cut), "cut.pt"),
        ((runs[0], runs[1], tmp_path / "none"), "none"),
        ((runs[0], runs[1], copy), "are the predictions of one network"),
        ((runs[0], runs[0] / "checkpoints/best.pt"), "are the predictions of one network"),
        ((runs[0],), "two members or more"),
        ((runs[0], test, *weighted, runs[0]), "--fit-on names 1 predictions for 2 members"),
        ((runs[0], test, *weighted, runs[0], tmp_path / "none"), "none"),
        ((runs[0], runs[1], *weighted, test, other), "nothing can be measured or fitted without a true class"),
        ((runs[0], test, *weighted, train, val), "which other members have"),
        ((runs[0], test, "--method", "weighted"), "has no true classes to fit weights on"),
        ((runs[0], runs[1], "--sample", sample), "has the label '3' (id 000047)"),
        ((runs[0], runs[1], "--submission", tmp_path), "is a folder"),
    ]:
        refused = fastflower("ensemble", *arguments)
        assert refused.code == 2, refused.out
        assert words in " ".join(refused.err.split()), arguments
    assert not list(tmp_path.glob("run*/predictions-*"))


def test_what_cannot_be_combined_is_named(runs: list[Path], data: Path, tmp_path: Path) -> None:
    alone = fastflower("ensemble", runs[0], "--split", "val")
    assert alone.code == 2
    assert "an ensemble needs two members or more" in alone.err
    twice = fastflower("ensemble", runs[0], runs[0] / "checkpoints/best.pt", "--split", "val")
    assert twice.code == 2
    assert "would count twice" in twice.err
    other = tmp_path / "other.parquet"
    assert fastflower("predict", runs[1], "--data.root", write_dataset(tmp_path / "o", {"test": 3}), "--out", other)
    differ = fastflower("ensemble", runs[0], other)
    assert differ.code == 2
    assert f"{runs[0]} lacks ids 000000, 000001, 000002, which other members have" in differ.err
    nowhere = fastflower("ensemble", tmp_path / "none", runs[0])
    assert nowhere.code == 2
    assert "give a run folder that has finished an epoch" in nowhere.err
    sample = tmp_path / "sample.csv"
    sample.write_text("id,label\n1,0\n")
    refused = fastflower("ensemble", *runs, "--sample", sample, "--submission", tmp_path / "s.csv")
    assert refused.code == 2
    assert f"{sample} has other ids than the records" in refused.err
    assert not (tmp_path / "s.csv").exists()


def test_the_table_shows_members_ensemble_and_weights(runs: list[Path]) -> None:
    result = fastflower("ensemble", *runs, "--split", "val", "--method", "weighted")
    assert result.code == 0, result.err
    assert "macro F1" in result.out
    assert "weight" in result.out
    assert "The weights were fitted on these very pictures" in result.out


def test_other_data_than_the_runs_is_not_taken_for_it(runs: list[Path], data: Path, tmp_path: Path) -> None:
    wanted = ensemble(*runs, "--split", "val")
    other = write_dataset(tmp_path / "other", {"val": 6}, first=800)
    for run in runs:
        assert fastflower("predict", run, "--split", "val", "--data.root", other).code == 0
    assert ensemble(*runs, "--split", "val") == wanted
    moved = data.rename(tmp_path / "moved")
    assert ensemble(*runs, "--split", "val", "--data.root", moved) == wanted
    refused = fastflower("ensemble", *runs, "--split", "val")
    assert refused.code == 2
    assert "--data.root" in refused.err


def test_members_are_of_the_views_that_are_asked_for_and_say_them(runs: list[Path]) -> None:
    plain = ensemble(*runs, "--split", "val", "--method", "mean")
    for run in runs:
        assert fastflower("predict", run, "--split", "val", "--crops", 10).code == 0
    made = [(run / "predictions-val-10-crops.parquet").stat().st_mtime_ns for run in runs]
    ten = ensemble(*runs, "--split", "val", "--method", "mean", "--crops", 10)
    assert made == [(run / "predictions-val-10-crops.parquet").stat().st_mtime_ns for run in runs]
    assert ten != plain
    again = fastflower("ensemble", *runs, "--split", "val", "--method", "mean")
    assert "Runs also have predictions-val-10-crops.parquet: --crops and --scales say which" in again.out
    assert ensemble(*runs, "--split", "val", "--method", "mean") == plain
    assert {row["views"] for row in plain} == {"1 crop"}
    assert {row["views"] for row in ten} == {"10 crops"}
    shown = fastflower("ensemble", *runs, "--crops", 10)  # of test, which has no classes
    assert shown.out.count("10 crops") == 4, shown.out
    assert "top-1" not in shown.out


def test_views_are_mixed_only_when_told(runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ten, scales = tmp_path / "ten.parquet", tmp_path / "scales.parquet"
    assert fastflower("predict", runs[1], "--split", "val", "--crops", 10, "--out", ten).code == 0
    assert fastflower("predict", runs[2], "--split", "val", "--scales", "40,48", "--out", scales).code == 0
    with monkeypatch.context() as patch:
        patch.setattr("fastflower.evaluation.predict.score", lambda *_: pytest.fail("a picture is scored"))
        refused = fastflower("ensemble", runs[0], ten, scales, "--split", "val")
    assert refused.code == 2
    words = f"several views, {runs[0]} by 1 crop and {ten} by 10 crops and {scales} by scales 40, 48: predict each"
    assert words in refused.err
    rows = ensemble(runs[0], ten, scales, "--split", "val", "--mix_views")
    assert [row["views"] for row in rows] == [
        "1 crop",
        "10 crops",
        "scales 40, 48",
        "1 crop and scales 40, 48 and 10 crops",
    ]
    unknown = tmp_path / "unknown.parquet"  # it does not say by which
    write_predictions(unknown, replace(read_predictions(ten), source={}))
    rows = ensemble(runs[0], unknown, "--split", "val")
    assert [row["views"] for row in rows] == ["1 crop", "", "1 crop"]


def test_a_copy_of_a_run_counts_once(runs: list[Path], tmp_path: Path) -> None:
    shutil.copytree(runs[0], tmp_path / "another_name")
    refused = fastflower("ensemble", runs[0], runs[1], tmp_path / "another_name", "--split", "val")
    assert refused.code == 2
    assert "are the predictions of one network, which would count twice" in refused.err


def test_members_that_trained_on_the_pictures_say_so(data: Path, runs: list[Path], tmp_path: Path) -> None:
    final = tmp_path / "final"
    options = ["--train.epochs", 1, "--train.schedule", "step", "--data.train_on", "train+val"]
    assert fastflower(*train_arguments(data, final), *options).code == 0
    shown = fastflower("ensemble", runs[0], final, "--split", "val")
    assert f"{final} trained on these pictures, which says nothing of new ones." in shown.out
    assert f"{runs[0]} trained on" not in shown.out
    weighted = fastflower("ensemble", runs[0], final, "--method", "weighted")
    assert f"{final} trained on these pictures, which flatters its weight." in weighted.out
    assert "trained on" not in fastflower("ensemble", runs[0], runs[1], "--split", "val").out
