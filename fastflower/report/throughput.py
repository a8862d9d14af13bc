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

Row = Mapping[str, Any]  # a result

OURS, OTHERS, DECODER = "fastflower", "others", "decoder alone"
LOOKS = dict(zip((OURS, OTHERS, DECODER), BARS, strict=True))
KINDS = {  # of contenders, by their role
    "ours": OURS,
    "decoded": OURS,
    "baseline": OTHERS,
    "peer": OTHERS,
    "decoder": DECODER,
    "limit": DECODER,
}
COMPARED = ("limit", "ours", "peer", "baseline")  # roles that loaders are compared by at each size; of peers the best
NAMED = {"limit": "decoder alone, whole pictures", "peer": "best other loader"}
# settings of a result that do not change what is measured, or that its name tells
UNIMPORTANT = frozenset({"out", "csv", "peers", "models", "compile"})
REQUIRED = {"mode", "name", "role", "images_per_s", "spread", "settings", "machine"}


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
            complete = result.keys() >= REQUIRED and result["role"] in KINDS
        except (ValueError, AttributeError):
            complete = False
        if not complete:
            raise UserError(
                f"{path}: line {number} is no result of bench/throughput.py, or one of an earlier version: give a file "
                "of its --out."
            )
        results.append(result)
    if not results:
        raise UserError(f"{path} holds no results: give a file that bench/throughput.py --out wrote.")
    return results


def plot_throughput(results: Sequence[Row]) -> Figure:
    """Images a second; of results for the same the last one is shown.

    Where all are of loaders at several stored sizes, they are compared size by size; else each contender is shown.
    """
    differing = _differing(results)
    if differing.keys() == {"loader"} and "sizes" in differing["loader"]:
        return plot_loaders(results)
    return plot_contenders(results)


def plot_loaders(results: Sequence[Row]) -> Figure:
    """Of loaders, for each stored size: a decoder alone, which is the limit, ours, the best of its peers, and what most
    people do; with the range of the repeats.

    Each combination of the other settings has a panel.
    """
    differing = _differing(results)["loader"] - {"sizes"}
    panels: dict[str, dict[str, dict[str, Row]]] = {}  # by title, size and name
    for result in results:
        title = ", ".join(_settings(result["settings"], differing))
        size = _words(result["settings"]["sizes"])
        panels.setdefault(title, {}).setdefault(size, {})[result["name"]] = result
    bars = max(sum(1 + len(_compared(rows.values())) for rows in sizes.values()) for sizes in panels.values())
    figure = Figure(figsize=(3 + 3.7 * len(panels), 0.26 * bars + 1), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharex=True, squeeze=False)[0]
    for axes, (title, sizes) in zip(all_axes, panels.items(), strict=True):
        _plot_sizes(axes, sizes, named=axes is all_axes[0])
        axes.set_title(title, fontsize=11, parse_math=False)
    figure.suptitle(f"Loaders on {' and '.join(dict.fromkeys(map(_machine, results)))}", parse_math=False)
    figure.supxlabel("images/s, the median and the range of the repeats", fontsize=10)
    return figure


def _compared(rows: Collection[Row]) -> list[Row]:
    """One of each role in COMPARED, as far as there are some."""
    by_role = [[row for row in rows if row["role"] == role] for role in COMPARED]
    return [max(same, key=lambda row: row["images_per_s"]) for same in by_role if same]


def _plot_sizes(axes: Axes, sizes: Mapping[str, Mapping[str, Row]], *, named: bool) -> None:
    """A group of bars for each stored size, below a heading; names of the bars where they are wanted."""
    rows: list[Row | None] = []  # None: a heading
    names, texts = [], []
    for size, of_size in sizes.items():
        compared = _compared(of_size.values())
        rows += [None, *compared]
        names += [f"stored at {size} pixels", *(NAMED.get(row["role"], "{}").format(row["name"]) for row in compared)]
        texts += ["", *(_rate(row) + (f" {row['name']}" if row["role"] == "peer" else "") for row in compared)]
    label_rows(axes, names if named else [""] * len(names))
    axes.tick_params(axis="y", length=0)
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight("normal" if row else "bold")
    _plot_bars(axes, rows, texts)


def plot_contenders(results: Sequence[Row]) -> Figure:
    """Images a second of each contender, with the range of its repeats.

    Each mode, and of a mode each machine, kind of pass and settings, has a panel.
    """
    differing = _differing(results)
    panels: dict[str, dict[str, Row]] = {}
    for result in results:
        part = result.get("part", "")
        settings = _settings(result["settings"], differing[result["mode"]])
        title = ", ".join(filter(None, (f"{result['mode']}: {_machine(result)}", part, *settings)))
        panels.setdefault(title, {})[result["name"].removesuffix(f", {part}")] = result
    columns = min(2, len(panels))
    pairs = [list(panels.items())[start : start + columns] for start in range(0, len(panels), columns)]
    heights = [0.27 * max(len(panel) for _, panel in pair) + 0.8 for pair in pairs]  # inches
    figure = Figure(figsize=(7.5 * columns, sum(heights) + 0.4), layout="constrained")
    grid = figure.subplots(len(pairs), columns, squeeze=False, height_ratios=heights)
    for all_axes, pair in zip(grid, pairs, strict=True):
        for axes, (title, panel) in zip(all_axes, pair, strict=False):
            label_rows(axes, list(panel))
            _plot_bars(axes, list(panel.values()), [_rate(row) for row in panel.values()])
            axes.set_title(title, fontsize=9, parse_math=False)
            axes.set_xlabel("images/s")
        for axes in all_axes[len(pair) :]:
            axes.set_axis_off()
    kinds = {KINDS[result["role"]] for result in results}
    looks = [Patch(label=kind, **look) for kind, look in LOOKS.items() if kind in kinds]
    figure.legend(handles=looks, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _plot_bars(axes: Axes, rows: Sequence[Row | None], texts: Sequence[str]) -> None:
    """A horizontal bar for each row from the top, and a text beyond its end; room where there is none."""
    places = [place for place, row in enumerate(rows) if row]
    shown = [row for row in rows if row]
    rates = np.array([row["images_per_s"] for row in shown])
    spread = np.abs(np.array([row["spread"] for row in shown]).T - rates)  # below and above
    for place, rate, row in zip(places, rates, shown, strict=True):
        axes.barh(place, rate, 0.7, **LOOKS[KINDS[row["role"]]])
    axes.errorbar(rates, places, xerr=spread, fmt="none", ecolor="black", capsize=3)
    ends = np.full(len(rows), np.nan)
    ends[places] = rates + spread[1]
    write_at_ends(axes, ends, texts)


def _rate(row: Row) -> str:
    return f"{row['images_per_s']:,.0f}"


def _machine(result: Row) -> str:
    machine = result["machine"]
    return f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores"


def _differing(results: Sequence[Row]) -> dict[str, set[str]]:
    """Of each mode the settings that are not the same in all of its results."""
    first: dict[tuple[str, str], Any] = {}
    differing: dict[str, set[str]] = {result["mode"]: set() for result in results}
    for result in results:
        for key, value in result["settings"].items():
            if key not in UNIMPORTANT and first.setdefault((result["mode"], key), value) != value:
                differing[result["mode"]].add(key)
    return differing


def _settings(settings: Row, chosen: Collection[str]) -> list[str]:
    """The chosen ones in words: "sizes 192"."""
    return [f"{key} {_words(value)}" for key, value in settings.items() if key in chosen]


def _words(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
