"""What a launcher such as torchrun tells each process that it starts, in environment variables."""

from __future__ import annotations

import os
from typing import NamedTuple

from fastflower.errors import UserError

LAST_PORT = 2**16 - 1


class Place(NamedTuple):
    """One process among those that were started."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_MEETING = ("MASTER_ADDR", "MASTER_PORT")  # where they find each other; a machine may name one without any launcher


def place() -> Place | None:
    """The place of this process; None where it is on its own. An empty variable is as good as none.

    Raises:
        UserError: some of the variables are missing, or they do not fit together.
    """
    given = {name: value for name in (*_NUMBERS, *_MEETING) if (value := os.environ.get(name, "").strip())}
    if not any(name in given for name in _NUMBERS):
        return None
    variables = ", ".join(f"{name}={value}" for name, value in given.items())
    start = "start the processes by torchrun, which sets them all, or unset them to run on one"
    if missing := [name for name in (*_NUMBERS, *_MEETING) if name not in given]:
        raise UserError(f"{variables} without {', '.join(missing)}: {start}.")
    if not all(given[name].isdecimal() for name in (*_NUMBERS, "MASTER_PORT")):
        raise UserError(f"{variables}: these are not whole numbers from 0; {start}.")
    process = Place(*(int(given[name]) for name in _NUMBERS))
    if not 0 < int(given["MASTER_PORT"]) <= LAST_PORT:
        raise UserError(f"{variables}: ports are 1 to {LAST_PORT}; {start}.")
    if not (process.rank < process.world_size and process.local_rank < process.local_world_size <= process.world_size):
        raise UserError(f"{variables}: ranks are below the numbers of processes, here and in all; {start}.")
    return process


def is_main() -> bool:
    """Whether this process writes files and speaks for all.

    Raises:
        UserError: see `place`.
    """
    process = place()
    return process is None or process.rank == 0


def local_rank() -> int:
    """Which of this machine's processes this is.

    Raises:
        UserError: see `place`.
    """
    process = place()
    return process.local_rank if process else 0
