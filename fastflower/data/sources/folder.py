"""Class folders: pictures as files, in ROOT/{train,val}/CLASS/ and ROOT/test/, or in ROOT/CLASS/ alone.

Each picture is a record of its own file. Its name's extension says that it is a picture, its content which kind.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastflower.config import SPLITS, DataConfig
from fastflower.data.records import NO_LABEL, Progress, Records
from fastflower.data.sources.files import records_of_files
from fastflower.data.sources.layout import Layout, Loaded, Problem, one_of
from fastflower.data.stamp import Stamp
from fastflower.errors import UserError

# What DALI decodes.
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k"),
)
FORM = "pictures as train/CLASS/*.jpg, val/CLASS/*.jpg and test/*.jpg, or as CLASS/*.jpg alone"
_NO_CLASSES = ("__MACOSX", "@eaDir")  # what archives and network drives put beside pictures

Picture = tuple[str, Stamp]  # path below the split's folder, with "/"


@dataclass(frozen=True)
class ClassFolders(Layout):
    """Pictures as files, in folders named after their classes."""

    besides: tuple[Layout, ...]  # what else the folder might have been, for the sentences that refuse it

    form = FORM
    ids_are_of_split = True
    renaming = "correct the folder's name"
    holds_out = True

    def holds(self, root: Path) -> bool:
        """Any folder; what it lacks is said when it is loaded."""
        return True

    def splits(self, root: Path) -> list[str]:
        """Those that have a folder."""
        return [split for split in SPLITS if split_folder(root, split)]

    def load(self, root: Path, split: str, data: DataConfig) -> Loaded:
        """See `load_folder`."""
        return self._load(root, split)

    def inspect(self, root: Path, follow: Callable[[str], Progress]) -> tuple[dict[str, Loaded], list[Problem]]:
        """The pictures of each split, also where classes of train are empty."""
        loaded, problems = {}, []
        for split in self.splits(root):
            empty: list[Path] = []
            try:
                loaded[split] = self._load(root, split, empty)
            except UserError as error:
                problems.append(Problem("file", split, str(split_folder(root, split)), None, "", str(error)))
            else:
                problems += [
                    Problem("file", split, str(folder), None, "", without_pictures(folder)) for folder in empty
                ]
        return loaded, problems

    def _load(self, root: Path, split: str, empty: list[Path] | None = None) -> Loaded:
        return Loaded(*load_folder(root, split, empty, expected=one_of((*self.besides, self))))


def split_folder(root: Path, split: str) -> Path | None:
    """Where the pictures of a split are; None where `root` has no such split. Without any, all of it is train."""
    if (root / split).is_dir():
        return root / split
    divided = any((root / name).is_dir() for name in SPLITS)
    return root if split == "train" and not divided else None


def load_folder(
    root: Path, split: str, empty: list[Path] | None = None, *, expected: str = f"a data folder holds {FORM}"
) -> tuple[Records, list[str]]:
    """Index the pictures of a split, sorted by path, with the names of their classes by label.

    A picture's id is its path below the split's folder, without the extension unless two differ in nothing else. Test
    pictures need no class folder, and have no label without one. Hidden files are left alone; links are followed.

    Args:
        root: the data set's folder.
        split: train, val or test.
        empty: takes the class folders of train without a picture; None = they are an error.
        expected: what a data folder holds, for the errors.

    Raises:
        UserError: there is no such split, no picture in it or in a class of train, a picture of train or val outside
            the class folders, or something cannot be read.
    """
    folder = split_folder(root, split)
    if folder is None:
        raise UserError(f"{root} has no folder {split}: {expected}.")
    try:
        pictures = sorted(_pictures(str(folder)))
        hollow = _class_folders(folder) - {path.partition("/")[0] for path, _ in pictures}
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): mend it or take it away.") from error
    loose = [path for path, _ in pictures if "/" not in path]
    if loose and split != "test":
        raise UserError(f"{folder / loose[0]} is in no class's folder: move it into one ({expected}).")
    if not pictures:
        raise UserError(f"{folder} holds no pictures ({', '.join(SUFFIXES)}): {expected}.")
    if hollow and split == "train":
        if empty is None:
            raise UserError(without_pictures(folder / min(hollow)))
        empty += [folder / name for name in sorted(hollow)]
    return _records(folder, pictures)


def without_pictures(folder: Path) -> str:
    """The sentence for a class's folder that is empty."""
    return f"{folder} holds no pictures ({', '.join(SUFFIXES)}): fill it or take it away."


def _pictures(folder: str, below: str = "", above: tuple[tuple[int, int], ...] = ()) -> list[Picture]:
    """All picture files below `folder`; a link to a folder that it lies in leads nowhere new."""
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in above:
        return []
    above = (*above, (status.st_dev, status.st_ino))
    pictures: list[Picture] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if _ignored(entry.name):
                continue
            if entry.is_dir():
                pictures += _pictures(entry.path, f"{below}{entry.name}/", above)
            elif entry.name.lower().endswith(SUFFIXES):
                status = entry.stat()
                if stat.S_ISREG(status.st_mode):
                    pictures.append((below + entry.name, Stamp.of(status)))
    return pictures


def _class_folders(folder: Path) -> set[str]:
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if not _ignored(entry.name) and entry.is_dir()}


def _ignored(name: str) -> bool:
    return name.startswith(".") or name in _NO_CLASSES


def _records(folder: Path, pictures: list[Picture]) -> tuple[Records, list[str]]:
    paths, stamps = zip(*pictures, strict=True)
    stems = np.array([path[: path.rindex(".")] for path in paths])
    _, same, counts = np.unique(stems, return_inverse=True, return_counts=True)
    classes = [path.partition("/")[0] if "/" in path else "" for path in paths]
    names = sorted(set(classes) - {""})
    index = {name: label for label, name in enumerate(names)} | {"": NO_LABEL}
    ids, labels = np.where(counts[same] > 1, paths, stems), np.array([index[name] for name in classes], np.int64)
    files = [folder / path for path in paths]
    return records_of_files(files, stamps, ids, labels, mend="put it into its class's folder"), names
