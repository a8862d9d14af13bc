"""The processes of a run: one alone, or those that torchrun started."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist

# The defaults of its functions hold the group that exists when it is imported, which torch does itself on first use of
# some parts. Imported after the group, it kept gloo's threads past the group's end, and one could abort the process
# as Python ended.
import torch.distributed.nn
from torch._inductor import config as inductor
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from fastflower import machine
from fastflower.errors import UserError
from fastflower.files import digest
from fastflower.runtime import launcher
from fastflower.runtime.clock import Clock
from fastflower.runtime.device import near
from fastflower.runtime.signals import Signals, Stopped, handling

T = TypeVar("T")

# What a process says before each step; the highest value over the ranks is what all do.
_END, _GO, _STOP, _FAILED = range(4)
_CLOCK = 2**48  # above any clock (milliseconds), which is added to it: of those that say the highest, the main rank's
SAID_WITHIN = timedelta(seconds=5)  # a mistake by the main rank, which all have met

# How long a process waits for the others. On the host it waits while another one works: reads all records, decodes
# them, downloads weights, writes a checkpoint to a slow disk. A GPU only waits for what all compute at the same time.
HOST_WITHIN = timedelta(days=1)
DEVICE_WITHIN = timedelta(minutes=30)
# A process that dies closes its connections, which ends the waiting; one whose machine has lost power or network does
# not. So the system asks on each connection that has been silent for so many seconds, so often, until it gives it up.
# It does not ask where something is sent already, such as what each rank says before a step: that is sent again, for a
# quarter of an hour, unless it is told for how long (milliseconds).
KEEP_ALIVE = {
    socket.TCP_KEEPIDLE: 60,
    socket.TCP_KEEPINTVL: 10,
    socket.TCP_KEEPCNT: 6,
    socket.TCP_USER_TIMEOUT: 120_000,
}


@dataclass(frozen=True)
class _Turn(Generic[T]):
    """A rank's next step."""

    batch: T | None  # None: there is none, or it failed
    failure: UserError | None
    verdict: Callable[[], int]  # waits for what all do


@dataclass(frozen=True)
class Ranks:
    """One process among the others."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    # over which the hosts' memory is exchanged; None = the default group, which on GPUs exchanges theirs
    host: dist.ProcessGroup | None = field(default=None, compare=False, repr=False)
    # how many of the machine's processes may use processors of this one's, itself included; None = all of them
    sharing: int | None = field(default=None, compare=False, repr=False)

    @property
    def cores(self) -> int:
        """The process's share of the processors' time, at least 1: how many threads it is to work with."""
        processes = self.local_world_size
        return machine.cpus(sharing=self.sharing or processes, processes=processes)

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    def share_of(self, batch_size: int) -> int:
        """How many pictures of a global batch are this rank's.

        Raises:
            UserError: it cannot be split evenly.
        """
        if batch_size % self.world_size:
            below = batch_size // self.world_size * self.world_size
            fits = f"{below} or {below + self.world_size}" if below else f"{self.world_size}"
            raise UserError(
                f"train.batch_size {batch_size} cannot be split over {self.world_size} processes: {fits} would fit."
            )
        return batch_size // self.world_size

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, value: int) -> int:
        """Greatest value over the ranks. Host memory only: it waits for the other processes, not for a GPU."""
        return self.max_later(value)()

    def max_later(self, value: int) -> Callable[[], int]:
        """What waits for the greatest value over the ranks, which is on its way from now on."""
        if self.world_size == 1:
            return lambda: value
        greatest = torch.tensor(value)
        work = dist.all_reduce(greatest, op=dist.ReduceOp.MAX, group=self.host, async_op=True)

        def wait() -> int:
            work.wait()
            return int(greatest)

        return wait

    def gather(self, value: T) -> list[T]:
        """Everyone's value, by rank. It waits for the others, however long they work, but not for one that is gone."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.host)
        return values

    def broadcast_buffers(self, model: torch.nn.Module) -> None:
        """Give every rank the main rank's buffers (BatchNorm's running statistics)."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Run the block on every rank; if it fails with a UserError on any, it fails with that on all."""
        failure = None
        try:
            yield
        except UserError as error:
            failure = error
        self._raise_first(failure)

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block on the main rank, then on the others, which find what it put into caches."""
        if not self.is_main:
            self._raise_first(None)
        failure = None
        try:
            yield
        except UserError as error:
            failure = error
        if self.is_main:
            self._raise_first(failure)
        self._raise_first(None if self.is_main else failure)

    def agree(self, clock: Clock) -> None:
        """Have all ranks know what the main rank's clock shows; it waits for them."""
        clock.agree(self.max(clock.read_ms() if self.is_main else 0))

    def lockstep(self, batches: Iterable[T], signals: Signals, clock: Clock | None = None) -> Iterator[T]:
        """Yield batches while every rank can go on; ranks may have unequal numbers of them.

        With a clock, all ranks know at each batch what the main rank's showed when it took the batch.

        Among several ranks a batch is taken before the one ahead of it is yielded, so that what each can do with it
        travels while all compute, and nobody waits for that. So a signal stops them a step later than one alone.

        Raises:
            Stopped: some rank got a signal; every rank raises this at the same step, with the same number.
            UserError: some rank's batches failed; its sentence, on every rank.
        """
        iterator = iter(batches)
        turn = self._take(iterator, signals, clock)
        while True:
            verdict, shown_ms = divmod(turn.verdict(), _CLOCK)
            if verdict == _FAILED:
                self._raise_first(turn.failure)
            if verdict == _STOP:
                raise Stopped(self.max(signals.received or 0))
            if verdict == _END:
                return
            if clock:
                clock.agree(shown_ms)
            following = self._take(iterator, signals, clock) if self.world_size > 1 else None
            if turn.batch is not None:
                yield turn.batch
            turn = following or self._take(iterator, signals, clock)

    def _take(self, iterator: Iterator[T], signals: Signals, clock: Clock | None) -> _Turn[T]:
        """A rank's next batch; tells the others whether there is one, and the main rank what its clock shows."""
        batch, failure, status = None, None, _GO
        try:
            batch = next(iterator, None)
        except UserError as error:
            failure, status = error, _FAILED
        if status == _GO:
            status = _STOP if signals.received else _END if batch is None else _GO
        shown_ms = clock.read_ms() if clock and self.is_main else 0
        return _Turn(batch, failure, self.max_later(status * _CLOCK + shown_ms))

    def _raise_first(self, failure: UserError | None) -> None:
        sentences = [sentence for sentence in self.gather(str(failure) if failure else None) if sentence]
        if sentences:
            raise failure or UserError(sentences[0])


@contextlib.contextmanager
def processes(device: torch.device) -> Iterator[Ranks]:
    """Join the processes that torchrun started, if it did, until the block ends.

    `device` becomes CUDA's current one in this thread before anything else is asked of CUDA, so that no process takes
    memory of another one's GPU.

    Raises:
        UserError: the launcher's variables are not complete, or the others cannot be found by them.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    place = launcher.place()
    ranks = Ranks(*place) if place else Ranks()
    with near(device):
        if not place:
            _limit_threads(ranks)
            yield ranks
            return
        store, ranks = _meet(device, ranks)
        _limit_threads(ranks)
        try:
            yield ranks
        except UserError as error:
            error.said_elsewhere = _is_said(str(error), store, ranks)
            raise
        except Stopped:
            dist.destroy_process_group()
            raise
        dist.destroy_process_group()  # but not after a failure, when it could wait for a process that is gone


def _meet(device: torch.device, ranks: Ranks) -> tuple[Store, Ranks]:
    """Join the process groups: what the processes find each other by, and the place of this one with its group.

    A signal ends the process, since Python would not hear of it before all are there.
    """
    store: Store
    on_gpu = device.type == "cuda"
    backend, within = ("nccl", DEVICE_WITHIN) if on_gpu else ("gloo", HOST_WITHIN)
    try:
        with handling(signal.SIG_DFL):
            store, _, _ = next(rendezvous("env://"))
            dist.init_process_group(backend, timeout=within, store=store, rank=ranks.rank, world_size=ranks.world_size)
            host: Any = dist.new_group(backend="gloo", timeout=HOST_WITHIN) if on_gpu else None
    except dist.DistError as error:
        where = ":".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT"))
        reason = str(error).partition("\n")[0].rstrip(". ")
        raise UserError(
            f"the processes do not find each other at {where} (MASTER_ADDR and MASTER_PORT): {reason}; start all of "
            "them by torchrun, with a host that each can reach and a port that is free."
        ) from error
    _keep_alive()
    ranks = replace(ranks, host=host)
    return store, replace(ranks, sharing=_sharing(ranks))


def _sharing(ranks: Ranks) -> int:
    """How many processes of this machine may use processors of this one's, itself included."""
    own, first = os.sched_getaffinity(0), ranks.rank - ranks.local_rank
    of_machine = ranks.gather(own)[first : first + ranks.local_world_size]
    return sum(not own.isdisjoint(processors) for processors in of_machine)


def _keep_alive() -> None:
    """Have the system watch all connections of this process; see KEEP_ALIVE."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # it is closed by now
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                with socket.socket(fileno=os.dup(int(name))) as connection:
                    if connection.family in (socket.AF_INET, socket.AF_INET6):
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                        for option, value in KEEP_ALIVE.items():
                            connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _is_said(sentence: str, store: Store, ranks: Ranks) -> bool:
    """Whether the main rank says the sentence; the others wait for a moment whether it does.

    Not by a collective, which a process that is gone or busy would not join.
    """
    key = f"said/{digest(sentence.encode(errors='surrogateescape')).hex()}"
    try:
        if ranks.is_main:
            store.set(key, "")
        else:
            store.wait([key], SAID_WITHIN)
    except RuntimeError:  # it did not, or is gone
        return False
    return not ranks.is_main


def _limit_threads(ranks: Ranks) -> None:
    """Keep torch and its compiler, which take a thread for each core that they see, to this process's share.

    More would wait for each other, under a quota or beside other processes. What the user has said stays.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), ranks.cores))
    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        inductor.compile_threads = min(inductor.decide_compile_threads(), ranks.cores)
