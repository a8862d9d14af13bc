"""Where the time of a training step goes, by torch's profiler."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from fastflower.runtime.compilations import Compilations, counted_compilations
from fastflower.runtime.progress import Display
from fastflower.runtime.run_folder import RunFolder

SKIPPED, WARMUP, RECORDED = 2, 1, 4  # steps; compilation and first allocations come before those recorded
HEAVIEST = 10  # operations that are listed


class Profiler:
    """Records some of the first steps of a run: trace.json in its folder, and the heaviest operations on screen."""

    def __init__(self, folder: RunFolder, display: Display, *, compiles: bool) -> None:
        """Begin; with `compiles`, what torch.compile makes anew in the recorded steps is counted."""
        self._folder, self._display, self._compiles = folder, display, compiles
        self._counting = contextlib.ExitStack()
        self._anew = Compilations()
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        steps = schedule(wait=SKIPPED, warmup=WARMUP, active=RECORDED, repeat=1)
        self._profile = profile(activities=activities, schedule=steps, on_trace_ready=self._report)
        self._profile.start()
        self._left = SKIPPED + WARMUP + RECORDED

    def step(self) -> None:
        """A training step is done."""
        if self._left:
            self._left -= 1
            self._profile.step()
            if self._left == RECORDED and self._compiles:
                self._anew = self._counting.enter_context(counted_compilations())
            if not self._left:
                self._profile.stop()
                self._counting.close()

    def close(self) -> None:
        """Say so where the run was too short."""
        self._counting.close()
        if self._left:
            self._profile.stop()
            self._display.say(
                f"train.profile: nothing recorded, a run needs {SKIPPED + WARMUP + RECORDED} steps for it."
            )

    def _report(self, recorded: profile) -> None:
        if self._left:
            return
        trace = self._folder.trace
        recorded.export_chrome_trace(str(trace))  # which tells nobody of a full disk
        time_spent = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        self._display.say(recorded.key_averages().table(sort_by=time_spent, row_limit=HEAVIEST))
        if self._compiles:
            self._display.say(
                f"torch.compile has compiled {self._anew.compiled} functions and recorded {self._anew.recorded} CUDA "
                f"graphs anew in these {RECORDED} steps, which should be none."
            )
        if _is_json(trace):
            self._display.say(f"Trace of {RECORDED} steps, for chrome://tracing or ui.perfetto.dev: {trace}")
        else:
            trace.unlink(missing_ok=True)
            self._folder.clear_temporaries()
            self._display.say(f"train.profile: {trace} cannot be written; make room and start again for it.")


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return True
