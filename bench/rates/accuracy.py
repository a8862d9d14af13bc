"""The accuracy that stands beside a speed: of a run, or of what the benchmark itself trained.

Where several may be shown, rows say which it is: val_accuracy, accuracy_of (in short) and accuracy_source (a phrase).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.contenders import loops
from fastflower.errors import UserError
from fastflower.runtime.run_folder import RUNS, RunFolder
from fastflower.settings import build, load_yaml
from fastflower.training.state import Setup, State

Row = dict[str, Any]


def accuracy_of_a_run(run: Path | None, model: str, say: Callable[[str], None]) -> Row:
    """What a run reached in validation; nothing where it is not known.

    Args:
        run: its folder; None takes the run under runs/ that logged last, of those that have an accuracy.
        model: the network that `run` must be of.
        say: gets a sentence on each log under runs/ that cannot be read.

    Raises:
        UserError: as `best_accuracy`.
    """
    if run:
        accuracy = best_accuracy(run, model)
        return _row(accuracy, "the run", f"the highest of validation in {run.name}") if accuracy is not None else {}
    for log in sorted(RUNS.rglob("metrics.jsonl"), key=lambda path: path.stat().st_mtime, reverse=True):
        folder = RunFolder(log.parent)
        try:
            if (accuracy := _highest(log)) is not None:
                config = build(load_yaml(folder.config), str(folder.config))
                of = f"{folder.path} ({config.model.name} on {', '.join(root.name for root in config.data.root or ())})"
                return _row(accuracy, "latest run", f"the highest of validation in the latest run, {of}")
        except UserError as error:
            say(f"Passed over for its accuracy: {error}")
    return {}


def accuracy_here(setup: Setup, state: State) -> Row:
    """What was trained here reaches in validation; nothing where no split validates."""
    if not (evaluation := loops.validated(setup, state)):
        return {}
    of = f"{state.step} steps"
    return _row(evaluation.accuracy, of, f"of validation, after the {of} that were trained here")


def _row(accuracy: float, of: str, source: str) -> Row:
    return {"val_accuracy": accuracy, "accuracy_of": of, "accuracy_source": source}


def best_accuracy(run: Path, model: str) -> float | None:
    """The highest validation accuracy of a run; None where it has none yet, or is of another network than `model`.

    Raises:
        UserError: its configuration cannot be read, or its log is damaged.
    """
    if load_yaml(RunFolder(run).config).get("model", {}).get("name") != model:
        return None
    return _highest(RunFolder(run).metrics)


def _highest(log: Path) -> float | None:
    """The highest validation accuracy of a metrics.jsonl; None where there is none; UserError where it is damaged."""
    try:
        rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        return max((float(row["val_accuracy"]) for row in rows if row["val_accuracy"] is not None), default=None)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{log} cannot be read as the log of a run: mend it, or name another run by --run.") from error
