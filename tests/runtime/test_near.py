"""Processes near their GPUs, on machines that a folder describes as Linux does."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Set
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastflower import doctor, machine
from fastflower.machine import Sources, cpus_of, is_bound, node_of, nodes
from fastflower.runtime import distributed
from fastflower.runtime.device import near, node_of_gpu
from fastflower.runtime.distributed import Ranks, processes


def listed(numbers: set[int], draw: random.Random) -> str:
    """As Linux lists them: ranges where it likes, in order."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1 and draw.random() < 0.9:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in parts)


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


class Machine:
    """NUMA nodes with their processors, GPUs at them, and a process that may use some of the processors."""

    def __init__(self, folder: Path, of_node: list[set[int]], gpus: list[int], draw: random.Random) -> None:
        self.of_node, self.gpus = of_node, gpus
        self.processors = set[int]().union(*of_node)
        self.affinity = dict.fromkeys(map(int, os.listdir("/proc/self/task")), self.processors)
        self.sources = Sources(folder / "groups", folder / "cgroup", folder / "meminfo", folder / "sys")
        write(folder / "sys/devices/system/cpu/online", listed(self.processors, draw))
        write(folder / "sys/devices/system/node/online", listed(set(range(len(of_node))), draw))
        for node, processors in enumerate(of_node):
            write(folder / f"sys/devices/system/node/node{node}/cpulist", listed(processors, draw))
        for number, node in enumerate(gpus):
            write(folder / f"sys/bus/pci/devices/0001:{0xA0 + number:02x}:1c.0/numa_node", node)
        self.folder = folder

    def properties(self, number: int) -> Any:
        """What torch says of a GPU."""
        place = {"pci_domain_id": 1, "pci_bus_id": 0xA0 + number, "pci_device_id": 0x1C}
        return SimpleNamespace(**place, name="a GPU", total_memory=2**34, major=9, minor=0)

    def get(self, thread: int) -> set[int]:
        """As os.sched_getaffinity."""
        return set(self.affinity[thread or os.getpid()])

    def set(self, thread: int, processors: set[int]) -> None:
        """As os.sched_setaffinity."""
        assert processors
        assert processors <= self.processors
        self.affinity[thread or os.getpid()] = set(processors)

    def give(self, processors: Set[int]) -> None:
        """Let the process use these."""
        self.affinity = {thread: set(processors) for thread in self.affinity}


@pytest.fixture(autouse=True)
def no_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that begin or end meanwhile, as a pool's, are not looked at."""
    listdir = os.listdir
    threads = listdir("/proc/self/task")
    monkeypatch.setattr(os, "listdir", lambda path: threads if path == "/proc/self/task" else listdir(path))


def put(host: Machine, patch: pytest.MonkeyPatch) -> None:
    """Have this process run there."""
    patch.setattr(os, "sched_getaffinity", host.get)
    patch.setattr(os, "sched_setaffinity", host.set)
    patch.setattr(torch.cuda, "get_device_properties", host.properties)


@pytest.mark.parametrize("seed", range(60))
def test_a_process_keeps_to_the_processors_at_its_gpu_that_it_may_use(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(seed)
    count = draw.choice([1, 2, 2, 4, 8])
    numbers = list(range(draw.randrange(count, 200)))
    if draw.random() < 0.5:
        draw.shuffle(numbers)  # a processor's second threads have numbers after all the first ones
    of_node = [set(numbers[node::count]) for node in range(count)]
    gpus = [draw.randrange(-1, count) for _ in range(draw.randrange(1, 9))]
    host = Machine(tmp_path, of_node, gpus, draw)
    version = draw.choice([1, 2, None])
    left = set(draw.sample(numbers, draw.randrange(1, len(numbers) + 1))) if version else host.processors
    if version == 1:
        write(tmp_path / "cgroup", "4:cpuset:/job\n0::/")
        write(tmp_path / "groups/cpuset/cpuset.effective_cpus", listed(host.processors, draw))
        write(tmp_path / "groups/cpuset/job/cpuset.effective_cpus", listed(left, draw))
    elif version == 2:
        write(tmp_path / "cgroup", "0::/job/step")
        write(tmp_path / "groups/job/cpuset.cpus.effective", listed(left, draw))
    bound = draw.random() < 0.3 and len(left) > 1
    given = set(draw.sample(sorted(left), draw.randrange(1, len(left)))) if bound else left
    host.give(given)
    put(host, monkeypatch)
    assert is_bound(host.sources) == bound
    assert nodes(host.sources) == count
    for number, node in enumerate(gpus):
        assert node_of_gpu(number, host.sources) == (None if node < 0 else node)
        both = given & of_node[node] if node >= 0 and not bound else set()
        with near(torch.device("cuda", number), host.sources):
            assert all(processors == (both or given) for processors in host.affinity.values())
        assert all(processors == given for processors in host.affinity.values())
    with near(torch.device("cpu"), host.sources):
        assert host.get(0) == given


def test_what_linux_does_not_say_leaves_a_process_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Machine(tmp_path, [{0, 1}, {2, 3}], [1], random.Random(0))
    put(host, monkeypatch)
    nothing = Sources(tmp_path / "none", tmp_path / "none", tmp_path / "none", tmp_path / "none")
    assert node_of("0000:00:00.0", nothing) is None
    assert cpus_of(0, nothing) == set()
    assert nodes(nothing) == 1
    with near(torch.device("cuda", 0), nothing):
        assert host.get(0) == {0, 1, 2, 3}
    (tmp_path / "sys/devices/system/node/node1/cpulist").unlink()
    with near(torch.device("cuda", 0), host.sources):
        assert host.get(0) == {0, 1, 2, 3}


def test_it_is_given_back_after_a_failure_also_to_threads_that_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Machine(tmp_path, [{0, 1}, {2, 3}], [1], random.Random(0))
    put(host, monkeypatch)
    gone = max(host.affinity) + 1

    def set_affinity(thread: int, processors: set[int]) -> None:
        if thread == gone:
            raise ProcessLookupError
        host.set(thread, processors)

    monkeypatch.setattr(os, "sched_setaffinity", set_affinity)
    monkeypatch.setattr(os, "listdir", lambda _: [str(gone), *map(str, host.affinity)])
    with pytest.raises(ValueError, match="for the test"), near(torch.device("cuda", 0), host.sources):
        assert host.get(0) == {2, 3}
        raise ValueError("for the test")
    assert host.get(0) == {0, 1, 2, 3}


def test_this_process_can_be_bound_to_what_it_has() -> None:
    before = os.sched_getaffinity(0)
    machine.bind({min(before)})
    try:
        assert {frozenset(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")} == {
            frozenset({min(before)})
        }
        assert machine.cpus() == 1
    finally:
        machine.bind(before)


@pytest.fixture
def two_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """224 processors at two nodes, of eight GPUs that torch finds six at the second one."""
    of_node = [{*range(56), *range(112, 168)}, {*range(56, 112), *range(168, 224)}]
    host = Machine(tmp_path, of_node, [0, 0, 1, 1, 1, 1, 1, 1], random.Random(0))
    put(host, monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(host.gpus))
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr("fastflower.data.batches.backend.GetCUDADeviceCount", lambda: len(host.gpus))
    monkeypatch.setattr(machine, "cpu_quota", lambda *_: None)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads = torch.get_num_threads()
    yield host
    torch.set_num_threads(threads)


def test_ranks_at_one_node_share_its_processors(two_nodes: Machine) -> None:
    masks = []
    for number in range(8):
        with near(torch.device("cuda", number), two_nodes.sources):
            masks.append(os.sched_getaffinity(0))
    assert masks == [two_nodes.of_node[node] for node in two_nodes.gpus]

    class Both(Ranks):
        """Of the second of two such machines."""

        def gather(self, value: Any) -> list[Any]:
            assert value == masks[self.local_rank]
            return [{0}] * 8 + masks

    for number, node in enumerate(two_nodes.gpus):
        two_nodes.give(masks[number])
        ranks = Both(8 + number, 16, number, 8)
        sharing = distributed._sharing(ranks)
        assert sharing == (2, 6)[node]
        assert Ranks(8 + number, 16, number, 8, sharing=sharing).cores == (56, 18)[node]


def test_a_process_alone_is_near_its_gpu_before_its_threads_are_counted(
    two_nodes: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "near", partial(near, sources=two_nodes.sources))
    torch.set_num_threads(150)
    with processes(torch.device("cuda", 3)) as ranks:
        assert os.sched_getaffinity(0) == two_nodes.of_node[1]
        assert ranks.cores == torch.get_num_threads() == 112
    assert os.sched_getaffinity(0) == two_nodes.processors


def test_the_doctor_says_what_training_would_take(two_nodes: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = two_nodes.sources
    assert doctor._cores(sources) == f"224 of {os.cpu_count()} may be used, 2 NUMA nodes"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with monkeypatch.context() as patch:
        patch.setattr("fastflower.runtime.device.node_of_gpu", partial(node_of_gpu, sources=sources))
        lines = doctor._gpu().splitlines()
    monkeypatch.setattr("fastflower.runtime.device.near", partial(near, sources=sources))
    assert [line.rpartition(", ")[2] for line in lines] == [f"NUMA node {node}" for node in two_nodes.gpus]
    assert doctor._decoding() == "DALI on the GPU, 16 CPU threads; 16 in each of 8 processes, one for each GPU"
    monkeypatch.setattr(machine, "cpu_quota", lambda *_: 24.0)
    assert doctor._decoding() == "DALI on the GPU, 16 CPU threads; 3 in each of 8 processes, one for each GPU"
    two_nodes.give(set(range(100)))
    assert doctor._cores(sources) == (
        f"24 of {os.cpu_count()} may be used (affinity 100, quota 24), bound to these, 2 NUMA nodes"
    )
