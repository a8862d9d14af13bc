"""What the bytes of records are: a digest of each, and whether it is a picture; each is read once, whoever asks.

The answers are kept in the user's cache folder record by record, so that another selection of the same files (another
fold, another size, what is left of a split) asks for none of them again.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia import nvimgcodec

from fastflower import machine
from fastflower.arrays import Bytes, Hashes, Ints
from fastflower.data import converted as conversion
from fastflower.data import soundness
from fastflower.data.decoding import undecodable
from fastflower.data.records import Contents, Progress, Records, read_image
from fastflower.data.soundness import is_sound, needs_conversion
from fastflower.data.stamp import file_keys, require_unchanged
from fastflower.data.view import MOST_THREADS
from fastflower.files import atomic_write, cache_dir, code_digest, digest

CHUNK = 256  # records that a thread reads in one go
_ROW = np.dtype([("key", np.uint64), ("digest", np.uint64), ("sound", np.bool_), ("converted", np.bool_)])


Rows = NDArray[Any]  # [n] of _ROW


def contents_of(records: Records, progress: Progress | None = None) -> Contents:
    """What each record holds; those that are not examined yet are looked up, and read by all cores where that is new.

    Whoever asks again takes the records of `examined`, which know it.

    Args:
        records: each with an image.
        progress: takes records read and to read.

    Raises:
        UserError: a record cannot be read, or its file changes meanwhile.
    """
    contents = records.contents or Contents.unknown(len(records))
    missing = np.flatnonzero(~contents.examined)
    if not len(missing):
        return contents
    rows = _look_up(records.select(missing), progress)
    digests, sound, converted = contents.digests.copy(), contents.sound.copy(), contents.converted.copy()
    digests[missing], sound[missing], converted[missing] = rows["digest"], rows["sound"], rows["converted"]
    return Contents(digests, sound, converted, np.ones(len(records), np.bool_))


def _look_up(records: Records, progress: Progress | None) -> Rows:
    """A row for each record, [n]; what the cache does not have is read and put into it."""
    rows = np.zeros(len(records), _ROW)
    rows["key"] = _keys(records)
    shards = _shards(records)
    kept = {path: _load(path) for path in shards}
    is_kept = np.zeros(len(records), bool)
    for path, chosen in shards.items():
        keys, shard = rows["key"][chosen], kept[path]
        hits = np.isin(keys, shard["key"])
        rows[chosen[hits]] = shard[np.searchsorted(shard["key"], keys[hits])]
        is_kept[chosen] = hits
    missing = np.flatnonzero(~is_kept)
    if len(missing):
        _read(records, missing, progress, rows)
    for path, chosen in shards.items():
        if not is_kept[chosen].all():
            together = np.append(kept[path], rows[chosen])
            _, first = np.unique(together["key"], return_index=True)
            with contextlib.suppress(OSError), atomic_write(path) as file:
                np.save(file, together[first])
    return rows


def examined(records: Records, progress: Progress | None = None) -> Records:
    """The records with what they hold; see `contents_of`."""
    return replace(records, contents=contents_of(records, progress))


def content_digests(records: Records, progress: Progress | None = None) -> Hashes:
    """The digest of each record's encoded picture, [n]; see `contents_of`."""
    return contents_of(records, progress).digests


def require_pictures(splits: Sequence[Records], progress: Progress | None = None) -> list[Records]:
    """The splits with what their records hold; see `contents_of`.

    Raises:
        UserError: names the records whose bytes are no picture.
    """
    splits = [examined(records, progress) for records in splits]
    bad = []
    for records in splits:
        bad += [(records, index) for index in np.flatnonzero(~contents_of(records).sound).tolist()]
    if bad:
        raise undecodable(*bad)
    return splits


def picture_digest(encoded: Bytes) -> int:
    """Of the bytes of an encoded picture, below 2**64: equal for the same bytes, and for others in no data set."""
    return int.from_bytes(digest(encoded.data))


def _read(records: Records, indices: Ints, progress: Progress | None, rows: Rows) -> None:
    """Read the records at `indices` and write into their rows what they are."""

    def read(start: int) -> list[tuple[int, bool, bool]]:
        pictures = (read_image(records, index) for index in indices[start : start + CHUNK].tolist())
        return [(picture_digest(encoded), is_sound(encoded), needs_conversion(encoded)) for encoded in pictures]

    done = 0
    with ThreadPoolExecutor(
        min(machine.cpus(), MOST_THREADS["cpu"])
    ) as threads:  # hashing and reading leave Python's lock
        for part in threads.map(read, range(0, len(indices), CHUNK)):
            for answer in part:
                row = rows[indices[done]]
                row["digest"], row["sound"], row["converted"] = answer
                done += 1
                if progress:
                    progress(done, len(indices))
    for number in np.unique(records.file[indices]).tolist():
        require_unchanged(records.files[number], records.stamps[number])


def _keys(records: Records) -> Hashes:
    """Of each record a number, [n], that no other bytes of the same file have, nor, in all likelihood, any others."""
    files = np.array([int.from_bytes(key[:8]) for key in file_keys(records.files, records.stamps)], np.uint64)
    keys: Hashes = files[records.file]
    for place in (records.offset, records.length):
        keys = (keys ^ place.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)  # odd: one to one
        keys ^= keys >> np.uint64(32)
    return keys


def _shards(records: Records) -> dict[Path, Ints]:
    """The cache's files, one for each folder of folders, and which of the records they are for."""
    code = (
        code_digest(__file__, soundness.__file__, conversion.__file__) + nvimgcodec.__version__ + conversion.versions()
    )

    @functools.cache
    def shard(folder: str) -> Path:
        above = os.path.dirname(os.path.realpath(folder))
        return cache_dir() / "contents" / f"{digest(os.fsencode(code + above), size=16).hex()}.npy"

    of_file = [shard(os.path.dirname(path)) for path in records.files]
    number = {path: i for i, path in enumerate(dict.fromkeys(of_file))}
    of_record = np.array([number[path] for path in of_file], np.int64)[records.file]
    return {path: chosen for path, i in number.items() if len(chosen := np.flatnonzero(of_record == i))}


def _load(path: Path) -> Rows:
    """What a shard of the cache has, sorted by key."""
    with contextlib.suppress(OSError, ValueError, EOFError):
        rows: Rows = np.load(path, allow_pickle=False)
        if rows.dtype == _ROW and rows.ndim == 1:
            return rows
    return np.zeros(0, _ROW)
