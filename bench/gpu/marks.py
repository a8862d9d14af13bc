"""All that a stage starts is marked, so that it can be ended: it may be in other sessions, and its parents gone."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

MARK = "FASTFLOWER_GPU_CHECK"  # in the environment of all that a stage starts, with a value of its own
POLL_S = 0.1
GIVE_UP_S = 10  # what a driver holds may not even be killed: the other stages go on


def kill_marked(mark: str, reap: Callable[[], object] = lambda: None) -> None:
    """Kill what has the mark, but for this process, until nothing is left; `reap` buries those that are ours."""
    given_up = time.monotonic() + GIVE_UP_S
    while (marked := _marked(mark)) and time.monotonic() < given_up:
        for pid in marked:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        reap()
        time.sleep(POLL_S / 10)


def end_with_parent() -> None:
    """From now on this process, and all that it starts, ends when its parent does: a killed check leaves nothing."""
    parent, mark = os.getppid(), os.environ.get(MARK)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_S)
        if mark:
            kill_marked(mark)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _marked(mark: str) -> list[int]:
    wanted, pids = f"{MARK}={mark}".encode(), []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted in environ.read_bytes().split(b"\0") and int(environ.parent.name) != os.getpid():
                pids.append(int(environ.parent.name))
        except OSError:  # gone, or another user's
            continue
    return pids
