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

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from fastflower.config import DataConfig
from fastflower.data.records import Progress, Records
from fastflower.errors import UserError

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
class Loaded:
    """A split, and what its labels are."""

    records: Records
    names: list[str] | None  # of the classes, by label; None = a label is a place in the data folder's list of classes


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

    def names_file(self, root: Path) -> Path:
        """Where a list of class names is, if there is one."""
        return root / "class_names.json"

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
