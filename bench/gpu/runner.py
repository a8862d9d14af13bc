"""A stage in a process of its own: a crash or a hang ends only the stage, and what it started ends with it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from bench.gpu.child import FAILED
from bench.gpu.marks import GIVE_UP_S, MARK, POLL_S, kill_marked
from bench.gpu.task import Stage

ROOT = Path(__file__).resolve().parents[2]
TAIL = 15  # lines of what a stage said before it crashed
SURVEY_LIMIT_S = 60
Row = dict[str, Any]


@dataclass(frozen=True)
class Ended:
    """How a stage ended."""

    result: str  # passed, failed or left out
    figure: str
    seconds: float
    quotes: tuple[str, ...] = ()
    said: tuple[str, ...] = ()  # its last words, where nobody expected its end
    in_time: bool = True  # False: it was killed at its limit


def run_stage(
    stage: Stage, kind: str, limit_s: float, took: Callable[[Row], None], show: Callable[[str], None]
) -> Ended:
    """Run a stage for at most `limit_s` seconds.

    Args:
        stage: which.
        kind: of device.
        limit_s: after which all that it started is killed.
        took: gets each row as it comes.
        show: gets each line of its standard output.
    """
    began = time.monotonic()
    words = [stage.function, kind, "ROWS", str(limit_s), *stage.needs]
    said: deque[str] = deque(maxlen=TAIL)
    last: Row = {}

    def take(row: Row) -> None:
        if "result" in row:
            last.update(row)
        else:
            took(row)

    with TemporaryDirectory() as folder:
        rows = Path(folder, "rows.jsonl")
        rows.touch()
        words[2] = str(rows)
        mark = secrets.token_hex(8)
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.gpu.child", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            cwd=ROOT,
            env=environment() | {MARK: mark},
            start_new_session=True,
        )
        readers = [_reading(process.stdout, show), _reading(process.stderr, said.append)]
        try:
            with rows.open(encoding="utf-8") as file:
                while process.poll() is None and time.monotonic() - began < limit_s:
                    time.sleep(POLL_S)
                    _take_lines(file, take)
                in_time = process.poll() is not None
                _bury(process, mark)
                _take_lines(file, take)
        finally:
            _bury(process, mark)
        for reader in readers:
            reader.join(GIVE_UP_S)
    seconds = time.monotonic() - began
    if last:
        return Ended(last["result"], last["figure"], seconds, tuple(last.get("quotes", ())))
    if not in_time:
        return Ended(FAILED, f"not done after {limit_s:.0f} s, its limit", seconds, said=tuple(said), in_time=False)
    return Ended(FAILED, _cause(process.returncode, said), seconds, said=tuple(said))


def look_around(kind: str) -> Row:
    """What `bench.gpu.survey` finds; an `error` where it ends otherwise."""
    mark = secrets.token_hex(8)
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.gpu.survey", kind],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment() | {MARK: mark},
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=SURVEY_LIMIT_S)
        found: Row = json.loads(out.splitlines()[-1])
        return found
    except subprocess.TimeoutExpired:
        return {"error": f"torch does not say within {SURVEY_LIMIT_S} s what GPU is here: look at nvidia-smi."}
    except (IndexError, ValueError):
        return {"error": f"torch cannot be asked what is here ({_cause(process.returncode, err.splitlines())})."}
    finally:
        _bury(process, mark)


def environment() -> dict[str, str]:
    """Of what is started: this checkout is imported, from wherever it is called, and kernels are not interpreted."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return inherited | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def _reading(stream: IO[str] | None, take: Callable[[str], object]) -> threading.Thread:
    assert stream

    def read() -> None:
        with stream:
            for line in stream:
                take(line.rstrip("\n"))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def _take_lines(file: IO[str], take: Callable[[Row], None]) -> None:
    """Rows that are whole; the rest waits for its end."""
    while (place := file.tell()) is not None and (line := file.readline()):
        if not line.endswith("\n"):
            file.seek(place)
            return
        take(json.loads(line))


def _bury(process: subprocess.Popen[str], mark: str) -> None:
    """Kill the process and all that it started, and wait for its end."""
    kill_marked(mark, process.poll)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GIVE_UP_S)


def _cause(code: int, said: Sequence[str]) -> str:
    ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    last = next((line for line in reversed(said) if line.strip()), "")
    return f"{ended}: {last.strip()}" if last else ended
