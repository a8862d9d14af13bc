"""Names of classes: which of them are numbers, which stand for the same class, and what to show for them."""

from __future__ import annotations

import importlib.resources
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

from fastflower.errors import UserError

T = TypeVar("T")

KAGGLE = "kaggle104"
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")


def composed(name: str) -> str:
    """A name in the one form (Unicode's NFC) that it has here, however a file system or an editor writes it."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def alike(names: Sequence[str]) -> list[list[str]]:
    """Those that differ from each other by case, or by spaces and the signs that replace them, alone."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_plain(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", composed(name)).strip().casefold()


def number_of(name: str) -> Decimal | None:
    """The number that a class is called by, such as 7, 007, -1 or 0.5; None where it is called otherwise."""
    return Decimal(name) if _NUMBER.fullmatch(name) else None


def numbers_of(classes: Sequence[str]) -> list[Decimal] | None:
    """The numbers that classes are called by; None where one is called otherwise, or two are one number (7 and 007)."""
    numbers = [number for name in classes if (number := number_of(name)) is not None]
    return numbers if len(set(numbers)) == len(classes) else None


def are_places(classes: Sequence[str]) -> bool:
    """Whether a label that is a mere number means a place in this list: its names are no numbers, or the places'."""
    numbers = [number_of(name) for name in classes]
    return not any(number is not None for number in numbers) or numbers == [*range(len(classes))]


def class_index(classes: Sequence[str]) -> dict[str | Decimal, int]:
    """Where each class is, by its name, and by its number if that is no other's; see `find`."""
    numbers = [number_of(name) for name in classes]
    times = Counter(numbers)
    index: dict[str | Decimal, int] = {composed(name): k for k, name in enumerate(classes)}
    return index | {number: k for k, number in enumerate(numbers) if number is not None and times[number] == 1}


def find(index: Mapping[str | Decimal, int], name: str, missing: T) -> int | T:
    """Where the class of that name is, or else of that number: 7 finds 007, if there is no 7; `missing` without one."""
    if composed(name) in index:
        return index[composed(name)]
    number = number_of(name)
    return missing if number is None else index.get(number, missing)


def places(wanted: Sequence[str], own: Sequence[str]) -> list[int] | None:
    """Where in `own` each class of `wanted` is (see `find`); None where they are not the same classes."""
    index = class_index(own)
    matches = [place for name in wanted if (place := find(index, name, None)) is not None]
    return matches if len(matches) == len(wanted) and sorted(matches) == [*range(len(own))] else None


def display_names(classes: list[str], given: str | None) -> list[str]:
    """Names to show for classes, in their order.

    Args:
        classes: what the data calls them.
        given: None for the classes' own names (the Kaggle competition's where they are its numbers, 0 to 103),
            "kaggle104" for those of its numbers that they are (of its first classes, where none is a number), else a
            file with a name for each class, in the order of their numbers where they are numbers: a JSON list (*.json)
            or text with one name a line; or a JSON object of the classes' names to show (see `read_names`).

    Raises:
        UserError: classes that the competition does not have, or the file has no name of its own for each class.
    """
    numbers = numbers_of(classes)
    if given is None:
        is_kaggles = numbers is not None and set(numbers) == set(range(len(kaggle_names())))
        return _kaggle_names_of(classes) if is_kaggles else classes
    if given == KAGGLE:
        return _kaggle_names_of(classes)
    return _read_names(Path(given), classes)


def _ranks(numbers: Sequence[Decimal]) -> list[int]:
    """Of each number how many are smaller."""
    order = {number: rank for rank, number in enumerate(sorted(numbers))}
    return [order[number] for number in numbers]


def _kaggle_names_of(classes: Sequence[str]) -> list[str]:
    kaggle, numbers = kaggle_names(), numbers_of(classes)
    if len(classes) > len(kaggle):
        raise UserError(
            f"{KAGGLE} names {len(kaggle)} classes, and there are {len(classes)}: give a file with a name for each."
        )
    if numbers is None:
        if any(number_of(name) is not None for name in classes):
            raise UserError(
                f"{KAGGLE} goes by number, but of the classes ({', '.join(classes)}) some have no number, or two the "
                "same: give a file with a name for each."
            )
        numbers = [Decimal(place) for place in range(len(classes))]
    by_number = {Decimal(number): name for number, name in enumerate(kaggle)}
    if unknown := [name for name, number in zip(classes, numbers, strict=True) if number not in by_number]:
        raise UserError(
            f"{KAGGLE} names the classes 0 to {len(kaggle) - 1}, and there is a class {unknown[0]}: give a file with a "
            "name for each."
        )
    return [by_number[number] for number in numbers]


def kaggle_names() -> list[str]:
    """The 104 classes of the Kaggle competition "Petals to the Metal", by number."""
    file = importlib.resources.files("fastflower.data").joinpath(f"{KAGGLE}.txt")
    return file.read_text(encoding="utf-8").splitlines()


def _read_names(path: Path, classes: Sequence[str]) -> list[str]:
    """What to call the classes: a list is by number, an object by class, or by place where classes are no numbers."""
    names, numbers = read_names(path), numbers_of(classes)
    if isinstance(names, dict):
        index = class_index([*names])
        places_of = [find(index, name, None) for name in classes]
        if None not in places_of:
            by_class = [*names.values()]
            return [by_class[place] for place in places_of if place is not None]
        by_number = in_order(names)
        if numbers is not None or by_number is None:
            raise UserError(f"{path} has no name for class {classes[places_of.index(None)]}: write one.")
        names = by_number
    if len(names) != len(classes):
        raise UserError(
            f"{path} has {len(names)} class names for {len(classes)} classes: write one for each, by number."
        )
    return names if numbers is None else [names[place] for place in _ranks(numbers)]


def read_names(path: Path) -> list[str] | dict[str, str]:
    """The class names that a file lists, by number: a JSON list (*.json), or text with one a line.

    A JSON object has names by what classes are called, or numbered by: {"21": "fire lily"} or {"fire lily": 21}.

    Raises:
        UserError: it cannot be read, holds something else, or a name twice or an empty one.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() != ".json":
            return _own_names(path, [line.strip() for line in text.splitlines()])
        plain = json.loads(text, object_pairs_hook=_Pairs)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): give a file of class names, or {KAGGLE}."
        ) from error
    except ValueError as error:
        raise UserError(
            f"{path} cannot be read as class names ({error}): write a list of class names, in UTF-8."
        ) from error
    if isinstance(plain, _Pairs) and plain:
        keys, values = [key for key, _ in plain], [value for _, value in plain]
        if all(isinstance(value, int) and not isinstance(value, bool) for value in values):
            keys, values = [str(number) for number in values], keys
        if all(isinstance(value, str) for value in values):
            return dict(zip(_own_names(path, keys), _own_names(path, values), strict=True))
    if not isinstance(plain, list) or not plain or not all(isinstance(name, str) for name in plain):
        raise UserError(
            f"{path} is not a JSON list of class names, nor an object of names and numbers: write one name for each "
            "class, by number."
        )
    return _own_names(path, plain)


class _Pairs(list[tuple[str, Any]]):
    """A JSON object, of which no key that stands twice is lost."""


def in_order(names: Mapping[str, str]) -> list[str] | None:
    """Names by number; None where the numbers are not 0, 1, 2, ..."""
    numbers = numbers_of([*names])
    if numbers is None or sorted(numbers) != [*range(len(names))]:
        return None
    return [name for _, name in sorted(zip(numbers, names.values(), strict=True))]


def _own_names(path: Path, names: Sequence[str]) -> list[str]:
    """The names as they are kept, each of which is one."""
    names = [composed(name) for name in names]
    if empty := [number for number, name in enumerate(names) if not name.strip()]:
        raise UserError(f"{path} has no name for class {empty[0]}: write one.")
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise UserError(f"{path} has the class name {twice[0]!r} twice: give each class a name of its own.")
    return names
