"""What the clock counts, what it leaves out, and what happens when memory runs out."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

from bench.harness import timing
from bench.harness.missing import MissingError
from bench.harness.timing import Contender, measure, take_turns, time_steps
from fastflower.errors import UserError
from fastflower.runtime.distributed import Ranks
from fastflower.training.stopwatch import Stopwatch

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Plan:
    batch: int = 8
    steps: int = 3
    warmup: int = 1
    repeats: int = 3


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time that passes only where somebody sleeps, so that no load of the machine has a say in it."""
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "perf_counter", lambda: now)


def even(batch: int, **more: Any) -> Contender:
    """Steps of a hundredth of a second."""

    def start(steps: int) -> Iterator[list[int]]:
        for _ in range(steps):
            time.sleep(0.01)
            yield [0] * batch

    return Contender(start, **more)


@pytest.mark.usefixtures("clock")
def test_only_the_steps_between_warmup_and_work_ahead_are_timed() -> None:
    done: list[int] = []

    def start(steps: int) -> Iterator[torch.Tensor]:
        for step in range(steps):
            time.sleep(0.2 if step == 0 else 0.1 if step < 4 or step >= 10 else 0.01)  # slow outside 4..9
            done.append(step)
            yield torch.zeros(3 + step, 3, 1, 1)

    timing = time_steps(Contender(start, ahead=4), warmup=2, steps=6, device=CPU, ranks=Ranks())
    assert done == list(range(4 + 6 + 4))  # warm-up grows to the work ahead, and that is waited for at the end
    assert timing.pictures == sum(3 + step for step in range(4, 10))  # counted, not batch x steps
    assert timing.first_s == pytest.approx(0.2)
    assert timing.seconds == pytest.approx(0.06)


@pytest.mark.parametrize("again", [0, 1])
def test_what_is_compiled_again_while_the_clock_runs_is_counted(again: int) -> None:
    def make(batch: int) -> Contender:
        function = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)

        def start(steps: int) -> Iterator[torch.Tensor]:
            for step in range(steps):
                yield function(torch.ones(batch + again * (step % 4)))  # shapes of the warm-up, and three others

        return Contender(start, compiled=True)

    torch.compiler.reset()
    (row,) = measure({"it": make}, Plan(steps=4, warmup=1, repeats=2), CPU, Ranks())
    assert (row["compiled_anew"], row["graphs_recorded_anew"]) == (3 * again, 0)


@pytest.mark.usefixtures("clock")
def test_waiting_counts_within_the_timed_steps_only() -> None:
    watch = Stopwatch()

    def start(steps: int) -> Iterator[list[int]]:
        def made() -> Iterator[list[int]]:
            for step in range(steps):
                time.sleep(0.1 if step == 0 else 0.01)
                yield [step]

        for item in watch.waiting_for(made()):
            time.sleep(0.03)
            yield item

    (row,) = measure({"stub": lambda batch: Contender(start, watch=watch)}, Plan(), CPU, Ranks())
    assert row["data_wait"] == pytest.approx(0.25)  # 0.01 of 0.04 s


@pytest.mark.usefixtures("clock")
def test_figures_are_consistent() -> None:
    (row,) = measure({"stub": lambda batch: even(batch, macs=1000, passes=3)}, Plan(), CPU, Ranks(), ceiling=1e9)
    assert row["images_per_s"] * row["ms_per_step"] / 1000 == pytest.approx(8)
    assert row["flops"] == 3 * 2 * 1000
    assert row["flops_per_s"] == pytest.approx(row["images_per_s"] * 6000)
    assert row["mfu"] == pytest.approx(row["flops_per_s"] / 1e9)
    assert row["spread"][0] <= row["images_per_s"] <= row["spread"][1]
    assert row["pictures"] == 3 * 3 * 8
    assert row["peak_memory_mb"] > 10
    assert "data_wait" not in row


@pytest.mark.usefixtures("clock")
def test_processes_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    # the other process delivered as much, in twice the time, and waited for half of it
    monkeypatch.setattr(Ranks, "gather", lambda self, mine: [mine, (mine[0], 2 * mine[1], mine[1])])
    monkeypatch.setattr(Ranks, "max", lambda self, value: value)
    (row,) = measure({"stub": even}, Plan(), CPU, Ranks(0, 2, 0, 2))
    assert row["pictures"] == 2 * 3 * 3 * 8
    assert row["images_per_s"] * row["ms_per_step"] / 1000 == pytest.approx(2 * 8)
    assert row["world_size"] == 2


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("when", ["build", "step"])
def test_batch_is_halved_until_it_fits(error: Exception, when: str) -> None:
    tried: list[int] = []

    def make(batch: int) -> Contender:
        tried.append(batch)
        if batch > 2 and when == "build":
            raise error

        def start(steps: int) -> Iterator[list[int]]:
            for step in range(steps):
                if batch > 2 and step == 2:
                    raise error
                yield [0] * batch

        return Contender(start)

    fits, small = measure({"fits": even, "small": make}, Plan(), CPU, Ranks())
    assert tried == [8, 4, 2]
    assert (small["batch"], small["pictures"]) == (2, 3 * 3 * 2)
    assert small["note"] == "out of memory: batch halved to 2"
    assert (fits["batch"], fits["pictures"]) == (8, 3 * 3 * 8)
    assert "note" not in fits


def test_repeats_begin_anew_with_the_smaller_batch() -> None:
    turns: list[int] = []

    def make(batch: int) -> Contender:
        def start(steps: int) -> Iterator[list[int]]:
            turns.append(batch)
            if turns == [8, 8]:
                raise torch.OutOfMemoryError("out of memory")
            for _ in range(steps):
                yield [0] * batch

        return Contender(start)

    (row,) = measure({"late": make}, Plan(), CPU, Ranks())
    assert turns == [8, 8, 4, 4, 4]
    assert row["pictures"] == 3 * 3 * 4


@pytest.mark.parametrize("ranks", [Ranks(), Ranks(0, 2, 0, 2)])
def test_what_cannot_be_halved_is_refused(ranks: Ranks) -> None:
    def make(batch: int) -> Contender:
        raise torch.OutOfMemoryError("out of memory")

    largest = 8 if ranks.world_size > 1 else 1
    with pytest.raises(UserError, match=f"a batch of {largest} does not fit into memory: lower --batch"):
        measure({"large": make}, Plan(), CPU, ranks)


def test_other_errors_are_no_lack_of_memory() -> None:
    def make(batch: int) -> Contender:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        measure({"broken": make}, Plan(), CPU, Ranks())


def test_missing_ones_say_why() -> None:
    def make(batch: int) -> Contender:
        raise MissingError("not installed (pip install it)")

    missing, row = measure({"missing": make, "there": even}, Plan(), CPU, Ranks())
    assert missing == {"name": "missing", "missing": "not installed (pip install it)"}
    assert row["pictures"] == 3 * 3 * 8


def test_all_take_turns_until_each_has_enough() -> None:
    """One whose times are dropped on the way takes more turns than the others, and begins to count anew."""
    said: list[str] = []
    counts = {"a": iter([1, 2, 3]), "b": iter([1, 0, 1, 2, 3]), "c": iter([3])}

    def turn(name: str) -> int:
        said.append(name)
        return next(counts[name])

    take_turns({name: partial(turn, name) for name in counts}, repeats=3)
    assert "".join(said) == "abc" + "ab" + "ab" + "b" + "b"


@pytest.mark.parametrize("late", [False, True])
def test_a_gpu_is_kept_busy_until_all_is_launched(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what is called in which order; the times are the events'. Where it was idle before, a warning says so."""
    said: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            said.append("record")

        def query(self) -> bool:
            said.append("look")
            return late

        def synchronize(self) -> None:
            said.append("wait")

        def elapsed_time(self, end: Event) -> float:
            assert end is not self
            return 2.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: said.append("idle"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: said.append(cycles))
    with pytest.warns(UserWarning, match="waits for the host") if late else contextlib.nullcontext():
        assert timing.elapsed_ms(lambda: said.append("work"), torch.device("cuda", 0), calls=3) == 2.5
    assert said == ["idle", timing.SLEEP_AT_LEAST + 3 * timing.SLEEP_CYCLES, "record", "work", "record", "look", "wait"]
    assert timing.SLEEP_CYCLES / 2e9 >= 1e-3  # seconds a call, at a GPU's highest clock


def test_who_is_told_sees_whose_turn_it_is() -> None:
    told: list[tuple[str, int]] = []
    measure({"a": even, "b": even}, Plan(repeats=2), CPU, Ranks(), told=lambda *turn: told.append(turn))
    assert told == [("a", 0), ("b", 1), ("a", 2), ("b", 3)]
