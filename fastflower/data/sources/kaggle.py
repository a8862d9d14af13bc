"""The layout of Kaggle's flowers: pictures at several sizes, ROOT/tfrecords-jpeg-SxS/{train,val,test}/*.tfrec."""

from __future__ import annotations

import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Literal
from zipfile import BadZipFile

import numpy as np

from fastflower.config import SPLITS
from fastflower.data import records
from fastflower.data.records import COLUMNS, NO_LABEL, SIZE_FOLDER, SUFFIXES, Records
from fastflower.data.sources import tfrecord
from fastflower.data.sources.tfrecord import scan
from fastflower.data.stamp import Stamp, cache_key, require_unchanged, stamp_of
from fastflower.errors import UserError
from fastflower.files import atomic_write, cache_dir, code_digest

Sizes = Literal["auto", "all"] | Sequence[int]


def holds_tfrecords(root: Path) -> bool:
    """Whether `find_files` is the one to look into a folder."""
    if any(SIZE_FOLDER.fullmatch(name) for name in (root.name, *os.listdir(root))):
        return True
    folders = (root / split for split in SPLITS)
    return any(name.endswith(SUFFIXES) for folder in folders if folder.is_dir() for name in os.listdir(folder))


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
    tables = [_index(path, stamp) for path, stamp in zip(files, stamps, strict=True)]
    columns = {name: np.concatenate([table[name] for table in tables]) for name in COLUMNS}
    counts = tuple(len(table["labels"]) for table in tables)
    return Records(
        files=tuple(files), stamps=stamps, counts=counts, file=np.repeat(np.arange(len(files)), counts), **columns
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
    stored = {int(m[1]): path for path in root.iterdir() if (m := SIZE_FOLDER.fullmatch(path.name)) and path.is_dir()}
    if stored:
        folders = [stored[size] / split for size in _choose_sizes(root, sorted(stored), sizes, scale_min)]
    else:
        folders = [root / split]
    files: list[Path] = []
    for folder in folders:
        found = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES) if folder.is_dir() else []
        if not found:
            raise UserError(
                f"{folder} holds no TFRecord files ({', '.join(SUFFIXES)}): "
                f"give a --data.root with tfrecords-jpeg-SxS/{split}/ in it."
            )
        files += found
    return files


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


def _index(path: Path, stamp: Stamp) -> dict[str, np.ndarray]:
    """The columns of one file, from the cache when path and stamp are those of an earlier scan."""
    cached = (
        cache_dir()
        / "index"
        / f"{cache_key(code_digest(__file__, records.__file__, tfrecord.__file__), [path], [stamp])}.npz"
    )
    try:
        with np.load(cached, allow_pickle=False) as table:
            return {name: table[name] for name in COLUMNS}
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, BadZipFile):
        pass  # absent, or not written by us: scan again
    examples = list(scan(path))
    require_unchanged(path, stamp)
    table = {
        "number": np.arange(len(examples)),
        "offset": np.array([e.image[0] if e.image else -1 for e in examples], np.int64),
        "length": np.array([e.image[1] if e.image else 0 for e in examples], np.int64),
        "ids": np.array([e.id or "" for e in examples], np.str_),
        "labels": np.array([NO_LABEL if e.label is None else e.label for e in examples], np.int64),
    }
    buffer = BytesIO()
    np.savez(buffer, **table)
    try:
        with atomic_write(cached) as file:
            file.write(buffer.getbuffer())
    except OSError:
        pass  # a cache that cannot be written costs a scan each time, nothing else
    return table
