"""A process waits for others as long as they work, and no longer than they live."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.distributed_c10d import default_pg_timeout

from fastflower.runtime import distributed
from fastflower.runtime.distributed import DEVICE_WITHIN, HOST_WITHIN, KEEP_ALIVE, Ranks, processes
from fastflower.runtime.launcher import local_rank
from fastflower.runtime.signals import Signals
from tests.conftest import ROOT, train_arguments, write_dataset
from tests.processes import in_ranks
from tests.training import tiny_worker
from tests.training.test_run import rows

LIMIT_S, WORK_S = 0.2, 0.6  # torch's default, and what one process works longer than


def with_a_small_default(work: Callable[[], None]) -> None:
    """Torch's groups that are told no other limit wait so long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.distributed.distributed_c10d.default_pg_timeout", timedelta(seconds=LIMIT_S))
        work()


def batches(rank: int) -> Iterator[int]:
    """One or two, the last of which takes its time."""
    for batch in range(1 + rank):
        time.sleep(WORK_S * (batch == rank))
        yield batch


def in_turn() -> None:
    """Each of the ways to wait, for either rank."""
    with processes(torch.device("cpu")) as ranks, Signals() as signals:
        with ranks.main_first():
            time.sleep(WORK_S)
        with ranks.together():
            time.sleep(WORK_S * ranks.rank)
        assert len(list(ranks.lockstep(batches(ranks.rank), signals))) == 1 + ranks.rank
        print(f"{ranks.gather(ranks.rank)}")


def every_way() -> None:
    with_a_small_default(in_turn)


def test_ranks_wait_longer_than_torch_would() -> None:
    result = in_ranks(every_way)
    assert (result.code, result.out) == (0, "[0, 1]\n" * 2), result.err


def slowly(patch: pytest.MonkeyPatch, name: str, rank: int) -> None:
    """One rank takes its time before it does what `name` says."""
    module, _, function = name.rpartition(".")
    original = getattr(sys.modules[module], function)

    def slow(*args: Any, **kwargs: Any) -> Any:
        if local_rank() == rank:
            time.sleep(WORK_S)
        return original(*args, **kwargs)

    patch.setattr(name, slow)


def train_slowly() -> None:
    with pytest.MonkeyPatch.context() as patch:
        slowly(patch, "fastflower.data.batches.look_over", 0)
        slowly(patch, "fastflower.data.stats.decoded_batches", 1)
        slowly(patch, "fastflower.data.cache.decoded_pictures", 0)
        slowly(patch, "fastflower.training.provenance.identity", 0)
        slowly(patch, "fastflower.training.loop.evaluate_in", 1)
        slowly(patch, "fastflower.training.saving.save_checkpoint", 0)
        with_a_small_default(tiny_worker.main)


def test_a_run_outlives_what_one_rank_is_slow_at(tmp_path: Path) -> None:
    root, run = write_dataset(tmp_path / "data", {"train": 16, "val": 5}), tmp_path / "run"
    result = in_ranks(train_slowly, *train_arguments(root, run), "--train.epochs", 1, "--data.cache", "ram")
    assert result.code == 0, result.err
    assert [row["step"] for row in rows(run)] == [2]


def die_while_another_waits() -> None:
    with processes(torch.device("cpu")) as ranks:
        ranks.gather(None)
        if ranks.rank == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises(RuntimeError, match="Connection"):
            ranks.gather(None)
        print("noticed", flush=True)
        os._exit(0)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_is_not_waited_for(rank: int) -> None:
    result = in_ranks(die_while_another_waits, rank)
    assert (result.code, result.out) == (-signal.SIGKILL, "noticed\n"), result.err


def name_unwatched() -> None:
    """Connections of this process that nobody watches."""
    with processes(torch.device("cpu")) as ranks:
        connections = []
        for name in os.listdir("/proc/self/fd"):
            try:
                connection = socket.socket(fileno=os.dup(int(name)))
                connection.getpeername()
            except OSError:
                continue
            if connection.family in (socket.AF_INET, socket.AF_INET6):
                asked = [connection.getsockopt(socket.IPPROTO_TCP, option) for option in KEEP_ALIVE]
                connections.append((connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), asked))
        assert len(connections) >= 2, "of the store and of gloo"
        print(ranks.gather([way for way in connections if way != (1, list(KEEP_ALIVE.values()))]))


def test_connections_are_watched_for_machines_that_vanish() -> None:
    result = in_ranks(name_unwatched)
    assert (result.code, result.out) == (0, "[[], []]\n" * 2), result.err


VANISHING = """
import os, socket, subprocess, sys, time
import torch
from fastflower.runtime import distributed
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}
rank = 1 - bool(child := os.fork())
os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
seconds = {socket.TCP_KEEPIDLE: 2, socket.TCP_KEEPINTVL: 1, socket.TCP_KEEPCNT: 3, socket.TCP_USER_TIMEOUT: 5000}
distributed.KEEP_ALIVE.update({option: seconds[option] for option in distributed.KEEP_ALIVE})
with distributed.processes(torch.device("cpu")) as ranks:
    ranks.gather(None)
    if rank:
        time.sleep(100)
    subprocess.run(["ip", "link", "set", "lo", "down"], check=True)
    try:
        ranks.max(1)
    except RuntimeError:
        print("noticed", flush=True)
    finally:
        os.kill(child, 9)
        os._exit(0)
"""


def test_who_has_sent_something_to_a_machine_that_vanishes_notices_it_too() -> None:
    """The probes are for silent connections; what is under way is only sent again and again."""
    alone = ["unshare", "--net", "--map-root-user"]  # in a network of its own, which vanishes
    if not (shutil.which("ip") and shutil.which("unshare")) or subprocess.run([*alone, "true"], check=False).returncode:
        pytest.skip("no network can be made here")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    command = [*alone, sys.executable, "-c", VANISHING]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert ended.stdout == "noticed\n", ended.stderr


def test_the_limits_are_those_that_the_documents_name() -> None:
    assert (HOST_WITHIN.days, DEVICE_WITHIN) == (1, default_pg_timeout)
    assert 10 * default_pg_timeout < HOST_WITHIN
    text = " ".join((ROOT / "docs/training.md").read_text(encoding="utf-8").split())
    assert "Such waiting ends after a day at the latest" in text
    assert "it ends after 30 minutes" in text
    silent_s = KEEP_ALIVE[socket.TCP_KEEPIDLE] + KEEP_ALIVE[socket.TCP_KEEPINTVL] * KEEP_ALIVE[socket.TCP_KEEPCNT]
    assert (silent_s, KEEP_ALIVE[socket.TCP_USER_TIMEOUT]) == (120, 120_000)
    assert "within two minutes when its machine has vanished" in text


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_hosts_have_a_group_of_their_own_beside_the_gpus(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what waits on the host waits long, and what waits on a GPU does not."""
    groups: dict[Any, tuple[str, timedelta]] = {}
    used: list[Any] = []

    def init(backend: str, timeout: timedelta, **_: Any) -> None:
        groups[None] = backend, timeout

    def new_group(backend: str, timeout: timedelta) -> str:
        groups["host"] = backend, timeout
        return "host"

    def all_gather(values: list[Any], value: Any, group: Any) -> None:
        used.append(group)
        values[:] = [value] * len(values)

    def all_reduce(_: torch.Tensor, op: Any = None, group: Any = None, async_op: bool = False) -> Any:
        used.append(group)
        return SimpleNamespace(wait=lambda: None) if async_op else None

    monkeypatch.setattr(distributed, "rendezvous", lambda _: iter([("store", 0, 2)]))
    monkeypatch.setattr("torch.distributed.init_process_group", init)
    monkeypatch.setattr("torch.distributed.new_group", new_group)
    monkeypatch.setattr("torch.distributed.all_gather_object", all_gather)
    monkeypatch.setattr("torch.distributed.all_reduce", all_reduce)
    _, ranks = distributed._meet(torch.device(kind), Ranks(0, 2, 0, 2))
    assert ranks == Ranks(0, 2, 0, 2)
    ranks.gather(1)
    ranks.max(1)
    assert list(ranks.lockstep([], Signals())) == []
    assert set(used) == {"host" if kind == "cuda" else None}
    used.clear()
    ranks.sum(torch.zeros(1))
    assert used == [None]
    if kind == "cuda":
        assert groups == {None: ("nccl", DEVICE_WITHIN), "host": ("gloo", HOST_WITHIN)}
    else:
        assert groups == {None: ("gloo", HOST_WITHIN)}
