"""The identity of records: the same wherever they are stored, another when an id, a class or a picture is."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastflower.data.identity import identity
from fastflower.data.records import Records
from fastflower.data.sources.kaggle import load_files
from fastflower.data.sources.tfrecord import write_tfrecord
from fastflower.runtime.entries import Identity

Row = tuple[str, int, bytes]


def stored(path: Path, rows: list[Row]) -> Records:
    write_tfrecord(path, [{"id": name.encode(), "class": label, "image": data} for name, label, data in rows])
    return load_files([path])


ROWS: list[Row] = [(f"id{i}", i % 3, bytes([i]) * 50) for i in range(7)]


@given(
    place=st.integers(0, len(ROWS) - 1),
    change=st.sampled_from(["id", "class", "content", "swap", "drop"]),
    byte=st.integers(0, 49),
)
def test_it_changes_with_any_id_class_byte_order_or_count(
    tmp_path_factory: pytest.TempPathFactory, place: int, change: str, byte: int
) -> None:
    folder = tmp_path_factory.mktemp("records")
    rows = list(ROWS)
    name, label, data = rows[place]
    if change == "id":
        rows[place] = ("other", label, data)
    elif change == "class":
        rows[place] = (name, label + 1, data)
    elif change == "content":  # of the same length
        rows[place] = (name, label, data[:byte] + bytes([data[byte] ^ 1]) + data[byte + 1 :])
    elif change == "swap":
        rows[place], rows[place - 1] = rows[place - 1], rows[place]
    else:
        del rows[place]
    before, after = identity(stored(folder / "a.tfrec", ROWS)), identity(stored(folder / "b.tfrec", rows))
    assert before != after
    assert (before["names"] == after["names"]) == (change == "content")
    assert (before["content"] == after["content"]) == (change in ("id", "class"))


def test_it_is_the_same_wherever_the_records_are_stored(tmp_path: Path) -> None:
    one = identity(stored(tmp_path / "a.tfrec", ROWS))
    stored(tmp_path / "b/1.tfrec", ROWS[:3]), stored(tmp_path / "b/2.tfrec", ROWS[3:])
    assert identity(load_files([tmp_path / "b/1.tfrec", tmp_path / "b/2.tfrec"])) == one
    assert one == Identity(count=7, names=one["names"], content=one["content"])
