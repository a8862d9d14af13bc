"""Encoded pictures from disk, a batch at a time: the same bytes as one by one, checked once, and without the lock."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastflower.arrays import Bytes
from fastflower.config import DataConfig
from fastflower.data import reading
from fastflower.data.contents import examined
from fastflower.data.reading import Reader, known_sound, read_plainly, read_without_lock
from fastflower.data.records import Records, read_image
from fastflower.data.soundness import is_sound
from fastflower.data.sources import layout_of
from fastflower.data.sources.kaggle import load_split
from fastflower.data.sources.tfrecord import write_tfrecord
from fastflower.errors import UserError
from tests.conftest import ROOT, example, jpeg, write_dataset, write_folders

WAYS = pytest.mark.parametrize("read", [read_without_lock, read_plainly], ids=["compiled", "plain"])
OPENED = pytest.mark.parametrize("kept", [256, 0], ids=["kept open", "opened each time"])


@WAYS
@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 5000), min_size=1, max_size=4),
    pieces=st.lists(st.tuples(st.integers(0, 5), st.floats(0, 1), st.floats(0, 1.2), st.booleans()), max_size=12),
    stale=st.sets(st.integers(0, 3)),
    seed=st.integers(0, 2**32),
)
def test_pieces_are_those_of_the_files_and_nothing_else_is_written(
    tmp_path_factory: pytest.TempPathFactory,
    read: Callable[..., None],
    sizes: list[int],
    pieces: list[tuple[int, float, float, bool]],
    stale: set[int],
    seed: int,
) -> None:
    """Of files that are there or not, open or not, as indexed or not, and pieces that reach beyond an end or not."""
    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(seed)
    files = [rng.integers(0, 256, size, np.uint8).tobytes() for size in sizes]
    paths = [folder / f"ä {number}" for number in range(6)]  # of which some are not there
    for path, written in zip(paths, files, strict=False):
        path.write_bytes(written)
    names, descriptors, contents, offsets, lengths, wanted = [], [], [], [], [], []
    for number, start, share, is_open in pieces:
        data: bytes | None = files[number] if number < len(files) else None
        offset = int(start * len(data or b""))
        length = int(share * (len(data or b"") - offset))
        status = os.stat(paths[number]) if data is not None else None
        content = (status.st_size, status.st_mtime_ns - (number in stale)) if status else (0, 0)
        descriptors.append(os.open(paths[number], os.O_RDONLY) if status and is_open else -1)
        names.append(os.fsencode(paths[number]))
        contents.append(content)
        offsets.append(offset)
        lengths.append(length)
        wanted.append(None if data is None or number in stale else data[offset : offset + length])
    room = 7
    starts = np.cumsum([0, *(length + room for length in lengths)])[:-1].astype(np.int64)
    memory = np.full(sum(lengths) + room * (len(lengths) + 1), 171, np.uint8)
    as_indexed = np.zeros(len(lengths), np.bool_)
    before = len(os.listdir("/proc/self/fd"))
    read(
        np.frombuffer(b"\0".join(names) + b"\0", np.uint8),
        np.cumsum([0, *(len(name) + 1 for name in names)])[:-1].astype(np.int64),
        np.array(descriptors, np.int64),
        np.array(contents, np.int64).reshape(-1, 2),
        np.array(offsets, np.int64),
        np.array(lengths, np.int64),
        starts,
        memory,
        as_indexed,
    )
    assert len(os.listdir("/proc/self/fd")) == before
    for i, piece in enumerate(wanted):
        assert as_indexed[i] == (piece is not None and len(piece) == lengths[i])
        if as_indexed[i]:
            assert memory[starts[i] : starts[i] + lengths[i]].tobytes() == piece
        assert (memory[starts[i] + lengths[i] :][:room] == 171).all()
    for descriptor in descriptors:
        if descriptor >= 0:
            os.close(descriptor)


def test_python_goes_on_while_files_are_opened_and_read(tmp_path: Path) -> None:
    """Opening a pipe waits for who writes to it: here a thread of the same process, which needs the lock for that."""
    code = """
import os, threading
import numpy as np
from fastflower.data.reading import read_without_lock
os.mkfifo("pipe")
def read(name):
    done = np.zeros(1, np.bool_)
    one, path = np.zeros(1, np.int64), np.frombuffer(name + b"\\0", np.uint8)
    read_without_lock(path, one, one - 1, np.zeros((1, 2), np.int64), one, one + 3, one, np.zeros(3, np.uint8), done)
read(b"none")  # compiled now
thread = threading.Thread(target=read, args=(b"pipe",))
thread.start()
with open("pipe", "wb"):
    thread.join()
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, timeout=240)


FEW_FILES = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
import numpy as np
from pathlib import Path
from fastflower.config import DataConfig
from fastflower.data.reading import Reader, known_sound
from fastflower.data.records import read_image
from fastflower.data.sources import layout_of
records = layout_of(Path("data")).load(Path("data"), "train", DataConfig()).records
for _ in range(2):
    batch = Reader(records, known_sound(records)).read(np.arange(90))
    assert all((encoded == read_image(records, i)).all() for i, encoded in enumerate(batch))
"""


def test_a_process_that_may_open_few_files_keeps_few_open(tmp_path: Path) -> None:
    write_folders(tmp_path / "data", {"train/rose": 45, "train/tulip": 45})
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", FEW_FILES], cwd=tmp_path, env=environment, check=True, timeout=240)


def kaggle(folder: Path) -> Records:
    """12 records in two files."""
    return load_split(write_dataset(folder, {"train": 12}, files=2), "train")


def loose(folder: Path) -> Records:
    """12 files."""
    root = write_folders(folder, {"train/rose": 5, "train/tulip": 7})
    return layout_of(root).load(root, "train", DataConfig()).records


LAYOUTS = pytest.mark.parametrize("layout", [kaggle, loose])


def reader(records: Records) -> Reader:
    return Reader(records, known_sound(records))


@LAYOUTS
@OPENED
@WAYS
def test_batches_are_what_is_read_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Callable[..., Records], kept: int, read: Any
) -> None:
    monkeypatch.setattr(reading, "KEPT_OPEN", kept)
    monkeypatch.setattr(reading, "read_pieces", read)
    records = layout(tmp_path)
    made, rng = reader(records), np.random.default_rng(0)
    for size in (12, 1, 5, 30, 2):
        indices = rng.integers(0, 12, size)
        for index, encoded in zip(indices.tolist(), made.read(indices), strict=True):
            assert encoded.tobytes() == read_image(records, index).tobytes()


def test_what_is_held_is_not_overwritten_and_what_is_dropped_is_used_again(tmp_path: Path) -> None:
    records = kaggle(tmp_path)
    made, indices = reader(records), np.arange(12)
    made.read(indices)  # the largest batch
    held = made.read(indices[::-1])[3]
    others = [made.read(np.roll(indices, shift)) for shift in range(4)]
    assert held.tobytes() == read_image(records, 8).tobytes()
    for shift, batch in enumerate(others):
        assert [x.tobytes() for x in batch] == [
            read_image(records, i).tobytes() for i in np.roll(indices, shift).tolist()
        ]
    places = {batch[0].ctypes.data for batch in others}
    assert len(places) == 4
    del batch, others
    again = [made.read(indices) for _ in range(4)]
    assert len(places & {batch[0].ctypes.data for batch in again}) >= 3


def count_checks(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    checked: list[bytes] = []

    def check(encoded: Bytes) -> bool:
        checked.append(encoded.tobytes())
        return is_sound(encoded)

    monkeypatch.setattr(reading, "is_sound", check)
    return checked


@LAYOUTS
def test_a_record_is_checked_once_whoever_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Callable[..., Records]
) -> None:
    records, checked = layout(tmp_path), count_checks(monkeypatch)
    sound = known_sound(records)
    first, second = Reader(records, sound), Reader(records, sound)
    for indices in ([3, 1, 3], [4, 1], [5, 3, 0], [0, 1, 3, 4, 5]):
        first.read(np.array(indices[:2]))
        second.read(np.array(indices))
    assert sorted(checked) == sorted(read_image(records, i).tobytes() for i in (3, 1, 4, 5, 0))
    checked.clear()
    reader(examined(records)).read(np.arange(12))  # which training has looked over
    assert not checked


def test_where_only_some_are_examined_the_others_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tfrecord(tmp_path / "train" / "a.tfrec", [example(0, 0), example(1, 0, jpeg(40, 40)[:200]), example(2, 0)])
    whole, checked = load_split(tmp_path, "train"), count_checks(monkeypatch)
    records = examined(whole)
    assert records.contents
    records.contents.examined[2] = False
    made = reader(records)
    made.read(np.array([0, 2]))
    assert len(checked) == 1
    with pytest.raises(UserError, match="record 1 .* cannot be decoded as a picture"):
        made.read(np.array([0, 1]))


@OPENED
def test_the_first_bad_record_of_a_batch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    monkeypatch.setattr(reading, "KEPT_OPEN", kept)
    pictures = [example(i, 0) for i in range(6)]
    pictures[4]["image"], pictures[2]["image"] = b"", b"<html>"
    write_tfrecord(tmp_path / "train" / "a.tfrec", pictures)
    write_tfrecord(tmp_path / "train" / "b.tfrec", [example(i, 0) for i in range(6, 9)])
    records = load_split(tmp_path, "train")
    made = reader(records)
    with pytest.raises(UserError, match=r"a\.tfrec, record 4 "):
        made.read(np.array([0, 4, 2]))
    records.files[1].unlink()
    for order, bad in (([0, 7, 2], r"b\.tfrec, record 1 .* cannot be read"), ([1, 2, 7], r"a\.tfrec, record 2 ")):
        with pytest.raises(UserError, match=bad):
            reader(records).read(np.array(order))
    assert len(made.read(np.array([0, 1, 3, 5]))) == 4  # it goes on


@OPENED
def test_a_file_that_is_cut_in_use_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    monkeypatch.setattr(reading, "KEPT_OPEN", kept)
    records = kaggle(tmp_path)
    made = reader(records)
    made.read(np.arange(12))
    os.truncate(records.files[0], int(records.offset[3]) + 10)
    with pytest.raises(UserError, match=r"record 3 .* has changed since it was indexed"):
        made.read(np.array([7, 8, 3]))


def test_what_is_written_into_an_open_file_is_checked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its records stay readable as long as they are pictures, though they were checked before."""
    records = kaggle(tmp_path)
    made = reader(records)
    made.read(np.arange(12))
    with records.files[0].open("r+b") as file:
        file.seek(records.offset[2])
        file.write(b"<html>")
    os.utime(records.files[0], ns=(0, 0))
    assert [x.tobytes() for x in made.read(np.array([0, 1, 7]))] == [
        read_image(records, i).tobytes() for i in (0, 1, 7)
    ]
    with pytest.raises(UserError, match=r"record 2 .* cannot be decoded as a picture"):
        made.read(np.array([0, 2]))
    with pytest.raises(UserError, match=r"record 2 .* cannot be decoded as a picture"):
        made.read(np.array([2]))
