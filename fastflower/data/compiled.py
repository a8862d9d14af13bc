"""Code that Numba compiles when it is first called, and that runs without Python's lock."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba import njit

from fastflower.files import cache_dir, is_writable

# Numba's first and last versions for which our vector code is used, and calls of the C library: the one gave what the
# plain loop gives, to the bit, with 0.60.0, 0.62.1, 0.65.0 and 0.68.1, the other read what Python reads with 0.60.0 and
# 0.68.1 (2026-11-30). Others may build other code of them, or none.
TESTED = ((0, 60), (0, 68))


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function when it is first called; the code is kept where NUMBA_CACHE_DIR says, else in the user's cache
    folder, or not at all where that cannot be written.
    """

    def made(function: Callable[..., Any]) -> Callable[..., Any]:
        settings: Any = numba.config
        named = settings.CACHE_DIR
        folder = Path(named or cache_dir() / "numba")
        settings.CACHE_DIR = str(folder)
        try:
            code: Callable[..., Any] = njit(nogil=True, cache=is_writable(folder), **options)(function)
        except RuntimeError:  # it could not be written after all
            code = njit(nogil=True, **options)(function)
        finally:
            settings.CACHE_DIR = named  # since it is for all that this process compiles
        return code

    return made


def is_tested(version: str) -> bool:
    """Whether our code that depends on what Numba makes of it was tested with a version of it."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is not None and TESTED[0] <= (int(numbers[1]), int(numbers[2])) <= TESTED[1]
