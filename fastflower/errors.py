"""The exception for a user's mistake: the command line prints its sentence, no traceback, and exits with code 2."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

_RESUME = re.compile(r"--resume ('[^']*'|[^\s,;:]+)")
# An option's name, and its value where that is a number, several, or one of few words.
_OPTION = re.compile(r"--([a-z][\w-]*(?:\.[a-z]\w*)*)(?: (\d+(?:,\d+)*|auto|cpu|cuda)\b)?")
_SWITCHES = ("overwrite", "mix_views")  # which are given alone


class UserError(Exception):
    """Bad input. Its message is one sentence that names the file, record or key and how to mend it."""

    said_elsewhere = False  # by another process of the run, to which the mistake is known too


@contextlib.contextmanager
def naming_arguments() -> Iterator[None]:
    """Have sentences raised in the block, which name options of the command line, name arguments of Python instead."""
    try:
        yield
    except UserError as error:
        error.args = (in_python(str(error)),)
        raise


def in_python(sentence: str) -> str:
    """A sentence whose options, such as --overwrite and --crops 10, are arguments: overwrite=True and crops=10.

    What is between backticks is a command, and stays.
    """
    parts = sentence.split("`")
    return "`".join(part if k % 2 else _OPTION.sub(_argument, _RESUME.sub(_call, part)) for k, part in enumerate(parts))


def _call(resume: re.Match[str]) -> str:
    path = resume[1].strip("'")
    return f'fastflower.resume("{path}")'


def _argument(option: re.Match[str]) -> str:
    name, value = option[1].replace("-", "_"), option[2]
    if name in _SWITCHES:
        return f"{name}=True"
    if value is None:
        return name
    if not value[0].isdecimal():
        return f'{name}="{value}"'
    return f"{name}=({value.replace(',', ', ')})" if "," in value else f"{name}={value}"
