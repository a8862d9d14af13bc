"""The cache of file indexes: it spares the scan, and is never wrong, in the way, or in the data's folder."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from fastflower.data.records import Records, read_image
from fastflower.data.sources import kaggle as module
from fastflower.data.sources.kaggle import find_files, load_split
from fastflower.data.sources.tfrecord import scan, write_tfrecord
from fastflower.errors import UserError
from tests.conftest import example, write_dataset

COLUMNS = ("file", "number", "offset", "length", "ids", "labels")


def assert_same(a: Records, b: Records) -> None:
    assert a.files == b.files
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), strict=True)


def fail_to_scan(path: Path) -> NoReturn:
    raise AssertionError(f"{path} was scanned")


def touch_later(path: Path) -> None:
    """Give a file the next second's mtime, whatever the file system's resolution."""
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))


def test_the_second_load_does_not_scan(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_split(small, "train")
    monkeypatch.setattr(module, "scan", fail_to_scan)
    assert_same(load_split(small, "train"), first)
    with pytest.raises(AssertionError, match="was scanned"):
        load_split(small, "val")


def test_another_version_of_the_code_scans_again(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_split(small, "train")
    monkeypatch.setattr(module, "scan", fail_to_scan)
    monkeypatch.setattr(module, "code_digest", lambda *_: "another")
    with pytest.raises(AssertionError, match="was scanned"):
        load_split(small, "train")


def test_the_cache_knows_a_file_by_any_name(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_split(small, "train")
    (tmp_path / "link").symlink_to(small)
    monkeypatch.chdir(small)
    monkeypatch.setattr(module, "scan", fail_to_scan)
    for root in (tmp_path / "link", Path()):
        np.testing.assert_array_equal(load_split(root, "train").offset, first.offset)


def test_only_the_changed_file_is_scanned_again(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = load_split(small, "train").files[1]
    scanned: list[Path] = []

    def spy(path: Path) -> Any:
        scanned.append(path)
        return scan(path)

    monkeypatch.setattr(module, "scan", spy)
    touch_later(second)
    load_split(small, "train")
    assert scanned == [second]


def test_new_content_with_the_same_size_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "train" / "a.tfrec"
    write_tfrecord(path, [{"image": b"x", "id": b"old", "class": 1}])
    assert load_split(tmp_path, "train").ids.tolist() == ["old"]
    stat = path.stat()
    write_tfrecord(path, [{"image": b"x", "id": b"new", "class": 2}])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))  # the finest change that a clock can tell
    assert path.stat().st_size == stat.st_size
    records = load_split(tmp_path, "train")
    assert (records.ids.tolist(), records.labels.tolist()) == (["new"], [2])


def test_new_content_with_the_same_mtime_but_another_size_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "train" / "a.tfrec"
    write_tfrecord(path, [example(0, 0)])
    load_split(tmp_path, "train")
    stat = path.stat()
    write_tfrecord(path, [example(0, 0), example(1, 1)])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert load_split(tmp_path, "train").labels.tolist() == [0, 1]


def test_a_refused_file_is_not_cached(small: Path) -> None:
    path = load_split(small, "train").files[1]
    whole, stat = path.read_bytes(), path.stat()
    path.write_bytes(whole[:-1])
    for _ in range(2):
        with pytest.raises(UserError, match="is cut off in record 23"):
            load_split(small, "train")
    path.write_bytes(whole)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert len(load_split(small, "train")) == 48


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped", "other arrays", "folder"])
def test_a_damaged_cache_is_scanned_anew(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setenv("FASTFLOWER_CACHE", str(tmp_path / "cache"))
    first = load_split(small, "train")
    cached = sorted((tmp_path / "cache").rglob("*.npz"))
    assert len(cached) == 2
    for path in cached:
        good = bytearray(path.read_bytes())
        if damage == "empty":
            path.write_bytes(b"")
        elif damage == "text":
            path.write_bytes(b"not an archive")
        elif damage == "cut":
            path.write_bytes(good[: len(good) // 2])
        elif damage == "flipped":
            for position in range(200, 260):  # in the first array's values
                good[position] ^= 0xFF
            path.write_bytes(good)
        elif damage == "other arrays":
            np.savez(path, number=np.arange(24))
        else:
            path.unlink()
            path.mkdir()
    assert_same(load_split(small, "train"), first)
    if damage != "folder":  # mended as well
        monkeypatch.setattr(module, "scan", fail_to_scan)
        assert_same(load_split(small, "train"), first)


def test_a_cache_that_cannot_be_written_does_no_harm(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_split(small, "train")
    (tmp_path / "file").write_text("a folder below this cannot exist, for root neither")
    monkeypatch.setenv("FASTFLOWER_CACHE", str(tmp_path / "file" / "cache"))
    for _ in range(2):
        assert_same(load_split(small, "train"), first)
    np.testing.assert_array_equal(read_image(first, 0), read_image(load_split(small, "train"), 0))


def test_the_data_folder_is_only_read(small: Path) -> None:
    def listing() -> list[tuple[str, int, int]]:
        return sorted((str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in [small, *small.rglob("*")])

    before = listing()
    for path in small.rglob("*.tfrec"):
        path.chmod(0o444)
    for folder in [p for p in small.rglob("*") if p.is_dir()]:
        folder.chmod(0o555)
    records = load_split(small, "train")
    read_image(records, 0)
    assert listing() == before
    for folder in [p for p in small.rglob("*") if p.is_dir()]:
        folder.chmod(0o755)


def test_two_processes_may_index_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTFLOWER_CACHE", str(tmp_path / "cache"))
    write_dataset(tmp_path / "data", {"train": 60}, files=20)
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(1) as first, spawn.Pool(1) as second:
        for ready in [pool.apply_async(find_files, (tmp_path / "data", "train")) for pool in (first, second)]:
            assert len(ready.get()) == 20  # both have started and imported
        loads = [pool.apply_async(load_split, (tmp_path / "data", "train")) for pool in (first, second)]
        a, b = (load.get() for load in loads)
    assert_same(a, b)
    assert len(a) == 60
    left = [path.suffix for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert left == [".npz"] * 20  # and no temporary files
    monkeypatch.setattr(module, "scan", fail_to_scan)
    assert_same(load_split(tmp_path / "data", "train"), a)
