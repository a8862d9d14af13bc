"""The accuracy that stands beside a speed: what runs have logged."""

from __future__ import annotations

import json
from pathlib import Path

from fastflower.config import build, load_yaml
from fastflower.engine.run import RUNS, RunFolder
from fastflower.errors import UserError


def best_accuracy(run: Path, model: str) -> float | None:
    """The highest validation accuracy of a run; None where it has none yet, or is of another network than `model`.

    Raises:
        UserError: its configuration cannot be read, or its log is damaged.
    """
    if load_yaml(RunFolder(run).config).get("model", {}).get("name") != model:
        return None
    return _highest(RunFolder(run).metrics)


def latest_accuracy() -> tuple[float, str] | None:
    """The highest validation accuracy of the run under runs/ that logged last, and which run that is; None without one.

    Runs that have no such accuracy are passed over, and named where they cannot be read.
    """
    passed = ""
    for log in sorted(RUNS.rglob("metrics.jsonl"), key=lambda path: path.stat().st_mtime, reverse=True):
        run = RunFolder(log.parent)
        try:
            accuracy = _highest(log)
            if accuracy is None:
                continue
            config = build(load_yaml(run.config), str(run.config))
        except UserError as error:
            passed += f" Passed over: {error}"
            continue
        data = ", ".join(root.name for root in config.data.root or ())
        return (
            accuracy,
            f"the highest of validation in the latest run, {run.path} ({config.model.name} on {data}).{passed}",
        )
    return None


def _highest(log: Path) -> float | None:
    """The highest validation accuracy of a metrics.jsonl; None where there is none; UserError where it is damaged."""
    try:
        rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        return max((float(row["val_accuracy"]) for row in rows if row["val_accuracy"] is not None), default=None)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{log} cannot be read as the log of a run: mend it, or name another run by --run.") from error
