"""What throughput.py found, as a table on screen and as CSV."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bench.common import describe
from fastflower.errors import UserError

Row = Mapping[str, Any]
WIDTH = 150  # characters of the table where the output is no terminal
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "images/s": ("images_per_s", lambda rate: f"{rate:.1f}"),
    "range": ("spread", lambda spread: "-".join(f"{rate:.1f}" for rate in spread)),
    "ms a step": ("ms_per_step", "{:.1f}".format),
    "ratio": ("ratio", "{:.2f}".format),
    "of the limit": ("share_of_limit", "{:.1%}".format),
    "first step s": ("first_step_s", "{:.1f}".format),
    "batch": ("batch", str),
    "peak MB": ("peak_memory_mb", "{:.0f}".format),
    "GMACs a picture": ("macs", lambda macs: f"{macs / 1e9:.3f}"),
    "GFLOPs a picture": ("flops", lambda flops: f"{flops / 1e9:.3f}"),
    "GFLOP/s": ("flops_per_s", lambda rate: f"{rate / 1e9:.1f}"),
    "MFU": ("mfu", "{:.1%}".format),
    "data wait": ("data_wait", "{:.1%}".format),
    "val accuracy": ("val_accuracy", "{:.1%}".format),
}


def show(mode: str, rows: Sequence[Row], around: Mapping[str, Any], console: Console) -> None:
    """Print the rows as a table, with columns for what was measured; ratios are to the first."""
    measured = [row for row in rows if "missing" not in row]
    shown = [row | {"ratio": row["images_per_s"] / measured[0]["images_per_s"]} for row in map(dict, measured)]
    columns = {heading: (key, text) for heading, (key, text) in COLUMNS.items() if any(key in row for row in shown)}
    table = Table("", title=mode, box=box.SIMPLE_HEAD)
    for heading in columns:
        table.add_column(heading.replace(" ", "\n", 1), justify="right", no_wrap=True)
    for row in shown:
        table.add_row(row["name"], *(text(row[key]) if key in row else "" for key, text in columns.values()))
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    console.print(table)
    notes = [f"{row['name']}: {row[key]}" for key in ("note", "bottleneck") for row in rows if key in row]
    missing = [f"missing: {row['name']}: {row['missing']}" for row in rows if "missing" in row]
    memory = "the GPU's" if measured[0]["peak_memory_of"] == "GPU" else "of this process, resident"
    notes.append(f"{describe(around['machine'])}. Peak memory is {memory}.")
    if ceiling := measured[0].get("ceiling_flops_per_s"):
        notes.append(f"MFU is of {ceiling / 1e9:.1f} GFLOP/s, measured on products of large matrices.")
    for note in (*missing, *notes):
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """The rows as a table, nested values as columns such as machine.cpu; UserError where it cannot be written."""
    flat = [_flat(row) for row in rows]
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in flat for key in row)))
            writer.writeheader()
            writer.writerows(flat)
    except OSError as error:
        raise UserError(f"--csv {path} cannot be written ({error.strerror}): name another file.") from error


def _flat(row: Row, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in row.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
