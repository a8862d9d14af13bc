"""Whether two tables of records are the same: by ids and classes, and by the bytes of their pictures.

Whatever is kept for some records (a checkpoint, predictions, folds) goes by this, so that it is never used for others.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from fastflower import machine
from fastflower.data.records import Records, fingerprint, read_image
from fastflower.files import atomic_write, cache_dir, code_digest

CHUNK = 256  # records that a thread reads in one go


@dataclass(frozen=True)
class Identity:
    """What tells a table of records from others, wherever it is stored."""

    count: int
    names: str  # digest of the ids and classes, in their order
    content: str  # digest of the encoded pictures, in the same order


def identity(records: Records, progress: Callable[[int, int], None] | None = None) -> Identity:
    """The identity of records, for which each is read once (see `content_digests`).

    Args:
        records: of a split.
        progress: takes records read and to read, where they are not known yet.

    Raises:
        UserError: a record cannot be read.
    """
    ids = os.fsencode("\0".join(records.ids.tolist()))
    names = hashlib.blake2b(ids + records.labels.tobytes(), digest_size=8)
    content = hashlib.blake2b(content_digests(records, progress).tobytes(), digest_size=8)
    return Identity(len(records), names.hexdigest(), content.hexdigest())


def content_digests(records: Records, progress: Callable[[int, int], None] | None = None) -> np.ndarray:
    """The digest of each record's encoded picture, [n] uint64; kept in the user's cache folder for the same files.

    Raises:
        UserError: a record cannot be read.
    """
    cached = cache_dir() / "digests" / f"{fingerprint(records, code_digest(__file__))}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):
        return np.load(cached, allow_pickle=False)

    def read(start: int) -> list[int]:
        return [digest(read_image(records, index)) for index in range(start, min(start + CHUNK, len(records)))]

    found: list[int] = []
    with ThreadPoolExecutor(machine.cpus()) as threads:  # hashing and reading leave Python's lock
        for part in threads.map(read, range(0, len(records), CHUNK)):
            for value in part:
                found.append(value)
                if progress:
                    progress(len(found), len(records))
    digests = np.array(found, np.uint64)
    with contextlib.suppress(OSError), atomic_write(cached) as file:
        np.save(file, digests)
    return digests


def digest(encoded: np.ndarray) -> int:
    """Of the bytes of an encoded picture, below 2**64: equal for the same bytes, and for others in no data set."""
    return int.from_bytes(hashlib.blake2b(encoded.data, digest_size=8).digest())
