"""The process of one stage: it writes rows as they come and, last, what the stage ended as.

    python -m bench.gpu.child MODULE:FUNCTION cuda ROWS SECONDS [MODULE ...]

What it needs besides torch is named after the seconds. An exception that nobody expected ends it with a traceback.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.gpu.marks import end_with_parent
from bench.gpu.task import FailedError, Task
from bench.harness.missing import MissingError

PASSED, FAILED, MISSING = "passed", "failed", "left out"
ALWAYS = ("numpy",)  # which torch works without


def main(words: Sequence[str]) -> None:
    """Run the stage."""
    function, kind, rows, seconds, *needs = words
    task = Task(kind, Path(rows), time.monotonic() + float(seconds))
    if missing := missing_of([*ALWAYS, *needs]):
        task.row(result=MISSING, figure=f"needs {', '.join(missing)}, which cannot be imported here")
        return
    module, _, name = function.partition(":")
    try:
        outcome = getattr(importlib.import_module(module), name)(task)
    except FailedError as failure:
        task.row(result=FAILED, figure=str(failure))
    except MissingError as reason:
        task.row(result=MISSING, figure=str(reason))
    else:
        task.row(result=PASSED, figure=outcome.figure, quotes=outcome.quotes)


def missing_of(modules: Sequence[str]) -> list[str]:
    """Those that cannot be imported."""
    missing = []
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    return missing


if __name__ == "__main__":
    end_with_parent()
    main(sys.argv[1:])
