"""Pictures of what `bench/throughput.py` measured: images a second of each contender."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fastflower.errors import UserError
from fastflower.report.curves import BARS, label_rows, write_at_ends

CONTENDERS = dict(zip(("fastflower", "others", "decoder alone"), BARS, strict=True))
# settings of a result that do not change what is measured, or that its name tells
UNIMPORTANT = frozenset({"out", "csv", "peers", "models", "compile"})


def read_throughput(path: Path) -> list[dict[str, Any]]:
    """Results of bench/throughput.py, in the file's order, without what was missing.

    Raises:
        UserError: the file cannot be read, or a line is no such result.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): give a file that bench/throughput.py --out wrote."
        ) from error
    results = []
    for number, line in enumerate(lines, 1):
        try:
            result = json.loads(line)
            if "missing" in result:
                continue
            complete = result.keys() >= {"mode", "name", "images_per_s", "spread", "settings", "machine"}
        except (ValueError, AttributeError):
            complete = False
        if not complete:
            raise UserError(f"{path}: line {number} is no result of bench/throughput.py: give the file of its --out.")
        results.append(result)
    if not results:
        raise UserError(f"{path} holds no results: give a file that bench/throughput.py --out wrote.")
    return results


def plot_throughput(results: Sequence[Mapping[str, Any]]) -> Figure:
    """Pictures a second of each contender of `bench/throughput.py`, with the range of its repeats.

    Each mode, and of a mode each machine, kind of pass and settings, has a panel. Of results for the same the last one
    is shown.
    """
    differing = _differing(results)
    panels: dict[str, dict[str, Mapping[str, Any]]] = {}
    for result in results:
        name, what = result["name"], ""
        if result["mode"] == "model":
            name, _, what = name.rpartition(", ")
        machine = f"{result['machine']['gpu'] or result['machine']['cpu']}, {result['machine']['cores']} cores"
        settings = _settings(result["settings"], differing[result["mode"]])
        title = ", ".join(filter(None, (f"{result['mode']}: {machine}", what, *settings)))
        panels.setdefault(title, {})[name] = result
    columns = min(2, len(panels))
    pairs = [list(panels.items())[start : start + columns] for start in range(0, len(panels), columns)]
    heights = [0.27 * max(len(panel) for _, panel in pair) + 0.8 for pair in pairs]  # inches
    figure = Figure(figsize=(7.5 * columns, sum(heights) + 0.4), layout="constrained")
    grid = figure.subplots(len(pairs), columns, squeeze=False, height_ratios=heights)
    for all_axes, pair in zip(grid, pairs, strict=True):
        for axes, (title, panel) in zip(all_axes, pair, strict=False):
            _plot_rates(axes, panel)
            axes.set_title(title, fontsize=9, parse_math=False)
        for axes in all_axes[len(pair) :]:
            axes.set_axis_off()
    kinds = {_kind(result) for result in results}
    looks = [Patch(label=kind, **look) for kind, look in CONTENDERS.items() if kind in kinds]
    figure.legend(handles=looks, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _plot_rates(axes: Axes, rows: Mapping[str, Mapping[str, Any]]) -> None:
    rates = np.array([row["images_per_s"] for row in rows.values()])
    spread = np.abs(np.array([row["spread"] for row in rows.values()]).T - rates)  # below and above
    for place, (rate, row) in enumerate(zip(rates, rows.values(), strict=True)):
        axes.barh(place, rate, 0.7, **CONTENDERS[_kind(row)])
    axes.errorbar(rates, range(len(rows)), xerr=spread, fmt="none", ecolor="black", capsize=3)
    write_at_ends(axes, rates + spread[1], [f"{rate:,.0f}" for rate in rates])
    label_rows(axes, list(rows))
    axes.set_xlabel("images/s")


def _kind(row: Mapping[str, Any]) -> str:
    """Whose result it is: one of CONTENDERS."""
    name = row["name"]
    if "decode only" in name:
        return "decoder alone"
    ours = name.startswith("fastflower") if row["mode"] == "loader" else " of " not in name
    return "fastflower" if ours else "others"


def _differing(results: Sequence[Mapping[str, Any]]) -> dict[str, set[str]]:
    """Of each mode the settings that are not the same in all of its results."""
    first: dict[tuple[str, str], Any] = {}
    differing: dict[str, set[str]] = {result["mode"]: set() for result in results}
    for result in results:
        for key, value in result["settings"].items():
            if key not in UNIMPORTANT and first.setdefault((result["mode"], key), value) != value:
                differing[result["mode"]].add(key)
    return differing


def _settings(settings: Mapping[str, Any], chosen: Collection[str]) -> list[str]:
    """The chosen ones in words: "sizes 192"."""
    return [
        f"{key} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in settings.items()
        if key in chosen
    ]
