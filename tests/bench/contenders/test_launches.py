"""What launches beside a loader is counted, and for how long it waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from bench.contenders.launches import Load, Turns, launching, noting_unlocked
from bench.harness.timing import Contender
from bench.rates.options import LoaderCommand
from fastflower.data import reading

CPU = torch.device("cpu")


def test_a_thread_that_holds_the_lock_is_waited_for() -> None:
    """Half of the time, as both want it always."""
    with launching(CPU) as alone:
        time.sleep(0.3)
    stop = threading.Event()

    def hold() -> None:
        while not stop.is_set():
            sum(range(1000))

    thread = threading.Thread(target=hold)
    thread.start()
    with launching(CPU) as beside:
        time.sleep(0.3)
    stop.set()
    thread.join()
    assert alone.count > 0
    assert beside.count > 0
    if not Path("/proc/self/schedstat").exists():
        assert alone.waited_s is beside.waited_s is None
    else:
        assert alone.waited_s is not None
        assert beside.waited_s is not None
        assert beside.waited_s / beside.seconds > 0.1 + alone.waited_s / alone.seconds


def test_lock_time_is_the_threads_own_and_not_what_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that sleeps takes none, one that computes takes all, but for what it does in the reading call."""

    def compute(seconds: float) -> None:
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass

    for name in ("read_without_lock", "read_pieces"):
        monkeypatch.setattr(reading, name, compute)

    def start(steps: int) -> Iterator[list[int]]:
        for _ in range(steps):
            time.sleep(0.002)
            compute(0.003)
            call: Callable[[float], None] = vars(reading)["read_pieces"]
            call(0.005)
            yield [0] * 10

    turns = Turns()
    load = Load(Contender(start), threading.current_thread().name)
    assert turns.turn(load, LoaderCommand(steps=5, warmup=1), CPU) == 1
    assert turns.pictures == [50]
    assert turns.locked_s[0] == pytest.approx(5 * 0.003, rel=0.5)
    assert reading.read_pieces is compute


def test_reading_call_by_call_counts_as_time_with_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "read_pieces", reading.read_plainly)
    with noting_unlocked():
        assert reading.read_pieces is reading.read_plainly
