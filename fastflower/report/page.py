"""Runs side by side: a table, who converges first, and pictures, as one HTML page that needs no network."""

from __future__ import annotations

import base64
import importlib.resources
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from fastflower.errors import UserError
from fastflower.evaluation.trained_run import open_trained
from fastflower.files import atomic_write
from fastflower.flops import Cost, count
from fastflower.models import architecture, create_model
from fastflower.report.curves import (
    plot_accuracy,
    plot_bubbles,
    plot_curves,
    plot_epoch_time,
    write_picture,
)
from fastflower.report.history import History, last, median, read_histories
from fastflower.report.throughput import plot_throughput, read_throughput
from fastflower.tables import FORMATS, NOTHING, new_table

LEVELS = (0.5, 0.6, 0.7)  # validation accuracies that runs are compared at
COSTS = {  # headings, and how their figures are written
    "seconds an epoch": ",.1f",
    "images/s": ",.1f",
    "params (M)": ".2f",
    "MACs (G)": ".2f",
}
WRITTEN = COSTS | {  # of a column's figures; the others are whole numbers
    "best val accuracy": FORMATS["accuracy"],
    "final val accuracy": FORMATS["accuracy"],
    "final train accuracy": FORMATS["accuracy"],
    "macro F1": FORMATS["macro_f1"],
}
SHORT = {  # headings in a terminal, of two lines
    "best val accuracy": "best\nval",
    "at epoch": "at\nepoch",
    "macro F1": "macro\nF1",
    "final val accuracy": "final\nval",
    "final train accuracy": "final\ntrain",
}

Summary = Mapping[str, float | None]  # a run's row of the table: what is shown under each heading, None = not known


class Picture(NamedTuple):
    """A figure on the page, and NAME.png and NAME.svg beside it."""

    name: str
    caption: str
    figure: Figure | None  # None: what it would show is not known


@dataclass(frozen=True)
class Report:
    """What was found, and the page that holds it."""

    rows: dict[str, Summary]  # by the run's name
    settings: dict[str, dict[str, str]]  # by the run's name: those that are not the same in all, by dotted keys
    notes: list[str]  # sentences about what was left out
    sentences: list[str]
    page: Path


def write_report(folders: Sequence[Path], out: Path, throughput: Path | None = None) -> Report:
    """Compare runs in a folder: report.html, which holds everything, and each picture as a PNG and an SVG file.

    Args:
        folders: run folders, or folders of TensorBoard events with the same tags; or folders that hold such ones.
        out: made if it is not there; an earlier report in it is replaced.
        throughput: results of bench/throughput.py to draw too.

    Raises:
        UserError: there is no run in any of the folders, or `throughput` is no such file.
    """
    runs, without = read_histories(folders)
    notes = [f"Left out, since it holds no finished epoch of a run: {path}" for path in without]
    settings = differing(runs)
    costs = [_cost(run) for run in runs]
    results = read_throughput(throughput) if throughput else []
    rows = {run.name: summarize(run, cost) for run, cost in zip(runs, costs, strict=True)}
    sentences = convergence(runs)
    pictures = _draw(runs, costs, results)
    for picture in pictures:
        if picture.figure:
            write_picture(out / picture.name, picture.figure)
        else:  # an earlier report's
            for ending in ("png", "svg"):
                (out / f"{picture.name}.{ending}").unlink(missing_ok=True)
    page = out / "report.html"
    with atomic_write(page) as file:
        drawn = [picture for picture in pictures if picture.figure]
        file.write(_page(rows, settings, notes, sentences, drawn, out).encode())
    return Report(rows, settings, notes, sentences, page)


def summarize(run: History, cost: Cost | None) -> Summary:
    """A run's row of the table; accuracies are shares."""
    accuracy, epoch = run.best or (None, None)
    return {
        "epochs": int(run.epochs[-1]),
        "best val accuracy": accuracy,
        "at epoch": epoch,
        "macro F1": run.best_macro_f1,
        "final val accuracy": last(run.val_accuracy),
        "final train accuracy": last(run.train_accuracy),
        **{f"epochs to {_percent(level)}": run.first_at(level) for level in LEVELS},
        "seconds an epoch": median(run.epoch_s),
        "images/s": median(run.images_per_s),
        "params (M)": cost.params / 1e6 if cost else None,
        "MACs (G)": cost.macs / 1e9 if cost else None,
    }


def differing(runs: Sequence[History]) -> dict[str, dict[str, str]]:
    """Of each run the settings, by dotted keys, that are not the same in all whose settings are known."""
    known = [run.settings for run in runs if run.settings]
    keys = [key for key in (known[0] if known else ()) if any(one[key] != known[0][key] for one in known)]
    return {run.name: {key: _setting(run.settings[key]) for key in keys if run.settings} for run in runs}


def _setting(value: Any) -> str:
    """As it is typed on the command line."""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def levels(runs: Sequence[History]) -> list[float]:
    """Validation accuracies to compare runs at: LEVELS, and the highest that all of several runs reach.

    The latter is rounded down to tenths of a percent. Runs without validation do not count.
    """
    best = [run.best[0] for run in runs if run.best]
    common = math.floor(1000 * min(best)) / 1000 if len(best) > 1 else 0
    return sorted({*LEVELS, common} - {0}) if best else []


def convergence(runs: Sequence[History]) -> list[str]:
    """A sentence for each of the levels: which run reaches it first, and how many epochs before each other one."""
    return [_compare([run for run in runs if run.best], level) for level in levels(runs)]


def _compare(runs: Sequence[History], level: float) -> str:
    at = {run.name: epoch for run in runs if (epoch := run.first_at(level))}
    if not at:
        return f"No run reaches {_percent(level)}."
    first = min(at.values())
    leaders = [name for name, epoch in at.items() if epoch == first]
    behind = sorted((epoch - first, name) for name, epoch in at.items() if epoch > first)
    never = [run.name for run in runs if run.name not in at]
    text = f"{_list(leaders)} reach{'' if len(leaders) > 1 else 'es'} {_percent(level)} after {first} epoch"
    text += ("s" if first > 1 else "") + "".join(f", {epochs} before {name}" for epochs, name in behind)
    return text + (f"; {_list(never)} never {'do' if len(never) > 1 else 'does'}." if never else ".")


def _list(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def runs_tables(report: Report) -> list[Table]:
    """For a terminal, which is narrow: what runs came to, what they cost, and in which settings they differ.

    A row is a run's; what is known of none has no column.
    """
    headings = [
        heading
        for heading in next(iter(report.rows.values()))
        if any(row[heading] is not None for row in report.rows.values())
    ]
    parts = ([key for key in headings if key not in COSTS], [key for key in headings if key in COSTS])
    tables = []
    for part in filter(None, parts):
        grid = new_table("run", *(SHORT.get(heading, heading.replace("epochs to ", "to\n")) for heading in part))
        for name, row in report.rows.items():
            grid.add_row(Text(name), *(_shown(heading, row[heading]) for heading in part))
        tables.append(grid)
    if any(report.settings.values()):
        grid = new_table("run", "settings that differ", names=2)
        for name, settings in report.settings.items():
            texts = ", ".join(f"{key} {value}" for key, value in settings.items())
            grid.add_row(Text(name), Text(texts or NOTHING))
        tables.append(grid)
    return tables


def _shown(heading: str, value: float | None) -> str:
    return NOTHING if value is None else format(value, WRITTEN.get(heading, "d"))


def _draw(runs: Sequence[History], costs: Sequence[Cost | None], results: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """All pictures, those of which nothing is known without a figure."""
    params = [cost.params if cost else None for cost in costs]
    macs = [cost.macs / 1e9 if cost else None for cost in costs]
    rates = [median(run.images_per_s) for run in runs]
    timed = any(median(run.epoch_s) for run in runs)
    return [
        Picture("curves", "Loss (logarithmic) and accuracy over the epochs.", plot_curves(runs)),
        Picture("accuracy", "Which run reaches an accuracy first.", plot_accuracy(runs, levels(runs))),
        Picture(
            "accuracy_macs",
            "Accuracy against the multiply-adds of one picture's forward pass.",
            plot_bubbles(runs, macs, params, "multiply-adds a picture (GMACs)"),
        ),
        Picture(
            "accuracy_speed",
            "Accuracy against the speed of training.",
            plot_bubbles(runs, rates, params, "images/s in training"),
        ),
        Picture("epoch_time", "What an epoch's time is spent on.", plot_epoch_time(runs) if timed else None),
        Picture(
            "throughput", "Throughput, with the range of the repeats.", plot_throughput(results) if results else None
        ),
    ]


def _page(
    rows: Mapping[str, Summary],
    settings: Mapping[str, Mapping[str, str]],
    notes: Sequence[str],
    sentences: Sequence[str],
    pictures: Sequence[Picture],
    out: Path,
) -> str:
    """The HTML page; the pictures, as they lie in `out`, are in it."""
    template = importlib.resources.files("fastflower.report").joinpath("report.html").read_text(encoding="utf-8")
    keys = next((list(of_run) for of_run in settings.values() if of_run), [])
    headings = ("run", *next(iter(rows.values())), *keys)
    items = "".join(f"<li>{escape(sentence)}</li>\n" for sentence in sentences)
    return Template(template).substitute(
        title=f"Report of {len(rows)} run{'s' if len(rows) > 1 else ''}",
        head="".join(f'<th scope="col"><button type="button">{escape(heading)}</button></th>' for heading in headings),
        rows="\n".join(_html_row(name, row, [settings[name].get(key) for key in keys]) for name, row in rows.items()),
        notes="\n".join(f'<p class="note">{escape(note)}</p>' for note in notes),
        sentences=f"<h2>Convergence on validation</h2>\n<ul>\n{items}</ul>" if sentences else "",
        pictures="\n".join(_html_figure(picture, out) for picture in pictures),
    )


def _html_row(name: str, row: Summary, settings: Sequence[str | None]) -> str:
    texts = [("" if value is None else value, _shown(heading, value)) for heading, value in row.items()]
    texts += [("" if value is None else value, NOTHING if value is None else value) for value in settings]
    cells = "".join(f'<td data-value="{escape(str(value))}">{escape(text)}</td>' for value, text in texts)
    return f'<tr><th scope="row" data-value="{escape(name)}">{escape(name)}</th>{cells}</tr>'


def _html_figure(picture: Picture, out: Path) -> str:
    data = base64.b64encode((out / f"{picture.name}.svg").read_bytes()).decode()
    image = f'<img src="data:image/svg+xml;base64,{data}" alt="{escape(picture.caption)}">'
    return f"<figure>{image}<figcaption>{escape(picture.caption)}</figcaption></figure>"


def _cost(run: History) -> Cost | None:
    """Of the network in a run folder's best checkpoint; None without one that can be read."""
    try:
        trained = open_trained(run.path)
    except UserError:
        return None
    with torch.device("meta"):
        network = create_model(num_classes=len(trained.classes), **architecture(asdict(trained.config.model)))
    return count(network, trained.config.data.crop)
