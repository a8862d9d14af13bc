"""The list of classes of a data folder: the names that a file gives, or the numbers that its records have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fastflower.arrays import Ints
from fastflower.data.names import alike, in_order, read_names
from fastflower.data.records import Records
from fastflower.data.sources import layout_of
from fastflower.errors import UserError

MAX_CLASSES = 100_000  # without a list of names; a larger number is a mistake, not a class


def listed_classes(root: Path) -> list[str] | None:
    """What `class_names.json` of the data folder lists; None where there is no such file.

    Raises:
        UserError: it does not list different names (see `read_names`).
    """
    path = layout_of(root).names_file(root)
    if not path.is_file():
        return None
    names = read_names(path)
    listed = in_order(names) if isinstance(names, dict) else names
    if listed is None:
        raise UserError(f"{path} numbers its names otherwise than 0 to {len(names) - 1}: write a list of class names.")
    return listed


def numbered_classes(train: Records) -> list[str]:
    """The numbers 0..C-1 up to the largest label, for classes without names.

    Raises:
        UserError: a record has no class, or one that cannot be meant.
    """
    train.require_classes(MAX_CLASSES)
    return [str(label) for label in range(int(train.labels.max()) + 1)]


def pictures_per_class(records: Records, count: int) -> Ints:
    """[count] pictures; one id at several sizes is one, and a label outside of 0..count-1 none."""
    once = records.ids == ""
    once[np.unique(records.ids, return_index=True)[1]] = True
    labels = records.labels[once]
    return np.bincount(labels[(labels >= 0) & (labels < count)], minlength=count)


def class_notes(classes: Sequence[str], pictures: Mapping[str, Ints]) -> list[str]:
    """Sentences on classes that cannot be learned or validated, or are perhaps one.

    Args:
        classes: their names.
        pictures: of train, and of val if there is one: how many each class has, [classes].
    """
    notes = []
    for split, lack in (("train", "to learn from"), ("val", "that validates")):
        if split in pictures and len(missing := np.flatnonzero(pictures[split] == 0)):
            some = ", ".join(classes[k] for k in missing[:3]) + (", …" if len(missing) > 3 else "")
            notes.append(f"{len(missing)} of the {len(classes)} classes have no picture {lack}: {some}.")
    if "val" not in pictures and len(single := np.flatnonzero(pictures["train"] == 1)):
        some = ", ".join(classes[k] for k in single[:3]) + (", …" if len(single) > 3 else "")
        notes.append(
            f"{len(single)} of the {len(classes)} classes have one picture, so nothing validates them: {some}."
        )
    notes += [
        f"Classes that differ by case or spaces alone: {', '.join(map(repr, names))}; if they are one, join them."
        for names in alike(classes)
    ]
    return notes
