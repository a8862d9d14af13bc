"""Stages of the tests that need a GPU, by pytest."""

from __future__ import annotations

import importlib.util
import os
import signal
from functools import partial
from types import FrameType

import pytest

from bench.gpu.runner import ROOT
from bench.gpu.task import FailedError, Outcome, Task

STOP_S = 5  # before the end, for pytest to end by itself
STOP_PARALLEL_S = 16  # the same with pytest-xdist, which waits up to 10 s for its processes
KERNELS = ("tests/kernels", "--ignore=tests/kernels/test_ahead_of_time.py", "--ignore=tests/kernels/test_sync.py")


class Watch:
    """A plugin that counts, and writes each failure down as it comes."""

    def __init__(self, task: Task) -> None:
        self.task, self.passed, self.failed, self.late = task, 0, list[str](), False

    def pytest_runtest_logreport(self, report: object) -> None:
        """Of one test's set-up, run or end."""
        name, when, outcome = (getattr(report, key) for key in ("nodeid", "when", "outcome"))
        if outcome == "failed":
            lines = str(getattr(report, "longreprtext", "")).splitlines() or [""]
            reason = next((line.removeprefix("E").strip() for line in lines if line.startswith("E ")), lines[-1])
            self.failed.append(name)
            self.task.row(test=name, reason=reason)
            self.task.say(f"failed: {name}: {reason}")
        elif when == "call" and outcome == "passed":
            self.passed += 1


def tests(task: Task, words: tuple[str, ...]) -> Outcome:
    """The tests of these files, four at a time where pytest-xdist is installed."""
    os.chdir(ROOT)
    parallel = ["-n", "4"] if importlib.util.find_spec("xdist") and not task.tiny else []
    watch = Watch(task)

    def time_is_up(number: int, frame: FrameType | None) -> None:
        watch.late = True
        raise KeyboardInterrupt  # after which pytest ends the session

    signal.signal(signal.SIGALRM, time_is_up)
    signal.setitimer(signal.ITIMER_REAL, max(task.left_s - (STOP_PARALLEL_S if parallel else STOP_S), 0.1))
    chosen = ["-m", "not slow"]
    if task.tiny:  # what needs no GPU, of that a little
        chosen = ["-m", "not slow and not gpu", "-k", "two_runs_give or strangers_apex"]
        os.environ.setdefault("TRITON_INTERPRET", "1")
    # limits for each test would need the same alarm
    options = [*parallel, *chosen, "-q", "-p", "no:cacheprovider", "-p", "no:timeout"]
    try:
        code = pytest.main([*words, *options], plugins=[watch])
    except KeyboardInterrupt:  # before the session has begun, or after it has ended
        code = pytest.ExitCode.INTERRUPTED
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if watch.failed:
        raise FailedError(f"{len(watch.failed)} failed, {watch.passed} passed: {', '.join(watch.failed[:3])}")
    if watch.late and not watch.passed:
        raise FailedError("no test ended before the time was up")
    if watch.late:
        return Outcome(f"{watch.passed} passed before the time was up; none failed")
    if code != pytest.ExitCode.OK:
        raise FailedError(f"pytest ended with {pytest.ExitCode(code).name}")
    return Outcome(f"{watch.passed} passed")


def product_tests(task: Task) -> Outcome:
    """Those of files with tests for a GPU, but for the kernels', and the doctor's."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    marked = [str(file) for file in files if file.parent.name != "kernels" and "mark.gpu" in file.read_text("utf-8")]
    return tests(task, (*marked, "tests/test_doctor.py", "tests/kernels/test_sync.py"))


# the configuration of all tests needs more than torch
kernel_tests = partial(tests, words=(*KERNELS, "--confcutdir=tests/kernels"))
