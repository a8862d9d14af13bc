"""What tells that a file is another than before: the one place that decides when something kept for it holds."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from fastflower.errors import UserError
from fastflower.files import digest


class Stamp(NamedTuple):
    """What a file system knows of a file's content.

    Copying, synchronizing and unpacking can give a new content the old size and modification time, but none of them
    the old time of change and inode.
    """

    size: int  # bytes
    mtime_ns: int  # of the last modification
    ctime_ns: int  # of the last change, also of name, links and permissions
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        """The stamp of what os.stat has found."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)

    @property
    def content(self) -> tuple[int, int]:
        """What stays while a file is in use, although somebody links it or changes its permissions."""
        return self.size, self.mtime_ns


def cache_key(code: str, files: Iterable[Path], stamps: Iterable[Stamp], *columns: NDArray[Any]) -> str:
    """The name in the cache of what code of the digest `code` finds out about files, and what `columns` say of them."""
    parts = (code.encode(), *file_keys(files, stamps), *(column.tobytes() for column in columns))
    return digest(*parts, size=16).hex()


def file_keys(files: Iterable[Path], stamps: Iterable[Stamp]) -> Iterator[bytes]:
    """Of each file 16 bytes that no other has, and not this one either once its stamp is another."""
    settled = functools.cache(os.path.realpath)  # a picture's folder holds many
    for path, stamp in zip(files, stamps, strict=True):
        folder, name = os.path.split(path)
        text = f"{settled(folder)}\0{name}\0{tuple(stamp)}"
        yield digest(os.fsencode(text), size=16)


def stamp_of(path: Path) -> Stamp:
    """A file's stamp.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return Stamp.of(path.stat())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check that it exists.") from error


def require_unchanged(path: Path, stamp: Stamp) -> None:
    """Raise UserError if a file has another stamp than before it was read: what was read may be half of each."""
    if stamp_of(path).content != stamp.content:
        raise UserError(f"{path} has changed while it was read: start again when nobody writes to it.")
