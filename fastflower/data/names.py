"""Names to show for classes: their own, those of the Kaggle competition, or a file's."""

from __future__ import annotations

import importlib.resources
import json
from collections import Counter
from pathlib import Path

from fastflower.errors import UserError

KAGGLE = "kaggle104"


def display_names(classes: list[str], given: str | None) -> list[str]:
    """Names to show for classes, by number.

    Args:
        classes: what the data calls them; mere numbers where it has no names.
        given: None for the classes' own names (the Kaggle competition's where they are its numbers, 0 to 103),
            "kaggle104" for those of its first classes, else a file with a name for each class: a JSON list (*.json) or
            text with one name a line.

    Raises:
        UserError: more classes than the competition has, or the file does not have a name of its own for each class.
    """
    kaggle = kaggle_names()
    if given is None:
        return kaggle if classes == [str(number) for number in range(len(kaggle))] else classes
    if given != KAGGLE:
        return _read_names(Path(given), len(classes))
    if len(classes) > len(kaggle):
        raise UserError(
            f"{KAGGLE} names {len(kaggle)} classes, and there are {len(classes)}: give a file with a name for each."
        )
    return kaggle[: len(classes)]


def kaggle_names() -> list[str]:
    """The 104 classes of the Kaggle competition "Petals to the Metal", by number."""
    found = importlib.resources.files("fastflower.data").joinpath(f"{KAGGLE}.txt")
    return found.read_text(encoding="utf-8").splitlines()


def _read_names(path: Path, count: int) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        names = json.loads(text) if path.suffix == ".json" else [line.strip() for line in text.splitlines()]
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): give a file of class names, or {KAGGLE}."
        ) from error
    except ValueError as error:
        raise UserError(f"{path} cannot be read as class names ({error}): write one for each class.") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} is not a JSON list of class names: write one for each class, by number.")
    if len(names) != count:
        raise UserError(f"{path} has {len(names)} class names for {count} classes: write one for each, by number.")
    if empty := [number for number, name in enumerate(names) if not name.strip()]:
        raise UserError(f"{path} has no name for class {empty[0]}: write one.")
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise UserError(f"{path} has the class name {twice[0]!r} twice: give each class a name of its own.")
    return names
