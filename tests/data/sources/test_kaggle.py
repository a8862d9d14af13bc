"""Kaggle's layout: which files and sizes, and how many records a file's name says it has."""

from __future__ import annotations

import shutil
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tfrecord.reader import tfrecord_loader

from fastflower.data.classes import listed_classes
from fastflower.data.records import NO_LABEL, Records, concatenate, miscounted, read_image
from fastflower.data.sources.kaggle import count_by_name, find_files, load_split
from fastflower.data.sources.tfrecord import write_tfrecord
from fastflower.data.stamp import Stamp
from fastflower.errors import UserError
from tests.conftest import example, write_dataset


def sentence(caught: pytest.ExceptionInfo[UserError]) -> str:
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


@pytest.fixture
def four_sizes(tmp_path: Path) -> Path:
    """The same 6 ids at four sizes, in the Kaggle layout."""
    for size in (192, 224, 331, 512):
        write_dataset(tmp_path / "four", {"train": 6}, size=size)
    return tmp_path / "four"


def size_of(files: list[Path]) -> list[int]:
    return sorted({int(path.parent.parent.name.rpartition("x")[2]) for path in files})


# Which files


@pytest.mark.parametrize(
    ("scale_min", "size"),
    [(1, 192), (192, 192), (193, 224), (256, 331), (331, 331), (332, 512), (512, 512), (600, 512)],
)
def test_auto_takes_the_smallest_size_that_suffices(four_sizes: Path, scale_min: int, size: int) -> None:
    assert size_of(find_files(four_sizes, "train", scale_min=scale_min)) == [size]


def test_sizes_are_numbers_not_names(tmp_path: Path) -> None:
    for size in (64, 128, 1024):  # as text, 1024 would come first
        write_dataset(tmp_path, {"train": 2}, size=size)
    assert size_of(find_files(tmp_path, "train", scale_min=65)) == [128]
    assert size_of(find_files(tmp_path, "train", scale_min=5000)) == [1024]


def test_all_sizes_and_named_ones(four_sizes: Path) -> None:
    assert size_of(find_files(four_sizes, "train", sizes="all")) == [192, 224, 331, 512]
    assert size_of(find_files(four_sizes, "train", sizes=[512, 192])) == [192, 512]
    everything = load_split(four_sizes, "train", sizes="all")
    assert (len(everything), everything.pictures) == (24, 6)
    assert (len(load_split(four_sizes, "train")), load_split(four_sizes, "train").pictures) == (6, 6)


def test_a_missing_size_is_named_with_what_there_is(four_sizes: Path) -> None:
    with pytest.raises(UserError) as caught:
        find_files(four_sizes, "train", sizes=[224, 256, 300])
    text = sentence(caught)
    assert "no size 256, 300;" in text
    assert "192, 224, 331, 512" in text
    assert str(four_sizes) in text


def test_root_may_be_a_size_folder_or_hold_the_split(four_sizes: Path, tmp_path: Path) -> None:
    folder = four_sizes / "tfrecords-jpeg-224x224"
    assert find_files(folder, "train") == find_files(four_sizes, "train", sizes=[224])
    shutil.copytree(folder / "train", tmp_path / "plain" / "train")
    records = load_split(tmp_path / "plain", "train")
    assert records.ids.tolist() == load_split(folder, "train").ids.tolist()


def test_other_files_and_folders_are_left_alone(small: Path) -> None:
    before = find_files(small, "train")
    folder = before[0].parent
    (folder / "README.txt").write_text("no records")
    (folder / ".00-40x40-24.tfrec.x1.tmp").write_bytes(b"a writer's temporary file")
    (small / "tfrecords-png-99x99").mkdir()
    (small / "tfrecords-jpeg-99x98.zip").touch()
    assert find_files(small, "train", sizes="all") == before


def test_several_files_come_sorted(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    for name in ("b.tfrecord", "a.tfrec", "c.tfrecords", "10.tfrec", "02.tfrec"):
        write_tfrecord(folder / name, [example(0, 0) | {"id": name.encode()}])
    order = ["02.tfrec", "10.tfrec", "a.tfrec", "b.tfrecord", "c.tfrecords"]
    assert [path.name for path in find_files(tmp_path, "train")] == order
    assert load_split(tmp_path, "train").ids.tolist() == order


def test_missing_folder_split_and_records(small: Path, tmp_path: Path) -> None:
    (tmp_path / "hollow" / "tfrecords-jpeg-40x40" / "train").mkdir(parents=True)
    for root, split, where in [
        (tmp_path / "nowhere", "train", tmp_path / "nowhere"),
        (small, "test", small / "tfrecords-jpeg-40x40" / "test"),
        (tmp_path / "hollow", "train", tmp_path / "hollow" / "tfrecords-jpeg-40x40" / "train"),
        (tmp_path / "hollow" / "tfrecords-jpeg-40x40" / "train", "train", tmp_path / "hollow"),
    ]:
        with pytest.raises(UserError) as caught:
            load_split(root, split)
        assert str(where) in sentence(caught)
        assert "tfrecords-jpeg-SxS" in sentence(caught)


def test_a_size_without_the_split_is_named(four_sizes: Path) -> None:
    shutil.rmtree(four_sizes / "tfrecords-jpeg-331x331" / "train")
    with pytest.raises(UserError, match="tfrecords-jpeg-331x331/train holds no TFRecord files"):
        load_split(four_sizes, "train", sizes="all")


# How many records


WORDS = ("00", "7", "192x192", "40x40", "192x224", "798", "2", "train", "00000", "of", "2024", "")


@given(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map("-".join),
    st.sampled_from(["tfrec", "tfrecord", "tfrecords"]),
)
@settings(deadline=None, max_examples=300)
@hypothesis.example("00-192x192-798", "tfrec")
@hypothesis.example("train-00-192x192-798", "tfrec")
@hypothesis.example("train00-192x192-798", "tfrec")
@hypothesis.example("train-00000-of-01024", "tfrecord")
@hypothesis.example("2024-05-17", "tfrec")
def test_only_names_as_kaggles_say_how_many_records_there_are(stem: str, suffix: str) -> None:
    parts = stem.split("-")
    sides = parts[-2].split("x") if len(parts) > 2 else []
    says = (
        len(sides) == 2
        and sides[0] == sides[1]
        and all(digits.isdigit() for digits in (parts[-3][-1:], *sides, parts[-1]))
    )
    path = Path("/data") / f"{stem}.{suffix}"
    for count in (2, 798):
        one = np.zeros(1, np.int64)
        records = Records(
            files=(path,),
            stamps=(Stamp(0, 0, 0, 0),),
            counts=(count,),
            counts_by_name=(count_by_name(path),),
            sides=(None,),
            mends=("",),
            file=one,
            number=one,
            offset=one,
            length=one,
            ids=np.array(["a"]),
            labels=one,
        )
        expected = []
        if says and int(parts[-1]) != count:
            expected = [
                f"{path} has {count} records, but by its name {int(parts[-1])}: "
                "copy or download it again, or correct its name."
            ]
        assert miscounted(records) == expected


def test_files_with_other_numbers_of_records_than_their_names_say(tmp_path: Path) -> None:
    """Whatever is selected of them, from the index's cache too, and of each file once."""
    root = write_dataset(tmp_path, {"train": 24, "val": 6}, files=2)
    lost, extra = (root / "tfrecords-jpeg-40x40/train" / name for name in ("00-40x40-12.tfrec", "01-40x40-12.tfrec"))
    assert not miscounted(load_split(root, "train"))
    lost.write_bytes(lost.read_bytes()[: _start_of(lost, 7)])
    extra.write_bytes(extra.read_bytes() + lost.read_bytes())
    for _ in range(2):
        records = load_split(root, "train")
        for part in (records, records.select(np.arange(3)), concatenate([records, records.select(np.arange(1))])):
            said = miscounted(part)
            assert [sentence.partition(":")[0] for sentence in said] == [
                f"{lost} has 7 records, but by its name 12",
                f"{extra} has 19 records, but by its name 12",
            ]
        assert not miscounted(load_split(root, "val"))


def _start_of(path: Path, number: int) -> int:
    """Where a record's frame begins."""
    data, position = path.read_bytes(), 0
    for _ in range(number):
        position += 16 + int.from_bytes(data[position : position + 8], "little")
    return position


# Real data


def test_flowers102(flowers102: Path) -> None:
    splits = {split: load_split(flowers102, split) for split in ("train", "val", "test")}
    assert {split: (len(r), r.pictures) for split, r in splits.items()} == {
        "train": (6552, 6552),
        "val": (818, 818),
        "test": (819, 819),
    }
    assert len(listed_classes(flowers102) or ()) == 102
    for split in ("train", "val"):
        splits[split].require_classes(102)
        assert len(np.unique(splits[split].labels)) == 102
    assert set(splits["test"].labels.tolist()) == {NO_LABEL}


def test_flowers102_agrees_with_the_other_package(flowers102: Path) -> None:
    records = load_split(flowers102, "val")
    expected = [r for path in records.files for r in tfrecord_loader(str(path), None)]
    assert len(expected) == len(records)
    assert records.ids.tolist() == [r["id"].decode() for r in expected]
    assert records.labels.tolist() == [int(r["class"][0]) for r in expected]
    for index, r in enumerate(expected):
        assert read_image(records, index).tobytes() == r["image"]


def test_flowers5_at_all_sizes(flowers5: Path) -> None:
    records = load_split(flowers5, "train", sizes="all")
    assert (len(records), records.pictures) == (880, 220)
    records.require_classes(len(listed_classes(flowers5) or ()))
    labels = {name: set(records.labels[records.ids == name].tolist()) for name in np.unique(records.ids)}
    assert {len(own) for own in labels.values()} == {1}  # one picture has one class at every size
    assert size_of(find_files(flowers5, "train", scale_min=256)) == [331]
