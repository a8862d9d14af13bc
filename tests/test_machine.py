"""Processors and memory within the limits of control groups, drawn at random and compared with what a reader sees."""

from __future__ import annotations

import math
import os
import random
from pathlib import Path

import pytest

from fastflower import doctor, machine
from fastflower.machine import Sources, cpus, memory

GB = 10**9
NONE_V1 = 9223372036854771712  # how version 1 says that there is no limit
CPUS = len(os.sched_getaffinity(0))


def sources(folder: Path, membership: str, *, total: int = 64 * GB, available: int = 48 * GB) -> Sources:
    """A machine of which nothing but `membership` and memory is written yet."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cgroup").write_text(membership)
    (folder / "meminfo").write_text(
        f"MemTotal: {total // 1024} kB\nMemFree: 1 kB\nMemAvailable: {available // 1024} kB\nHugePages_Total: 0\n"
    )
    return Sources(folder / "groups", folder / "cgroup", folder / "meminfo")


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_here_and_where_nothing_is_limited(tmp_path: Path) -> None:
    assert 1 <= cpus() <= CPUS
    actual = memory()
    assert 10**8 < actual.free <= actual.total < 10**14
    free = sources(tmp_path, "")
    assert cpus(free) == CPUS
    assert memory(free) == machine.Memory(64 * GB, 48 * GB, None)
    assert cpus(Sources(tmp_path, tmp_path / "no such file")) == CPUS


@pytest.mark.parametrize("seed", range(40))
def test_the_smallest_limit_on_the_way_up_counts(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    version, hybrid = draw.choice([1, 2]), draw.random() < 0.3
    names = [f"level{i}" for i in range(draw.randrange(5))]
    path = "/" + "/".join(names)
    together = "cpu,cpuacct" if draw.random() < 0.5 else "cpu"
    lines = f"5:{together}:{path}\n4:memory:{path}\n1:name=systemd:/elsewhere\n" if version == 1 else ""
    lines += f"0::{path if version == 2 else '/'}\n" if version == 2 or hybrid else ""
    host = sources(tmp_path, lines)
    for_memory = host.groups / "memory" if version == 1 else host.groups / ("unified" if hybrid else "")
    for_cpus = host.groups / together if version == 1 else for_memory
    limits, free, quotas = [64 * GB], [48 * GB // 1024 * 1024], [float(CPUS)]
    for depth in range(len(names) + 1):
        inside = names[:depth]
        limit, used, cached = (draw.randrange(1, 90 * GB) if draw.random() < 0.6 else None), draw.randrange(GB), 12345
        cached = min(used, cached)
        quota, period = (draw.randrange(1000, 400_000) if draw.random() < 0.6 else None), draw.choice([50_000, 100_000])
        if version == 1:
            write(
                for_memory.joinpath(*inside),
                memory__limit_in_bytes=NONE_V1 if limit is None else limit,
                memory__usage_in_bytes=used,
                memory__stat=f"cache 1\ninactive_file 0\ntotal_inactive_file {cached}",
            )
            write(
                for_cpus.joinpath(*inside),
                cpu__cfs_quota_us=-1 if quota is None else quota,
                cpu__cfs_period_us=period,
            )
        else:
            write(
                for_memory.joinpath(*inside),
                memory__max="max" if limit is None or seed % 2 else limit,
                memory__high="max" if limit is None or not seed % 2 else limit,
                memory__current=used,
                memory__stat=f"anon 1\ninactive_file {cached}\nactive_file 7",
                cpu__max=f"{'max' if quota is None else quota} {period}",
            )
        if limit is not None:
            limits.append(limit)
            free.append(max(limit - (used - cached), 0))
        if quota is not None:
            quotas.append(quota / period)
    smallest = min(limits)
    assert memory(host).limit == (smallest if smallest < 64 * GB // 1024 * 1024 else None)
    assert memory(host).free == min(free)
    assert cpus(host) == max(1, math.ceil(min(quotas)))
    # a neighbour's limits are its own
    write(for_memory / "neighbour", memory__max=1, memory__limit_in_bytes=1, memory__current=0, cpu__max="1000 100000")
    assert memory(host).limit == (smallest if smallest < 64 * GB // 1024 * 1024 else None)


@pytest.mark.parametrize("path", ["/docker/0123abc", "/../other", "/"])
def test_in_a_container_the_path_may_be_the_hosts(path: str, tmp_path: Path) -> None:
    first = sources(tmp_path / "1", f"4:memory:{path}\n3:cpu,cpuacct:{path}\n")
    write(first.groups / "memory", memory__limit_in_bytes=2 * GB, memory__usage_in_bytes=GB)
    write(first.groups / "cpu,cpuacct", cpu__cfs_quota_us=50_000, cpu__cfs_period_us=100_000)
    second = sources(tmp_path / "2", f"0::{path}\n")
    write(second.groups, memory__max=2 * GB, memory__current=GB, cpu__max="50000 100000")
    for host in (first, second):
        assert memory(host).limit == 2 * GB
        assert memory(host).free == GB
        assert cpus(host) == 1


def test_what_is_over_the_limit_is_not_free(tmp_path: Path) -> None:
    host = sources(tmp_path, "0::/job\n")
    write(host.groups / "job", memory__max=GB, memory__high=GB // 2, memory__current=GB)
    assert memory(host).free == 0
    assert memory(host).limit == GB // 2


def test_the_doctor_shows_both(tmp_path: Path) -> None:
    host = sources(tmp_path, "0::/job\n")
    assert doctor._memory(host) == f"{64 * GB / 2**30:.1f} GiB, {48 * GB / 2**30:.1f} GiB free"
    write(host.groups / "job", memory__max=2 * 2**30, memory__current=2**30, cpu__max="150000 100000")
    assert doctor._memory(host) == f"{64 * GB / 2**30:.1f} GiB, limited to 2.0 GiB, 1.0 GiB free"
    assert doctor._cores(host) == f"{min(CPUS, 2)} of {os.cpu_count()} may be used (affinity {CPUS}, quota 1.5)"
