"""Splits as tables of records: which numbers, what is refused, and reading image bytes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from fastflower.data.records import NO_LABEL, read_image
from fastflower.data.sources.kaggle import load_split
from fastflower.data.sources.tfrecord import write_tfrecord
from fastflower.errors import UserError
from tests.conftest import example, write_dataset


def sentence(caught: pytest.ExceptionInfo[UserError]) -> str:
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


# The table


def test_columns(small: Path) -> None:
    records = load_split(small, "train")
    assert len(records) == records.pictures == 48
    assert [path.name for path in records.files] == ["00-40x40-24.tfrec", "01-40x40-24.tfrec"]
    assert records.file.tolist() == [0] * 24 + [1] * 24
    assert records.number.tolist() == [*range(24), *range(24)]
    assert records.ids.tolist() == [f"{i:06}" for i in range(48)]
    assert records.labels.tolist() == [i % 3 for i in range(48)]
    assert {getattr(records, name).dtype for name in ("file", "number", "offset", "length", "labels")} == {
        np.dtype(np.int64)
    }
    assert records.describe(25) == f"{records.files[1]}, record 1 (id 000025)"


def test_records_without_an_id_are_a_picture_each(tmp_path: Path) -> None:
    write_tfrecord(tmp_path / "train" / "a.tfrec", [{"image": b"x"}, {"image": b"x", "id": b"i"}, {"image": b"x"}])
    records = load_split(tmp_path, "train")
    assert records.pictures == 3
    assert records.ids.tolist() == ["", "i", ""]
    assert records.describe(2) == f"{records.files[0]}, record 2"


def test_records_without_a_class_have_none(tmp_path: Path) -> None:
    write_dataset(tmp_path, {"test": 3})
    assert load_split(tmp_path, "test").labels.tolist() == [NO_LABEL] * 3


@pytest.mark.parametrize("by", ["indices", "mask"])
def test_select(small: Path, by: str) -> None:
    records = load_split(small, "train")
    chosen = np.array([3, 25, 40]) if by == "indices" else np.isin(np.arange(48), [3, 25, 40])
    part = records.select(chosen)
    assert (len(part), part.files) == (3, records.files)
    for i, whole in enumerate([3, 25, 40]):
        assert part.describe(i) == records.describe(whole)
        assert part.labels[i] == records.labels[whole]
        np.testing.assert_array_equal(read_image(part, i), read_image(records, whole))


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train" / "a.tfrec"
    write_tfrecord(path, [example(0, 0), {"id": b"000001", "class": 1}, {"class": 2}])
    with pytest.raises(UserError) as caught:
        load_split(tmp_path, "train")
    assert sentence(caught).startswith(f"{path}, record 1 (id 000001) has no feature 'image'")


def test_missing_class_and_id_are_named(tmp_path: Path) -> None:
    path = tmp_path / "train" / "a.tfrec"
    write_tfrecord(path, [example(0, 0), example(1, None), {"image": b"x", "class": 0}])
    records = load_split(tmp_path, "train")
    records.require("image")
    with pytest.raises(UserError) as caught:
        records.require("class")
    assert sentence(caught).startswith(f"{path}, record 1 (id 000001) has no feature 'class'")
    with pytest.raises(UserError) as caught:
        records.require("id")
    assert sentence(caught).startswith(f"{path}, record 2 has no feature 'id'")
    with pytest.raises(UserError, match="has no feature 'class'"):
        records.require_classes(3)


@pytest.mark.parametrize("label", [3, 104, -1, 2**62, -(2**63) + 1])
def test_a_class_outside_the_list_is_named(tmp_path: Path, label: int) -> None:
    write_dataset(tmp_path, {"train": 6})
    path = tmp_path / "tfrecords-jpeg-40x40" / "train" / "99.tfrec"
    write_tfrecord(path, [example(10, 2), example(11, label), example(12, 77)])
    records = load_split(tmp_path, "train")
    with pytest.raises(UserError) as caught:
        records.require_classes(3)
    assert sentence(caught).startswith(f"{path}, record 1 (id 000011) has class {label}, outside 0..2")


def test_classes_inside_the_list_pass(small: Path) -> None:
    load_split(small, "train").require_classes(3)
    with pytest.raises(UserError, match=r"has class 2, outside 0\.\.1"):
        load_split(small, "train").require_classes(2)


# Image bytes


def test_image_bytes(small: Path) -> None:
    records = load_split(small, "train")
    for index in (47, 0, 23, 24, 1):
        data = read_image(records, index)
        assert data.dtype == np.uint8
        assert data.tobytes() == example(index, index % 3)["image"]


def test_a_file_that_shrank_is_an_error_with_a_name(small: Path) -> None:
    records = load_split(small, "train")
    path = records.files[1]
    read_image(records, 47)
    cut = int(records.offset[47]) + 10
    os.truncate(path, cut)
    with pytest.raises(UserError) as caught:
        read_image(records, 47)
    text = sentence(caught)
    assert text.startswith(f"{path}, record 23 (id 000047) cannot be read")
    assert "has changed since it was indexed" in text
    assert read_image(records, 46).tobytes() == example(46, 46 % 3)["image"]  # what is still there is read
    os.truncate(path, 0)
    with pytest.raises(UserError, match=r"record 0 .*has changed"):
        read_image(records, 24)


def test_a_file_that_vanished_is_an_error_with_a_name(small: Path) -> None:
    records = load_split(small, "train")
    records.files[0].unlink()
    with pytest.raises(UserError) as caught:
        read_image(records, 5)
    assert f"{records.files[0]}, record 5 (id 000005) cannot be read (No such file" in sentence(caught)


def test_more_files_than_are_held_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTFLOWER_CACHE", os.devnull + "/none")  # 300 synced index files would take seconds
    write_tfrecord(tmp_path / "template", [{"image": b"<000>"}])
    template = (tmp_path / "template").read_bytes()
    (tmp_path / "train").mkdir()
    for i in range(300):
        (tmp_path / "train" / f"{i:03}.tfrec").write_bytes(template.replace(b"<000>", b"<%03d>" % i))
    records = load_split(tmp_path, "train")
    assert len(records.files) == 300
    for _ in range(2):
        for index in range(300):
            assert read_image(records, index).tobytes() == b"<%03d>" % index
    assert len(os.listdir("/proc/self/fd")) < 290
