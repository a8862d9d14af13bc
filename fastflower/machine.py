"""The processors and the memory that this process may use: the machine's, within the limits that it runs under.

A container or a scheduler limits processes by control groups (cgroups), of version 1, 2 or both side by side; a limit
holds for all groups inside a group, so that the smallest one on the way up counts. Linux describes them in its
documentation, admin-guide/cgroup-v2.rst and admin-guide/cgroup-v1/.
"""

from __future__ import annotations

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


LINUX = Sources()


@dataclass(frozen=True)
class Memory:
    """Of the host, in bytes."""

    total: int
    free: int  # that can still be taken, within the limit
    limit: int | None  # of the control groups; None: there is none, or it is no less than `total`


def cpus(sources: Sources = LINUX) -> int:
    """How many processors' time this process may use; at least 1.

    A quota is a share of time, such as one and a half processors', and is rounded up: one less would leave some of it.
    """
    allowed = len(os.sched_getaffinity(0))
    quota = cpu_quota(sources)
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def cpu_quota(sources: Sources = LINUX) -> float | None:
    """The processors' time that the control groups allow for a second, in seconds; None for any."""
    return min((quota for group in _groups(sources, "cpu") if (quota := _quota(group)) is not None), default=None)


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


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="ascii").strip()
    except OSError:
        return None
