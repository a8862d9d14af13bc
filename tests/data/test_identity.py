"""The identity of records: the same wherever they are stored, another when an id, a class or a picture is."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastflower.data import identity as module
from fastflower.data.identity import Identity, content_digests, identity
from fastflower.data.records import Records, load_files
from fastflower.data.tfrecord import write_tfrecord
from fastflower.errors import UserError

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
    assert (before.names == after.names) == (change == "content")
    assert (before.content == after.content) == (change in ("id", "class"))


def test_it_is_the_same_wherever_the_records_are_stored(tmp_path: Path) -> None:
    one = identity(stored(tmp_path / "a.tfrec", ROWS))
    stored(tmp_path / "b/1.tfrec", ROWS[:3]), stored(tmp_path / "b/2.tfrec", ROWS[3:])
    assert identity(load_files([tmp_path / "b/1.tfrec", tmp_path / "b/2.tfrec"])) == one
    assert one == Identity(7, one.names, one.content)


def test_records_are_read_once_and_again_when_their_file_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 2)  # several threads' shares
    records = stored(tmp_path / "a.tfrec", ROWS)
    seen: list[tuple[int, int]] = []
    first = content_digests(records, lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, 7) for i in range(7)]
    assert len(np.unique(first)) == 7
    with monkeypatch.context() as patch:
        patch.setattr(module, "read_image", None)
        assert np.array_equal(content_digests(records), first)
    changed = [(name, label, bytes([9]) * 50) if name == "id4" else (name, label, data) for name, label, data in ROWS]
    again = stored(tmp_path / "a.tfrec", changed)
    assert (content_digests(again) != first).tolist() == [i == 4 for i in range(7)]
    shutil.rmtree(os.environ["FASTFLOWER_CACHE"])
    os.truncate(tmp_path / "a.tfrec", 40)
    with pytest.raises(UserError, match=r"a\.tfrec, record 0 .* has changed since it was indexed"):
        content_digests(again)
