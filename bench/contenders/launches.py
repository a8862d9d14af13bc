"""What the loader takes from a thread that launches operations, as training's does: they share Python's lock.

In turn launch: a thread that has the process for itself; the same beside our loader at its full rate, and at a given
one; and beside what the loader does for a GPU, where DALI decodes and resamples without the lock: read and feed.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from nvidia.dali import fn, pipeline_def
from nvidia.dali.backend import TensorCPU
from nvidia.dali.pipeline import DataNode

from bench.contenders.loaders import OURS, Work, ours
from bench.harness.timing import Contender, Plan, take_turns
from fastflower.data import reading
from fastflower.data.contents import examined
from fastflower.data.pipeline import Inputs, inputs
from fastflower.data.reading import Reader, known_sound

FEED = f"{OURS}, read and feed only"
AT_ONCE = 50  # launches between two looks at whether to stop
MORE = 20  # times as many pictures are fed in a second as are decoded


@dataclass
class Launches:
    """A thread's launches while the clock ran."""

    count: int = 0
    seconds: float = 0.0
    waited_s: float | None = None  # for the lock, neither running nor waiting for a core; None where nothing tells

    @property
    def per_s(self) -> float:
        """Launches a second."""
        return self.count / self.seconds


@contextmanager
def launching(device: torch.device) -> Iterator[Launches]:
    """A thread that launches additions to eight numbers all the time; counted is what it does inside."""
    launches, stop, warm = Launches(), threading.Event(), threading.Event()

    def launch() -> None:
        numbers = torch.zeros(8, device=device)
        for _ in range(100):
            numbers.add_(1)
        warm.set()
        began, awake_before = time.perf_counter(), _awake_s()
        while not stop.is_set():
            for _ in range(AT_ONCE):
                numbers.add_(1)
            launches.count += AT_ONCE
        launches.seconds = time.perf_counter() - began
        awake = _awake_s()
        if awake is not None and awake_before is not None:
            launches.waited_s = launches.seconds - (awake - awake_before)

    thread = threading.Thread(target=launch, name="launches")
    thread.start()
    warm.wait()
    try:
        yield launches
    finally:
        stop.set()
        thread.join()


def _awake_s() -> float | None:
    """Seconds that this thread has run or waited for a core: what is missing from the clock's it was asleep."""
    try:
        run_ns, queued_ns, _ = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text().split()
    except OSError:
        return None
    return (int(run_ns) + int(queued_ns)) / 1e9


@dataclass(frozen=True)
class Load:
    """What runs beside the launches."""

    contender: Contender
    thread: str  # name of the one that feeds DALI
    rate: float | None = None  # images/s that it is held to
    times: int = 1  # as many steps as the plan has, where a step takes little


@dataclass
class Turns:
    """What was measured of a load in its turns."""

    launches: list[Launches] = field(default_factory=list)
    pictures: list[int] = field(default_factory=list)
    locked_s: list[float] = field(default_factory=list)  # CPU time of the feeding thread, but for reading

    def turn(self, load: Load, plan: Plan, device: torch.device) -> int:
        """One more repeat; how many there are now."""
        lead = max(plan.warmup, load.contender.ahead)
        steps = load.times * plan.steps
        done = load.contender.start(lead + steps + load.contender.ahead)
        for _ in islice(done, lead):
            pass
        (thread,) = (thread for thread in threading.enumerate() if thread.name == load.thread)
        assert thread.ident
        clock = time.pthread_getcpuclockid(thread.ident)
        with launching(device) as launches, noting_unlocked() as unlocked_s:
            before = time.clock_gettime(clock)
            pictures = _paced(islice(done, steps), load.rate)
            self.locked_s.append(time.clock_gettime(clock) - before - sum(unlocked_s))
        for _ in done:
            pass
        self.pictures.append(pictures)
        self.launches.append(launches)
        return len(self.launches)


def _paced(batches: Iterator[Sized], rate: float | None) -> int:
    """Take batches at so many pictures a second; how many pictures."""
    began, pictures = time.perf_counter(), 0
    for batch in batches:
        pictures += len(batch)
        if rate:
            time.sleep(max(0.0, began + pictures / rate - time.perf_counter()))
    return pictures


def rows(work: Work, plan: Plan, rate: float) -> list[dict[str, Any]]:
    """A row for each load, all in turns with launches that nothing runs beside."""
    work = replace(work, records=examined(work.records))  # as training has it
    loader = ours(work, plan.batch)
    loads = {
        OURS: Load(loader, "loader"),
        f"{OURS}, {rate:g} images/s": Load(loader, "loader", rate),
        FEED: Load(feeding(work, plan.batch), threading.current_thread().name, times=MORE),
    }
    turns = {name: Turns() for name in loads}
    alone: list[Launches] = []

    def turn_alone() -> int:
        with launching(work.device) as launches:
            time.sleep(turns[OURS].launches[-1].seconds)
        alone.append(launches)
        return len(alone)

    todo: dict[str, Callable[[], int]] = {
        name: partial(turns[name].turn, load, plan, work.device) for name, load in loads.items()
    }
    take_turns(todo | {"alone": turn_alone}, plan.repeats)
    return [{"name": name} | _row(turns[name], alone, plan) for name in loads]


def _row(turns: Turns, alone: list[Launches], plan: Plan) -> dict[str, Any]:
    pairs = list(zip(turns.pictures, turns.launches, strict=True))
    rates = [pictures / launches.seconds for pictures, launches in pairs]
    waits = [1e6 * launches.waited_s / pictures for pictures, launches in pairs if launches.waited_s is not None]
    locked = [1e6 * seconds / pictures for seconds, pictures in zip(turns.locked_s, turns.pictures, strict=True)]
    row = {
        "role": "ours",
        "images_per_s": median(rates),
        "spread": (min(rates), max(rates)),
        "ms_per_step": 1000 * plan.batch / median(rates),
        "pictures": sum(turns.pictures),
        "batch": plan.batch,
        "launches_per_s": median(launches.per_s for launches in turns.launches),
        "launches_alone_per_s": median(launches.per_s for launches in alone),
        "lock_us": median(locked),
    }
    return row | ({"launcher_waits_us": median(waits)} if waits else {})


def feeding(work: Work, batch: int) -> Contender:
    """All that the loader's thread does before DALI decodes: a pipeline that only looks at the pictures' lengths."""
    reader = Reader(work.records, known_sound(work.records))

    def start(steps: int) -> Iterator[Sized]:
        requests = work.requests(batch, steps)
        in_work: deque[Inputs] = deque()

        def source() -> Inputs:
            request = next(requests)
            in_work.append(inputs([TensorCPU(encoded) for encoded in reader.read(request.indices)], request))
            return in_work[-1]

        @pipeline_def(batch_size=batch, num_threads=1, device_id=None, prefetch_queue_depth=work.engine.prefetch)
        def lengths() -> tuple[DataNode, ...]:
            encoded, *numbers = fn.external_source(source=source, num_outputs=4, batch=True, no_copy=True)
            return encoded.shape(), *numbers

        pipeline = lengths()
        for _ in range(steps):
            pictures = pipeline.run()[0]
            in_work.popleft()
            yield pictures

    return Contender(start, ahead=work.engine.prefetch)


@contextmanager
def noting_unlocked() -> Iterator[list[float]]:
    """CPU seconds of each call that reads a batch, where that needs no lock."""
    read: Callable[..., None] = reading.read_pieces
    spent_s: list[float] = []

    def noted(*arguments: Any) -> None:
        before = time.thread_time()
        read(*arguments)
        spent_s.append(time.thread_time() - before)

    if read is reading.read_without_lock:
        reading.read_pieces = noted
    try:
        yield spent_s
    finally:
        reading.read_pieces = read
