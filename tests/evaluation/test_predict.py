"""Predictions of runs: each picture once, from its largest record, and the files that come of it."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from fastflower.data.records import Records, concatenate
from fastflower.data.selection import largest_of_each
from fastflower.data.sources.kaggle import load_files, load_split
from fastflower.data.sources.tfrecord import write_tfrecord
from fastflower.evaluation.predictions import read_predictions
from fastflower.files import atomic_write
from tests.conftest import (
    copy_run,
    example,
    fastflower,
    jpeg,
    shared_run,
    train_arguments,
    write_dataset,
    write_folders,
)
from tests.processes import in_ranks
from tests.training import tiny_worker


def trained(root: Path, run: Path, *options: object) -> Path:
    result = fastflower(*train_arguments(root, run), "--train.epochs", 1, *options)
    assert result.code == 0, result.err
    return run


def write_sized(root: Path) -> Path:
    """The same ids at 40 and 48 pixels; the larger pictures are others, so that it shows which one is taken."""
    counts = {"train": 24, "val": 9, "test": 7}
    write_dataset(root, counts, size=40)
    first = 0
    for split, count in counts.items():
        records = [
            example(first + i, None if split == "test" else i % 3, jpeg(48, 48, first + i)) for i in range(count)
        ]
        write_tfrecord(root / "tfrecords-jpeg-48x48" / split / "00.tfrec", records)
        first += count
    return root


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run on the smaller pictures."""
    folder = tmp_path_factory.mktemp("predict")
    write_sized(folder / "data")
    with shared_run(folder, "--train.epochs", 1, "--data.sizes", 40) as run:
        yield run


@pytest.fixture
def sized(shared: Path) -> Path:
    """The data of that run, which tests only read."""
    return shared.parent / "data"


@pytest.fixture
def run(shared: Path, tmp_path: Path, tiny_net: None) -> Path:
    return copy_run(shared, tmp_path / "run")


@pytest.fixture
def own(tmp_path: Path, tiny_net: None) -> Path:
    """A run on pictures that a test may change, in `data` beside it."""
    return trained(write_sized(tmp_path / "data"), tmp_path / "run", "--data.sizes", 40)


def submission(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_each_id_is_taken_once_from_its_largest_record(sized: Path) -> None:
    records = load_split(sized, "test", sizes="all")
    for order in (np.arange(14), np.arange(14)[::-1], np.random.default_rng(0).permutation(14)):
        shuffled = records.select(order)
        chosen, notes = largest_of_each(shuffled)
        assert notes == []
        assert {path.parent.parent.name for path in np.array(chosen.files)[chosen.file]} == {"tfrecords-jpeg-48x48"}
        assert chosen.ids.tolist() == list(dict.fromkeys(shuffled.ids.tolist()))


def test_an_id_twice_at_one_size_is_taken_once_and_reported(tmp_path: Path) -> None:
    large, small = tmp_path / "tfrecords-jpeg-9x9/test/a.tfrec", tmp_path / "tfrecords-jpeg-8x8/test/a.tfrec"
    write_tfrecord(large, [example(1, None), example(2, None), example(1, None), example(3, None), example(1, None)])
    write_tfrecord(small, [example(3, None), example(3, None), {"image": b"x"}, {"image": b"y"}])
    chosen, notes = largest_of_each(load_files([large, small]))
    assert chosen.ids.tolist() == ["000001", "000002", "000003", "", ""]
    assert chosen.number.tolist() == [0, 1, 3, 2, 3]
    (note,) = notes
    assert f"{large}, record 0 (id 000001) is taken" in note
    assert f"{large}, record 2 (id 000001); {large}, record 4 (id 000001)" in note


def nothing(records: Records) -> Records:
    return records.select(np.zeros(0, np.int64))


def test_no_records_are_no_records(sized: Path) -> None:
    chosen, notes = largest_of_each(nothing(load_split(sized, "test")))
    assert (len(chosen), notes) == (0, [])


def test_predict_writes_probabilities_and_a_submission(run: Path, sized: Path, tmp_path: Path) -> None:
    result = fastflower("predict", run, "--submission", tmp_path / "submission.csv")
    assert result.code == 0, result.err
    predictions = read_predictions(run / "predictions-test.parquet")
    ids = [f"{i:06}" for i in range(33, 40)]
    assert predictions.ids.tolist() == ids
    np.testing.assert_allclose(predictions.probabilities.sum(axis=1), 1, atol=1e-6)
    assert not predictions.labelled
    rows = [[name, str(label)] for name, label in zip(ids, predictions.likeliest, strict=True)]
    assert submission(tmp_path / "submission.csv") == [["id", "label"], *rows]
    assert f"Predictions of 7 pictures: {run / 'predictions-test.parquet'}" in result.err
    assert [line.split()[0] for line in result.out.splitlines()[2:]] == ids
    frame = pd.read_parquet(run / "predictions-test.parquet")
    assert frame["label"].tolist() == predictions.likeliest.tolist()


def test_other_sizes_give_other_predictions_and_the_largest_is_the_default(run: Path, tmp_path: Path) -> None:
    files = {}
    for name, options in {"default": (), "large": ("--sizes", 48), "small": ("--sizes", 40)}.items():
        files[name] = tmp_path / f"{name}.parquet"
        assert fastflower("predict", run, "--out", files[name], *options).code == 0
    probabilities = {name: read_predictions(path).probabilities for name, path in files.items()}
    np.testing.assert_array_equal(probabilities["default"], probabilities["large"])
    assert np.abs(probabilities["default"] - probabilities["small"]).max() > 1e-3


def test_a_run_that_crops_stored_pictures_keeps_to_its_sizes(sized: Path, tmp_path: Path, tiny_net: None) -> None:
    run = trained(sized, tmp_path / "as_is", "--data.sizes", 40, "--data.val_resize", "None")
    for views in ((), ("--scales", 48)):
        probabilities = []
        for options in ((), ("--sizes", 40), ("--sizes", 48)):
            assert fastflower("predict", run, "--out", tmp_path / "p.parquet", *views, *options).code == 0
            probabilities.append(read_predictions(tmp_path / "p.parquet").probabilities)
        taken = 2 if views else 1  # scales begin with the largest, since they resize anyway
        np.testing.assert_array_equal(probabilities[0], probabilities[taken])
        assert np.abs(probabilities[0] - probabilities[3 - taken]).max() > 1e-3


def test_files_do_not_depend_on_batches_processes_or_the_order_of_files(own: Path, tmp_path: Path) -> None:
    def predicted(name: str, *options: object) -> tuple[list[list[str]], np.ndarray]:
        arguments = ("predict", own, "--out", tmp_path / f"{name}.parquet", "--submission", tmp_path / f"{name}.csv")
        result = fastflower(*arguments, *options)
        assert result.code == 0, result.err
        return submission(tmp_path / f"{name}.csv"), read_predictions(tmp_path / f"{name}.parquet").probabilities

    rows, probabilities = predicted("whole")
    for name, options in {"one": ("--batch_size", 1), "three": ("--batch_size", 3)}.items():
        outputs = predicted(name, *options)
        assert outputs[0] == rows
        np.testing.assert_allclose(outputs[1], probabilities, atol=1e-6)
    arguments = ("predict", own, "--out", tmp_path / "two.parquet", "--submission", tmp_path / "two.csv")
    done = in_ranks(tiny_worker.main, *arguments)
    assert done.code == 0, done.err
    assert submission(tmp_path / "two.csv") == rows
    folder = tmp_path / "data/tfrecords-jpeg-48x48/test"
    records = [example(33 + i, None, jpeg(48, 48, 33 + i)) for i in range(7)]
    shutil.rmtree(folder)
    for i, record in enumerate([*records[::-1], records[2]]):  # one of them twice
        write_tfrecord(folder / f"{i}.tfrec", [record])
    assert predicted("turned")[0] == rows


def test_a_sample_with_other_ids_stops_before_anything_is_written(run: Path, tmp_path: Path) -> None:
    sample = tmp_path / "sample.csv"
    sample.write_text("id,label\n" + "".join(f"{i:06},0\n" for i in range(34, 42)))
    arguments = ("predict", run, "--submission", tmp_path / "submission.csv", "--sample", sample)
    refused = fastflower(*arguments)
    assert refused.code == 2
    assert f"{sample} has other ids than the records: the records lack ids 000040, 000041, and it lacks id 000033" in (
        refused.err
    )
    assert not (tmp_path / "submission.csv").exists()
    assert not (run / "predictions-test.parquet").exists()
    sample.write_text("id,label\n" + "".join(f"{i:06},0\n" for i in range(33, 40)))
    assert fastflower(*arguments).code == 0


def test_records_without_ids_and_repeated_ones_are_named(own: Path, tmp_path: Path) -> None:
    path = tmp_path / "data" / "tfrecords-jpeg-48x48/test/00.tfrec"
    write_tfrecord(path, [example(1, None), example(2, None), example(1, None)])
    shutil.rmtree(tmp_path / "data/tfrecords-jpeg-40x40/test")
    result = fastflower("predict", own, "--sizes", 48)
    assert result.code == 0, result.err
    assert f"{path}, record 0 (id 000001) is taken for its id, which is there again" in " ".join(result.err.split())
    write_tfrecord(path, [example(1, None), {"image": jpeg(40, 40)}])
    refused = fastflower("predict", own, "--sizes", 48)
    assert refused.code == 2
    assert f"{path}, record 1 has no feature 'id'" in refused.err


def test_class_folders_are_predicted_by_path(tmp_path: Path, tiny_net: None) -> None:
    root = write_folders(tmp_path / "data", {"rose": 12, "tulip": 12})
    run = trained(root, tmp_path / "run")
    other = write_folders(tmp_path / "other", {"test": 3, "test/tulip": 2, "train/daisy": 1})
    assert fastflower("predict", run, "--data.root", other).code == 0
    predictions = read_predictions(run / "predictions-test.parquet")
    assert predictions.ids.tolist() == ["000000", "000001", "000002", "tulip/000003", "tulip/000004"]
    assert predictions.classes == ["rose", "tulip"]
    assert predictions.labels[3:].tolist() == [1, 1]
    assert not predictions.labelled


def test_names_and_samples_that_do_not_fit_are_refused_before_a_picture_is_scored(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, names, sample = tmp_path / "a.jpg", tmp_path / "names.txt", tmp_path / "sample.csv"
    picture.write_bytes(jpeg(40, 40))
    names.write_text("rose\ntulip\n")
    sample.write_text("id,label\n" + "".join(f"{i:06},{i}\n" for i in range(33, 40)))
    monkeypatch.setattr("fastflower.evaluation.score.Scoring.scores", lambda *_: pytest.fail("a picture is scored"))
    for arguments, words in [
        ((picture, "--names", names), "has 2 class names for 3 classes"),
        (("--submission", tmp_path / "s.csv", "--sample", sample), "has the label '33' (id 000033)"),
    ]:
        refused = fastflower("predict", run, *arguments)
        assert refused.code == 2
        assert words in refused.err


def test_views_change_predictions_and_are_kept_in_files_of_their_own(run: Path, sized: Path) -> None:
    seen = []
    for options, name in ((), ""), (("--crops", 10), "-10-crops"), (("--scales", "32,40,48"), "-scales-32-40-48"):
        assert fastflower("predict", run, *options).code == 0
        predictions = read_predictions(run / f"predictions-test{name}.parquet")
        seen.append(predictions.probabilities)
        np.testing.assert_allclose(predictions.probabilities.sum(axis=1), 1, atol=1e-6)
    assert predictions.source["views"] == {"crops": 1, "scales": [32, 40, 48]}
    assert predictions.source["geometry"] == {"crop": 32, "val_resize": 36}
    assert predictions.source["records"]["count"] == 7
    assert (predictions.source["run"], predictions.source["checkpoint"]) == (run.name, "best.pt")
    assert predictions.source["data"] == {
        "root": [str(sized)],
        "split": "test",
        "sizes": "all",
        "trained_on": False,
    }
    np.testing.assert_array_equal(read_predictions(run / "predictions-test.parquet").probabilities, seen[0])
    assert not torch.allclose(torch.tensor(seen[0]), torch.tensor(seen[1]), atol=1e-4)
    assert not torch.allclose(torch.tensor(seen[1]), torch.tensor(seen[2]), atol=1e-4)


def test_two_roots_are_predicted_together(run: Path, sized: Path, tmp_path: Path) -> None:
    more = write_dataset(tmp_path / "more", {"test": 4}, first=500, size=48)
    assert fastflower("predict", run, "--data.root", sized, more).code == 0
    assert len(read_predictions(run / "predictions-test.parquet").ids) == 11


def test_concatenating_keeps_stored_sizes_apart(sized: Path) -> None:
    parts = [load_split(sized, "test", sizes=[size]) for size in (48, 40)]
    chosen, _ = largest_of_each(concatenate(parts))
    assert chosen.file.max() == 0


def test_another_checkpoint_leaves_the_bests_predictions_alone(run: Path, tmp_path: Path) -> None:
    assert fastflower("predict", run).code == 0
    best = (run / "predictions-test.parquet").read_bytes()
    assert fastflower("predict", run / "checkpoints/last.pt").code == 0
    assert (run / "predictions-test-last.parquet").is_file()
    assert fastflower("eval", run / "checkpoints/last.pt").code == 0
    assert (run / "eval-val-last/figures.json").is_file()
    assert (run / "predictions-test.parquet").read_bytes() == best


def test_what_a_killed_predict_left_goes_and_what_another_one_writes_stays(run: Path) -> None:
    left = run / ".predictions-test.parquet.0123456789ab.tmp"
    left.write_text("PAR")
    with atomic_write(run / "predictions-test.parquet") as file:
        file.write(b"another's")
        assert fastflower("predict", run).code == 0
        assert not left.exists()
        assert len(list(run.glob(".*.tmp"))) == 1
    assert (run / "predictions-test.parquet").read_bytes() == b"another's"


def test_what_cannot_be_written_stops_before_the_work(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for option in ("--out", "--submission"):
        for path, words in [(tmp_path, "is a folder: name a file"), (tmp_path / "file/s.csv", str(tmp_path / "file"))]:
            refused = fastflower("predict", run, option, path)
            assert refused.code == 2
            assert words in refused.err
    assert not (run / "predictions-test.parquet").exists()


def test_what_is_left_out_is_said(tmp_path: Path, tiny_net: None) -> None:
    root = write_folders(
        tmp_path / "data", {"train/rose": 12, "train/tulip": 12, "val/rose": 2, "val/tulip": 2, "test": 3}
    )
    (root / "test/page.jpg").write_bytes(b"<html>")
    checked = fastflower("data", "check", root, "--json")
    (tmp_path / "skip.json").write_text(checked.out)
    run = trained(root, tmp_path / "run", "--data.skip", tmp_path / "skip.json")
    result = fastflower("predict", run)
    assert result.code == 0, result.err
    assert f"Left out 1 records of test that {tmp_path / 'skip.json'} lists." in result.err
    assert len(read_predictions(run / "predictions-test.parquet").ids) == 3
