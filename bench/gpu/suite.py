"""Stages of the tests that need a GPU, by pytest."""

from __future__ import annotations

import importlib.util
import os
from functools import partial

from bench.gpu.runner import ROOT
from bench.gpu.task import FailedError, Outcome, Task

STOP_S = 3  # before the end, for pytest to end by itself
KERNELS = ("tests/kernels", "--ignore=tests/kernels/test_ahead_of_time.py", "--ignore=tests/kernels/test_sync.py")


class Watch:
    """A plugin that counts, writes each failure down as it comes, and ends the session before the stage is killed."""

    def __init__(self, task: Task) -> None:
        self.task, self.passed, self.failed, self.late = task, 0, list[str](), False
        self.session: object = None

    def pytest_runtest_logreport(self, report: object) -> None:
        """Of one test's set-up, run or end."""
        name, when, outcome = (getattr(report, key) for key in ("nodeid", "when", "outcome"))
        if outcome == "failed":
            reason = (str(getattr(report, "longreprtext", "")).strip().splitlines() or [""])[-1]
            self.failed.append(name)
            self.task.row(test=name, reason=reason)
            self.task.say(f"failed: {name}: {reason}")
        elif when == "call" and outcome == "passed":
            self.passed += 1
        if self.task.left_s < STOP_S and self.session is not None:
            self.late = True
            self.session.shouldstop = "no time is left"  # type: ignore[attr-defined]

    def pytest_sessionstart(self, session: object) -> None:
        """Note the session, to stop it."""
        self.session = session


def tests(task: Task, words: tuple[str, ...]) -> Outcome:
    """Tests of these files, four at a time where pytest-xdist is installed."""
    import pytest

    os.chdir(ROOT)
    parallel = ["-n", "4"] if importlib.util.find_spec("xdist") and not task.tiny else []
    watch = Watch(task)
    tiny = ["-k", "two_runs_give or device_other"] if task.tiny else []
    code = pytest.main([*words, *parallel, *tiny, "-q", "-m", "not slow", "-p", "no:cacheprovider"], plugins=[watch])
    if watch.failed:
        raise FailedError(f"{len(watch.failed)} failed, {watch.passed} passed: {', '.join(watch.failed[:3])}")
    if watch.late:
        return Outcome(f"{watch.passed} passed before the time was up; none failed")
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise FailedError(f"pytest ended with {pytest.ExitCode(code).name}")
    return Outcome(f"{watch.passed} passed")


kernel_tests = partial(tests, words=(*KERNELS, "--confcutdir", "tests/kernels"))
product_tests = partial(tests, words=("tests/gpu", "tests/test_doctor.py"))
