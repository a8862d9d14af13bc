"""A split of a data set as a table of records: what is asked of it, and a record's bytes.

A picture is an id; a record is an id at a stored size, of which a layout on disk (`fastflower.data.sources`) may have
several. Either a file holds many records, or it is the picture itself.
"""

from __future__ import annotations

import functools
import os
import resource
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np

from fastflower.arrays import Bools, Bytes, Hashes, Ints, Strings
from fastflower.data.stamp import Stamp, cache_key
from fastflower.errors import UserError

NO_LABEL = np.iinfo(np.int64).min
LEAVE_OUT = "by --data.skip bad.json, which `fastflower data check ROOT --json > bad.json` writes"  # how, for messages
# Files: a quarter of those that the process may have open, often 1,024.
KEPT_OPEN = min(256, resource.getrlimit(resource.RLIMIT_NOFILE)[0] % 2**31 // 4)  # an endless limit is -1
Progress = Callable[[int, int], None]  # takes what is done and all that is to do


@dataclass(frozen=True)
class Contents:
    """What records hold, as far as `fastflower.data.contents` has found it out."""

    digests: Hashes  # [n], equal for the same bytes
    sound: Bools  # [n], it begins as a picture and is not cut off
    converted: Bools  # [n], it is of a kind that is converted whenever it is read
    examined: Bools  # [n]; what is said of the others means nothing

    @classmethod
    def unknown(cls, n: int) -> Contents:
        """Those of n records of which none is examined."""
        return cls(np.zeros(n, np.uint64), *(np.zeros(n, np.bool_) for _ in range(3)))

    def select(self, indices: Ints | Bools) -> Contents:
        """Those of the records at `indices` ([m] or [n])."""
        return Contents(*(getattr(self, column.name)[indices] for column in fields(self)))

    @classmethod
    def join(cls, parts: Sequence[Contents]) -> Contents:
        """Those of some tables' records, one table after another."""
        return cls(*(np.concatenate([getattr(part, column.name) for part in parts]) for column in fields(cls)))


@dataclass(frozen=True)
class Records:
    """A split: record i is the `length[i]` image bytes at `offset[i]` of `files[file[i]]`."""

    files: tuple[Path, ...]
    stamps: tuple[Stamp, ...]  # of each file when it was indexed
    counts: tuple[int, ...]  # of records in each file, whether they are in this table or not
    counts_by_name: tuple[int | None, ...]  # the same as each file's name says it; None where it says nothing
    sides: tuple[int | None, ...]  # of each file: its pictures' stored size (pixels); None where there is but one
    mends: tuple[str, ...]  # of each file: how its records get what they lack, as its layout says it
    file: Ints  # [n], index into files
    number: Ints  # [n], position of the record in its file
    offset: Ints  # [n], bytes; -1 where the record has no image
    length: Ints  # [n], bytes
    ids: Strings  # [n], "" where the record has none
    labels: Ints  # [n], NO_LABEL where the record has none
    contents: Contents | None = None  # once some of the records are examined

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def pictures(self) -> int:
        """How many different pictures (ids) there are; records without an id count as one each."""
        named = self.ids[self.ids != ""]
        return len(np.unique(named)) + len(self) - len(named)

    @property
    def sizes(self) -> list[int]:
        """The stored sizes in pixels, ascending; empty where there is but one."""
        return sorted({side for side in self.sides if side})

    @property
    def side(self) -> Ints:
        """Each record's stored size in pixels, [n]; 0 where there is but one."""
        return np.array([side or 0 for side in self.sides], np.int64)[self.file]

    def is_file(self, index: int) -> bool:
        """Whether a record is all of its file, which then is the picture itself."""
        return bool(self.offset[index] == 0 and self.length[index] == self.stamps[self.file[index]].size)

    def describe(self, index: int) -> str:
        """File, record number and id, for messages; of a picture that is a file, just its path."""
        path = self.files[self.file[index]]
        if self.is_file(index):
            return str(path)
        name = f" (id {self.ids[index]})" if self.ids[index] else ""
        return f"{path}, record {self.number[index]}{name}"

    def select(self, indices: Ints | Bools) -> Records:
        """The records at `indices` ([m] or [n]), in that order."""
        columns = {name: getattr(self, name)[indices] for name in (*COLUMNS, "file")}
        return replace(self, **columns, contents=self.contents and self.contents.select(indices))

    def require(self, feature: Literal["image", "id", "class"]) -> None:
        """Raise UserError naming the first record that lacks `feature`."""
        missing = {"image": self.offset < 0, "id": self.ids == "", "class": self.labels == NO_LABEL}[feature]
        if missing.any():
            index = int(np.argmax(missing))
            lacked = feature if self.is_file(index) else f"feature '{feature}'"
            mend = self.mends[self.file[index]]
            raise UserError(f"{self.describe(index)} has no {lacked}, which this command needs: {mend}.")

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
    """The records of all parts, one part after another; what is not known of those of a part stays unknown."""
    if len(parts) == 1:
        return parts[0]
    first = np.cumsum([0, *(len(part.files) for part in parts)])
    contents = None
    if any(part.contents for part in parts):
        contents = Contents.join([part.contents or Contents.unknown(len(part)) for part in parts])
    return Records(
        files=tuple(path for part in parts for path in part.files),
        stamps=tuple(stamp for part in parts for stamp in part.stamps),
        counts=tuple(count for part in parts for count in part.counts),
        counts_by_name=tuple(count for part in parts for count in part.counts_by_name),
        sides=tuple(side for part in parts for side in part.sides),
        mends=tuple(mend for part in parts for mend in part.mends),
        file=np.concatenate([part.file + start for part, start in zip(parts, first[:-1], strict=True)]),
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS},
        contents=contents,
    )


def fingerprint(records: Records, code: str) -> str:
    """Names what code of the digest `code` finds out about these records, in the cache; changes when a file does."""
    return cache_key(code, records.files, records.stamps, records.file, records.offset, records.length)


def miscounted(records: Records) -> list[str]:
    """A sentence for each file that has fewer or more records than its name says.

    A file that was cut off between two records shows it in nothing else.
    """
    counts = dict(zip(records.files, zip(records.counts, records.counts_by_name, strict=True), strict=True))
    return [
        f"{path} has {count} records, but by its name {said}: copy or download it again, or correct its name."
        for path, (count, said) in counts.items()
        if said not in (None, count)
    ]


def read_image(records: Records, index: int) -> Bytes:
    """The encoded image of a record, [length].

    A plain read: a file that shrinks or vanishes while it is used is an error here, where a memory map would crash.

    Raises:
        UserError: names file and record.
    """
    number, length = records.file[index], int(records.length[index])
    stamp = records.stamps[number]
    try:
        # kept by name while it is read: another thread may drop it from the cache, which closes it
        file = open_kept(records.files[number], stamp)
        same = file.stamp.content == stamp.content
        data = os.pread(file.descriptor, length, int(records.offset[index])) if same else b""
    except OSError as error:
        where = records.describe(index)
        raise UserError(f"{where} cannot be read ({error.strerror}): check its permissions and the disk.") from error
    if len(data) < length:
        raise UserError(f"{records.describe(index)} cannot be read: the file has changed since it was indexed.")
    return np.frombuffer(data, np.uint8)


class OpenFile:
    """An open file, until nobody refers to it."""

    def __init__(self, path: Path) -> None:
        """Open it; OSError where that cannot be done."""
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor).atexit = False
        self.stamp = Stamp.of(os.fstat(self.descriptor))


@functools.lru_cache(maxsize=KEPT_OPEN)
def open_kept(path: Path, stamp: Stamp) -> OpenFile:
    """A file that had a stamp when it was indexed, and that stays open as long as it is among the last ones used.

    Raises:
        OSError: it cannot be opened.
    """
    return OpenFile(path)
