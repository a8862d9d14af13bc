"""Figures and tables as a terminal shows them: one way to write each figure, one way to align columns."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.table import Column, Table
from rich.text import Text

TITLES = {
    "loss": "loss",
    "accuracy": "top-1",
    "top5": "top-5",
    "macro_f1": "macro F1",
    "ece": "calibration error",
}
# A tenth of a percent is finer than the standard error of 10,000 pictures, but at 99 %, where it is the same.
FORMATS = {"loss": ".4f", "accuracy": ".1%", "top5": ".1%", "macro_f1": ".3f", "ece": ".3f"}
NOTHING = "–"  # in place of a figure that was not measured


def written(figure: str, value: float | None) -> str:
    """A figure, by its name in metrics.jsonl and figures.json (accuracy, loss, ...; also with its split before it)."""
    return NOTHING if value is None else format(value, FORMATS[figure.removeprefix("train_").removeprefix("val_")])


def written_all(figures: Mapping[str, float]) -> str:
    """Those of TITLES that are there, in a line: "loss 0.5000  top-1 87.5%"."""
    return "  ".join(f"{title} {written(key, figures[key])}" for key, title in TITLES.items() if key in figures)


def new_table(*headings: str, names: int = 1, title: str | None = None, caption: str | None = None) -> Table:
    """An empty table whose first columns, so many as `names` says, are of names, and the others of figures.

    Names are on the left and continued below where they are too long; figures are on the right and never cut. A space
    more is all that there is between columns, so that many find room in a line of 80 characters.
    """
    columns = [Column(Text(heading), overflow="fold") for heading in headings[:names]]
    columns += [Column(Text(heading), justify="right", no_wrap=True) for heading in headings[names:]]
    return Table(
        *columns,
        title=title,
        caption=caption,
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
