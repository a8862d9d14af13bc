"""What a word of the command line, or a value of a YAML file, means to a setting of a type; and what a type takes.

One reading for both: none, null and ~ are the same, one value stands for a list of it, ~ is the home folder.
"""

from __future__ import annotations

import difflib
import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import TypeAdapter

NOTHING = {"", "none", "null", "~"}
SWITCH = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}
MOST_CHOICES = 30  # characters of choices that a placeholder lists
LONGEST_VALUE = 60  # characters of a value that a message repeats


def read(annotation: Any, value: object) -> Any:
    """A value as its setting holds it.

    Args:
        annotation: the setting's type, with its bounds.
        value: a word, a list of words, or what YAML or Python has.

    Raises:
        ValueError: the setting does not take it.
    """
    return _adapter(annotation).validate_python(meant(annotation, value))


def reads(annotation: Any, value: object) -> bool:
    """Whether a setting of the type takes the value."""
    try:
        read(annotation, value)
    except ValueError:
        return False
    return True


def meant(annotation: Any, value: object) -> Any:
    """The value in the form that the type has, where it was written in another; its bounds are not looked at.

    Raises:
        ValueError: on and off, where the type has no switch: Python would count them as 1 and 0; 1.0, where it has
            whole numbers and shares; or an empty path, which Python would take for the folder that one is in.
    """
    kinds = [kind for kind, _ in alternatives(annotation)]
    choices = {str(choice): choice for kind in kinds for choice in _choices(kind)}
    if isinstance(value, bool) and bool not in kinds and value not in choices.values():
        raise ValueError("it is no switch")
    if {int, float} <= set(kinds) and re.fullmatch(r"\s*\+?\d+\.0*\s*", str(value)):
        raise ValueError("1.0 may be meant as a share, of all, but would be read as the number 1")
    if isinstance(value, str):
        word = value.strip()
        if word in choices:
            return choices[word]
        if bool in kinds and word.lower() in SWITCH:
            return SWITCH[word.lower()]
        if word.lower() in NOTHING or (word.lower() == "auto" and is_switch(annotation)):
            value = None if NoneType in kinds or "none" in choices else value
    if Path in kinds and isinstance(value, str) and not value.strip():
        raise ValueError("it is empty")
    if value is None:
        return "none" if NoneType not in kinds and "none" in choices else None
    several = next((kind for kind in kinds if get_origin(kind) is tuple), None)
    if several:
        return _items(several, value)
    return os.path.expanduser(value) if isinstance(value, str) and {Path, str} & set(kinds) else value


def _items(kind: Any, value: object) -> Any:
    """Items of a tuple, where one stands for all, and numbers may be in one word."""
    types = get_args(kind)
    any_number = types[-1] is Ellipsis
    if isinstance(value, str) and "," in value and not {Path, str} & {kind for kind, _ in alternatives(types[0])}:
        value = value.split(",")
    if isinstance(value, str | Path | int | float):
        value = [value]
    if not isinstance(value, Sequence):
        return value
    items = list(value) * (len(types) if len(value) == 1 and not any_number else 1)
    each = [types[0]] * len(items) if any_number else types
    return tuple(meant(item_kind, item) for item_kind, item in zip(each, items, strict=False)) + tuple(
        items[len(each) :]
    )


def alternatives(annotation: Any, metadata: tuple[Any, ...] = ()) -> list[tuple[Any, tuple[Any, ...]]]:
    """The types that an annotation allows, each with its metadata (bounds)."""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return alternatives(inner, (*metadata, *more))
    if get_origin(annotation) in (Union, UnionType):
        return [pair for part in get_args(annotation) for pair in alternatives(part, metadata)]
    return [(annotation, metadata)]


def is_switch(annotation: Any) -> bool:
    """Whether it is on or off, or None for what is decided later (auto)."""
    return {kind for kind, _ in alternatives(annotation)} <= {bool, NoneType}


def most(annotation: Any) -> int | None:
    """How many words it takes at most; None = any number."""
    tuples = [get_args(kind) for kind, _ in alternatives(annotation) if get_origin(kind) is tuple]
    lengths = [None if types[-1] is Ellipsis else len(types) for types in tuples]
    return lengths[0] if lengths else 1


def takes(annotation: Any) -> str:
    """What a setting takes, as a phrase: "auto, cpu or gpu", "a number above 0, or none"."""
    phrases: list[str] = []
    for kind, metadata in alternatives(annotation):
        if get_origin(kind) is Literal:
            phrases += map(str, get_args(kind))
        elif kind is bool:
            phrases += ["on", "off"]
        elif kind is not NoneType:
            phrases.append(_phrase(kind, metadata))
    if any(kind is NoneType for kind, _ in alternatives(annotation)):
        phrases.append("auto" if is_switch(annotation) else "none")
    return " or ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)


def refusal(name: str, value: object, annotation: Any) -> str:
    """What is said of a value that a setting does not take: one sentence."""
    text = value if isinstance(value, str) else repr(value)
    choices = choices_of(annotation)
    near = difflib.get_close_matches(text, choices, n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    return f"{name} is {_short(text) or 'empty'}: it takes {takes(annotation)}{hint}"


def _choices(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) is Literal else ()


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_VALUE else f"{line[:LONGEST_VALUE]}…"


def _phrase(kind: Any, metadata: Sequence[Any], *, plural: bool = False) -> str:
    if get_origin(kind) is tuple:
        types = get_args(kind)
        ((item, bounds),) = alternatives(types[0])
        count = "one or more" if types[-1] is Ellipsis else str(len(types))
        return f"{count} {_phrase(item, bounds, plural=True)}"
    nouns = {int: "whole number", float: "number", Path: "path", str: "text"}
    noun = nouns.get(kind, "value")
    return (f"{noun}s" if plural else f"a {noun}") + _bounds(metadata)


def _bounds(metadata: Sequence[Any]) -> str:
    words = {"gt": "above", "ge": "from", "lt": "below", "le": "to"}
    limits: dict[str, Any] = {}
    for field in metadata:
        for constraint in getattr(field, "metadata", ()):
            bounds = {name: getattr(constraint, name, None) for name in words}
            limits |= {name: bound for name, bound in bounds.items() if bound is not None}
    low = next((f"{words[name]} {limits[name]}" for name in ("gt", "ge") if name in limits), "")
    high = next((f"{words[name]} {limits[name]}" for name in ("lt", "le") if name in limits), "")
    if low.startswith("from") and not high:
        high = "on"
    between = " and " if high.startswith("below") and low else " "
    return (" " + (low + between + high if low and high else low or high)).rstrip()


def placeholder(annotation: Any) -> str:
    """What stands for the value in a help text: INT, {auto,cpu,gpu}, PATH ...; nothing for a plain switch."""
    if is_switch(annotation):
        return "[on|off|auto]" if len(alternatives(annotation)) > 1 else ""
    names = {int: "INT", float: "NUMBER", Path: "PATH", str: "TEXT"}
    parts = []
    for kind, _ in alternatives(annotation):
        if get_origin(kind) is Literal:
            choices = ",".join(map(str, get_args(kind)))
            parts.append(f"{{{choices}}}" if len(choices) <= MOST_CHOICES else "NAME")
        elif get_origin(kind) is tuple:
            types = get_args(kind)
            item = placeholder(types[0])
            parts.append(f"{item} ..." if types[-1] is Ellipsis else " ".join([item] * len(types)))
        elif kind is not NoneType:
            parts.append(names.get(kind, "VALUE"))
    return "|".join(parts)


def choices_of(annotation: Any) -> list[str]:
    """The words that a setting takes, if it takes some of a few."""
    words = [str(choice) for kind, _ in alternatives(annotation) for choice in _choices(kind)]
    return ["on", "off", "auto"] if is_switch(annotation) and len(alternatives(annotation)) > 1 else words


def choices_left_out(annotation: Any) -> list[str]:
    """The choices that are too many for the placeholder."""
    choices = choices_of(annotation)
    return choices if len(",".join(choices)) > MOST_CHOICES else []


def written(value: object) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple | list):
        return " ".join(map(written, value))
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


@functools.cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation)
