"""Pictures that compare runs: told apart by color and by marker, so that they can be read in grayscale too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from fastflower.arrays import Floats
from fastflower.evaluation.plots import LONGEST_NAME, save_figure, short
from fastflower.report.history import History, median

# As many as there are markers, one by one as different as colors can be that are dark enough on white; also for eyes
# that do not tell red from green.
COLORS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#8b1a3a", "#e69f00")
MARKERS = "osD^P*X<"  # none like the mark of a learning-rate drop
MARKED = 10  # places on a curve, about
TRAIN: dict[str, Any] = {"linestyle": (0, (4, 2)), "linewidth": 0.9}
VAL: dict[str, Any] = {"linestyle": "-", "linewidth": 2.2}
MARK: dict[str, Any] = {"markeredgecolor": "black", "linestyle": "none"}
DROP: dict[str, Any] = {"marker": "v", "markersize": 10, "markerfacecolor": "white", **MARK}
RING: dict[str, Any] = {"marker": "o", "markersize": 13, "markerfacecolor": "none", **MARK}
LARGEST = 1500  # points², of the bubble with most parameters
BARS: tuple[dict[str, Any], ...] = (
    {"facecolor": "0.5", "edgecolor": "black"},
    {"facecolor": "0.8", "edgecolor": "black", "hatch": "///"},
    {"facecolor": "white", "edgecolor": "black", "hatch": "xxx"},
)


def plot_curves(runs: Sequence[History]) -> Figure:
    """Loss and accuracy over the epochs, of training and validation, with the drops of the learning rate."""
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for axes, what, scale in ((loss, "loss", 1), (accuracy, "accuracy", 100)):
        for number, run in enumerate(runs):
            train, val = scale * getattr(run, f"train_{what}"), scale * getattr(run, f"val_{what}")
            _curve(axes, run, train, number, len(runs), markersize=4, markerfacecolor="white", **TRAIN)
            _curve(axes, run, val, number, len(runs), markersize=6, **VAL)
            dropped = np.isin(run.epochs, run.drops())
            axes.plot(run.epochs[dropped], np.where(np.isnan(val), train, val)[dropped], zorder=3, **DROP)
    loss.set_ylabel("loss (cross-entropy, nats)")
    loss.set_yscale("log")
    _widen(loss, "y", 1.2)
    _widen(accuracy, "y", 2, share=100)
    low, high = loss.get_ylim()
    loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 5 * low else MaxNLocator(5))
    loss.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    loss.yaxis.set_minor_formatter(NullFormatter())
    accuracy.set_ylabel("top-1 accuracy (%)")
    kinds = [Line2D([], [], color="0.4", **TRAIN, label="training"), Line2D([], [], color="0.4", **VAL)]
    kinds[1].set_label("validation")
    if any(run.drops() for run in runs):
        kinds.append(Line2D([], [], **DROP, label="learning rate drops"))
    _over_epochs(figure, runs, kinds)
    return figure


def plot_accuracy(runs: Sequence[History], levels: Sequence[float]) -> Figure:
    """Validation accuracy over the epochs (training's, where nothing validates), with a ring where it first reaches
    each of the levels, which are shares.
    """
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    for number, run in enumerate(runs):
        values, style = (run.val_accuracy, VAL) if run.best else (run.train_accuracy, TRAIN)
        _curve(axes, run, 100 * values, number, len(runs), markersize=6, **style)
        reached = np.isin(run.epochs, [run.first_at(level) or 0 for level in levels])
        axes.plot(run.epochs[reached], 100 * run.val_accuracy[reached], zorder=3, **RING)
    for level in levels:
        axes.axhline(100 * level, color="0.6", linestyle=":", linewidth=1)
    axes.set_ylabel("top-1 accuracy (%)")
    _widen(axes, "y", 2, share=100)
    kinds = [Line2D([], [], color="0.4", **VAL, label="validation")] if any(run.best for run in runs) else []
    if not all(run.best for run in runs):
        kinds.append(Line2D([], [], color="0.4", **TRAIN, label="training, without validation"))
    if levels:
        kinds.append(Line2D([], [], **RING, label=f"first at {', '.join(f'{100 * level:.3g}' for level in levels)} %"))
    _over_epochs(figure, runs, kinds)
    return figure


def plot_bubbles(
    runs: Sequence[History], costs: Sequence[float | None], params: Sequence[int | None], label: str
) -> Figure | None:
    """Best validation accuracy against a cost (one of each run, in the unit that `label` names).

    The area of a bubble is the network's number of parameters. Runs of which something is not known are left out; None
    where that leaves none.
    """
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.add_subplot()
    shown, most = [], max((number for number in params if number), default=0)
    for number, (run, cost, size) in enumerate(zip(runs, costs, params, strict=True)):
        if not (run.best and cost and size):
            continue
        look, accuracy = _look(number), 100 * run.best[0]
        axes.scatter(cost, accuracy, LARGEST * size / most, color="0.6", alpha=0.4, edgecolors="black", zorder=2)
        axes.plot(cost, accuracy, **look, zorder=3)
        text = f"{short(run.name, LONGEST_NAME)}, {size / 1e6:.3g} M"
        shown.append(Line2D([], [], **look, linestyle="none", label=text))
    axes.margins(0.2)
    _widen(axes, "x", 1.2)
    _widen(axes, "y", 2, share=100)
    axes.set_xlabel(label)
    axes.set_ylabel("best top-1 validation accuracy (%)")
    axes.set_title("area: parameters (millions, M)", fontsize=10)
    _finish(figure, shown)
    return figure if shown else None


def plot_epoch_time(runs: Sequence[History]) -> Figure:
    """Seconds of an epoch in training and validation and, in a bar of its own, how many of them were waiting for data;
    medians over the epochs.
    """
    figure = Figure(figsize=(9, 0.8 * len(runs) + 1.4), layout="constrained")
    axes = figure.add_subplot()
    label_rows(axes, [run.name for run in runs])
    rows = np.arange(len(runs))
    parts = [(run.training_s, run.epoch_s - run.training_s, run.epoch_s, run.waited_s) for run in runs]
    medians = np.array([[median(part) for part in of_run] for of_run in parts], np.float64)  # NaN draws nothing
    training, validation, whole, waited = medians.T
    divided = ~np.isnan(training)
    axes.barh(rows, training, 0.5, label="training", **BARS[0])
    axes.barh(rows, validation, 0.5, training, label="validation", **BARS[1])
    if not divided.all():
        label = "training and validation"
        axes.barh(rows[~divided], whole[~divided], 0.5, label=label, color="0.65", edgecolor="black")
    if not np.isnan(waited).all():
        axes.barh(rows + 0.37, waited, 0.2, label="of it waiting for data", **BARS[2])
    totals = np.where(divided, training + validation, whole)
    write_at_ends(axes, totals, [f"{total:.3g} s" for total in totals])
    axes.set_xlabel("seconds an epoch (median)")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def write_picture(path: Path, figure: Figure) -> None:
    """Write PATH.png and PATH.svg."""
    for format in ("png", "svg"):
        save_figure(path.with_name(f"{path.name}.{format}"), figure, format)


def _curve(axes: Axes, run: History, values: Floats, number: int, runs: int, **style: Any) -> None:
    """One run's values ([E]; gaps where NaN); marked at about MARKED epochs, which are not the same for all runs."""
    every = -(-len(run.epochs) // MARKED)
    axes.plot(run.epochs, values, **_look(number), markevery=(number * every // runs, every), **style)


def _look(number: int) -> dict[str, Any]:
    """Color and marker of a run, by its number: both of their own for the first eight, and a pair of its own for more.

    Of each further eight the markers are moved on by one.
    """
    moved, place = divmod(number, len(COLORS))
    return {"color": COLORS[place], "marker": MARKERS[(place + moved) % len(MARKERS)]}


def _widen(axes: Axes, axis: Literal["x", "y"], least: float, *, share: float | None = None) -> None:
    """Where all values of an axis are (nearly) equal, show some room around them, with numbers that can be read.

    Args:
        axes: with all that is drawn on it.
        axis: which.
        least: how many times the lowest value the highest is at least; of shares the difference of the two.
        share: the largest value that there may be, where values are shares of it, from 0.
    """
    low, high = axes.get_xlim() if axis == "x" else axes.get_ylim()
    middle = (low + high) / 2
    if share is not None:
        if high - low < least:
            low, high = middle - least / 2, middle + least / 2
        low, high = max(low, -0.02 * share), min(high, 1.02 * share)  # room for the marks at the ends
    elif 0 < high < low * least:
        low, high = middle / least, middle * least
    (axes.set_xlim if axis == "x" else axes.set_ylim)(low, high)
    (axes.xaxis if axis == "x" else axes.yaxis).set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:g}" if share is None or 0 <= value <= share else "")
    )


def _over_epochs(figure: Figure, runs: Sequence[History], kinds: Sequence[Line2D]) -> None:
    """Epochs below, and a legend of the runs and of the kinds of lines."""
    for axes in figure.axes:
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
        low, high = min(run.epochs[0] for run in runs), max(run.epochs[-1] for run in runs)
        if low == high:
            axes.set_xlim(low - 0.5, high + 0.5)
    shown = [
        Line2D([], [], linewidth=2, **_look(number), label=short(run.name, LONGEST_NAME))
        for number, run in enumerate(runs)
    ]
    _finish(figure, [*shown, *kinds])


def _finish(figure: Figure, handles: Sequence[Line2D]) -> None:
    """A grid, and a legend below."""
    for axes in figure.axes:
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
    columns = 2 + len(figure.axes)
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)


def label_rows(axes: Axes, names: Sequence[str]) -> None:
    """Names of horizontal bars, from the top; room for a figure at their ends."""
    axes.set_yticks(range(len(names)), [short(name, LONGEST_NAME) for name in names], parse_math=False)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)


def write_at_ends(axes: Axes, ends: Floats, texts: Sequence[str]) -> None:
    """A text beyond the end of each horizontal bar; none at NaN."""
    for row in np.flatnonzero(~np.isnan(ends)).tolist():
        axes.annotate(texts[row], (ends[row], row), (4, 0), textcoords="offset points", va="center", fontsize=9)
