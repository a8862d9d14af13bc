"""Class folders: pictures as files, in ROOT/{train,val}/CLASS/ and ROOT/test/, or in ROOT/CLASS/ alone.

Each picture is a record of its own file. Its name's extension says that it is a picture, its content which kind.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastflower.config import SPLITS
from fastflower.data.records import NO_LABEL, Records, is_picture
from fastflower.data.stamp import Stamp, stamp_of
from fastflower.errors import UserError

# What DALI decodes.
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k"),
)
LAYOUTS = (
    "a data folder holds tfrecords-jpeg-SxS/{train,val,test}/*.tfrec, or pictures as train/CLASS/*.jpg, "
    "val/CLASS/*.jpg and test/*.jpg, or as CLASS/*.jpg alone"
)
_NO_CLASSES = ("__MACOSX", "@eaDir")  # what archives and network drives put beside pictures

Found = tuple[str, Stamp]  # path below the split's folder, with "/"


def split_folder(root: Path, split: str) -> Path | None:
    """Where the pictures of a split are; None where `root` has no such split. Without any, all of it is train."""
    if (root / split).is_dir():
        return root / split
    divided = any((root / name).is_dir() for name in SPLITS)
    return root if split == "train" and not divided else None


def load_folder(root: Path, split: str, empty: list[Path] | None = None) -> tuple[Records, list[str]]:
    """Index the pictures of a split, sorted by path, with the names of their classes by label.

    A picture's id is its path below the split's folder, without the extension unless two differ in nothing else. Test
    pictures need no class folder, and have no label without one. Hidden files are left alone; links are followed.

    Args:
        root: the data set's folder.
        split: train, val or test.
        empty: takes the class folders of train without a picture; None = they are an error.

    Raises:
        UserError: there is no such split, no picture in it or in a class of train, a picture of train or val outside
            the class folders, or something cannot be read.
    """
    folder = split_folder(root, split)
    if folder is None:
        raise UserError(f"{root} has no folder {split}: {LAYOUTS}.")
    try:
        found = sorted(_pictures(str(folder)))
        hollow = _class_folders(folder) - {path.partition("/")[0] for path, _ in found}
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): mend it or take it away.") from error
    loose = [path for path, _ in found if "/" not in path]
    if loose and split != "test":
        raise UserError(f"{folder / loose[0]} is in no class's folder: move it into one ({LAYOUTS}).")
    if not found:
        raise UserError(f"{folder} holds no pictures ({', '.join(SUFFIXES)}): {LAYOUTS}.")
    if hollow and split == "train":
        if empty is None:
            raise UserError(without_pictures(folder / min(hollow)))
        empty += [folder / name for name in sorted(hollow)]
    return _records(folder, found)


def without_pictures(folder: Path) -> str:
    """The sentence for a class's folder that is empty."""
    return f"{folder} holds no pictures ({', '.join(SUFFIXES)}): fill it or take it away."


def picture_files(paths: Sequence[Path]) -> Records:
    """Picture files that are named one by one, without classes; a path is the id.

    Raises:
        UserError: one cannot be read, is not a picture's file, or is given twice.
    """
    if not paths:
        raise UserError("--images names no picture: give one or more files.")
    for path, times in Counter(paths).items():
        if path.is_dir():
            raise UserError(f"{path} is a folder: give picture files, or a data set's folder as --data.root.")
        if not is_picture(path):
            raise UserError(f"{path} holds records and is no picture: give its data set's folder as --data.root.")
        if times > 1:
            raise UserError(f"{path} is given twice: give each picture once.")
    stamps = [stamp_of(path) for path in paths]
    return _one_each(paths, stamps, np.array([str(path) for path in paths]), np.full(len(paths), NO_LABEL))


def _pictures(folder: str, below: str = "", above: tuple[tuple[int, int], ...] = ()) -> list[Found]:
    """All picture files below `folder`; a link to a folder that it lies in leads nowhere new."""
    here = os.stat(folder)
    if (here.st_dev, here.st_ino) in above:
        return []
    above = (*above, (here.st_dev, here.st_ino))
    found: list[Found] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if _ignored(entry.name):
                continue
            if entry.is_dir():
                found += _pictures(entry.path, f"{below}{entry.name}/", above)
            elif entry.name.lower().endswith(SUFFIXES):
                status = entry.stat()
                if stat.S_ISREG(status.st_mode):
                    found.append((below + entry.name, Stamp.of(status)))
    return found


def _class_folders(folder: Path) -> set[str]:
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if not _ignored(entry.name) and entry.is_dir()}


def _ignored(name: str) -> bool:
    return name.startswith(".") or name in _NO_CLASSES


def _records(folder: Path, found: list[Found]) -> tuple[Records, list[str]]:
    paths, stamps = zip(*found, strict=True)
    stems = np.array([path[: path.rindex(".")] for path in paths])
    _, same, counts = np.unique(stems, return_inverse=True, return_counts=True)
    classes = [path.partition("/")[0] if "/" in path else "" for path in paths]
    names = sorted(set(classes) - {""})
    index = {name: label for label, name in enumerate(names)} | {"": NO_LABEL}
    ids, labels = np.where(counts[same] > 1, paths, stems), np.array([index[name] for name in classes], np.int64)
    return _one_each([folder / path for path in paths], stamps, ids, labels), names


def _one_each(files: Sequence[Path], stamps: Sequence[Stamp], ids: np.ndarray, labels: np.ndarray) -> Records:
    """Records that are files of their own."""
    return Records(
        files=tuple(files),
        stamps=tuple(stamps),
        counts=(1,) * len(files),
        file=np.arange(len(files)),
        number=np.zeros(len(files), np.int64),
        offset=np.zeros(len(files), np.int64),
        length=np.array([stamp.size for stamp in stamps], np.int64),
        ids=ids,
        labels=labels,
    )
