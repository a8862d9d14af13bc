"""What a stage is, what it is given, and what it may end as."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.harness.missing import MissingError
from fastflower.files import to_json

if TYPE_CHECKING:
    import torch

NAMED = 3  # failures in a sentence


@dataclass(frozen=True)
class Stage:
    """A part of the check, which runs in a process of its own."""

    name: str
    what: str  # it shows, in a line
    function: str  # MODULE:FUNCTION, called with a `Task`; gives an `Outcome`, raises `FailedError` or a MissingError
    limit_s: float  # after which it is killed
    needs: tuple[str, ...] = ()  # modules besides torch, without which it is left out


@dataclass(frozen=True)
class Outcome:
    """What a stage found where nothing failed."""

    figure: str  # in a few words
    quotes: tuple[str, ...] = ()  # sentences with figures that the documents may quote


class FailedError(Exception):
    """Something is not as it should be; the message says what."""


@dataclass(frozen=True)
class Task:
    """What a stage is given: where it runs, how large, how long, and where its figures go."""

    kind: str  # of device: cuda, or cpu to try the script
    rows: Path  # file that gets one JSON line for each row
    deadline: float  # of time.monotonic()

    @property
    def tiny(self) -> bool:
        """Whether sizes are those of a trial on a CPU."""
        return self.kind == "cpu"

    @cached_property
    def device(self) -> torch.device:
        """The first GPU, or the CPU; torch looks for the fastest convolutions, as in training."""
        import torch

        torch.backends.cudnn.benchmark = True
        return torch.device(self.kind, 0) if self.kind == "cuda" else torch.device("cpu")

    @property
    def left_s(self) -> float:
        """Seconds until it is killed."""
        return self.deadline - time.monotonic()

    def row(self, **figures: Any) -> dict[str, Any]:
        """Write a row, which stays whatever comes after; gives it back."""
        with self.rows.open("a", encoding="utf-8") as file:
            file.write(to_json(figures) + "\n")
        return figures

    def say(self, text: str) -> None:
        """Show how far it is."""
        print(text, flush=True)


def attempt(task: Task, cells: Mapping[str, Callable[[], None]], reserve_s: float = 5) -> int:
    """Do one cell after another, as long as what the longest took is left; how many were done.

    Raises FailedError, after the last, where some failed, and MissingError where there was time for none.
    """
    longest_s, done, failures = 0.0, 0, list[str]()
    for name, work in cells.items():
        if task.left_s < longest_s + reserve_s:
            break
        task.say(name)
        began = time.monotonic()
        try:
            work()
        except FailedError as failure:
            failures.append(f"{name}: {failure}")
            task.row(cell=name, failure=str(failure))
        except Exception as error:  # of one cell, which says nothing of the others
            failures.append(f"{name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            task.row(cell=name, failure="".join(traceback.format_exception(error)))
        longest_s, done = max(longest_s, time.monotonic() - began), done + 1
    if failures:
        more = f"; and {len(failures) - NAMED} more" if len(failures) > NAMED else ""
        raise FailedError("; ".join(failures[:NAMED]) + more)
    if not done:
        raise MissingError("no time was left for it")
    return done
