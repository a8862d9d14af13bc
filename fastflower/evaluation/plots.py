"""Pictures for reports. Only Matplotlib's object interface, which needs no display and leaves no global state."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from fastflower.arrays import Bytes, Ints
from fastflower.files import atomic_write

DPI = 150
MOST_NAMES = 128  # on an axis
LONGEST_NAME = 40  # characters on an axis
LONGEST_LINE = 38  # characters of a caption
COUNTED = 20  # up to so many classes the cells hold their counts
ACROSS = 6  # pictures in a row of a contact sheet


def plot_confusion(path: Path, matrix: Ints, support: Ints, names: Sequence[str], title: str) -> None:
    """Draw a confusion matrix as a PNG file.

    The grays are shares of the true class; their scale is that of the square root, so that a confusion of a few percent
    can be seen. A class without records has a white row.

    Args:
        path: where to.
        matrix: [C, C] counts, a row for each true class, of at most MOST_NAMES.
        support: [C] pictures of each class, also those that are taken for a class that is not shown.
        names: [C], of the classes.
        title: above it.
    """
    classes = len(names)
    shares = matrix / np.maximum(support[:, None], 1)
    labels = [short(name, LONGEST_NAME) for name in names]
    font, cell = (9, 0.45) if classes <= COUNTED else (7, 0.17)  # points, inches
    square = max(3, cell * classes)
    margin = 0.6 * font / 72 * max(map(len, labels)) + 0.8  # inches that names and titles take
    figure = Figure(figsize=(square + margin + 1, square + margin), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Greys", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    axes.set_xticks(range(classes), labels, rotation=90, fontsize=font, parse_math=False)
    axes.set_yticks(range(classes), labels, fontsize=font, parse_math=False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(title)
    figure.colorbar(image, label="share of the true class", ticks=[0, 0.05, 0.25, 0.5, 1], fraction=0.04)
    if classes <= COUNTED:
        for (row, column), count in np.ndenumerate(matrix):
            if count:
                color = "white" if shares[row, column] > 0.25 else "black"
                axes.text(column, row, f"{count}", ha="center", va="center", fontsize=8, color=color)
    save_figure(path, figure, "png")


def contact_sheet(path: Path, pictures: Sequence[Bytes], captions: Sequence[str]) -> None:
    """Draw pictures (uint8 RGB [h, w, 3] of any sizes), each above its caption of a few lines, as a JPEG file."""
    rows = -(-len(pictures) // ACROSS)
    figure = Figure(figsize=(2.4 * ACROSS, 3 * rows), layout="constrained")
    for axes in figure.subplots(rows, ACROSS, squeeze=False).flat:
        axes.set_axis_off()
    for axes, (picture, caption) in zip(figure.axes, zip(pictures, captions, strict=True), strict=False):
        axes.imshow(picture)
        text = "\n".join(short(line, LONGEST_LINE) for line in caption.split("\n"))
        axes.text(0.5, -0.03, text, transform=axes.transAxes, ha="center", va="top", fontsize=7.5, parse_math=False)
    save_figure(path, figure, "jpeg")


def short(text: str, longest: int) -> str:
    """The text, or its beginning where it has more characters than `longest`."""
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def save_figure(path: Path, figure: Figure, format: Literal["png", "jpeg", "svg"]) -> None:
    """Write a figure as a file, the same bytes each time."""
    FigureCanvasAgg(figure)
    metadata = {"Date": None} if format == "svg" else None
    with atomic_write(path) as file, warnings.catch_warnings(), rc_context({"svg.hashsalt": "fastflower"}):
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a box stands for it
        figure.savefig(file, format=format, dpi=DPI, metadata=metadata)
