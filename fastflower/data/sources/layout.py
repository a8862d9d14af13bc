"""What a layout on disk says of a data folder; all else asks it, and never which layout it is.

A layout gives records (`fastflower.data.records.Records`), which are located, not read: a record is an encoded picture
that lies as it is, `length` bytes from `offset` on, in a file that this process can open. With it come its number,
which no other record of the file has and which stays, since `data.skip` names a record by it, its id and its label.
What lies otherwise (compressed, or on another machine) a layout first has to put into a file, of the user's cache
folder say.

To add one, derive a class from `Layout` in a file of its own, and add it to the registry in
`fastflower/data/sources/__init__.py`.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from fastflower.config import DataConfig
from fastflower.data.records import Progress, Records
from fastflower.errors import UserError

NAMES_FILE = "class_names.json"
Kind = Literal["file", "count", "crc", "unreadable", "shape", "class", "no id", "id twice", "duplicate", "leak"]


@dataclass(frozen=True)
class Problem:
    """Something to mend, or to leave out."""

    kind: Kind
    split: str
    file: str  # absolute path
    record: int | None  # its number in the file; None = the file as a whole
    id: str  # "" where there is none
    text: str


@dataclass(frozen=True)
class LeftOut:
    """Files of one kind, or a folder, that are in a data folder and not used."""

    kind: str  # an extension (".txt"), a folder's name with a slash behind, NO_EXTENSION or HIDDEN
    why: str  # "" where the kind says it
    count: int
    example: str  # the first of their paths


NO_EXTENSION, HIDDEN = "without extension", "hidden or of the system"
_EXTENSION = re.compile(r"\.\w{1,10}")


class LeftOuts:
    """Takes what is left out while a folder is looked through."""

    def __init__(self) -> None:
        """Nothing is, so far."""
        self._paths: dict[tuple[str, str], list[str]] = defaultdict(list)

    def add(self, path: str, why: str = "", *, kind: str | None = None) -> None:
        """A file, of the kind that its extension says unless it is given."""
        if kind is None:
            extension = os.path.splitext(path)[1].lower()
            kind = extension if _EXTENSION.fullmatch(extension) else NO_EXTENSION
        self._paths[kind, why].append(path)

    def add_entry(self, entry: os.DirEntry[str], why: str) -> None:
        """Whatever it is: a folder, which is not looked into, or a file."""
        self.add(entry.path, why, kind=f"{entry.name}/" if entry.is_dir() else None)

    def total(self) -> tuple[LeftOut, ...]:
        """All of it, the most first, and what is hidden last."""
        rows = (LeftOut(kind, why, len(paths), min(paths)) for (kind, why), paths in self._paths.items())
        return tuple(sorted(rows, key=_rank))


def _rank(row: LeftOut) -> tuple[bool, int, str, str]:
    return row.kind == HIDDEN, -row.count, row.kind, row.why


@dataclass(frozen=True)
class Inventory:
    """How a data folder was understood, beside the records that it gave."""

    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()  # sentences on what is not plain

    @classmethod
    def join(cls, parts: Iterable[Inventory]) -> Inventory:
        """That of several folders."""
        parts = list(parts)
        rows: dict[tuple[str, str], list[LeftOut]] = defaultdict(list)
        for part in parts:
            for row in part.left_out:
                rows[row.kind, row.why].append(row)
        left_out = (
            LeftOut(*key, sum(row.count for row in own), min(row.example for row in own)) for key, own in rows.items()
        )
        notes = dict.fromkeys(note for part in parts for note in part.notes)
        return cls(tuple(sorted(left_out, key=_rank)), tuple(notes))

    def left_out_line(self, width: int = 80) -> str | None:
        """What is left out, in a line of at most `width` characters; None where there is nothing but hidden files."""
        rows = [row for row in self.left_out if row.kind != HIDDEN]
        if not rows:
            return None
        items = [
            (f"folder {row.kind}" if row.kind.endswith("/") else f"{row.count:,} {row.kind}")
            + (f" ({row.why})" if row.why else "")
            for row in rows
        ]
        for shown in range(len(items), 0, -1):
            more = sum(row.count for row in rows[shown:])
            rest = f", and {more:,} more: see `fastflower data check`" if more else ""
            line = f"Left out: {', '.join(items[:shown])}{rest}."
            if len(line) <= width:
                return line
        return f"Left out: {sum(row.count for row in rows):,} files or folders: see `fastflower data check`."


NOTHING_ELSE = Inventory()


@dataclass(frozen=True)
class Loaded:
    """A split, and what its labels are."""

    records: Records
    names: list[str] | None  # of the classes, by label; None = a label is a place in the data folder's list of classes
    inventory: Inventory = NOTHING_ELSE  # of the split's own folders


class Layout(ABC):
    """How a data set lies in a folder."""

    form: ClassVar[str]
    """What such a folder holds, to be read after "a data folder holds"."""
    ids_are_of_split: ClassVar[bool]
    """Whether the same id in another split is another picture, as where files are numbered anew in each."""
    renaming: ClassVar[str] = "correct the name"
    """What to do about a class that the data folder's list does not have, to be read before "or the list"."""
    holds_out: ClassVar[bool]
    """Whether train gives up `data.val_share` of its pictures where there is no val; otherwise it must be there."""

    @abstractmethod
    def holds(self, root: Path) -> bool:
        """Whether an existing folder is of this layout, by the names in it.

        Raises:
            OSError: it cannot be read.
        """

    @abstractmethod
    def splits(self, root: Path) -> list[str]:
        """Which splits the folder is divided into, in the order of `fastflower.config.SPLITS`."""

    @abstractmethod
    def load(self, root: Path, split: str, data: DataConfig) -> Loaded:
        """Index a split by what the settings say of it (such as `data.sizes`); each record has an image.

        Raises:
            UserError: there is no such split, or nothing in it, or it is not as it should be; names file or folder.
        """

    def survey(self, root: Path) -> Inventory:
        """What is beside the splits' folders, and how those were found; what is in them comes with each (`load`).

        Raises:
            UserError: the splits cannot be told apart.
        """
        return NOTHING_ELSE

    def likely_mend(self, root: Path) -> str | None:
        """Where the classes of a `root` that seems to have but one are, and what to do; None where nothing is known."""
        return None

    def names_file(self, root: Path) -> Path:
        """Where a list of class names is, if there is one."""
        return root / NAMES_FILE

    def inspect(self, root: Path, follow: Callable[[str], Progress]) -> tuple[dict[str, Loaded], list[Problem]]:
        """All that can be loaded of each split, at all stored sizes, and what is wrong with the rest.

        Here a split is loaded or refused. A layout that can tell more, or load more, does so in its own.

        Args:
            root: the data folder.
            follow: makes a callback for a named part of the work.

        Raises:
            UserError: there is nothing to look at.
        """
        loaded, problems = {}, []
        for split in self.splits(root):
            try:
                loaded[split] = self.load(root, split, DataConfig(sizes="all"))
            except UserError as error:
                problems.append(Problem("file", split, str(root), None, "", str(error)))
        return loaded, problems


def one_of(layouts: tuple[Layout, ...]) -> str:
    """What a data folder may hold, for the sentence that refuses one."""
    return f"a data folder holds {', or '.join(layout.form for layout in layouts)}"
