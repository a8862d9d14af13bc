"""Two files of throughput.py's results against each other: a gate against regressions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from fastflower.errors import UserError
from fastflower.files import to_json
from fastflower.report import throughput

UNIMPORTANT = throughput.UNIMPORTANT | {"steps", "warmup", "repeats", "run"}  # how long it was measured does not count

Key = tuple[str, str, str]  # mode, name, settings that matter


def compare(before: Path, after: Path, max_loss: float, console: Console) -> int:
    """Print the ratio of images/s for what both files measured; 1 where some lost more than `max_loss` percent.

    Of what a file has several times, the last counts.

    Raises:
        UserError: a file is none of throughput.py's, the two have nothing in common, or `max_loss` is no loss.
    """
    if not 0 <= max_loss < 100:
        raise UserError(f"--max-loss is {max_loss:g}: give percent, from 0 to below 100.")
    old, new = read(before), read(after)
    common = [key for key in old if key in new]
    if not common:
        raise UserError(f"--compare {before} {after}: they have no measurement with the same settings in common.")
    table = Table("", title=f"{before.name} → {after.name}", box=box.SIMPLE_HEAD)
    for heading in ("before\nimages/s", "after\nimages/s", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    lost = []
    for key in common:
        ratio = new[key] / old[key]
        table.add_row(_title(key, common), f"{old[key]:.1f}", f"{new[key]:.1f}", f"{ratio:.3f}")
        if ratio < 1 - max_loss / 100:
            lost.append(f"{_title(key, common)} ({ratio:.3f})")
    console.print(table)
    for path, some, others in ((before, old, new), (after, new, old)):
        for key in [key for key in some if key not in others]:
            _say(console, f"only in {path}: {_title(key, list(some))}")
    if lost:
        _say(console, f"Lost more than {max_loss:g} %: {', '.join(lost)}.")
    return 1 if lost else 0


def read(path: Path) -> dict[Key, float]:
    """images/s by what was measured, without what was missing; UserError where the file is none of throughput.py's."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {_key(row): float(row["images_per_s"]) for row in rows if "missing" not in row}
    except OSError as error:
        raise UserError(f"--compare {path} cannot be read ({error.strerror}): name a results file.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--compare {path} holds no rows of this benchmark: name a file that --out wrote.") from error


def _key(row: dict[str, Any]) -> Key:
    settings = {key: value for key, value in row["settings"].items() if key not in UNIMPORTANT}
    settings["world_size"] = row.get("world_size", 1)
    return row["mode"], row["name"], to_json(settings, sort_keys=True)


def _title(key: Key, keys: list[Key]) -> str:
    """Mode and name, and the settings where the same name was measured with several."""
    mode, name, settings = key
    twins = sum(other[:2] == (mode, name) for other in keys)
    return f"{mode}: {name}" + (f" {settings}" if twins > 1 else "")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
