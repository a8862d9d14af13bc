"""What kernels.py found, as tables and as a picture; both from its rows, just measured or read from a results file."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from bench.batch_norm.layers import DTYPES
from bench.batch_norm.measure import reaches_goal, verdict
from bench.harness.common import describe
from fastflower.errors import UserError

Row = Mapping[str, Any]
SUFFIXES = (".png", ".svg", ".pdf")
# contenders are told apart without color: by marker, gray and filling
MARKERS = "osD^vP*X<>"


def last_run(path: Path) -> list[dict[str, Any]]:
    """The rows of the last run in a results file; UserError where it is none."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        last = [row for row in rows if row["date"] == rows[-1]["date"] and row["contender"]]
    except OSError as error:
        raise UserError(f"--from {path} cannot be read ({error.strerror}): name a results file.") from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"--from {path} holds no rows of this benchmark: name a results file of its.") from error
    if not last:
        raise UserError(f"--from {path} is empty: name a results file.")
    return last


def show(rows: Sequence[Row], console: Console) -> None:
    """Print for each type every layer and the sums over each network, and what is missing."""
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        some = [row for row in rows if row["dtype"] == dtype]
        console.print(layers_table(dtype, some), sums_table(dtype, some))
    missing: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "missing" in row:
            missing.setdefault((row["contender"], row["missing"]), []).append(row["dtype"])
    for (contender, reason), dtypes in missing.items():
        console.print(
            f"missing: {contender}, {', '.join(dict.fromkeys(dtypes))}: {reason}", markup=False, soft_wrap=True
        )
    copy = f"A copy reads and writes {rows[0]['copy_gb_per_s']:.0f} GB/s."
    console.print(f"{describe(rows[0]['machine'])}. {copy} {verdict(rows)}", markup=False, soft_wrap=True)


def layers_table(dtype: str, rows: Sequence[Row]) -> Table:
    """A line for each contender at each layer; the error is the largest, in units of the type's precision."""
    models = list(dict.fromkeys(model for row in rows for model in row["layers"]))
    table = _new_table(f"{dtype}: {', '.join(models)}", "layers", "contender")
    for heading in ("forward", "backward"):
        table.add_column(f"{heading}\nms", justify="right", no_wrap=True)
    for heading in ("share of\na copy", "goal", "error\n/ eps"):
        table.add_column(heading, justify="right", no_wrap=True)
    shown = None
    for row in rows:
        layer = row["kind"], row["shape"]
        if "missing" in row:
            continue
        if layer != shown:
            table.add_section()
        number = "/".join(str(row["layers"].get(model, 0)) for model in models)
        label = f"{number} {row['kind']} {'x'.join(map(str, row['shape']))}" if layer != shown else ""
        shown = layer
        forward, backward = row["forward"], row["backward"]
        table.add_row(
            label,
            row["contender"],
            f"{forward['ms']:.3f}",
            f"{backward['ms']:.3f}",
            f"{forward['share']:.0%} {backward['share']:.0%}",
            {None: "", True: "reached", False: "missed"}[reaches_goal(row)],
            f"{max(row['errors'].values()) / torch.finfo(DTYPES[dtype]).eps:.2f}",
        )
    return table


def sums_table(dtype: str, rows: Sequence[Row]) -> Table:
    """Forward and backward of all measured layers of a network together, and the ratio to torch.compile's time."""
    sums = network_sums(rows)
    table = _new_table(f"{dtype}: whole networks", "contender")
    for model in sums:
        norms = sum(
            row["layers"].get(model, 0) * (2 if row["kind"].startswith("dual") else 1)
            for row in rows
            if row["contender"] == "eager"
        )
        table.add_column(f"{model},\n{norms} norms\nms", justify="right", no_wrap=True)
        table.add_column("/ compile", justify="right", no_wrap=True)
    for contender in dict.fromkeys(row["contender"] for row in rows):
        cells = []
        for times in sums.values():
            ms, compile_ms = times.get(contender), times.get("compile")
            cells.append("-" if ms is None else f"{ms:.2f}")
            cells.append("-" if ms is None or compile_ms is None else f"{ms / compile_ms:.2f}")
        table.add_row(contender, *cells)
    return table


def _new_table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, show_edge=False, pad_edge=False)
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    return table


def network_sums(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Milliseconds by network and contender, of those contenders that ran at all of the network's measured layers."""
    sums: dict[str, dict[str, float]] = {}
    for row in rows:
        ms = math.nan if "missing" in row else row["forward"]["ms"] + row["backward"]["ms"]
        for model, number in row["layers"].items():
            times = sums.setdefault(model, {})
            times[row["contender"]] = times.get(row["contender"], 0) + number * ms
    return {model: {name: ms for name, ms in times.items() if not math.isnan(ms)} for model, times in sums.items()}


def require_plotting(path: Path) -> None:
    """UserError where matplotlib is missing or does not draw such files."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib: pip install matplotlib, or leave --plot out.")
    if path.suffix not in SUFFIXES:
        raise UserError(f"--plot {path} does not end in one of {', '.join(SUFFIXES)}: name such a file.")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Effective rate against the activation's size, a point a layer; a row of panels for each type.

    Raises UserError where the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    contenders = list(dict.fromkeys(row["contender"] for row in rows if "missing" not in row))
    figure = Figure(figsize=(10, 0.8 + 3.6 * len(dtypes)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(dtypes), 2, sharex=True, sharey=True, squeeze=False)
    for line, dtype in zip(panels, dtypes, strict=True):
        for axes, direction in zip(line, ("forward", "backward"), strict=True):
            for number, contender in enumerate(contenders):
                measured = [row for row in rows if row["dtype"] == dtype and row["contender"] == contender]
                points = sorted(
                    (math.prod(row["shape"]) * DTYPES[dtype].itemsize / 1e6, row[direction]["gb_per_s"])
                    for row in measured
                    if "missing" not in row
                )
                gray = str(0.65 * number / max(1, len(contenders) - 1))
                axes.plot(
                    [mb for mb, _ in points],
                    [rate for _, rate in points],
                    linestyle="none",
                    marker=MARKERS[number % len(MARKERS)],
                    markersize=6,
                    color=gray,
                    markerfacecolor=gray if number % 2 == 0 else "white",
                    label=contender,
                )
            axes.axhline(rows[0]["copy_gb_per_s"], color="black", linestyle="--", linewidth=1, label="copy")
            axes.set(title=f"{dtype}, {direction}", xscale="log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_ylim(bottom=0)
            axes.grid(True, color="0.9")
            axes.label_outer()
    for axes in panels[-1]:
        axes.set_xlabel("activation (MB)")
    for axes in panels[:, 0]:
        axes.set_ylabel("effective rate (GB/s)")
    machine = rows[0]["machine"]
    figure.suptitle(f"BatchNorm + ReLU (+ residual) on {machine['gpu'] or machine['cpu']}")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"--plot {path} cannot be written ({error.strerror}): name another file.") from error
