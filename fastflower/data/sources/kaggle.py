"""The layout of Kaggle's flowers: pictures at several sizes, ROOT/tfrecords-jpeg-SxS/{train,val,test}/*.tfrec."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from fastflower.config import SPLITS, DataConfig
from fastflower.data import records
from fastflower.data.records import COLUMNS, NO_LABEL, Progress, Records, concatenate, miscounted
from fastflower.data.sources import tfrecord
from fastflower.data.sources.layout import Layout, Loaded, Problem
from fastflower.data.sources.tfrecord import SUFFIXES, damaged_payloads, scan
from fastflower.data.stamp import Stamp, cache_key, require_unchanged, stamp_of
from fastflower.errors import UserError
from fastflower.files import atomic_write, cache_dir, code_digest

Sizes = Literal["auto", "all"] | Sequence[int]
_SIZE_FOLDER = re.compile(r"tfrecords-jpeg-(\d+)x(\d+)")
_COUNTED = re.compile(rf".*\d-(\d+)x\1-(?P<count>\d+)({'|'.join(map(re.escape, SUFFIXES))})")


class SizedTFRecords(Layout):
    """TFRecord files, in a folder for each stored size, or for one size in the splits' folders."""

    form = "tfrecords-jpeg-SxS/{train,val,test}/*.tfrec"
    ids_are_of_split = False
    holds_out = False

    def holds(self, root: Path) -> bool:
        """Whether there is such a folder, or it is one, or a split's folder has TFRecord files."""
        if any(_SIZE_FOLDER.fullmatch(name) for name in (root.name, *os.listdir(root))):
            return True
        folders = (root / split for split in SPLITS)
        return any(name.endswith(SUFFIXES) for folder in folders if folder.is_dir() for name in os.listdir(folder))

    def splits(self, root: Path) -> list[str]:
        """Those that some size has."""
        folders = (root, *_size_folders(root))
        return [split for split in SPLITS if any((folder / split).is_dir() for folder in folders)]

    def load(self, root: Path, split: str, data: DataConfig) -> Loaded:
        """See `load_split`; classes are numbers."""
        return Loaded(load_split(root, split, sizes=data.sizes, scale_min=data.scale[0]), None)

    def names_file(self, root: Path) -> Path:
        """Beside the folders of the sizes."""
        root = root.resolve()
        return super().names_file(root.parent if _SIZE_FOLDER.fullmatch(root.name) else root)

    def inspect(self, root: Path, follow: Callable[[str], Progress]) -> tuple[dict[str, Loaded], list[Problem]]:
        """The records of all files that can be read, and what is wrong with files and checksums."""
        files, problems = [], []
        for split in self.splits(root):
            paths, missing = _stored_files(root, split)
            files += [(split, path) for path in paths]
            problems += missing
        if not files:
            raise UserError(
                f"{root} holds no TFRecord files in train, val or test or in tfrecords-jpeg-SxS folders: "
                "give the data set's folder."
            )
        parts: dict[str, list[Records]] = {}
        progress = follow("verify checksums")
        for done, (split, path) in enumerate(files, start=1):
            try:
                damaged = list(damaged_payloads(path))
                part = load_files([path])
            except UserError as error:
                problems.append(Problem("file", split, str(path), None, "", str(error)))
            else:
                parts.setdefault(split, []).append(part)
                problems += [Problem("count", split, str(path), None, "", text) for text in miscounted(part)]
                text = "does not match its checksum: copy or download the file again"
                problems += [Problem("crc", split, str(path), i, str(part.ids[i]), text) for i in damaged]
            progress(done, len(files))
        return {split: Loaded(concatenate(own), None) for split, own in parts.items()}, problems


def load_split(root: Path, split: str, *, sizes: Sizes = "auto", scale_min: int = 256) -> Records:
    """Index all records of a split; each has an image (see `Records.require` for the other features).

    Args:
        root: the data set's folder (see `find_files`).
        split: train, val or test.
        sizes: which of the stored sizes to take (see `find_files`).
        scale_min: pixels, the smallest shorter side that training resizes to; used by sizes="auto".

    Raises:
        UserError: no such files, or one of them is refused (`fastflower.data.sources.tfrecord.scan`).
    """
    records = load_files(find_files(root, split, sizes=sizes, scale_min=scale_min))
    records.require("image")
    return records


def load_files(files: Sequence[Path]) -> Records:
    """Index all records of TFRecord files, also those without an image.

    Raises:
        UserError: one of them is refused (`fastflower.data.sources.tfrecord.scan`).
    """
    stamps = tuple(stamp_of(path) for path in files)
    indexes = [_index(path, stamp) for path, stamp in zip(files, stamps, strict=True)]
    columns: dict[str, Any] = {name: np.concatenate([index[name] for index in indexes]) for name in COLUMNS}
    counts = tuple(len(index["labels"]) for index in indexes)
    return Records(
        files=tuple(files),
        stamps=stamps,
        counts=counts,
        counts_by_name=tuple(count_by_name(path) for path in files),
        sides=tuple(_size_named(path.parent.parent) for path in files),
        mends=("write it or drop the file",) * len(files),
        file=np.repeat(np.arange(len(files)), counts),
        **columns,
    )


def find_files(root: Path, split: str, *, sizes: Sizes = "auto", scale_min: int = 256) -> list[Path]:
    """TFRecord files of a split, sorted by size folder and name.

    `root` holds `tfrecords-jpeg-SxS` folders, or is one of them, or holds the split's folder itself.
    sizes "auto" takes the smallest stored size that is at least `scale_min` pixels, else the largest; "all" takes each;
    a list takes those named.

    Raises:
        UserError: the folder, the split or a named size is missing.
    """
    if not root.is_dir():
        raise UserError(f"--data.root {root} is not a folder: give the one that holds tfrecords-jpeg-SxS folders.")
    stored = {size: path for path in _size_folders(root) if (size := _size_named(path))}
    if stored:
        folders = [stored[size] / split for size in _choose_sizes(root, sorted(stored), sizes, scale_min)]
    else:
        folders = [root / split]
    files: list[Path] = []
    for folder in folders:
        paths = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES) if folder.is_dir() else []
        if not paths:
            raise UserError(
                f"{folder} holds no TFRecord files ({', '.join(SUFFIXES)}): "
                f"give a --data.root with tfrecords-jpeg-SxS/{split}/ in it."
            )
        files += paths
    return files


def _stored_files(root: Path, split: str) -> tuple[list[Path], list[Problem]]:
    """The files of a split at all stored sizes, and the sizes that lack it although others have it."""
    files, problems = [], []
    for folder in _size_folders(root) or [root]:
        try:
            files += find_files(folder, split)
        except UserError as error:
            problems.append(Problem("file", split, str(folder / split), None, "", str(error)))
    return files, problems


def _size_folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if _size_named(path) and path.is_dir())


def _size_named(folder: Path) -> int | None:
    """The size in pixels that a folder's name says its pictures have."""
    match = _SIZE_FOLDER.fullmatch(folder.name)
    return int(match[1]) if match else None


def count_by_name(path: Path) -> int | None:
    """The number of records that a file's name says it has, if it is NN-SxS-COUNT."""
    match = _COUNTED.fullmatch(path.name)
    return int(match["count"]) if match else None


def _choose_sizes(root: Path, stored: list[int], sizes: Sizes, scale_min: int) -> list[int]:
    if sizes == "all":
        return stored
    if sizes == "auto":
        return [next((size for size in stored if size >= scale_min), stored[-1])]
    missing = [size for size in sizes if size not in stored]
    if missing or not sizes:
        raise UserError(
            f"data.sizes: {root} has no size {', '.join(map(str, missing)) or '(none is named)'}; "
            f"it has {', '.join(map(str, stored))}."
        )
    return sorted({int(size) for size in sizes})


def _index(path: Path, stamp: Stamp) -> dict[str, NDArray[Any]]:
    """The columns of one file, from the cache when path and stamp are those of an earlier scan."""
    cached = (
        cache_dir()
        / "index"
        / f"{cache_key(code_digest(__file__, records.__file__, tfrecord.__file__), [path], [stamp])}.npz"
    )
    try:
        with np.load(cached, allow_pickle=False) as columns:
            return {name: columns[name] for name in COLUMNS}
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, BadZipFile):
        pass  # absent, or not written by us: scan again
    examples = list(scan(path))
    require_unchanged(path, stamp)
    index: dict[str, Any] = {
        "number": np.arange(len(examples)),
        "offset": np.array([e.image[0] if e.image else -1 for e in examples], np.int64),
        "length": np.array([e.image[1] if e.image else 0 for e in examples], np.int64),
        "ids": np.array([e.id or "" for e in examples], np.str_),
        "labels": np.array([NO_LABEL if e.label is None else e.label for e in examples], np.int64),
    }
    buffer = BytesIO()
    np.savez(buffer, **index)
    try:
        with atomic_write(cached) as file:
            file.write(buffer.getbuffer())
    except OSError:
        pass  # a cache that cannot be written costs a scan each time, nothing else
    return index
