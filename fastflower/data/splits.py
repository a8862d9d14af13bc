"""From the data's folders to one table of records for each split: which layout, which classes, what is left out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fastflower.arrays import Bools, Ints
from fastflower.config import DataConfig
from fastflower.data.classes import listed_classes, numbered_classes
from fastflower.data.contents import contents_of, examined
from fastflower.data.folds import assign_folds, hold_out
from fastflower.data.names import alike, are_places, class_index, find
from fastflower.data.records import NO_LABEL, Progress, Records, concatenate
from fastflower.data.sources import layout_of
from fastflower.data.sources.layout import NAMES_FILE, NOTHING_ELSE, Inventory
from fastflower.errors import UserError


@dataclass(frozen=True)
class Part:
    """What one of the data's folders has of a split."""

    root: Path
    split: str
    records: Records
    names: list[str] | None  # what the labels stand for; None where they are mere numbers
    listed: list[str] | None  # the folder's own list of names, if it has one
    inventory: Inventory = NOTHING_ELSE  # of the folders that all its records are from


def load_parts(data: DataConfig, seed: int, *splits: str, progress: Progress | None = None) -> list[list[Part]]:
    """Index splits: for each of them the parts that the folders of `data.root` have of it.

    With data.folds, val is a fold of train and val together, and train the other folds (`assign_folds`). Without, a
    folder that has no val and needs none (`Layout.holds_out`) gives up data.val_share of its training pictures, chosen
    by `seed` (`hold_out`).
    Either way copies of a picture are on one side, for which `progress` takes records read and to read.

    Raises:
        UserError: names the folder, file or record.
    """
    divide = _divide_by_fold if data.folds else _divide_by_share
    divided = divide(data, seed, progress) if set(splits) & {"train", "val"} else []

    def load(root: Path, split: str) -> list[Part]:
        parts = [(part, validates) for part, validates in divided if part.root == root]
        if split == "test" or not parts:
            return [_load(data, root, split)]
        return [
            replace(
                part,
                split=split,
                records=part.records.select(validates if split == "val" else ~validates),
                inventory=part.inventory if part.split == split else NOTHING_ELSE,  # once, although both are of it
            )
            for part, validates in parts
        ]

    return [[part for root in _roots(data) for part in load(root, split)] for split in splits]


def load_pool(data: DataConfig) -> list[Part]:
    """Index train and val of all folders of `data.root`, where they have both, for folds to divide.

    Where an id is of its split alone (`Layout.ids_are_of_split`), it then starts with the split.

    Raises:
        UserError: names the folder, file or record.
    """
    pool = []
    for root in dict.fromkeys(_roots(data)):
        layout = layout_of(root)
        both = "val" in layout.splits(root)
        parts = [_load(data, root, split) for split in (("train", "val") if both else ("train",))]
        if both and layout.ids_are_of_split:
            parts = [
                replace(part, records=replace(part.records, ids=np.char.add(f"{part.split}/", part.records.ids)))
                for part in parts
            ]
        pool += parts
    return pool


Divided = list[tuple[Part, Bools]]  # undivided parts, and which of their records validate ([n])


def _divide_by_fold(data: DataConfig, seed: int, progress: Progress | None) -> Divided:
    """Everything, by data.folds, which all stored sizes have a say in: whichever are used, a picture's fold is one."""
    assert data.folds
    pool = load_pool(replace(data, sizes="all"))
    everything = examined(join(pool, class_list(pool)), progress)
    validates = assign_folds(everything, data.folds, seed) == data.fold
    row_of = {place: row for row, place in enumerate(_places(everything))}
    rows = ((part, np.array([row_of[place] for place in _places(part.records)])) for part in load_pool(data))
    return [(_examined(part, everything, own), validates[own]) for part, own in rows]


def _places(records: Records) -> Iterator[tuple[Path, int]]:
    """File of each record, and its number in it."""
    return zip((records.files[file] for file in records.file.tolist()), records.number.tolist(), strict=True)


def _divide_by_share(data: DataConfig, seed: int, progress: Progress | None) -> Divided:
    """The folders without val that give it up, by data.val_share."""
    layouts = {root: layout_of(root) for root in _roots(data)}
    whole = [
        _load(data, root, "train")
        for root, layout in layouts.items()
        if layout.holds_out and "val" not in layout.splits(root)
    ]
    if not whole:
        return []
    folder = np.repeat(np.arange(len(whole)), [len(part.records) for part in whole])
    everything = examined(join(whole, class_list(whole)), progress)
    validates = hold_out(everything, folder, data.val_share, seed)
    rows = ((part, np.flatnonzero(folder == number)) for number, part in enumerate(whole))
    return [(_examined(part, everything, own), validates[own]) for part, own in rows]


def _examined(part: Part, everything: Records, rows: Ints) -> Part:
    """A part with what the table that it went into knows of its records, which are at `rows` there."""
    return replace(part, records=replace(part.records, contents=contents_of(everything).select(rows)))


def class_list(train: Sequence[Part]) -> list[str]:
    """The classes of what trains by index: the names that files list, in their order, then those of class
    folders, sorted; or numbers, where no folder has names.

    Raises:
        UserError: some folders have names and others only numbers.
    """
    named, numbered = require_alike(train)
    if numbered:
        return numbered_classes(concatenate([part.records for part in numbered]))
    listed = dict.fromkeys(name for part in named for name in part.listed or ())
    return [*listed, *sorted({name for part in named for name in part.names or ()} - set(listed))]


def inventory_of(parts: Sequence[Part]) -> Inventory:
    """How the data folders were understood: what these parts have beside their records, and what is beside them."""
    roots = dict.fromkeys(part.root for part in parts)
    return Inventory.join([*(layout_of(root).survey(root) for root in roots), *(part.inventory for part in parts)])


def require_two_classes(root: Path, classes: Sequence[str]) -> None:
    """Raise UserError where there is but one class, which a network would always be right about.

    The data are then likely to lie elsewhere than in `root`.
    """
    if len(classes) != 1:
        return
    mend = layout_of(root).likely_mend(root) or "add pictures of another class"
    raise UserError(f"{root} has one class, {classes[0]}, and nothing to tell it from: {mend}.")


def require_alike(parts: Sequence[Part]) -> tuple[list[Part], list[Part]]:
    """Those whose classes have names, and those whose classes are numbers: one of the two is empty.

    Raises:
        UserError: some have names and others only numbers.
    """
    named = [part for part in parts if part.names is not None]
    numbered = [part for part in parts if part.names is None]
    labelled = [part for part in numbered if (part.records.labels != NO_LABEL).any()]
    if named and labelled:
        one, other = labelled[0], named[0]
        split, names_split = (f" in {part.split}" if one.root == other.root else "" for part in (one, other))
        raise UserError(
            f"{one.root} has only numbers for classes{split}, but {other.root} has names{names_split}: "
            f"write the names into {one.root / NAMES_FILE}, a JSON list."
        )
    return named, numbered


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


def is_listed(records: Records, skip: Path) -> Bools:
    """Which records a file of what `fastflower data check --json` printed lists, [n].

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
        of_records = [problem for problem in problems if problem["record"] is not None and problem["kind"] != "no id"]
        return {(_settled(Path(problem["file"])), int(problem["record"])) for problem in of_records}
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


def has_split(data: DataConfig, split: str) -> bool:
    """Whether each folder of the data has a split, which may still be empty; the built-in flowers have all."""
    return all(split in layout_of(root).splits(root) for root in data.root or ())


def _roots(data: DataConfig) -> tuple[Path, ...]:
    if not data.root:
        raise UserError("--data.root names no folder: give one or more.")
    return data.root


def _load(data: DataConfig, root: Path, split: str) -> Part:
    layout = layout_of(root)
    loaded, listed = layout.load(root, split, data), listed_classes(root)
    records, names = loaded.records, loaded.names
    if names is None:
        if listed and (records.labels != NO_LABEL).any():
            records.require_classes(len(listed))
        return Part(root, split, records, listed, listed, loaded.inventory)
    unknown = set(names) - set(listed or names)
    if unknown and split != "test":
        raise UserError(
            f"{root} has pictures of class {min(unknown)!r} in {split}, which its class_names.json does not list: "
            f"{layout.renaming} or the list."
        )
    return Part(root, split, records, names, listed, loaded.inventory)


def _relabel(part: Part, classes: list[str]) -> Records:
    if part.names == classes or (part.names is None and are_places(classes)):
        return part.records
    labelled = part.records.labels != NO_LABEL
    labels = part.records.labels.copy()
    distinct, place = np.unique(labels[labelled], return_inverse=True)
    names = [part.names[label] if part.names else str(label) for label in distinct.tolist()]
    index = class_index(classes)
    labels[labelled] = np.array([find(index, name, NO_LABEL) for name in names], np.int64)[place]
    unknown = labelled & (labels == NO_LABEL)
    if unknown.any() and part.split != "test":
        first = int(np.argmax(unknown))
        label = part.records.labels[first]
        name = part.names[label] if part.names else str(label)
        some = ", ".join(classes[:5]) + (", …" if len(classes) > 5 else "")
        near = next((own for own in classes if alike([own, name])), None)
        hint = f"call it {near!r}, if it is the same," if near else "correct the name"
        raise UserError(
            f"{part.root} has pictures of class {name!r} in {part.split} "
            f"({part.records.describe(first)}), which is none of the {len(classes)} classes of training ({some}): "
            f"{hint} or take them away."
        )
    return replace(part.records, labels=labels)
