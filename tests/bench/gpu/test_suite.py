"""The stages that run pytest: what they count, and that they end in time, by one process and by several."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.gpu.runner import ROOT
from bench.gpu.suite import STOP_PARALLEL_S, STOP_S

SCRIPT = """
import sys, time
from pathlib import Path
from bench.gpu import suite
from bench.gpu.task import FailedError, Task

kind, folder, seconds = sys.argv[1:]
suite.importlib.util.find_spec = (lambda name: None) if kind == "alone" else suite.importlib.util.find_spec
task = Task("cuda", Path(folder, "rows"), time.monotonic() + float(seconds))
try:
    print("ended", suite.tests(task, (folder,)).figure)
except FailedError as failure:
    print("failed", failure)
"""
OK = "def test_right():\n    pass\n"
BAD = "def test_wrong():\n    assert 1 == 2, 'sums differ'\n"
SLOW = "import time\nimport pytest\n@pytest.mark.slow\ndef test_slow():\n    assert False\n"
# the second test lets the alarm ring, in the process that runs it or in the one that started that
LONG = """
import os, signal, time
def test_right():
    pass
def test_rings():
    os.kill(os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid(), signal.SIGALRM)
    time.sleep(600)
"""


def run(kind: str, folder: Path, source: str, seconds: float) -> tuple[str, list[dict[str, Any]]]:
    """What a stage ended as, and its rows."""
    (folder / "test_drawn.py").write_text(source)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    command = [sys.executable, "-c", SCRIPT, kind, str(folder), str(seconds)]
    # these tests may themselves be run by pytest-xdist, which the inner ones must not take for theirs
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    rows = folder / "rows"
    last = [line for line in result.stdout.splitlines() if line.startswith(("ended", "failed "))][-1]
    return last, [json.loads(line) for line in rows.read_text().splitlines()] if rows.is_file() else []


@pytest.mark.parametrize("kind", ["alone", "parallel"])
def test_failures_are_named_and_written(kind: str, tmp_path: Path) -> None:
    end, rows = run(kind, tmp_path, OK + BAD + SLOW, 600)
    assert end == "failed 1 failed, 1 passed: test_drawn.py::test_wrong"
    assert [row["test"] for row in rows] == ["test_drawn.py::test_wrong"]
    assert rows[0]["reason"].startswith("AssertionError: sums differ")


@pytest.mark.parametrize("kind", ["alone", "parallel"])
def test_it_ends_when_the_time_is_up(kind: str, tmp_path: Path) -> None:
    end, rows = run(kind, tmp_path, LONG, 600)
    ends = ["ended 1 passed before the time was up; none failed", "failed no test ended before the time was up"]
    assert end in ends[: 1 if kind == "alone" else 2]  # of two processes either may be the first
    assert not rows


def test_there_is_time_for_the_processes_to_end() -> None:
    """Which pytest-xdist waits for before it says what they found."""
    manager = importlib.import_module("xdist.workermanage").NodeManager
    assert STOP_PARALLEL_S >= manager.EXIT_TIMEOUT + STOP_S


def test_no_tests_are_no_success(tmp_path: Path) -> None:
    assert run("alone", tmp_path, SLOW, 600)[0] == "failed pytest ended with NO_TESTS_COLLECTED"
