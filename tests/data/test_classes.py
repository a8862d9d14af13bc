"""The list of classes of a data folder: from a file, or by the numbers of its records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastflower.data.classes import listed_classes, numbered_classes
from fastflower.data.sources.kaggle import load_split
from fastflower.data.sources.tfrecord import write_tfrecord
from fastflower.errors import UserError
from tests.conftest import example


def test_class_names_from_json(small: Path) -> None:
    names = ["rose", "wild geranium", "Löwenzahn 蒲公英"]
    (small / "class_names.json").write_text(json.dumps(names, ensure_ascii=False), encoding="utf-8")
    assert listed_classes(small) == names
    assert listed_classes(small / "tfrecords-jpeg-40x40") == names


def test_class_names_from_numbers(tmp_path: Path) -> None:
    write_tfrecord(tmp_path / "train" / "a.tfrec", [example(0, 0), example(1, 11), example(2, 3)])
    assert listed_classes(tmp_path) is None
    assert numbered_classes(load_split(tmp_path, "train")) == [str(i) for i in range(12)]


@pytest.mark.parametrize("label", [-1, 100_000, 2**40])
def test_class_numbers_that_are_no_classes_are_refused(tmp_path: Path, label: int) -> None:
    write_tfrecord(tmp_path / "train" / "a.tfrec", [example(0, 0), example(1, label)])
    with pytest.raises(UserError, match=rf"a\.tfrec, record 1 \(id 000001\) has class {label}, outside"):
        numbered_classes(load_split(tmp_path, "train"))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[",
        b"rose\ndaisy\n",
        b"\xff\xfe",
        b"[]",
        b'{"1": "rose", "2": "iris"}',
        b'{"0": ["rose"]}',
        b'{"rose": 0.5}',
        b'{"rose": true}',
        b'["rose", 1]',
        b'"rose"',
    ],
)
def test_broken_class_names_are_refused(small: Path, text: bytes) -> None:
    path = small / "class_names.json"
    path.write_bytes(text)
    with pytest.raises(UserError) as caught:
        listed_classes(small)
    assert str(path) in str(caught.value)
    assert "list of class names" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        *('["r\u00f3sa", "iris", "7"]', '["ro\u0301sa", "iris", "7"]', '{"1": "iris", "0": "r\u00f3sa", "2": "7"}'),
        *('{"7": 2, "r\u00f3sa": 0, "iris": 1}', '\ufeff{"00": "r\u00f3sa", "01": "iris", "02": "7"}'),
    ],
)
def test_class_names_as_a_list_or_an_object(small: Path, text: str) -> None:
    (small / "class_names.json").write_text(text, encoding="utf-8")
    assert listed_classes(small) == ["r\u00f3sa", "iris", "7"]
