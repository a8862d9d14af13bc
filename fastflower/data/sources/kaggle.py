"""The layout of Kaggle's flowers: pictures at several sizes, ROOT/tfrecords-jpeg-SxS/{train,val,test}/*.tfrec."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from fastflower.config import SPLITS, DataConfig
from fastflower.data import records
from fastflower.data.names import composed
from fastflower.data.records import COLUMNS, NO_LABEL, Progress, Records, concatenate, miscounted
from fastflower.data.sources import tfrecord
from fastflower.data.sources.layout import HIDDEN, NAMES_FILE, Inventory, Layout, LeftOuts, Loaded, Problem
from fastflower.data.sources.naming import (
    folders_by_split,
    is_foreign,
    one_each,
    other_names,
    require_text,
    split_meant,
)
from fastflower.data.sources.tfrecord import SUFFIXES, damaged_payloads, is_shard, missing_shards, scan
from fastflower.data.stamp import Stamp, cache_key, require_unchanged, stamp_of
from fastflower.errors import UserError
from fastflower.files import atomic_write, cache_dir, code_digest

Sizes = Literal["auto", "all"] | Sequence[int]
_SIZE_FOLDER = re.compile(r"tfrecords-jpeg-(\d+)x(\d+)", re.IGNORECASE)
_COUNTED = re.compile(rf".*\d-(\d+)x\1-(?P<count>\d+)({'|'.join(map(re.escape, SUFFIXES))})", re.IGNORECASE)


class SizedTFRecords(Layout):
    """TFRecord files, in a folder for each stored size, or for one size in the splits' folders."""

    form = "tfrecords-jpeg-SxS/{train,val,test}/*.tfrec"
    ids_are_of_split = False
    holds_out = False

    def holds(self, root: Path) -> bool:
        """Whether there is such a folder, or it is one, or a split's folder has TFRecord files."""
        if any(_SIZE_FOLDER.fullmatch(name) for name in (root.name, *os.listdir(root))):
            return True
        folders = (folder for own in folders_by_split(root).values() for folder in own)
        return any(is_shard(name) and not is_foreign(name) for folder in folders for name in os.listdir(folder))

    def splits(self, root: Path) -> list[str]:
        """Those that some size has."""
        present = {split for folder in (root, *_size_folders(root)) for split in folders_by_split(folder)}
        return [split for split in SPLITS if split in present]

    def load(self, root: Path, split: str, data: DataConfig) -> Loaded:
        """See `load_split`; classes are numbers, or names where the records have them."""
        files = find_files(root, split, sizes=data.sizes, scale_min=data.scale[0])
        records, names = in_one_table(files)
        records.require("image")
        return Loaded(records, names, _beside_shards(files, missing_shards(files)))

    def survey(self, root: Path) -> Inventory:
        """What lies beside the folders of sizes and splits, and which folders are taken for what."""
        left_out, notes = LeftOuts(), []
        sizes = _size_folders(root)
        folders = sizes or [root]
        for folder in {root: None, **dict.fromkeys(folders)}:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if is_foreign(entry.name):
                        left_out.add(entry.path, kind=HIDDEN)
                    elif folder in folders and split_meant(entry.name) and entry.is_dir():
                        continue
                    elif entry.name != NAMES_FILE and Path(entry.path) not in sizes:
                        left_out.add_entry(entry, "beside the splits")
        for folder in folders:
            notes += other_names(one_each(folders_by_split(folder)))
        return Inventory(left_out.total(), tuple(dict.fromkeys(notes)))

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
        parts: dict[str, list[Named]] = {}
        progress = follow("verify checksums")
        for done, (split, path) in enumerate(files, start=1):
            try:
                damaged = list(damaged_payloads(path))
                part = _load_file(path)
            except UserError as error:
                problems.append(Problem("file", split, str(path), None, "", str(error)))
            else:
                parts.setdefault(split, []).append(part)
                records, _ = part
                problems += [Problem("count", split, str(path), None, "", text) for text in miscounted(records)]
                text = "does not match its checksum: copy or download the file again"
                problems += [Problem("crc", split, str(path), i, str(records.ids[i]), text) for i in damaged]
            progress(done, len(files))
        loaded = {}
        for split, own in parts.items():
            paths = [path for of, path in files if of == split]
            problems += [Problem("count", split, str(root), None, "", text) for text in missing_shards(paths)]
            loaded[split] = Loaded(*_joined(own), _beside_shards(paths))
        return loaded, problems


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
    return in_one_table(files)[0]


Named = tuple[Records, list[str] | None]  # records, and their classes' names by label; None = labels are numbers


def in_one_table(files: Sequence[Path]) -> Named:
    """Index all records of TFRecord files, with the names of their classes where the records have names, sorted.

    Raises:
        UserError: one of them is refused, or some records have a number for a class and others a name.
    """
    return _joined([_load_file(path) for path in files])


def _load_file(path: Path) -> Named:
    require_text(path)
    stamp = stamp_of(path)
    index = _index(path, stamp)
    columns: dict[str, Any] = {name: index[name] for name in COLUMNS}
    records = Records(
        files=(path,),
        stamps=(stamp,),
        counts=(len(index["labels"]),),
        counts_by_name=(count_by_name(path),),
        sides=(_size_named(path.parent.parent),),
        mends=("write it or drop the file",),
        file=np.zeros(len(index["labels"]), np.int64),
        **columns,
    )
    return records, index["names"].tolist() or None


def _joined(parts: Sequence[Named]) -> Named:
    named = [(records, names) for records, names in parts if names]
    numbered = [records for records, names in parts if not names and (records.labels != NO_LABEL).any()]
    if not named:
        return concatenate([records for records, _ in parts]), None
    if numbered:
        raise _mixed(named[0][0].files[0], numbered[0].files[0])
    together = sorted({name for _, names in named for name in names})
    place = {name: label for label, name in enumerate(together)}
    relabelled = []
    for part, names in parts:
        label = {NO_LABEL: NO_LABEL} | {own: place[name] for own, name in enumerate(names or ())}
        labels = np.array([label[own] for own in part.labels.tolist()], np.int64)
        relabelled.append(replace(part, labels=labels))
    return concatenate(relabelled), together


def _mixed(named: Path, numbered: Path) -> UserError:
    return UserError(
        f"{named} has names for classes, and {numbered} numbers: write the names or the numbers into all of them."
    )


def _beside_shards(files: Sequence[Path], notes: Sequence[str] = ()) -> Inventory:
    """What the splits' folders have beside these TFRecord files."""
    left_out, shards = LeftOuts(), {str(path) for path in files}
    for folder in dict.fromkeys(path.parent for path in files):
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_foreign(entry.name):
                    left_out.add(entry.path, kind=HIDDEN)
                elif entry.path not in shards:
                    left_out.add_entry(entry, "no TFRecords")
    return Inventory(left_out.total(), tuple(notes))


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
    chosen = _choose_sizes(root, sorted(stored), sizes, scale_min) if stored else []
    above = [stored[size] for size in chosen] or [root]
    files: list[Path] = []
    for folder in (one_each(folders_by_split(outer)).get(split, outer / split) for outer in above):
        paths = sorted(path for path in folder.iterdir() if _is_own_shard(path)) if folder.is_dir() else []
        if not paths:
            raise UserError(
                f"{folder} holds no TFRecord files ({', '.join(SUFFIXES)}): "
                f"give a --data.root with tfrecords-jpeg-SxS/{split}/ in it."
            )
        files += paths
    return files


def _is_own_shard(path: Path) -> bool:
    return is_shard(path.name) and not is_foreign(path.name) and not path.is_dir()


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
            return {name: columns[name] for name in (*COLUMNS, "names")}
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, BadZipFile):
        pass  # absent, or not written by us: scan again
    examples = list(scan(path))
    require_unchanged(path, stamp)
    names = sorted({composed(e.label) for e in examples if isinstance(e.label, str)})
    if names and any(isinstance(e.label, int) for e in examples):
        raise _mixed(path, path)
    place = {name: label for label, name in enumerate(names)}
    labels = [place[composed(e.label)] if isinstance(e.label, str) else e.label for e in examples]
    index: dict[str, Any] = {
        "number": np.arange(len(examples)),
        "offset": np.array([e.image[0] if e.image else -1 for e in examples], np.int64),
        "length": np.array([e.image[1] if e.image else 0 for e in examples], np.int64),
        "ids": np.array([e.id or "" for e in examples], np.str_),
        "labels": np.array([NO_LABEL if label is None else label for label in labels], np.int64),
        "names": np.array(names, np.str_),
    }
    buffer = BytesIO()
    np.savez(buffer, **index)
    try:
        with atomic_write(cached) as file:
            file.write(buffer.getbuffer())
    except OSError:
        pass  # a cache that cannot be written costs a scan each time, nothing else
    return index
