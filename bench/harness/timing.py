"""The clock of all benchmarks, and contenders in turns.

Of steps only the steady state is timed, and a batch that memory does not hold is halved.

All contenders of a group take turns, repeat by repeat, so that a machine that slows down slows all of them. The first
steps do not count (compiling, starting), and as much work lies begun ahead of the last timed step as lay ahead of the
first. Where torchrun started several processes, they start and stop the clock together.
"""

from __future__ import annotations

import contextlib
import resource
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sized
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch

from bench.harness.missing import MissingError
from fastflower.errors import UserError
from fastflower.runtime.compilations import Compilations, counted_compilations
from fastflower.runtime.distributed import Ranks
from fastflower.training.stopwatch import Stopwatch

SLEEP_CYCLES = 2_000_000  # of the GPU for each call, about 1 ms: longer than the host needs to launch it
SLEEP_AT_LEAST = 20_000_000  # about 10 ms, which no pause of the host outlasts, such as Python's garbage collection
LATE = "the GPU was idle before all was launched"
OUT_OF_MEMORY = ("out of memory", "can't allocate memory")  # what torch's and DALI's allocators say


# What a contender is beside ours: ours from decoded pictures, what most people do (baseline), what else is used (peer),
# or a decoder alone, of which one is the limit.
Role = Literal["ours", "decoded", "baseline", "peer", "decoder", "limit"]


@dataclass(frozen=True)
class Contender:
    """Something to measure."""

    start: Callable[[int], Iterator[Sized]]  # begin so many steps; gives each one's pictures when it is done
    role: Role = "ours"
    ahead: int = 0  # most steps that it begins beyond the one that it hands over
    watch: Stopwatch | None = None  # notes the time spent waiting for batches, where there is some to note
    macs: int | None = None  # of a forward pass of one picture
    passes: int = 1  # work of a step in forward passes: 1, or 3 with the backward pass, which takes two
    compiled: bool | None = None  # a network by torch.compile; None where there is none
    part: str | None = None  # of a training step, where it is measured alone


Name = TypeVar("Name", bound=Hashable)
Make = Callable[[int], Contender]  # for a batch of so many pictures; raises MissingError
Told = Callable[[str, int], None]  # whose turn it is, and how many turns have been timed


class Plan(Protocol):
    """How much is measured."""

    @property
    def batch(self) -> int:
        """Pictures in a batch, of each process."""

    @property
    def steps(self) -> int:
        """Timed steps of a repeat."""

    @property
    def warmup(self) -> int:
        """Fewest steps before them."""

    @property
    def repeats(self) -> int:
        """How often each contender is timed."""


def elapsed_ms(work: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """What `work`, so many calls, takes: on a GPU the device's time, without waits for the host.

    The device is kept busy until all is launched; a warning says so where it was not.
    """
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return 1000 * (time.perf_counter() - began)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    torch.cuda._sleep(SLEEP_AT_LEAST + SLEEP_CYCLES * calls)
    before.record()
    work()
    after.record()
    if before.query():
        warnings.warn(f"{LATE}: the time has waits for the host in it", stacklevel=2)
    after.synchronize()
    milliseconds: float = before.elapsed_time(after)
    return milliseconds


def take_turns(turns: Mapping[Name, Callable[[], int]], repeats: int) -> None:
    """Let all take turns until each has been timed `repeats` times.

    Args:
        turns: of each contender what times it once more, and gives how many of its times count so far.
        repeats: how many are to count.
    """
    counted = dict.fromkeys(turns, 0)
    while waiting := [name for name in turns if counted[name] < repeats]:
        for name in waiting:
            counted[name] = turns[name]()


class Timing(NamedTuple):
    """One repeat of one contender."""

    pictures: int  # delivered while the clock ran, to all processes
    seconds: float
    first_s: float  # what the very first step took, before the clock ran
    waited_s: float  # of `seconds`, for batches; the mean over the processes
    anew: Compilations  # in `seconds`, by this process; should be none


def time_steps(contender: Contender, warmup: int, steps: int, device: torch.device, ranks: Ranks) -> Timing:
    """Time `steps` steps after at least `warmup` >= 1 others.

    As many steps as the contender works ahead are begun before the clock starts and, for the same reason, follow after
    it stops. They are waited for, so that they do not slow the next contender down.
    """
    lead = max(warmup, contender.ahead)
    began = time.perf_counter()
    done = contender.start(lead + steps + contender.ahead)
    next(done)
    _synchronize(device, ranks)
    first_s = time.perf_counter() - began
    _count(done, lead - 1)
    _synchronize(device, ranks)
    waited_before = contender.watch.waited_s if contender.watch else 0.0
    with counted_compilations() if contender.compiled else contextlib.nullcontext(Compilations()) as anew:
        began = time.perf_counter()
        pictures = _count(done, steps)
    waited_s = contender.watch.waited_s - waited_before if contender.watch else 0.0
    _synchronize(device, ranks)
    seconds = time.perf_counter() - began
    _count(done, contender.ahead)
    totals, clocks, waits = zip(*ranks.gather((pictures, seconds, waited_s)), strict=True)  # of each process
    return Timing(sum(totals), max(clocks), first_s, sum(waits) / len(waits), anew)


def _count(done: Iterator[Sized], steps: int) -> int:
    return sum(len(pictures) for pictures in islice(done, steps))


def _synchronize(device: torch.device, ranks: Ranks) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    ranks.max(0)  # waits for the other processes


class Lane:
    """A contender through its repeats; it begins anew with half the batch where memory does not hold it."""

    def __init__(self, make: Make, batch: int, device: torch.device, ranks: Ranks) -> None:
        self.make, self.batch, self.device, self.ranks = make, batch, device, ranks
        self.timings: list[Timing] = []
        self.note: str | None = None
        self.contender: Contender | None = None
        self.peak_bytes = 0

    def turn(self, plan: Plan) -> None:
        """One repeat.

        Raises:
            MissingError: it cannot be measured here.
            UserError: not even one picture fits, or several processes run, of which one alone cannot halve its batch.
        """
        while not self._try(plan):
            if self.batch == 1 or self.ranks.world_size > 1:
                raise UserError(
                    f"a batch of {self.batch} does not fit into memory: lower --batch or the pictures' size."
                )
            self.batch //= 2
            self.note = f"out of memory: batch halved to {self.batch}"
            self.contender = None
            self.timings.clear()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _try(self, plan: Plan) -> bool:
        """Whether the repeat was timed; False where memory ran out."""
        try:
            if self.contender is None:
                before = reset_peak(self.device)
                self.contender = self.make(self.batch)
                timing = time_steps(self.contender, plan.warmup, plan.steps, self.device, self.ranks)
                self.peak_bytes = self.ranks.max(peak_bytes(self.device) - before)
            else:
                timing = time_steps(self.contender, plan.warmup, plan.steps, self.device, self.ranks)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            return False
        self.timings.append(timing)
        return True

    def row(self, steps: int, ceiling: float | None) -> dict[str, Any]:
        """What is reported; `ceiling` is what all processes together multiply, FLOP/s.

        first_step_s is that of the first repeat: building the pipeline is in it, and compiling, unless a contender of
        the group has compiled the same before. pictures are those of all repeats and processes, and images_per_s is of
        all processes too. macs (multiply-adds of a forward pass) and flops (of the step: 2 x macs, and three times that
        with a backward pass) are a picture's. compiled_anew and graphs_recorded_anew count what torch.compile did again
        while the clock ran, functions and CUDA graphs, and should be 0.
        """
        assert self.contender
        rates = [timing.pictures / timing.seconds for timing in self.timings]
        row: dict[str, Any] = {
            "role": self.contender.role,
            "images_per_s": median(rates),
            "spread": (min(rates), max(rates)),
            "ms_per_step": 1000 * median(timing.seconds for timing in self.timings) / steps,
            "first_step_s": self.timings[0].first_s,
            "pictures": sum(timing.pictures for timing in self.timings),
            "batch": self.batch,
            "world_size": self.ranks.world_size,
            "peak_memory_mb": self.peak_bytes / 1e6,
            "peak_memory_of": "GPU" if self.device.type == "cuda" else "process",
        }
        if self.contender.macs is not None and ceiling is not None:
            flops = 2 * self.contender.passes * self.contender.macs
            rate = row["images_per_s"] * flops
            row |= {"macs": self.contender.macs, "flops": flops, "flops_per_s": rate, "mfu": rate / ceiling}
            row |= {"ceiling_flops_per_s": ceiling}
        if self.contender.watch:
            row["data_wait"] = median(timing.waited_s / timing.seconds for timing in self.timings)
        if self.contender.compiled:
            row["compiled_anew"] = sum(timing.anew.compiled for timing in self.timings)
            row["graphs_recorded_anew"] = sum(timing.anew.recorded for timing in self.timings)
        told = {"compiled": self.contender.compiled, "part": self.contender.part, "note": self.note}
        return row | {key: value for key, value in told.items() if value is not None}


def measure(
    makers: Mapping[str, Make],
    plan: Plan,
    device: torch.device,
    ranks: Ranks,
    ceiling: float | None = None,
    told: Told | None = None,
) -> list[dict[str, Any]]:
    """A row for each contender, by name; all are timed `plan.repeats` times, in turns. Missing ones say why.

    Args:
        makers: of the contenders.
        plan: how much is measured.
        device: where.
        ranks: the processes.
        ceiling: FLOP/s that all processes together multiply.
        told: called before each turn; None shows a progress bar.

    Raises:
        UserError: not even one picture fits into memory, or what the contenders raise.
    """
    lanes = {name: Lane(make, plan.batch, device, ranks) for name, make in makers.items()}
    missing: dict[str, str] = {}
    total = plan.repeats * len(lanes)
    with contextlib.nullcontext(told) if told else _progress_bar(total, shown=ranks.is_main) as tell:

        def turn(name: str) -> int:
            tell(name, sum(len(lane.timings) for lane in lanes.values()))
            try:
                lanes[name].turn(plan)
            except MissingError as reason:
                missing[name] = str(reason)
                return plan.repeats
            return len(lanes[name].timings)

        take_turns({name: partial(turn, name) for name in lanes}, plan.repeats)
    return [
        {"name": name} | ({"missing": missing[name]} if name in missing else lane.row(plan.steps, ceiling))
        for name, lane in lanes.items()
    ]


@contextlib.contextmanager
def _progress_bar(total: int, *, shown: bool) -> Iterator[Told]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not shown) as progress:
        task = progress.add_task("measuring", total=total)
        yield lambda name, timed: progress.update(task, description=name, completed=timed)


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


def reset_peak(device: torch.device) -> int:
    """Begin to look for the peak of memory; bytes that others hold and that do not count.

    On a GPU what tensors take is known. On a CPU the whole process counts; since its start, where the system cannot
    reset the peak.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak of the resident size
    return 0


def peak_bytes(device: torch.device) -> int:
    """The peak of memory since `reset_peak`: a GPU's tensors, or the resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux
