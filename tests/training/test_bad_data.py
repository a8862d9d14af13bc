"""What is wrong with a data set is said before the first step, or stops a run with the record's place."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from fastflower.data.sources.tfrecord import write_tfrecord
from tests.conftest import example, fastflower, jpeg, train_arguments, write_dataset

pytestmark = pytest.mark.usefixtures("tiny_net")


def test_bad_pictures_of_both_splits_are_named_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, run = write_dataset(tmp_path / "data", {"train": 16, "val": 8}), tmp_path / "run"
    records = [example(i, i % 3) for i in range(8)]
    records[5]["image"] = jpeg(40, 40)[:300]
    write_tfrecord(root / "tfrecords-jpeg-40x40/train/09-bad.tfrec", records)
    write_tfrecord(root / "tfrecords-jpeg-40x40/val/09-bad.tfrec", [*records[:2], records[2] | {"image": b"page"}])
    monkeypatch.setattr("fastflower.data.batches.choose_normalization", None)
    result = fastflower(*train_arguments(root, run))
    assert result.code == 2
    folder = root / "tfrecords-jpeg-40x40"
    assert (
        "error: 2 records cannot be decoded as pictures: replace them, or leave them out by --data.skip" in result.err
    )
    places = "{0}/train/09-bad.tfrec, record 5 (id 000005) (300 bytes); {0}/val/09-bad.tfrec, record 2 (id 000002) (4"
    assert places.format(folder) in result.err
    assert "Traceback" not in result.err
    assert not run.exists()


def test_a_picture_that_only_the_decoder_refuses_stops_the_run_with_its_place(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "data", {"train": 16, "val": 8})
    buffer = BytesIO()
    Image.new("RGB", (40, 40)).save(buffer, "TIFF")
    records = [example(i, i % 3) for i in range(8)]
    records[5]["image"] = buffer.getvalue()[:2000]
    write_tfrecord(root / "tfrecords-jpeg-40x40/train/09-bad.tfrec", records)
    given = ("--data.mean", "0.5", "0.5", "0.5", "--data.std", "0.2", "0.2", "0.2")  # else measuring finds it first
    for options in (given, ()):
        result = fastflower(*train_arguments(root, tmp_path / "run"), *options, "--train.batch_size", "24")
        assert result.code == 2
        assert "09-bad.tfrec, record 5 (id 000005) cannot be decoded" in result.err
        assert "Traceback" not in result.err


def test_files_with_other_numbers_of_records_than_their_names_say_are_named_once(tmp_path: Path) -> None:
    root, run = write_dataset(tmp_path / "data", {"train": 16, "val": 8}), tmp_path / "run"
    folder = root / "tfrecords-jpeg-40x40"
    (folder / "train/00-40x40-8.tfrec").rename(folder / "train/00-40x40-11.tfrec")
    (folder / "val/01-40x40-4.tfrec").rename(folder / "val/01-40x40-3.tfrec")
    notes = [
        f"{folder}/train/00-40x40-11.tfrec has 8 records, but by its name 11: copy or download it again",
        f"{folder}/val/01-40x40-3.tfrec has 4 records, but by its name 3: copy or download it again",
    ]
    for options in ((), ("--data.folds", 2)):
        result = fastflower(*train_arguments(root, run), "--train.epochs", 2, *options, "--overwrite")
        assert result.code == 0, result.err
        assert [result.out.count(note) for note in notes] == [1, 1]
    for command in ("eval", "predict"):
        result = fastflower(command, run, *([] if command == "eval" else ["--split", "val"]))
        assert result.code == 0
        assert [(result.out + result.err).count(note) for note in notes] == [1, 1]


def test_pictures_that_validate_and_train_are_counted(tmp_path: Path) -> None:
    root, run = write_dataset(tmp_path / "data", {"train": 16, "val": 8}), tmp_path / "run"
    write_tfrecord(root / "tfrecords-jpeg-40x40/val/09.tfrec", [example(i, i % 3) | {"id": b"x"} for i in (3, 5)])
    result = fastflower(*train_arguments(root, run), "--train.epochs", 1)
    assert "2 of the 10 validation records are also in train, such as " in result.out
    assert (
        f"{root}/tfrecords-jpeg-40x40/val/09.tfrec, record 0 (id x): `fastflower data check ROOT --json > bad.json`"
        in result.out
    )
    (root / "tfrecords-jpeg-40x40/val/09.tfrec").unlink()
    assert "also in train" not in fastflower(*train_arguments(root, run), "--train.epochs", 1, "--overwrite").out
