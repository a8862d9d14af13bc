"""The plot of a learning-rate range test."""

from __future__ import annotations

from matplotlib.figure import Figure

from fastflower.report.curves import COLORS
from fastflower.training.lr_range import RangeTest


def plot_range(test: RangeTest) -> Figure:
    """Loss over the rate, of each step and smoothed, with the suggested rate."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(test.lr, test.loss, color="0.7", linewidth=0.9, label="each step")
    axes.plot(test.lr, test.smoothed, color=COLORS[1], linewidth=2.2, label="smoothed")
    if test.suggestion is not None:
        axes.axvline(test.suggestion, color=COLORS[2], linestyle="--", label=f"suggestion: {test.suggestion:g}")
    low, high = min(test.smoothed, default=0.0), max(test.smoothed[:1], default=1.0)
    axes.set_ylim(low - 0.1 * (high - low) - 0.05, high + 0.5 * (high - low) + 0.05)  # the explosion may leave it
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss (nats)")
    axes.grid(color="0.9")
    axes.legend()
    return figure
