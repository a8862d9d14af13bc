"""Ranks go on, stop and fail at the same step, and nobody waits for one that does not come.

The ranks are threads, which exchange values as processes do: the first of one with the first of all others, and so on.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastflower.errors import UserError
from fastflower.runtime.clock import Clock
from fastflower.runtime.distributed import Ranks
from fastflower.runtime.signals import Signals, Stopped

SOON_S = 60  # nothing takes that long but waiting in vain


class Meeting:
    """Where threads exchange values, each in its own order."""

    def __init__(self, ranks: int) -> None:
        self.ranks, self.own = ranks, threading.local()
        self._posted: dict[int, dict[int, tuple[str, Any]]] = {}
        self._news = threading.Condition()

    def post(self, what: str, value: Any) -> int:
        """Give this rank's next value; the number of its exchange, which all must have begun as `what`."""
        number = self.own.number = getattr(self.own, "number", -1) + 1
        with self._news:
            self._posted.setdefault(number, {})[self.own.rank] = (what, value)
            self._news.notify_all()
        return number

    def read(self, number: int) -> list[Any]:
        """Everyone's value of an exchange, by rank."""
        with self._news:
            came = self._news.wait_for(lambda: len(self._posted.get(number, ())) == self.ranks, SOON_S)
            assert came, f"rank {self.own.rank} waits in vain"
            posted = self._posted[number]
        assert len({what for what, _ in posted.values()}) == 1, "not all exchange the same"
        return [posted[rank][1] for rank in range(self.ranks)]

    def all_reduce(self, tensor: torch.Tensor, op: object, group: None, async_op: bool) -> Any:
        """In place of torch's: the greatest value."""
        assert op == dist.ReduceOp.MAX
        assert async_op
        return Work(self, self.post("max", int(tensor)), tensor)

    def all_gather_object(self, values: list[Any], value: Any, group: None) -> None:
        """In place of torch's."""
        values[:] = self.read(self.post("gather", value))


@dataclass
class Work:
    """An exchange that goes on while its rank does other things."""

    meeting: Meeting
    number: int
    tensor: torch.Tensor

    def wait(self) -> None:
        """Take part in it to its end."""
        self.tensor.fill_(max(self.meeting.read(self.number)))


class Ticking(Clock):
    """A clock that goes on by a second each time it is read; by more on other ranks than the main one."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank, self._readings = rank, 0

    def read_ms(self) -> int:
        self._readings += 1
        return 1000 * self._readings * (1 + self._rank)


@dataclass(frozen=True)
class Case:
    """So many batches of each rank; where one fails or a signal comes, if any do."""

    batches: list[int]
    failure: tuple[int, int] | None  # rank, batch
    signal: tuple[int, int] | None  # rank, in the step of that batch

    def end(self) -> tuple[int, str]:
        """At which step all end, and how."""
        ends = [(max(self.batches), 2, "")]
        if self.failure:
            rank, batch = self.failure
            ends.append((batch, 0, f"batch {batch} of rank {rank} is bad"))
        if self.signal:
            rank, batch = self.signal
            later = 1 if len(self.batches) == 1 else 2  # the step after it is agreed on before
            if batch + later <= max(self.batches):
                ends.append((batch + later, 1, "SIGUSR1"))
        step, _, how = min(ends)
        return step, how


@st.composite
def cases(draw: st.DrawFn) -> Case:
    ranks, longest = draw(st.integers(1, 4)), draw(st.integers(0, 6))
    even = draw(st.booleans())
    batches = [longest if even else draw(st.integers(0, longest)) for _ in range(ranks)]
    places = [(rank, batch) for rank, count in enumerate(batches) for batch in range(count)]
    place = st.none() | st.sampled_from(places) if places else st.none()
    return Case(batches, draw(place), draw(place))


def run(case: Case, rank: int, meeting: Meeting) -> tuple[int, str]:
    """How many steps a rank does, and how it ends."""
    meeting.own.rank = rank
    signals, steps, clock = Signals(), 0, Ticking(rank)

    def batches() -> Iterator[int]:
        for batch in range(case.batches[rank]):
            if (rank, batch) == case.failure:
                raise UserError(f"batch {batch} of rank {rank} is bad")
            yield batch

    try:
        for batch in Ranks(rank, len(case.batches)).lockstep(batches(), signals, clock):
            assert batch == steps
            if case.batches[0] > batch:
                assert clock.agreed_s == 1 + batch, "all know what the main rank's clock showed as it took the batch"
            if len({*case.batches}) == 1:  # as in training, where gradients travel in each step
                meeting.read(meeting.post("gradients", batch))
            if (rank, batch) == case.signal:
                signals.received = signal.SIGUSR1
            steps += 1
    except (UserError, Stopped) as end:
        return steps, str(end)
    return steps, ""


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cases())
def test_all_end_at_the_same_step_in_the_same_way(case: Case) -> None:
    ranks, meeting = len(case.batches), Meeting(len(case.batches))
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(ranks) as threads:
        patch.setattr(dist, "all_reduce", meeting.all_reduce)
        patch.setattr(dist, "all_gather_object", meeting.all_gather_object)
        ends = [thread.result() for thread in [threads.submit(run, case, rank, meeting) for rank in range(ranks)]]
    step, how = case.end()
    assert ends == [(min(step, count), how) for count in case.batches]
