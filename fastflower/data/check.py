"""Look at every record of a data set before a training run does: what is unreadable, there twice or has no class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.table import Table

from fastflower.config import SPLITS
from fastflower.data.classes import MAX_CLASSES, class_names, listed_classes
from fastflower.data.contents import digest
from fastflower.data.decoding import BATCH, ShapeDecoder, has_header
from fastflower.data.records import (
    NO_LABEL,
    Records,
    concatenate,
    is_picture,
    miscounted,
    read_image,
    stored_size,
)
from fastflower.data.sources.folder import load_folder, split_folder, without_pictures
from fastflower.data.sources.kaggle import find_files, holds_tfrecords, load_files
from fastflower.data.sources.tfrecord import damaged_payloads
from fastflower.errors import UserError

MAX_ASPECT = 8  # a square crop of anything longer shows less than an eighth of it
MIN_SIDE = 16  # pixels; what is smaller is an icon or a placeholder, and a blur once it is enlarged
SHOWN = 40  # problems on screen

Kind = Literal["file", "count", "crc", "unreadable", "shape", "class", "no id", "id twice", "duplicate", "leak"]
Progress = Callable[[int, int], None]


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
class Report:
    """What a data set holds."""

    root: Path
    splits: dict[str, dict[str, Any]]  # of each split: records, pictures (ids), classes that have some, stored sizes
    classes: dict[str, dict[str, int]]  # pictures by class name and split, of splits that have classes
    problems: list[Problem]

    def to_plain(self) -> dict[str, Any]:
        """What --json prints."""
        return asdict(self) | {"root": str(self.root)}


def check(root: Path, *, threads: int, follow: Callable[[str], Progress]) -> Report:
    """Read, verify and decode (on the CPU) all records of all splits at all stored sizes.

    Of two records that are the same picture one is reported: the later one, and of two splits the one in train rather
    than in val, and in val rather than in test, since that is the one to leave out.

    Args:
        root: the data set's folder.
        threads: of the decoder.
        follow: makes a callback (done, to do) for a named part of the work.

    Raises:
        UserError: there is no data set, or its list of class names is wrong.
    """
    root = root.absolute()
    if root.is_dir() and not holds_tfrecords(root):
        records, problems, names, unknown = _open_folder(root)
    else:
        parts, problems = _open(root, follow("verify checksums"))
        records = {split: concatenate(each) for split, each in parts.items() if each}
        names, unknown = _class_names(root, records), []
    if records:
        backwards = [split for split in reversed(SPLITS) if split in records]
        everything = concatenate([records[split] for split in backwards])
        split = np.repeat(backwards, [len(records[name]) for name in backwards])
        digests, shapes, unread = _examine(everything, threads, follow("decode"))
        found = [
            *_bad_pictures(everything, shapes, unread),
            *_bad_labels(everything, split, len(names), unknown),
            *_bad_ids(everything, split),
            *_same_pictures(everything, split, np.where(shapes[:, 0] > 0, digests, 0), [*names, *unknown]),
        ]
        problems += [_problem(everything, split, *each) for each in found]
    problems.sort(key=lambda p: (SPLITS.index(p.split), p.file, -1 if p.record is None else p.record))
    per_class = {name: _pictures_per_class(each, len(names)) for name, each in records.items()}
    return Report(
        root,
        splits={
            name: {
                "records": len(records[name]),
                "pictures": records[name].pictures,
                "classes": int((per_class[name] > 0).sum()),
                "sizes": records[name].sizes,
            }
            for name in SPLITS
            if name in records
        },
        classes={
            name: {split: int(counts[i]) for split, counts in per_class.items() if counts.any()}
            for i, name in enumerate(names)
        },
        problems=problems,
    )


def _open(root: Path, progress: Progress) -> tuple[dict[str, list[Records]], list[Problem]]:
    """The records of each split's files, and what is wrong with files and checksums."""
    files, problems = [], []
    for split in SPLITS:
        found, missing = split_files(root, split)
        files += [(split, path) for path in found]
        problems += missing
    if not files:
        sizes = "or in tfrecords-jpeg-SxS folders"
        raise UserError(f"{root} holds no TFRecord files in train, val or test {sizes}: give the data set's folder.")
    splits: dict[str, list[Records]] = {split: [] for split in SPLITS}
    for done, (split, path) in enumerate(files, start=1):
        try:
            damaged = list(damaged_payloads(path))
            records = load_files([path])
        except UserError as error:
            problems.append(Problem("file", split, str(path), None, "", str(error)))
        else:
            splits[split].append(records)
            problems += [Problem("count", split, str(path), None, "", each) for each in miscounted(records)]
            text = "does not match its checksum: copy or download the file again"
            problems += [Problem("crc", split, str(path), i, str(records.ids[i]), text) for i in damaged]
        progress(done, len(files))
    return splits, problems


def _open_folder(root: Path) -> tuple[dict[str, Records], list[Problem], list[str], list[str]]:
    """A folder of classes: the records of each split, what is wrong with its folders, the classes, and those of other
    splits that train does not have; their labels come after the others.
    """
    records, problems, names = {}, [], list(listed_classes(root) or [])
    unknown: list[str] = []
    for split in SPLITS:
        folder = split_folder(root, split)
        if not folder:
            continue
        empty: list[Path] = []
        try:
            found, classes = load_folder(root, split, empty)
        except UserError as error:
            problems.append(Problem("file", split, str(folder), None, "", str(error)))
            continue
        problems += [Problem("file", split, str(each), None, "", without_pictures(each)) for each in empty]
        if split == "train":
            names = names or classes
        unknown += [name for name in classes if name not in names + unknown]
        label = [(names + unknown).index(name) for name in classes]
        labels = np.array([each if each == NO_LABEL else label[each] for each in found.labels.tolist()], np.int64)
        records[split] = replace(found, labels=labels)
    return records, problems, names, unknown


def split_files(root: Path, split: str) -> tuple[list[Path], list[Problem]]:
    """The files of a split at all stored sizes, and the sizes that lack it although others have it."""
    if not root.is_dir():
        return find_files(root, split), []  # raises: it says what is wrong
    folders = sorted(path for path in root.glob("tfrecords-jpeg-*x*") if path.is_dir()) or [root]
    if not any((folder / split).is_dir() for folder in folders):
        return [], []
    files, problems = [], []
    for folder in folders:
        try:
            files += find_files(folder, split)
        except UserError as error:
            problems.append(Problem("file", split, str(folder / split), None, "", str(error)))
    return files, problems


def _class_names(root: Path, records: dict[str, Records]) -> list[str]:
    """Their names; where no file has them, the numbers up to the largest in the training split."""
    for each in (records[split] for split in SPLITS if split in records):
        labelled = each.select((each.labels >= 0) & (each.labels < MAX_CLASSES))
        if len(labelled):
            return class_names(root, labelled)
    return []


def _examine(records: Records, threads: int, progress: Progress) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Of each record: a digest of its encoded bytes ([n] uint64), and height and width ([n, 2], 0 = unreadable).

    And of those that the system refuses to read, why.
    """
    digests, shapes = np.zeros(len(records), np.uint64), np.zeros((len(records), 2), np.int64)
    unread: dict[int, str] = {}
    decoder = ShapeDecoder(threads)
    stored = np.flatnonzero(records.offset >= 0)
    for start in range(0, len(stored), BATCH):
        batch = stored[start : start + BATCH]
        encoded = {}
        for index in batch.tolist():
            try:
                data = read_image(records, index)
            except UserError as error:
                if not isinstance(error.__cause__, OSError):  # somebody writes to the data
                    raise
                unread[index] = f"cannot be read ({error.__cause__.strerror})"
            else:
                digests[index] = digest(data)
                if has_header(data):
                    encoded[index] = data
        if encoded:
            shapes[list(encoded)] = decoder.shapes(list(encoded.values()))
        for done in range(start, start + len(batch)):
            progress(done + 1, len(stored))
    return digests, shapes, unread


_Finding = tuple[int, Kind, str]  # number of the record, kind, text


def _problem(records: Records, split: np.ndarray, index: int, kind: Kind, text: str) -> Problem:
    path, number = records.files[records.file[index]], int(records.number[index])
    return Problem(kind, str(split[index]), str(path), number, str(records.ids[index]), text)


def _bad_pictures(records: Records, shapes: np.ndarray, unread: Mapping[int, str]) -> Iterator[_Finding]:
    for index, (height, width) in enumerate(shapes.tolist()):
        if index in unread:
            yield index, "unreadable", unread[index]
        elif records.offset[index] < 0:
            yield index, "unreadable", "has no feature 'image'"
        elif not height:
            yield index, "unreadable", f"cannot be decoded as a picture ({records.length[index]} bytes)"
        elif min(height, width) < MIN_SIDE or max(height, width) > MAX_ASPECT * min(height, width):
            yield index, "shape", f"is {width}×{height} pixels"


def _bad_labels(records: Records, split: np.ndarray, count: int, unknown: Sequence[str]) -> Iterator[_Finding]:
    missing = records.labels == NO_LABEL
    for index in np.flatnonzero(missing & (split != "test")).tolist():
        yield index, "class", "has no class"
    for index in np.flatnonzero(~missing & ((records.labels < 0) | (records.labels >= count))).tolist():
        label = int(records.labels[index])
        if unknown:
            yield index, "class", f"is of class {unknown[label - count]}, which train does not have"
        else:
            yield index, "class", f"has class {label}, outside 0..{(count or MAX_CLASSES) - 1}"


def _bad_ids(records: Records, split: np.ndarray) -> Iterator[_Finding]:
    named = records.ids != ""
    for index in np.flatnonzero(~named).tolist():
        yield index, "no id", "has no id"
    sizes = np.array([stored_size(path) or 0 for path in records.files])[records.file]
    for name in np.unique(split):
        for size in np.unique(sizes):
            chosen = np.flatnonzero(named & (split == name) & (sizes == size))
            for index, first in _repeats(chosen, records.ids):
                yield index, "id twice", f"has the id of {records.describe(first)}"


def _same_pictures(
    records: Records, split: np.ndarray, digests: np.ndarray, classes: Sequence[str]
) -> Iterator[_Finding]:
    """Equal bytes under several ids or in several splits, and equal ids in several splits; digest 0 = unreadable."""
    leaks = set()
    for index, first in _repeats(np.flatnonzero(digests), digests):
        leak = split[index] != split[first]
        if leak or records.ids[index] != records.ids[first] or not records.ids[index]:
            leaks.add(index)
            labels = records.labels[[index, first]]
            other = ""
            if labels[0] != labels[1] and NO_LABEL not in labels:
                known = 0 <= labels[1] < len(classes)
                other = f", there of class {classes[labels[1]] if known else labels[1]}"
            text = f"is the same picture as {records.describe(first)}{other}"
            yield index, "leak" if leak else "duplicate", text
    # files of class folders are numbered anew in each split, so their names tell nothing
    named = np.array([not is_picture(path) for path in records.files])[records.file] & (records.ids != "")
    for index, first in _repeats(np.flatnonzero(named), records.ids):
        if split[index] != split[first] and index not in leaks:
            yield index, "leak", f"has the id of {records.describe(first)}"


def _repeats(chosen: np.ndarray, values: np.ndarray) -> Iterator[tuple[int, int]]:
    """Each of the chosen numbers whose value came before, with the number where it came first."""
    _, first, group = np.unique(values[chosen], return_index=True, return_inverse=True)
    repeated = np.flatnonzero(first[group] != np.arange(len(chosen)))
    yield from zip(chosen[repeated].tolist(), chosen[first[group[repeated]]].tolist(), strict=True)


def _pictures_per_class(records: Records, count: int) -> np.ndarray:
    """[count] pictures; one id at several sizes is one."""
    once = records.ids == ""
    once[np.unique(records.ids, return_index=True)[1]] = True
    labels = records.labels[once]
    return np.bincount(labels[(labels >= 0) & (labels < count)], minlength=count)


def table(report: Report) -> Table:
    """The splits, for a terminal."""
    grid = Table("split", "records", "pictures", "classes", "sizes")
    for column in grid.columns[1:]:
        column.justify = "right"
    for name, split in report.splits.items():
        sizes = ", ".join(map(str, split["sizes"])) or "-"
        grid.add_row(name, f"{split['records']:,}", f"{split['pictures']:,}", f"{split['classes']:,}", sizes)
    return grid


def sentences(report: Report) -> Iterator[str]:
    """The problems, for a terminal: at most SHOWN of them, and how many there are."""
    for problem in report.problems[:SHOWN]:
        name = f" (id {problem.id})" if problem.id else ""
        number = "" if is_picture(Path(problem.file)) else f", record {problem.record}{name}"
        where = "" if problem.record is None else f"{problem.file}{number} "
        yield f"{problem.kind}: {where}{problem.text}"
    if len(report.problems) > SHOWN:
        yield f"and {len(report.problems) - SHOWN} more; --json lists all."
    kinds = Counter(problem.kind for problem in report.problems)
    total = f"{len(report.problems)} problems" if len(report.problems) > 1 else "1 problem"
    yield f"{total}: {', '.join(f'{n} {kind}' for kind, n in kinds.most_common())}" if kinds else "No problems."
