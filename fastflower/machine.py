"""The processors and the memory that this process may use: the machine's, within the limits that it runs under; and
which processors are near a device.

A container or a scheduler limits processes by control groups (cgroups), of version 1, 2 or both side by side; a limit
holds for all groups inside a group, so that the smallest one on the way up counts. Linux describes them in its
documentation, admin-guide/cgroup-v2.rst and admin-guide/cgroup-v1/.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sources:
    """Where Linux tells."""

    groups: Path = Path("/sys/fs/cgroup")  # where control groups are mounted
    membership: Path = Path("/proc/self/cgroup")  # which of them this process is in
    meminfo: Path = Path("/proc/meminfo")
    system: Path = Path("/sys")  # where devices are listed


LINUX = Sources()


@dataclass(frozen=True)
class Memory:
    """Of the host, in bytes."""

    total: int
    free: int  # that can still be taken, within the limit
    limit: int | None  # of the control groups; None: there is none, or it is no less than `total`


def cpus(sources: Sources = LINUX, *, sharing: int = 1, processes: int = 1) -> int:
    """How many processors' time this process may use; at least 1.

    A quota is a share of time, such as one and a half processors', and is rounded up: one less would leave some of it.

    Args:
        sources: where Linux tells.
        sharing: processes of a run, with this one, that may use the same processors.
        processes: of it on this machine, which share the quota.
    """
    allowed = len(os.sched_getaffinity(0)) // sharing
    quota = cpu_quota(sources)
    return max(1, allowed if quota is None else min(allowed, math.ceil(quota) // processes))


def cpu_quota(sources: Sources = LINUX) -> float | None:
    """The processors' time that the control groups allow for a second, in seconds; None for any."""
    return min((quota for group in _groups(sources, "cpu") if (quota := _quota(group)) is not None), default=None)


def node_of(address: str, sources: Sources = LINUX) -> int | None:
    """The NUMA node, processors and memory side by side, that a PCI device is at; None where Linux does not know it.

    `address` is as in 0000:3b:00.0.
    """
    number = _text(sources.system / "bus/pci/devices" / address / "numa_node") or ""
    return int(number) if number.isdecimal() else None  # -1: none


def cpus_of(node: int, sources: Sources = LINUX) -> set[int]:
    """The processors of a NUMA node."""
    return _numbers(_text(sources.system / f"devices/system/node/node{node}/cpulist"))


def nodes(sources: Sources = LINUX) -> int:
    """How many NUMA nodes this machine has; 1 where Linux does not say."""
    return max(1, len(_numbers(_text(sources.system / "devices/system/node/online"))))


def is_bound(sources: Sources = LINUX) -> bool:
    """Whether somebody has bound this process to some of the processors that its control groups leave it.

    As launchers do, which bind each process to its own, and `taskset` and `numactl`.
    """
    left = _numbers(_text(sources.system / "devices/system/cpu/online")) or set(range(os.cpu_count() or 1))
    for group in _groups(sources, "cpuset"):
        for name in ("cpuset.cpus.effective", "cpuset.effective_cpus"):  # of version 2, and of 1
            left &= _numbers(_text(group / name)) or left
    return os.sched_getaffinity(0) < left


def bind(processors: set[int]) -> None:
    """Let this process, with the threads that it has, use no others; it may use all of them already."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(thread), processors)


def memory(sources: Sources = LINUX) -> Memory:
    """The host's memory."""
    lines = (line.split() for line in sources.meminfo.read_text(encoding="ascii").splitlines())
    kib = {words[0].rstrip(":"): int(words[1]) for words in lines}
    total, free = 1024 * kib["MemTotal"], 1024 * kib["MemAvailable"]
    limits = [total]
    for group in _groups(sources, "memory"):
        for limit, used in _limits(group):
            limits.append(limit)
            free = min(free, limit - used)
    return Memory(total, max(free, 0), min(limits) if min(limits) < total else None)


def _groups(sources: Sources, controller: str) -> Iterator[Path]:
    """Folders of the control groups that this process is in, from its own up to the one that is mounted.

    In a container the path that Linux names may be the host's, which does not lead anywhere: then only the mounted one
    is left, which is the container's.
    """
    try:
        lines = sources.membership.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2, which may stand beside version 1
            mounted = [sources.groups, sources.groups / "unified"]
        elif controller in controllers.split(","):
            mounted = list(dict.fromkeys([sources.groups / controllers, sources.groups / controller]))
        else:
            continue
        parts = [part for part in path.split("/") if part]
        inside = [] if ".." in parts else parts  # above what is mounted
        for mount in mounted:
            for depth in range(len(inside), -1, -1):
                if (group := mount.joinpath(*inside[:depth])).is_dir():
                    yield group


def _quota(group: Path) -> float | None:
    words = (_text(group / "cpu.max") or "").split()  # version 2: "max 100000" or "150000 100000"
    if not words:
        words = [_text(group / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period")]  # version 1: -1 for none
    if not all(word.isdecimal() for word in words) or len(words) != 2 or not int(words[1]):
        return None
    return int(words[0]) / int(words[1])


def _limits(group: Path) -> Iterator[tuple[int, int]]:
    """Limits of a group and what of them is used, in bytes; version 1 says that there is none by a very large one."""
    for limits, usage, cached in (
        (("memory.max", "memory.high"), "memory.current", "inactive_file"),
        (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
    ):
        sizes = [int(text) for name in limits if (text := _text(group / name) or "").isdecimal()]
        if sizes:
            yield min(sizes), max(int(_text(group / usage) or 0) - _statistic(group / "memory.stat", cached), 0)


def _statistic(file: Path, name: str) -> int:
    """Files that were read count as used, but give way: those that were not read again lately."""
    lines = (line.split() for line in (_text(file) or "").splitlines())
    return next((int(words[1]) for words in lines if words[0] == name), 0)


def _numbers(text: str | None) -> set[int]:
    """Those that Linux lists as in 0-3,8,10-11."""
    numbers: set[int] = set()
    for part in filter(None, (text or "").split(",")):
        first, _, last = part.partition("-")
        numbers |= set(range(int(first), int(last or first) + 1))
    return numbers


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="ascii").strip()
    except OSError:
        return None
