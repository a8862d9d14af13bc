"""What throughput.py found, as a table on screen and as CSV."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bench.harness.common import describe
from fastflower.errors import UserError
from fastflower.settings import flattened

Row = Mapping[str, Any]
Columns = Mapping[str, tuple[str, Callable[[Any], str]]]  # by heading: a row's key, and what is written of its value
MEMORY = {"GPU": "the GPU's", "process": "of this process, resident"}
WIDTH = 150  # characters of the table where the output is no terminal
COLUMNS: Columns = {
    "images/s": ("images_per_s", lambda rate: f"{rate:.1f}"),
    "range": ("spread", lambda spread: "-".join(f"{rate:.1f}" for rate in spread)),
    "ms\na step": ("ms_per_step", "{:.1f}".format),
    "ratio": ("ratio", "{:.2f}".format),
    "of\nthe limit": ("share_of_limit", "{:.1%}".format),
    "first\nstep s": ("first_step_s", "{:.1f}".format),
    "batch": ("batch", str),
    "peak\nMB": ("peak_memory_mb", "{:.0f}".format),
    "GMACs\na picture": ("macs", lambda macs: f"{macs / 1e9:.3f}"),
    "GFLOPs\na picture": ("flops", lambda flops: f"{flops / 1e9:.3f}"),
    "GFLOP/s": ("flops_per_s", lambda rate: f"{rate / 1e9:.1f}"),
    "MFU": ("mfu", "{:.1%}".format),
    "launches/s": ("launches_per_s", "{:.0f}".format),
    "launches/s\nalone": ("launches_alone_per_s", "{:.0f}".format),
    "launcher\nwaits µs": ("launcher_waits_us", "{:.1f}".format),
    "lock µs\na picture": ("lock_us", "{:.1f}".format),
    "data\nwait": ("data_wait", "{:.1%}".format),
    "val\naccuracy": ("val_accuracy", "{:.1%}".format),
}


def show(mode: str, rows: Sequence[Row], around: Mapping[str, Any], console: Console) -> None:
    """Print the rows as a table, with columns for what was measured; ratios are to the first."""
    measured = [row for row in rows if "missing" not in row]
    shown = [row | {"ratio": row["images_per_s"] / measured[0]["images_per_s"]} for row in map(dict, measured)]
    columns = {heading: (key, text) for heading, (key, text) in COLUMNS.items() if any(key in row for row in shown)}
    notes = [*_notes(rows), f"{describe(around['machine'])}."]
    if of := measured[0].get("peak_memory_of"):
        notes[-1] += f" Peak memory is {MEMORY[of]}."
    if ceiling := measured[0].get("ceiling_flops_per_s"):
        notes.append(f"MFU is of {ceiling / 1e9:.1f} GFLOP/s, measured on products of large matrices.")
    _print(mode, shown, columns, notes, console)


def show_overview(mode: str, rows: Sequence[Row], around: Mapping[str, Any], console: Console) -> None:
    """Print loader, training step and training from end to end as a table; what stands in it is said below."""
    settings, loader = around["settings"], rows[0]
    networks = [row for row in rows if "macs" in row]
    of = next((row for row in networks if "accuracy_of" in row), None)
    columns: Columns = {
        "images/s": COLUMNS["images/s"],
        "GMACs\nforward": COLUMNS["GMACs\na picture"],
        "GFLOPs\nforward": ("macs", lambda macs: f"{2 * macs / 1e9:.3f}"),
        "GFLOPs\nstep": COLUMNS["GFLOPs\na picture"],
        "GFLOP/s": COLUMNS["GFLOP/s"],
        "of\nthe limit": COLUMNS["of\nthe limit"],
        f"accuracy,\n{of['accuracy_of'] if of else 'not known'}": COLUMNS["val\naccuracy"],
    }
    stored = ", ".join(f"{size} x {size}" for size in loader["stored_px"]) or "various"
    limits = f"step and end to end {networks[0]['ceiling_flops_per_s'] / 1e9:.1f} GFLOP/s (products of large matrices)"
    if "limit" in loader:
        limits = f"loader {loader['limit_images_per_s']:.1f} images/s ({loader['limit']}); {limits}"
    notes = [
        f"Pictures: {', '.join(settings['root'])}, stored at {stored} pixels; {settings['crop']} x {settings['crop']} "
        f"are cut out, which MACs and FLOPs are of. Batches of {settings['batch']}, {settings['dtype']}.",
        "MACs: multiply-adds of one picture's forward pass. FLOPs: 2 a MAC; a training step counts as three forward "
        "passes, one forward and twice that backward. GFLOP/s = images/s x GFLOPs of the step.",
        f"Limits, measured here: {limits}.",
        f"Accuracy: {of['accuracy_source']}." if of else "Accuracy: no run has one, and no split is there to validate.",
        *_notes(rows),
        f"{describe(around['machine'])}.",
    ]
    _print(mode, [{**loader, "name": "loader"}, *networks], columns, notes, console)


def _notes(rows: Sequence[Row]) -> list[str]:
    """What is missing, and what rows have to say."""
    missing = [f"missing: {row['name']}: {row['missing']}" for row in rows if "missing" in row]
    return missing + [f"{row['name']}: {row[key]}" for key in ("note", "bottleneck") for row in rows if key in row]


def _print(title: str, rows: Sequence[Row], columns: Columns, notes: Sequence[str], console: Console) -> None:
    """A table with a line for each row, and lines below it."""
    table = Table("", title=title, box=box.SIMPLE_HEAD)
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row["name"], *(text(row[key]) if key in row else "" for key, text in columns.values()))
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    console.print(table)
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """The rows as a table, nested values as columns such as machine.cpu; UserError where it cannot be written."""
    flat = [flattened(row) for row in rows]
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in flat for key in row)))
            writer.writeheader()
            writer.writerows(flat)
    except OSError as error:
        raise UserError(f"--csv {path} cannot be written ({error.strerror}): name another file.") from error
