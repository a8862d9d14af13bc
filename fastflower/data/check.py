"""Look at every record of a data set before a training run does: what is unreadable, there twice or has no class."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from fastflower.arrays import Hashes, Ints, Strings
from fastflower.config import SPLITS
from fastflower.data.classes import MAX_CLASSES, class_notes, listed_classes, numbered_classes, pictures_per_class
from fastflower.data.contents import picture_digest
from fastflower.data.converted import UnreadableError
from fastflower.data.decoding import BATCH, ShapeDecoder, why_not
from fastflower.data.pieces import pieces
from fastflower.data.records import NO_LABEL, Progress, Records, concatenate, read_image
from fastflower.data.soundness import convert
from fastflower.data.sources import layout_of
from fastflower.data.sources.layout import Inventory, Kind, Loaded, Problem
from fastflower.data.splits import require_two_classes
from fastflower.data.view import Engine
from fastflower.errors import UserError
from fastflower.files import as_word
from fastflower.tables import NOTHING, new_table

MAX_ASPECT = 8  # a square crop of anything longer shows less than an eighth of it
MIN_SIDE = 16  # pixels; what is smaller is an icon or a placeholder, and a blur once it is enlarged
SHOWN = 40  # problems on screen
SHOWN_CLASSES = 40  # the most that a table has a row for


@dataclass(frozen=True)
class Report:
    """What a data set holds."""

    root: Path
    splits: dict[str, dict[str, Any]]  # of each split: records, pictures (ids), classes that have some, stored sizes
    classes: dict[str, dict[str, int]]  # pictures by class name and split, of splits that have classes
    problems: list[Problem]
    picture_files: frozenset[str]  # those of the problems' files that are pictures themselves
    inventory: Inventory  # what is there and not used
    notes: list[str]  # sentences on what is no problem, but not plain either

    def to_plain(self) -> dict[str, Any]:
        """What --json prints."""
        plain = asdict(self) | {"root": str(self.root), "left_out": [asdict(row) for row in self.inventory.left_out]}
        del plain["picture_files"], plain["inventory"]
        return plain


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
    layout = layout_of(root)
    loaded, problems = layout.inspect(root, follow)
    records, names, unknown = _in_one_list(root, loaded)
    picture_files: frozenset[str] = frozenset()
    if records:
        backwards = [split for split in reversed(SPLITS) if split in records]
        everything = concatenate([records[split] for split in backwards])
        split = np.repeat(backwards, [len(records[name]) for name in backwards])
        digests, shapes, unread = _examine(everything, threads, follow("decode"))
        findings = [
            *_bad_pictures(everything, shapes, unread),
            *_bad_labels(everything, split, len(names), unknown),
            *_bad_ids(everything, split),
            *_same_pictures(
                everything,
                split,
                np.where(shapes[:, 0] > 0, digests, np.uint64(0)),
                [*names, *unknown],
                ids_are_of_split=layout.ids_are_of_split,
            ),
        ]
        problems += [_problem(everything, split, *finding) for finding in findings]
        picture_files = frozenset(everything.describe(index) for index, _, _ in findings if everything.is_file(index))
    inventory = Inventory.join([layout.survey(root), *(part.inventory for part in loaded.values())])
    per_class = {split: pictures_per_class(part, len(names)) for split, part in records.items()}
    notes = [*inventory.notes]
    if "train" in records:
        notes += class_notes(names, {split: per_class[split] for split in ("train", "val") if split in records})
        problems += [Problem("class", "train", str(root), None, "", text) for text in _single_class(root, names)]
    problems.sort(key=lambda p: (SPLITS.index(p.split), p.file, -1 if p.record is None else p.record))
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
        picture_files=picture_files,
        inventory=inventory,
        notes=notes,
    )


def _single_class(root: Path, names: Sequence[str]) -> Iterator[str]:
    """What training would be refused with, where there is but one class."""
    try:
        require_two_classes(root, names)
    except UserError as error:
        yield str(error)


def _in_one_list(root: Path, loaded: Mapping[str, Loaded]) -> tuple[dict[str, Records], list[str], list[str]]:
    """Each split's records with labels by one list of classes; that list, which a file gives, or the first split that
    could be loaded; and the classes of other splits that are not in it, whose labels come after the others.
    """
    records = {split: loaded[split].records for split in SPLITS if split in loaded}
    if all(part.names is None for part in loaded.values()):
        return records, _numbered(root, records), []
    named = (loaded[split].names for split in SPLITS if split in loaded)
    names = listed_classes(root) or next((names for names in named if names), [])
    place = {name: label for label, name in enumerate(names)}
    for split, part in records.items():
        own = loaded[split].names
        numbers = np.unique(part.labels[part.labels != NO_LABEL]).tolist()
        called = dict(enumerate(own)) if own is not None else {number: str(number) for number in numbers}
        for name in called.values():
            place.setdefault(name, len(place))
        labels = [label if label == NO_LABEL else place[called[label]] for label in part.labels.tolist()]
        records[split] = replace(part, labels=np.array(labels, np.int64))
    return records, names, list(place)[len(names) :]


def _numbered(root: Path, records: Mapping[str, Records]) -> list[str]:
    """The classes' names, by number; where no file has them, the numbers up to the largest in the training split."""
    for part in (records[split] for split in SPLITS if split in records):
        labelled = part.select((part.labels >= 0) & (part.labels < MAX_CLASSES))
        if len(labelled):
            return listed_classes(root) or numbered_classes(labelled)
    return []


def _examine(records: Records, threads: int, progress: Progress) -> tuple[Hashes, Ints, dict[int, str]]:
    """Of each record: a digest of its encoded bytes ([n]), and height and width ([n, 2], 0 = unreadable).

    And of those that the system refuses to read, why.
    """
    digests, shapes = np.zeros(len(records), np.uint64), np.zeros((len(records), 2), np.int64)
    unread: dict[int, str] = {}
    decoder = ShapeDecoder(threads)
    stored = np.flatnonzero(records.offset >= 0)
    for piece in pieces(records.length[stored], Engine(threads=threads).piece, BATCH):
        batch = stored[piece]
        encoded = {}
        for index in batch.tolist():
            try:
                data = read_image(records, index)
            except UserError as error:
                if not isinstance(error.__cause__, OSError):  # somebody writes to the data
                    raise
                unread[index] = f"cannot be read ({error.__cause__.strerror})"
            else:
                digests[index] = picture_digest(data)
                with contextlib.suppress(UnreadableError):
                    encoded[index] = convert(data)
        if encoded:
            shapes[list(encoded)] = decoder.shapes(list(encoded.values()))
        for done in range(piece.start, piece.stop):
            progress(done + 1, len(stored))
    return digests, shapes, unread


_Finding = tuple[int, Kind, str]  # number of the record, kind, text


def _problem(records: Records, split: Strings, index: int, kind: Kind, text: str) -> Problem:
    path, number = records.files[records.file[index]], int(records.number[index])
    return Problem(kind, str(split[index]), str(path), number, str(records.ids[index]), text)


def _bad_pictures(records: Records, shapes: Ints, unread: Mapping[int, str]) -> Iterator[_Finding]:
    for index, (height, width) in enumerate(shapes.tolist()):
        if index in unread:
            yield index, "unreadable", unread[index]
        elif records.offset[index] < 0:
            yield index, "unreadable", "has no feature 'image'"
        elif not height:
            yield (
                index,
                "unreadable",
                f"cannot be decoded as a picture ({records.length[index]} bytes{why_not(records, index)})",
            )
        elif min(height, width) < MIN_SIDE or max(height, width) > MAX_ASPECT * min(height, width):
            yield index, "shape", f"is {width}×{height} pixels"


def _bad_labels(records: Records, split: Strings, count: int, unknown: Sequence[str]) -> Iterator[_Finding]:
    missing = records.labels == NO_LABEL
    for index in np.flatnonzero(missing & (split != "test")).tolist():
        yield index, "class", "has no class"
    for index in np.flatnonzero(~missing & ((records.labels < 0) | (records.labels >= count))).tolist():
        label = int(records.labels[index])
        if unknown:
            yield index, "class", f"is of class {unknown[label - count]}, which train does not have"
        else:
            yield index, "class", f"has class {label}, outside 0..{(count or MAX_CLASSES) - 1}"


def _bad_ids(records: Records, split: Strings) -> Iterator[_Finding]:
    named = records.ids != ""
    for index in np.flatnonzero(~named).tolist():
        yield index, "no id", "has no id"
    sizes = records.side
    for name in np.unique(split):
        for size in np.unique(sizes):
            chosen = np.flatnonzero(named & (split == name) & (sizes == size))
            for index, first in _repeats(chosen, records.ids):
                yield index, "id twice", f"has the id of {records.describe(first)}"


def _same_pictures(
    records: Records, split: Strings, digests: Hashes, classes: Sequence[str], *, ids_are_of_split: bool
) -> Iterator[_Finding]:
    """Equal bytes under several ids or in several splits, and equal ids in several splits, unless they mean nothing
    there; digest 0 = unreadable.
    """
    leaks = set()
    for index, first in _repeats(np.flatnonzero(digests), digests):
        leak = split[index] != split[first]
        if leak or records.ids[index] != records.ids[first] or not records.ids[index]:
            leaks.add(index)
            labels = records.labels[[index, first]]
            other = ""
            if labels[0] != labels[1] and NO_LABEL not in labels:
                named = 0 <= labels[1] < len(classes)
                other = f", there of class {classes[labels[1]] if named else labels[1]}"
            text = f"is the same picture as {records.describe(first)}{other}"
            yield index, "leak" if leak else "duplicate", text
    if ids_are_of_split:
        return
    for index, first in _repeats(np.flatnonzero(records.ids != ""), records.ids):
        if split[index] != split[first] and index not in leaks:
            yield index, "leak", f"has the id of {records.describe(first)}"


def _repeats(chosen: Ints, values: Hashes | Strings) -> Iterator[tuple[int, int]]:
    """Each of the chosen numbers whose value came before, with the number where it came first."""
    _, first, group = np.unique(values[chosen], return_index=True, return_inverse=True)
    repeated = np.flatnonzero(first[group] != np.arange(len(chosen)))
    yield from zip(chosen[repeated].tolist(), chosen[first[group[repeated]]].tolist(), strict=True)


def overview(report: Report) -> list[Table]:
    """The splits, the classes and what is left out, for a terminal."""
    splits = new_table("split", "records", "pictures", "classes", "sizes")
    for name, split in report.splits.items():
        sizes = ", ".join(map(str, split["sizes"])) or NOTHING
        splits.add_row(name, f"{split['records']:,}", f"{split['pictures']:,}", f"{split['classes']:,}", sizes)
    tables = [splits]
    if 0 < len(report.classes) <= SHOWN_CLASSES:
        shown = [name for name in report.splits if any(name in counts for counts in report.classes.values())]
        classes = new_table("class", *shown)
        for name, counts in report.classes.items():
            classes.add_row(Text(name), *(f"{counts[split]:,}" if split in counts else NOTHING for split in shown))
        tables.append(classes)
    if report.inventory.left_out:
        left_out = new_table("left out", "why", "such as", "files", names=3)
        for row in report.inventory.left_out:
            example = os.path.relpath(row.example, report.root)
            number = NOTHING if row.kind.endswith("/") else f"{row.count:,}"
            left_out.add_row(Text(row.kind), row.why or "no picture", Text(example), number)
        tables.append(left_out)
    return tables


def sentences(report: Report) -> Iterator[str]:
    """The problems, for a terminal: at most SHOWN of them, and how many there are."""
    for problem in report.problems[:SHOWN]:
        name = f" (id {problem.id})" if problem.id else ""
        number = "" if problem.file in report.picture_files else f", record {problem.record}{name}"
        where = "" if problem.record is None else f"{problem.file}{number} "
        yield f"{problem.kind}: {where}{problem.text}"
    if len(report.problems) > SHOWN:
        yield f"and {len(report.problems) - SHOWN} more; --json lists all."
    kinds = Counter(problem.kind for problem in report.problems)
    total = f"{len(report.problems)} problems" if len(report.problems) > 1 else "1 problem"
    yield f"{total}: {', '.join(f'{n} {kind}' for kind, n in kinds.most_common())}" if kinds else "No problems."
    if any(problem.record is not None and problem.kind != "no id" for problem in report.problems):
        yield (
            f"To train without these records: `fastflower data check {as_word(report.root)} --json > bad.json`, then "
            "`--data.skip bad.json`."
        )
