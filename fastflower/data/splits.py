"""From the data's folders to one table of records for each split: which layout, which classes, what is left out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fastflower.config import DataConfig
from fastflower.data.classes import listed_classes, numbered_classes
from fastflower.data.contents import Progress
from fastflower.data.folds import assign_folds, hold_out
from fastflower.data.names import are_places, class_index, find
from fastflower.data.records import NO_LABEL, Records, concatenate
from fastflower.data.sources.folder import LAYOUTS, load_folder
from fastflower.data.sources.kaggle import holds_tfrecords, load_split
from fastflower.errors import UserError


@dataclass(frozen=True)
class Part:
    """What one of the data's folders has of a split."""

    root: Path
    split: str
    records: Records
    names: list[str] | None  # what the labels stand for; None where they are mere numbers


def load_parts(data: DataConfig, seed: int, *splits: str, progress: Progress | None = None) -> list[list[Part]]:
    """Index splits: for each of them the parts that the folders of `data.root` have of it.

    With data.folds, val is a fold of train and val together, and train the other folds (`assign_folds`). Without, a
    folder of classes that has no val gives up data.val_share of its training pictures, chosen by `seed` (`hold_out`).
    Either way copies of a picture are on one side, for which `progress` takes records read and to read.

    Raises:
        UserError: names the folder, file or record.
    """
    divide = _divide_by_fold if data.folds else _divide_by_share
    divided = divide(data, seed, progress) if set(splits) & {"train", "val"} else []

    def load(root: Path, split: str) -> list[Part]:
        here = [(part, validates) for part, validates in divided if part.root == root]
        if split == "test" or not here:
            return [_load(data, root, split)]
        return [
            Part(root, split, part.records.select(validates if split == "val" else ~validates), part.names)
            for part, validates in here
        ]

    return [[part for root in _roots(data) for part in load(root, split)] for split in splits]


def load_pool(data: DataConfig) -> list[Part]:
    """Index train and val of all folders of `data.root`, where they have both, for folds to divide.

    Ids of class folders with both start with the split, since the two may have pictures of the same name.

    Raises:
        UserError: names the folder, file or record.
    """
    pool = []
    for root in dict.fromkeys(_roots(data)):
        parts = [_load(data, root, split) for split in ("train", "val") if split == "train" or _has_val(root)]
        if len(parts) > 1 and not _holds_tfrecords(root):
            parts = [
                replace(part, records=replace(part.records, ids=np.char.add(f"{part.split}/", part.records.ids)))
                for part in parts
            ]
        pool += parts
    return pool


Divided = list[tuple[Part, np.ndarray]]  # undivided parts, and which of their records validate ([n] bool)


def _divide_by_fold(data: DataConfig, seed: int, progress: Progress | None) -> Divided:
    """Everything, by data.folds, which all stored sizes have a say in: whichever are used, a picture's fold is one."""
    assert data.folds
    everything = load_pool(replace(data, sizes="all"))
    records = join(everything, class_list(everything))
    folds = assign_folds(records, data.folds, seed, progress)
    fold_of = dict(zip(_places(records), folds.tolist(), strict=True))
    return [
        (part, np.array([fold_of[place] == data.fold for place in _places(part.records)])) for part in load_pool(data)
    ]


def _places(records: Records) -> Iterator[tuple[Path, int]]:
    """File of each record, and its number in it."""
    return zip((records.files[file] for file in records.file.tolist()), records.number.tolist(), strict=True)


def _divide_by_share(data: DataConfig, seed: int, progress: Progress | None) -> Divided:
    """Class folders without val, by data.val_share."""
    whole = [
        _load(data, root, "train")
        for root in dict.fromkeys(_roots(data))
        if not _holds_tfrecords(root) and not _has_val(root)
    ]
    if not whole:
        return []
    sizes = [len(part.records) for part in whole]
    folder = np.repeat(np.arange(len(whole)), sizes)
    validates = hold_out(join(whole, class_list(whole)), folder, data.val_share, seed, progress)
    return list(zip(whole, np.split(validates, np.cumsum(sizes)[:-1]), strict=True))


def class_list(train: Sequence[Part]) -> list[str]:
    """The classes of what trains by index: the names that files list, in their order, then those of class
    folders, sorted; or numbers, where no folder has names.

    Raises:
        UserError: some folders have names and others only numbers.
    """
    named = [part for part in train if part.names is not None]
    numbered = [part for part in train if part.names is None]
    if named and numbered:
        raise UserError(
            f"{numbered[0].root} has only numbers for classes, but {named[0].root} has names: "
            f"write the names into {numbered[0].root / 'class_names.json'}, a JSON list."
        )
    if numbered:
        return numbered_classes(concatenate([part.records for part in numbered]))
    listed = dict.fromkeys(name for part in named for name in listed_classes(part.root) or ())
    return [*listed, *sorted({name for part in named for name in part.names or ()} - set(listed))]


def join(parts: Sequence[Part], classes: list[str]) -> Records:
    """One table of a split, with labels by the class list of the training split.

    Raises:
        UserError: a class that is not in the list (a test picture then has no label), or no records at all.
    """
    joined = concatenate([_relabel(part, classes) for part in parts])
    if not len(joined):
        roots = ", ".join(str(part.root) for part in parts)
        raise UserError(
            f"{roots}: there are no records for {parts[0].split}: add some (a class needs two different pictures, "
            "for one to validate)."
        )
    return joined


def load_records(
    data: DataConfig, split: str, classes: list[str], seed: int, progress: Progress | None = None
) -> Records:
    """A split with labels by a known class list, and without what data.skip lists; see `load_parts` and `join`."""
    (parts,) = load_parts(data, seed, split, progress=progress)
    records = join(parts, classes)
    return leave_out(records, data.skip) if data.skip else records


def load_pictures(data: DataConfig, splits: Sequence[str], *, seed: int) -> Records:
    """The records of some splits together, for what asks for no classes; see `load_parts`."""
    return concatenate([part.records for parts in load_parts(data, seed, *splits) for part in parts])


def leave_out(records: Records, skip: Path) -> Records:
    """Without the records that data.skip lists; see `is_listed`."""
    return records.select(~is_listed(records, skip))


def is_listed(records: Records, skip: Path) -> np.ndarray:
    """Which records a file of what `fastflower data check --json` printed lists, [n] bool.

    Raises:
        UserError: it is no such file, or it lists all of them.
    """
    listed = _listed(skip)
    names = {path.name for path, _ in listed}
    suspects = {i: _settled(path) for i, path in enumerate(records.files) if path.name in names}
    bad = np.zeros(len(records), bool)
    for i in np.flatnonzero(np.isin(records.file, list(suspects))):
        bad[i] = (suspects[records.file[i]], records.number[i]) in listed
    if bad.all():
        raise UserError(f"{skip} lists every record of a split, which leaves nothing: shorten it or drop data.skip.")
    return bad


def _listed(skip: Path) -> set[tuple[Path, int]]:
    """File and record number of each problem with a record; a record without an id is none for training."""
    try:
        problems = json.loads(skip.read_text(encoding="utf-8"))["problems"]
        records = [each for each in problems if each["record"] is not None and each["kind"] != "no id"]
        return {(_settled(Path(problem["file"])), int(problem["record"])) for problem in records}
    except OSError as error:
        raise UserError(f"data.skip {skip} cannot be read ({error.strerror}): give an existing file.") from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"data.skip {skip} does not hold the problems that `fastflower data check ROOT --json` prints: "
            "write its output into it."
        ) from error


def _settled(path: Path) -> Path:
    """The same for each way to name a file's folder; a link to a file stays another file."""
    return path.parent.resolve() / path.name


def _roots(data: DataConfig) -> tuple[Path, ...]:
    if not data.root:
        raise UserError("--data.root names no folder: give one or more.")
    return data.root


def _has_val(root: Path) -> bool:
    return (root / "val").is_dir() or any(root.glob("tfrecords-jpeg-*x*/val"))


def _holds_tfrecords(root: Path) -> bool:
    if not root.is_dir():
        raise UserError(f"--data.root {root} is not a folder: {LAYOUTS}.")
    try:
        return holds_tfrecords(root)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): check its permissions.") from error


def _load(data: DataConfig, root: Path, split: str) -> Part:
    tfrecords, names = _holds_tfrecords(root), listed_classes(root)
    if tfrecords:
        records = load_split(root, split, sizes=data.sizes, scale_min=data.scale[0])
        if names and (records.labels != NO_LABEL).any():
            records.require_classes(len(names))
        return Part(root, split, records, names)
    records, folders = load_folder(root, split)
    unknown = set(folders) - set(names or folders)
    if unknown and split != "test":
        raise UserError(
            f"{root} has pictures of class {min(unknown)!r} in {split}, which its class_names.json does not list: "
            "correct the folder's name or the list."
        )
    return Part(root, split, records, folders)


def _relabel(part: Part, classes: list[str]) -> Records:
    if part.names == classes or (part.names is None and are_places(classes)):
        return part.records
    labelled = part.records.labels != NO_LABEL
    labels = part.records.labels.copy()
    found, place = np.unique(labels[labelled], return_inverse=True)
    names = [part.names[label] if part.names else str(label) for label in found.tolist()]
    index = class_index(classes)
    labels[labelled] = np.array([find(index, name, NO_LABEL) for name in names], np.int64)[place]
    unknown = labelled & (labels == NO_LABEL)
    if unknown.any() and part.split != "test":
        first = int(np.argmax(unknown))
        label = part.records.labels[first]
        name = part.names[label] if part.names else str(label)
        some = ", ".join(classes[:5]) + (", …" if len(classes) > 5 else "")
        raise UserError(
            f"{part.root} has pictures of class {name!r} in {part.split} "
            f"({part.records.describe(first)}), which is none of the {len(classes)} classes of training ({some}): "
            "correct the name or take them away."
        )
    return replace(part.records, labels=labels)
