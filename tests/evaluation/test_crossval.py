"""Cross-validation as a command: every picture predicted by a network that did not see it, finished folds kept."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from sklearn.metrics import accuracy_score, f1_score, log_loss

from fastflower.data.sources.kaggle import load_split
from fastflower.data.sources.tfrecord import write_tfrecord
from fastflower.errors import UserError
from fastflower.evaluation.crossval import cross_validate
from fastflower.evaluation.predictions import read_predictions
from fastflower.evaluation.views import Views
from fastflower.layers import Layer, Layers
from fastflower.runtime.checkpoint import load_checkpoint
from fastflower.runtime.distributed import Ranks
from fastflower.runtime.lock import own_folder
from fastflower.settings import merge
from fastflower.training.metrics import TrainingSums
from tests.conftest import example, fastflower, jpeg, train_arguments, train_settings, write_dataset
from tests.processes import in_ranks
from tests.training import tiny_worker
from tests.training.test_left_out import GIVEN, checked, spoil
from tests.training.test_resume import signal_at
from tests.training.test_run import rows, without_times


def arguments(root: Path, run: Path, *options: object) -> list[object]:
    return ["cv", *train_arguments(root, run)[1:], "--folds", 3, "--train.epochs", 1, *options]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """33 pictures of three classes in train, 9 in val, 5 in test."""
    return write_dataset(tmp_path / "data", {"train": 33, "val": 9, "test": 5})


def cross_validated(root: Path, run: Path, *options: object) -> dict[str, Any]:
    result = fastflower(*arguments(root, run, *options))
    assert result.code == 0, result.err
    results: dict[str, Any] = json.loads((run / "cv.json").read_text())
    return results


def test_every_picture_is_predicted_by_a_network_that_did_not_train_on_it(
    data: Path, tmp_path: Path, tiny_net: None
) -> None:
    run = tmp_path / "cv"
    results = cross_validated(data, run)
    together = read_predictions(run / "predictions-val.parquet")
    assert together.ids.tolist() == [f"{i:06}" for i in range(42)]
    assert together.labels.tolist() == [i % 3 for i in range(33)] + [i % 3 for i in range(9)]
    counts = []
    for fold in range(3):
        part = read_predictions(run / f"fold-{fold}" / "predictions-val.parquet")
        counts.append(np.bincount(part.labels))
        chosen = np.isin(together.ids, part.ids)
        np.testing.assert_array_equal(together.probabilities[chosen], part.probabilities)
        assert results["folds"][fold]["n"] == len(part.ids)
        (row,) = rows(run / f"fold-{fold}")
        for figure in ("loss", "accuracy", "macro_f1"):  # one stored size: what training logged
            assert results["folds"][fold][figure] == pytest.approx(row[f"val_{figure}"], abs=1e-5)
        saved = load_checkpoint(run / f"fold-{fold}" / "checkpoints/best.pt")
        assert (saved["config"]["data"]["folds"], saved["config"]["data"]["fold"]) == (3, fold)
        assert saved["train_records"]["count"] == 42 - len(part.ids)
    assert np.ptp(counts, axis=0).max() <= 1  # by class
    values = [fold["accuracy"] for fold in results["folds"]]
    assert results["mean"]["accuracy"] == pytest.approx(np.mean(values))
    assert results["std"]["accuracy"] == pytest.approx(np.std(values, ddof=1))
    assert results["together"]["n"] == 42
    assert results["together"]["accuracy"] == pytest.approx(accuracy_score(together.labels, together.likeliest))
    assert results["together"]["macro_f1"] == pytest.approx(
        f1_score(together.labels, together.likeliest, average="macro")
    )
    probabilities = together.probabilities.astype(float)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    assert results["together"]["loss"] == pytest.approx(log_loss(together.labels, probabilities), rel=1e-5)


def test_a_terminal_sees_what_takes_time_before_the_first_fold(data: Path, tmp_path: Path, tiny_net: None) -> None:
    def stop(*_: object) -> None:
        raise UserError("far enough")

    screen = StringIO()
    layers = Layers((Layer("", merge(train_settings(data, epochs=1), {"data": {"folds": 3}})),))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="far enough"):
        patch.setattr("fastflower.evaluation.crossval._begin", stop)
        cross_validate(
            layers,
            name="cv",
            run=tmp_path / "cv",
            overwrite=False,
            views=Views(),
            test=False,
            submission=None,
            console=Console(file=screen, force_terminal=True, width=200),
        )
    for work in ("read the pictures", "measure pixels"):
        assert work in screen.getvalue()
    assert "classes," not in screen.getvalue(), "each fold is built for a try only"


def test_each_fold_is_normalized_by_its_own_training_part(data: Path, tmp_path: Path, tiny_net: None) -> None:
    cross_validated(data, tmp_path / "cv")
    means = [
        tuple(load_checkpoint(tmp_path / f"cv/fold-{fold}/checkpoints/best.pt")["normalization"]["mean"])
        for fold in range(3)
    ]
    assert len(set(means)) == 3


def test_finished_folds_are_not_trained_again_and_a_stopped_one_goes_on(
    data: Path, tmp_path: Path, tiny_net: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    wanted = cross_validated(data, whole, "--train.epochs", 2)
    with monkeypatch.context() as patch:
        signal_at(patch, TrainingSums, 4, signal.SIGINT)
        result = fastflower(*arguments(data, stopped, "--train.epochs", 2))
    assert result.code == 128 + signal.SIGINT
    assert f"Go on with the same command and --run {stopped}" in result.out
    assert not (stopped / "cv.json").exists()
    result = fastflower(*arguments(data, stopped, "--train.epochs", 2))
    assert result.code == 0, result.err
    assert json.loads((stopped / "cv.json").read_text()) == wanted
    for fold in range(3):
        assert without_times(stopped / f"fold-{fold}") == without_times(whole / f"fold-{fold}")
    before = {path: path.stat().st_mtime_ns for path in stopped.glob("fold-*/checkpoints/*")}
    again = fastflower(*arguments(data, stopped, "--train.epochs", 2))
    assert again.code == 0
    assert again.out.count("is finished") == 3
    assert {path: path.stat().st_mtime_ns for path in stopped.glob("fold-*/checkpoints/*")} == before


def test_a_record_that_cannot_be_decoded_is_left_out_of_folds_that_have_begun(tmp_path: Path, tiny_net: None) -> None:
    root = spoil(write_dataset(tmp_path / "data", {"train": 1, "val": 9}, first=1000), "train", 33, 20)
    run = tmp_path / "cv"
    failed = fastflower(*arguments(root, run, *GIVEN))
    assert failed.code == 2
    assert "record 20 (id 000020) cannot be decoded" in failed.err
    assert (run / "fold-0/checkpoints/last.pt").is_file()
    results = cross_validated(root, run, *GIVEN, "--data.skip", checked(root, tmp_path / "bad.json"))
    assert results["together"]["n"] == 41


def test_other_settings_are_refused_unless_the_folds_are_replaced(data: Path, tmp_path: Path, tiny_net: None) -> None:
    run = tmp_path / "cv"
    before = cross_validated(data, run)
    for other in (["--train.lr", 0.5], ["--folds", 4], ["--seed", 1]):
        refused = fastflower(*arguments(data, run), *other)
        assert refused.code == 2
        assert "was trained with other settings" in refused.err
    other = ["--data.threads", 1, "--device", "cpu", "--train.log_every", 3]
    assert cross_validated(data, run, *other) == before
    for bad in (["--folds", 99], ["--scales", 24], ["--data.root", tmp_path / "none"], ["--submission", tmp_path]):
        assert fastflower(*arguments(data, run), "--overwrite", *bad).code == 2
    assert cross_validated(data, run) == before
    assert cross_validated(data, run, "--train.lr", 0.5, "--overwrite") != before


def test_folds_in_training_are_left_alone_and_what_a_kill_left_goes(data: Path, tmp_path: Path, tiny_net: None) -> None:
    run = tmp_path / "cv"
    results = cross_validated(data, run)
    for taken in (run, run / "fold-1"):
        with own_folder(taken, "", Ranks()):
            refused = fastflower(*arguments(data, run, "--overwrite"))
            assert refused.code == 2
            assert f"is training in {taken}:" in refused.err
    (run / ".cv.json.0123456789ab.tmp").write_text("{")
    (run / "fold-1/.predictions-val.parquet.0123456789ab.tmp").write_text("PAR")  # of a fold that is finished
    (run / "fold-0/checkpoints/last.pt").unlink()  # best holds all of it
    (run / "fold-0/finished").unlink()
    assert cross_validated(data, run) == results
    assert not list(run.rglob("*.tmp"))


def test_duplicates_under_two_ids_are_reported_and_share_a_fold(data: Path, tmp_path: Path, tiny_net: None) -> None:
    picture = example(0, 0)["image"]
    assert isinstance(picture, bytes)
    write_tfrecord(data / "tfrecords-jpeg-40x40/val/twin.tfrec", [example(900, 0, picture), example(901, 2, picture)])
    result = fastflower(*arguments(data, tmp_path / "cv"))
    assert result.code == 0, result.err
    assert "1 pictures stand under several ids, which are kept in one fold" in result.out
    assert "000000 = 000900 = 000901, of classes 0, 2" in result.out
    parts = [set(read_predictions(tmp_path / f"cv/fold-{k}/predictions-val.parquet").ids.tolist()) for k in range(3)]
    assert [{"000000", "000900", "000901"} <= part for part in parts].count(True) == 1


def test_test_is_predicted_as_the_mean_of_the_folds(data: Path, tmp_path: Path, tiny_net: None) -> None:
    run = tmp_path / "cv"
    cross_validated(data, run, "--submission", tmp_path / "submission.csv")
    parts = [read_predictions(run / f"fold-{fold}" / "predictions-test.parquet") for fold in range(3)]
    predictions = read_predictions(run / "predictions-test.parquet")
    mean = np.mean([part.probabilities for part in parts], axis=0)
    np.testing.assert_allclose(predictions.probabilities, mean, atol=1e-6)
    lines = (tmp_path / "submission.csv").read_text().splitlines()
    assert lines == ["id,label", *(f"{i:06},{k}" for i, k in zip(range(42, 47), mean.argmax(axis=1), strict=True))]


def test_ensembles_take_the_folder_of_the_folds(data: Path, tmp_path: Path, tiny_net: None) -> None:
    for seed in (0, 1):
        cross_validated(data, tmp_path / f"cv{seed}", "--seed", seed, "--test")
    members = (tmp_path / "cv0", tmp_path / "cv1")
    result = fastflower("ensemble", *members, "--split", "val", "--method", "mean", "--json")
    assert result.code == 0, result.err
    evaluations = json.loads(result.out)
    assert [row["n"] for row in evaluations] == [42, 42, 42]
    assert evaluations[0]["accuracy"] == json.loads((members[0] / "cv.json").read_text())["together"]["accuracy"]
    result = fastflower("ensemble", *members, "--method", "weighted", "--submission", tmp_path / "s.csv")
    assert result.code == 0, result.err
    assert len((tmp_path / "s.csv").read_text().splitlines()) == 6


def test_views_and_several_sizes(tmp_path: Path, tiny_net: None) -> None:
    for size in (40, 48):
        write_dataset(tmp_path / "data", {"train": 18, "val": 6}, size=size)
    run = tmp_path / "cv"
    plain = cross_validated(tmp_path / "data", run, "--data.sizes", "all")
    one = (run / "predictions-val.parquet").read_bytes()
    assert fastflower(*arguments(tmp_path / "data", run, "--data.sizes", "all", "--crops", 10)).code == 0
    results = json.loads((run / "cv-10-crops.json").read_text())
    assert (results["crops"], results["scales"]) == (10, [])
    assert results["together"]["n"] == 24
    assert len(load_split(tmp_path / "data", "train", sizes="all")) == 36
    source = read_predictions(run / "fold-0/predictions-val-10-crops.parquet").source
    assert source["views"] == {"crops": 10, "scales": []}
    assert fastflower(*arguments(tmp_path / "data", run, "--data.sizes", "all", "--scales", "32,40")).code == 0
    again = json.loads((run / "cv-scales-32-40.json").read_text())
    assert len({of_views["together"]["loss"] for of_views in (plain, results, again)}) == 3
    # one crop's results are as they were
    assert json.loads((run / "cv.json").read_text()) == plain
    assert (run / "predictions-val.parquet").read_bytes() == one
    assert (
        read_predictions(run / "predictions-val-10-crops.parquet").ids.tolist()
        == read_predictions(run / "predictions-val-scales-32-40.parquet").ids.tolist()
    )
    cross_validated(tmp_path / "data", run, "--data.sizes", "all", "--overwrite")
    assert not [*run.rglob("*-crops.*"), *run.rglob("*-scales-*")]


def test_two_processes_cross_validate_too(data: Path, tmp_path: Path, tiny_net: None) -> None:
    run = tmp_path / "two"
    done = in_ranks(tiny_worker.main, *arguments(data, run, "--test"))
    assert done.code == 0, done.err
    assert json.loads((run / "cv.json").read_text())["together"]["n"] == 42
    assert len(read_predictions(run / "predictions-test.parquet").ids) == 5
    shutil.rmtree(run)


def test_settings_that_leave_nothing_to_validate_are_refused(data: Path, tmp_path: Path) -> None:
    for options, words in [
        (("--data.train_on", "train+val", "--train.schedule", "step"), "data.folds leaves a part to validate on"),
        (("--folds", 1), "data.folds"),
        (("--folds", 0), "data.folds"),
        (("--folds", 99), "there are only 42 different pictures"),
        (("--crops", 10, "--data.val_resize", 32), "one crop and not ten"),
        (("--scales", 24), "is smaller than data.crop"),
    ]:
        refused = fastflower(*arguments(data, tmp_path / "cv", *options))
        assert refused.code == 2
        assert words in refused.err
    shutil.rmtree(data / "tfrecords-jpeg-40x40/test")
    refused = fastflower(*arguments(data, tmp_path / "cv", "--test"))
    assert refused.code == 2
    assert "/test holds no TFRecord files" in refused.err
    assert not (tmp_path / "cv").exists()


def without_ids(root: Path, split: str) -> None:
    (path,) = (root / f"tfrecords-jpeg-40x40/{split}").glob("00*")
    write_tfrecord(path, [{k: v for k, v in example(i, 0).items() if k != "id"} for i in range(4)])


def of_pixels(root: Path, split: str, side: int) -> None:
    folder = root / f"tfrecords-jpeg-40x40/{split}"
    write_tfrecord(folder / "odd.tfrec", [example(800, None if split == "test" else 0, jpeg(side, side))])


def skipping(root: Path, split: str) -> None:
    problems = [
        {"file": str(path), "record": number, "kind": "damaged"}
        for path in root.glob(f"tfrecords-jpeg-40x40/{split}/*")
        for number in range(50)
    ]
    (root / "skip.json").write_text(json.dumps({"problems": problems}))


AS_STORED = ("--data.val_resize", "None")
LARGE = ("--data.crop", 40, "--data.scale", 44, 48)
ALEXNET = ("--model.name", "alexnet", "--data.crop", 64, "--data.scale", 72, 80, "--data.val_resize", 72)
REFUSED: dict[str, tuple[Callable[[Path], object], tuple[object, ...], str]] = {
    "no ids in train": (lambda root: without_ids(root, "train"), (), "has no feature 'id'"),
    "no ids in val": (lambda root: without_ids(root, "val"), (), "has no feature 'id'"),
    "no ids in test": (lambda root: without_ids(root, "test"), ("--test",), "has no feature 'id'"),
    "small pictures": (lambda root: of_pixels(root, "val", 30), (*AS_STORED, "--crops", 10), "no ten crops"),
    "small test": (lambda root: of_pixels(root, "test", 30), (*AS_STORED, "--crops", 10, "--test"), "no ten crops"),
    "no room for crops": (
        lambda _: None,
        (*AS_STORED, *LARGE, "--crops", 10),
        "40×40 pixels, of which there are no",
    ),
    "scales twice": (lambda _: None, ("--scales", "40,40"), "names a size twice"),
    "scales below the crop": (lambda _: None, ("--scales", "24,40"), "is smaller than data.crop"),
    "scales and crops": (lambda _: None, ("--scales", "40", "--crops", 10), "two ways to test"),
    "scales of alexnet": (lambda _: None, ("--scales", 64, *ALEXNET), "global average pooling"),
    "no test": (lambda root: shutil.rmtree(root / "tfrecords-jpeg-40x40/test"), ("--test",), "holds no TFRecord files"),
    "no epoch": (lambda _: None, ("--train.max_steps", 2), "train.max_steps is 2, and an epoch of fold 0 has 3 steps"),
    "single values": (lambda _: None, ("--train.batch_size", 1), "BatchNorm has a single value"),
    "no weights": (lambda _: None, ("--model.pretrained", "none.pth"), "none.pth"),
    "decoder": (lambda _: None, ("--data.decoder", "gpu"), "data.decoder is gpu"),
    "skipped test": (lambda root: skipping(root, "test"), ("--test", "--data.skip", "SKIP"), "lists every record"),
    "submission": (lambda _: None, ("--submission", "."), "is a folder: name a file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_later_step_would_refuse_is_refused_before_the_first_fold(
    case: str, data: Path, tmp_path: Path, tiny_net: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, options, words = REFUSED[case]
    run = tmp_path / "cv"
    kept = [run / "fold-0/checkpoints/last.pt", run / "fold-1/finished", run / "cv.json"]
    for path in kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"earlier")
    monkeypatch.setattr("fastflower.evaluation.crossval.train_into", lambda *_: pytest.fail("a fold is trained"))
    spoil(data)
    given = [data / "skip.json" if option == "SKIP" else option for option in options]
    refused = fastflower(*arguments(data, run, "--overwrite", *given))
    assert refused.code == 2, refused.err
    assert words in " ".join(refused.err.split())
    assert all(path.read_bytes() == b"earlier" for path in kept)


def test_other_pictures_than_the_folds_are_not_taken_for_theirs(data: Path, tmp_path: Path, tiny_net: None) -> None:
    run = tmp_path / "cv"
    before = cross_validated(data, run)
    (path, *_) = (data / "tfrecords-jpeg-40x40/train").glob("00*")
    records = [example(i, i % 3) for i in range(17)]
    write_tfrecord(path, records)
    assert cross_validated(data, run) == before  # written anew, and the same
    for change in ({"image": jpeg(40, 40, 7)}, {"id": b"other"}, {"class": 2}):
        write_tfrecord(path, [*records[:-1], records[-1] | change])
        refused = fastflower(*arguments(data, run))
        assert refused.code == 2
        assert f"{run} was trained on other pictures or classes" in refused.err
    cross_validated(data, run, "--overwrite")
    # folds that an earlier version left are not trusted, and no epoch is trained again
    (run / "data.json").unlink()
    times = {path: path.stat().st_mtime_ns for path in run.glob("fold-*/checkpoints/*")}
    again = fastflower(*arguments(data, run))
    assert again.code == 0, again.err
    assert "is finished" not in again.out
    assert {path: path.stat().st_mtime_ns for path in run.glob("fold-*/checkpoints/*")} == times
    assert fastflower(*arguments(data, run)).out.count("is finished") == 3


def test_an_ensemble_takes_no_fold_folders_predictions_of_other_pictures(
    data: Path, tmp_path: Path, tiny_net: None
) -> None:
    for seed in (0, 1):
        cross_validated(data, tmp_path / f"cv{seed}", "--seed", seed, "--test")
    members = [tmp_path / "cv0", tmp_path / "cv1"]
    mean = ("--method", "mean", "--out", tmp_path / "out.parquet")
    assert fastflower("ensemble", *members, *mean).code == 0
    before = read_predictions(tmp_path / "out.parquet")
    kept = [read_predictions(member / "predictions-test.parquet").probabilities for member in members]
    np.testing.assert_allclose(before.probabilities, np.mean(kept, axis=0), atol=1e-6)
    for path in (data / "tfrecords-jpeg-40x40/test").iterdir():
        first = 42 + 3 * int(path.name[:2])
        write_tfrecord(path, [example(i, None, jpeg(40, 40, i)) for i in range(first, min(first + 3, 47))])
    assert fastflower("ensemble", *members, *mean).code == 0
    after = read_predictions(tmp_path / "out.parquet")
    assert after.ids.tolist() == before.ids.tolist()
    assert np.abs(after.probabilities - before.probabilities).max() > 1e-4
    refused = fastflower("ensemble", *members, "--split", "train")
    assert refused.code == 2
    assert "folds leave predictions of val" in refused.err


def test_a_folder_that_holds_a_run_is_refused_and_changed_test_data_is_predicted_anew(
    data: Path, tmp_path: Path, tiny_net: None
) -> None:
    run = tmp_path / "cv"
    cross_validated(data, run, "--test")
    refused = fastflower(*arguments(data, run / "fold-0"))
    assert refused.code == 2
    assert f"{run / 'fold-0'} holds a run, and no folds" in refused.err
    write_tfrecord(data / "tfrecords-jpeg-40x40/test/more.tfrec", [example(700, None)])
    cross_validated(data, run, "--submission", tmp_path / "s.csv")
    assert len((tmp_path / "s.csv").read_text().splitlines()) == 7
