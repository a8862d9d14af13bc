"""A run folder that one training has for itself."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from fastflower.errors import UserError
from fastflower.runtime.distributed import Ranks
from fastflower.runtime.run_folder import RUNS, STAMP, RunFolder

LOCK = ".lock"  # in the folder; the system frees it when the process ends, however it does


@contextlib.contextmanager
def own_folder(given: Path | None, name: str, ranks: Ranks) -> Iterator[RunFolder]:
    """The folder to train in, which no other training gets until the block ends.

    One that is made here, and in which nothing is written, goes again, with the folders above that were made for it.

    Args:
        given: the folder; None makes a new one, runs/NAME-DATE-TIME.
        name: of a new one.
        ranks: the processes; the main one makes and locks the folder.

    Raises:
        UserError: another process trains there, or it cannot be written; on every rank.
    """
    with contextlib.ExitStack() as until_the_end:
        path = given or RUNS
        with ranks.together():
            if ranks.is_main:
                try:
                    path, made = _make(given, name)
                    until_the_end.enter_context(_locked(path, made))
                except OSError as error:
                    reason = f"{error.filename or given} cannot be written ({error.strerror})"
                    raise UserError(
                        f"{reason}: name a folder with --run where there is room and permission."
                    ) from error
        yield RunFolder(ranks.gather(path)[0])


def _make(given: Path | None, name: str) -> tuple[Path, list[Path]]:
    """The folder, and which folders were made for it, the inner ones first.

    A new one is nobody else's, however many start in one second.
    """
    if given:
        missing = _missing(given)
        given.mkdir(parents=True, exist_ok=True)
        return given, missing
    base = RUNS / f"{name}-{time.strftime(STAMP)}"
    for number in itertools.count(1):
        path = base if number == 1 else base.with_name(f"{base.name}-{number}")
        missing = _missing(path)
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            return path, missing
    raise AssertionError("numbers end")


def _missing(path: Path) -> list[Path]:
    """The folders that making a folder makes, the inner ones first."""
    return list(itertools.takewhile(lambda folder: not folder.exists(), (path, *path.parents)))


@contextlib.contextmanager
def _locked(path: Path, made: Sequence[Path]) -> Iterator[None]:
    lock = path / LOCK
    with lock.open("a+", encoding="utf-8") as file:
        _take(file, lock)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if made and os.listdir(path) == [LOCK]:
                    lock.unlink()
                    for folder in made:
                        folder.rmdir()  # which fails where something else has come into one


def _take(file: IO[str], lock: Path) -> None:
    """Lock the open file and write into it whose it is; raise UserError where it is another's."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(lock.stat(), os.fstat(file.fileno())):
            raise BlockingIOError  # who had it removed it just now, and another process made it anew
    except BlockingIOError as error:
        file.seek(0)
        who = file.read() or "another process"
        raise UserError(f"{who} is training in {lock.parent}: wait for its end, or name another --run.") from error
    except OSError as error:
        if error.filename:
            raise
        # else a file system without locks
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
