"""What functions are given in Python: words of a few, numbers and paths, read as settings of their types are."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, get_origin, get_type_hints

from pydantic import Field

from fastflower.errors import UserError
from fastflower.values import alternatives, read, refusal

P = ParamSpec("P")
R = TypeVar("R")

StrPath = str | os.PathLike[str]
Paths = StrPath | Sequence[StrPath]
Count = Annotated[int, Field(gt=0)]
Sizes = Sequence[int]  # pixels; one stands for a list of it
_AS = {StrPath: Path, StrPath | None: Path | None, Sizes: tuple[Count, ...]}  # what is read as settings of other types


def reading_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which refuses an argument that its annotation does not take.

    Looked at are choices, whole numbers and single paths; the others are looked at where they are used.
    """
    signature = inspect.signature(function)
    kinds = {name: _AS.get(hint, hint) for name, hint in get_type_hints(function, include_extras=True).items()}
    looked_at = {name: kind for name, kind in kinds.items() if name != "return" and _is_plain(kind)}

    @functools.wraps(function)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            if name in looked_at:
                bound.arguments[name] = _read(name, value, looked_at[name])
        return function(*bound.args, **bound.kwargs)

    return inner


def _is_plain(kind: Any) -> bool:
    kinds = {part for part, _ in alternatives(kind)}
    return all(part in (int, Path, NoneType) or get_origin(part) in (Literal, tuple) for part in kinds)


def _read(name: str, value: object, kind: Any) -> Any:
    """The value, or UserError where it is none of the kind; an array of numbers stands for their list."""
    try:
        return read(kind, value.tolist() if hasattr(value, "tolist") else value)
    except ValueError as error:
        raise UserError(refusal(name, value, kind)) from error


def text_of(given: StrPath | None) -> str | None:
    """A name or a file, which may be given as a path."""
    return None if given is None else os.fspath(given)


def path_of(given: StrPath | None) -> Path | None:
    """A path, if one is given."""
    return None if given is None else Path(given)


def paths_of(given: Paths | None) -> tuple[Path, ...] | None:
    """One path or several.

    Raises:
        UserError: it is none, or an empty one.
    """
    if given is None:
        return None
    try:
        paths = [os.fspath(path) for path in ([given] if isinstance(given, str | os.PathLike) else given)]
    except TypeError as error:
        raise UserError(f"{type(given).__name__} is no path: give a path, or a list of paths.") from error
    if "" in paths:
        raise UserError("a path is empty: name the folder, or a dot for the one you are in.")
    return tuple(map(Path, paths))
