"""What a contender, or a stage of a check, says that cannot be measured here."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingError(Exception):
    """A contender is not installed or does not apply; the message says why."""


def need(package: str) -> ModuleType:
    """Import a package that only contenders use; MissingError where it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingError(f"not installed (pip install {package.partition('.')[0]})") from error
