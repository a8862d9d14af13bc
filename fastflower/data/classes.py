"""The list of classes of a data folder: the names that a file gives, or the numbers that its records have."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from fastflower.data.records import Records
from fastflower.data.sources import layout_of
from fastflower.errors import UserError

MAX_CLASSES = 100_000  # without a list of names; a larger number is a mistake, not a class


def listed_classes(root: Path) -> list[str] | None:
    """What `class_names.json` of the data folder lists; None where there is no such file.

    Raises:
        UserError: it is not a JSON list of different names.
    """
    path = layout_of(root).names_file(root)
    if not path.is_file():
        return None
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): write a list of class names.") from error
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} is not a JSON list of class names: write one name for each class, by index.")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{path} has the class name {twice[0]!r} twice: give each class a name of its own.")
    return names


def numbered_classes(train: Records) -> list[str]:
    """The numbers 0..C-1 up to the largest label, for classes without names.

    Raises:
        UserError: a record has no class, or one that cannot be meant.
    """
    train.require_classes(MAX_CLASSES)
    return [str(label) for label in range(int(train.labels.max()) + 1)]
