"""A split of a data set as a table of records: what is asked of it, and a record's bytes.

A picture is an id; a record is an id at a stored size. The Kaggle layout holds each picture at several sizes:
ROOT/tfrecords-jpeg-SxS/{train,val,test}/*.tfrec. A picture may also be a file of its own
(`fastflower.data.sources.folder`).
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from fastflower.data.stamp import Stamp, cache_key
from fastflower.errors import UserError

SUFFIXES = (".tfrec", ".tfrecord", ".tfrecords")
NO_LABEL = np.iinfo(np.int64).min
_COUNTED = re.compile(rf".*\d-(\d+)x\1-(?P<count>\d+)({'|'.join(map(re.escape, SUFFIXES))})")
SIZE_FOLDER = re.compile(r"tfrecords-jpeg-(\d+)x(\d+)")


@dataclass(frozen=True)
class Records:
    """A split: record i is the `length[i]` image bytes at `offset[i]` of `files[file[i]]`."""

    files: tuple[Path, ...]
    stamps: tuple[Stamp, ...]  # of each file when it was indexed
    counts: tuple[int, ...]  # of records in each file, whether they are in this table or not
    file: np.ndarray  # [n] int64, index into files
    number: np.ndarray  # [n] int64, position of the record in its file
    offset: np.ndarray  # [n] int64, bytes; -1 where the record has no image
    length: np.ndarray  # [n] int64, bytes
    ids: np.ndarray  # [n] str, "" where the record has none
    labels: np.ndarray  # [n] int64, NO_LABEL where the record has none

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def pictures(self) -> int:
        """How many different pictures (ids) there are; records without an id count as one each."""
        named = self.ids[self.ids != ""]
        return len(np.unique(named)) + len(self) - len(named)

    @property
    def sizes(self) -> list[int]:
        """The stored sizes in pixels, ascending; empty where no folder names one."""
        return sorted({size for path in self.files if (size := stored_size(path))})

    def describe(self, index: int) -> str:
        """File, record number and id, for messages; of a picture that is a file, just its path."""
        path = self.files[self.file[index]]
        if is_picture(path):
            return str(path)
        name = f" (id {self.ids[index]})" if self.ids[index] else ""
        return f"{path}, record {self.number[index]}{name}"

    def select(self, indices: np.ndarray) -> Records:
        """The records at `indices` ([m] int64 or [n] bool), in that order."""
        columns = {name: getattr(self, name)[indices] for name in (*COLUMNS, "file")}
        return replace(self, **columns)

    def require(self, feature: Literal["image", "id", "class"]) -> None:
        """Raise UserError naming the first record that lacks `feature`."""
        missing = {"image": self.offset < 0, "id": self.ids == "", "class": self.labels == NO_LABEL}[feature]
        if missing.any():
            index = int(np.argmax(missing))
            where = self.describe(index)
            if is_picture(self.files[self.file[index]]):
                raise UserError(f"{where} has no {feature}, which this command needs: put it into its class's folder.")
            raise UserError(f"{where} has no feature '{feature}', which this command needs: write it or drop the file.")

    def require_classes(self, count: int) -> None:
        """Raise UserError naming the first record whose class is missing or outside 0..count-1."""
        self.require("class")
        outside = (self.labels < 0) | (self.labels >= count)
        if outside.any():
            index = int(np.argmax(outside))
            raise UserError(
                f"{self.describe(index)} has class {self.labels[index]}, outside 0..{count - 1}: "
                "correct the record's class or the list of class names."
            )


COLUMNS = ("number", "offset", "length", "ids", "labels")


def concatenate(parts: Sequence[Records]) -> Records:
    """The records of all parts, one part after another."""
    if len(parts) == 1:
        return parts[0]
    first = np.cumsum([0, *(len(part.files) for part in parts)])
    return Records(
        files=tuple(path for part in parts for path in part.files),
        stamps=tuple(stamp for part in parts for stamp in part.stamps),
        counts=tuple(count for part in parts for count in part.counts),
        file=np.concatenate([part.file + start for part, start in zip(parts, first[:-1], strict=True)]),
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS},
    )


def fingerprint(records: Records, code: str) -> str:
    """Names what code of the digest `code` finds out about these records, in the cache; changes when a file does."""
    return cache_key(code, records.files, records.stamps, records.file, records.offset, records.length)


def is_picture(path: Path) -> bool:
    """Whether a record's file is the picture itself, and no TFRecord file."""
    return path.suffix not in SUFFIXES


def stored_size(path: Path) -> int | None:
    """The size in pixels that a file's tfrecords-jpeg-SxS folder names; None where there is no such folder."""
    match = SIZE_FOLDER.fullmatch(path.parent.parent.name)
    return int(match[1]) if match else None


def miscounted(records: Records) -> list[str]:
    """A sentence for each file that has fewer or more records than its name says (NN-SxS-COUNT, as in the Kaggle set).

    A file that was cut off between two records shows it in nothing else.
    """
    return [
        f"{path} has {count} records, but by its name {said}: copy or download it again, or correct its name."
        for path, count in dict(zip(records.files, records.counts, strict=True)).items()
        if (match := _COUNTED.fullmatch(path.name)) and (said := int(match["count"])) != count
    ]


def read_image(records: Records, index: int) -> np.ndarray:
    """The encoded image of a record, [length] uint8.

    A plain read: a file that shrinks or vanishes while it is used is an error here, where a memory map would crash.

    Raises:
        UserError: names file and record.
    """
    number, length = records.file[index], int(records.length[index])
    stamp = records.stamps[number]
    try:
        # kept by name while it is read: another thread may drop it from the cache, which closes it
        file = _open(records.files[number], stamp)
        same = file.stamp.content == stamp.content
        data = os.pread(file.descriptor, length, int(records.offset[index])) if same else b""
    except OSError as error:
        where = records.describe(index)
        raise UserError(f"{where} cannot be read ({error.strerror}): check its permissions and the disk.") from error
    if len(data) < length:
        raise UserError(f"{records.describe(index)} cannot be read: the file has changed since it was indexed.")
    return np.frombuffer(data, np.uint8)


class _File:
    """An open file, until nobody refers to it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        self.stamp = Stamp.of(os.fstat(self.descriptor))

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@functools.lru_cache(maxsize=256)  # bounded, since a process may hold about 1,024 open files
def _open(path: Path, stamp: Stamp) -> _File:
    return _File(path)
