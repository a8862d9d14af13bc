"""Stages that stand in for real ones: what may become of a process. They need no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from bench.gpu.task import FailedError, Outcome, Stage, Task
from bench.harness.missing import MissingError


def works(task: Task) -> Outcome:
    task.say("half way")
    task.row(kind="a figure", value=1.5, interpreted=os.environ.get("TRITON_INTERPRET"))
    return Outcome("42 images/s", ("A network: 42 images/s.",))


def fails(task: Task) -> Outcome:
    task.row(value=2)
    raise FailedError("dx is wrong | by 3")


def lacks(task: Task) -> Outcome:
    raise MissingError("needs two GPUs")


def raises(task: Task) -> Outcome:
    raise ValueError("nobody expected this")


def crashes(task: Task) -> Outcome:
    task.row(value=3)
    print("last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError


def leaves(task: Task) -> Outcome:
    os._exit(3)


def hangs(task: Task) -> Outcome:
    """With children that are deaf, in sessions of their own, whose parent is gone, and the pids of all in a row."""
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
    child = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {deaf!r}], start_new_session=True); "
    orphan = child + "print(p.pid, flush=True)"
    with subprocess.Popen([sys.executable, "-c", orphan], stdout=subprocess.PIPE, text=True) as gone:
        assert gone.stdout
        lines = [gone.stdout.readline() for _ in range(2)]
        pids = [int(line) for line in lines if int(line) != 1]
        gone.wait()
        task.row(pids=[os.getpid(), *pids])
        time.sleep(600)
    raise AssertionError


def floods(task: Task) -> Outcome:
    for number in range(20_000):
        print(f"line {number}", file=sys.stderr)
    return Outcome("done")


def stage(function: str, limit_s: float = 60, needs: tuple[str, ...] = ()) -> Stage:
    return Stage(function, f"that it {function}", f"tests.bench.gpu.stand_ins:{function}", limit_s, needs)
