"""Where a network errs: confusion matrix, figures of each class, calibration and its most confident mistakes."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from rich.text import Text

from fastflower.arrays import Bools, Bytes, Floats, Ints, Singles, Strings
from fastflower.config import DataConfig
from fastflower.data.batches import choose_engine
from fastflower.data.decoding import thumbnails
from fastflower.evaluation.evaluate import Evaluated
from fastflower.evaluation.plots import contact_sheet, plot_confusion
from fastflower.evaluation.score import softmax
from fastflower.files import atomic_write, to_json
from fastflower.runtime.distributed import Ranks
from fastflower.runtime.run_folder import RunFolder
from fastflower.training.metrics import ClassCounts

BINS = 15  # of confidence, as in Guo et al. 2017
PICTURES = 24  # on the contact sheet
SIDE = 224  # pixels, longer side of each
SHOWN_PAIRS, SHOWN_CLASSES = 10, 5  # in the terminal


@dataclass(frozen=True)
class Confused:
    """Pictures of one class that are taken for another."""

    true: int
    predicted: int
    count: int
    share: float  # of the true class


@dataclass(frozen=True)
class Mistake:
    """A picture whose likeliest class is not its own."""

    index: int  # row of the arrays that were analysed
    id: str
    true: int
    predicted: int
    confidence: float  # probability of the predicted class


@dataclass(frozen=True)
class Analysis:
    """What `analyse` finds. Figures of a class are 0 where they are not defined."""

    names: list[str]  # of the classes, by number
    confusion: Ints  # [C, C], a row for each true class, a column for each predicted one
    precision: Floats  # [C]
    recall: Floats  # [C]
    f1: Floats  # [C]
    support: Ints  # [C], pictures of the class
    confused: list[Confused]  # the most frequent first
    mistakes: list[Mistake]  # the most confident first
    ece: float  # expected calibration error


def analyse_run(evaluated: Evaluated) -> Analysis:
    """Where a run's network errs."""
    records = evaluated.records
    ids = [name or records.describe(index) for index, name in enumerate(records.ids.tolist())]
    return analyse(records.labels, softmax(evaluated.scores), ids, evaluated.names)


def write_run(evaluated: Evaluated, analysis: Analysis, folder: Path | None) -> Path:
    """Write an analysis with the pictures of its mistakes, into eval-SPLIT of the run folder where `folder` is None."""
    trained = evaluated.trained
    folder = folder or trained.result(RunFolder(trained.folder).evaluation(evaluated.split))
    shown = [mistake.index for mistake in analysis.mistakes[:PICTURES]]
    engine = choose_engine(DataConfig(), torch.device("cpu"), Ranks())
    pictures = thumbnails(evaluated.records, shown, SIDE, engine)
    write_analysis(folder, analysis, {"split": evaluated.split, **asdict(evaluated.metrics)}, pictures)
    with atomic_write(folder / "source.json") as file:
        file.write(to_json(evaluated.source, indent=2).encode() + b"\n")
    return folder


def analyse(labels: Ints, probabilities: Singles, ids: Sequence[str] | Strings, names: list[str]) -> Analysis:
    """Compare true classes with probabilities.

    Args:
        labels: [n] int64, each in 0..C-1; n is at least 1.
        probabilities: [n, C] float; the class predicted is the likeliest, of equally likely ones the first.
        ids: [n], what each picture is called.
        names: [C], to show for the classes.
    """
    classes = len(names)
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1).astype(np.float64)
    confusion: Ints = np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)
    counts = ClassCounts.of_confusion(torch.from_numpy(confusion))
    wrong = np.flatnonzero(predicted != labels)
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")]
    mistakes = [
        Mistake(i, str(ids[i]), int(labels[i]), int(predicted[i]), float(confidence[i])) for i in wrong.tolist()
    ]
    return Analysis(
        names=names,
        confusion=confusion,
        precision=counts.precision.numpy(),
        recall=counts.recall.numpy(),
        f1=counts.f1.numpy(),
        support=confusion.sum(axis=1),
        confused=_confused(confusion),
        mistakes=mistakes,
        ece=calibration_error(confidence, predicted == labels),
    )


def calibration_error(confidence: Floats, correct: Bools) -> float:
    """Expected calibration error: mean over the pictures of |accuracy - mean confidence| of the bin each is in.

    The bins of confidence are equally wide, (0, 1/15] to (14/15, 1]: Guo et al., On Calibration of Modern Neural
    Networks, 2017, equation 3.

    Args:
        confidence: [n] float64, probability of the predicted class.
        correct: [n] bool, whether that is the true one.
    """
    bins = np.digitize(confidence, np.linspace(0, 1, BINS + 1)[1:-1], right=True)
    gaps = np.bincount(bins, correct - confidence, BINS)  # of a bin: its size × (accuracy - mean confidence)
    return float(np.abs(gaps).sum() / len(confidence))


def write_analysis(folder: Path, analysis: Analysis, metrics: dict[str, Any], pictures: Sequence[Bytes]) -> None:
    """Write all of it into a folder, replacing an earlier one's files.

    confusion.csv and confusion.png, classes.csv, confused.csv, figures.json, and mistakes.jpg if there are any.

    Args:
        folder: made if it is not there.
        analysis: what to write.
        metrics: plain values for figures.json (split, n, loss, ...), to which ece is added.
        pictures: uint8 RGB [h, w, 3] of the first PICTURES of `analysis.mistakes` (of all, where there are fewer), in
            that order, for the contact sheet.
    """
    names = analysis.names
    _write_csv(
        folder / "confusion.csv",
        ["true \\ predicted", *names],
        ([name, *row] for name, row in zip(names, analysis.confusion.tolist(), strict=True)),
    )
    columns = (analysis.precision, analysis.recall, analysis.f1, analysis.support)
    _write_csv(
        folder / "classes.csv",
        ["name", "precision", "recall", "f1", "support"],
        zip(names, *(column.tolist() for column in columns), strict=True),
    )
    _write_csv(
        folder / "confused.csv",
        ["true", "predicted", "count", "share"],
        ([names[pair.true], names[pair.predicted], pair.count, pair.share] for pair in analysis.confused),
    )
    with atomic_write(folder / "figures.json") as file:
        file.write(to_json(metrics | {"ece": analysis.ece}, indent=2).encode() + b"\n")
    plot_confusion(folder / "confusion.png", analysis.confusion, names)
    sheet = folder / "mistakes.jpg"
    captions = [_caption(mistake, names) for mistake in analysis.mistakes[:PICTURES]]
    if captions:
        contact_sheet(sheet, pictures, captions)
    else:
        sheet.unlink(missing_ok=True)


def _caption(mistake: Mistake, names: Sequence[str]) -> str:
    """Three lines below a picture."""
    true, predicted = names[mistake.true], names[mistake.predicted]
    return f"true: {true}\npredicted: {predicted}\n{mistake.confidence:.1%}  {mistake.id}"


def summary(analysis: Analysis) -> list[Table]:
    """For a terminal: the most confused pairs, if there are any, and the classes with the lowest F1."""
    names = analysis.names
    pairs = _new_table("Most confused", "true", "predicted", "count", "share")
    for pair in analysis.confused[:SHOWN_PAIRS]:
        pairs.add_row(Text(names[pair.true]), Text(names[pair.predicted]), f"{pair.count:,}", f"{pair.share:.1%}")
    worst = _new_table("Lowest F1", "class", "F1", "precision", "recall", "support")
    occurring = np.flatnonzero(analysis.confusion.sum(axis=0) + analysis.support)  # those that macro F1 counts
    for k in occurring[np.argsort(analysis.f1[occurring], kind="stable")][:SHOWN_CLASSES]:
        shares = (f"{column[k]:.3f}" for column in (analysis.f1, analysis.precision, analysis.recall))
        worst.add_row(Text(names[k]), *shares, f"{analysis.support[k]:,}")
    return [pairs, worst] if analysis.confused else [worst]


def _confused(confusion: Ints) -> list[Confused]:
    """Pairs with at least one picture: by count, then share, then class numbers."""
    support = confusion.sum(axis=1)
    pairs = [
        Confused(true, predicted, int(confusion[true, predicted]), float(confusion[true, predicted] / support[true]))
        for true, predicted in np.argwhere(confusion).tolist()
        if true != predicted
    ]
    return sorted(pairs, key=lambda pair: (-pair.count, -pair.share, pair.true, pair.predicted))


def _new_table(title: str, *columns: str) -> Table:
    """An empty table with names on the left and numbers on the right."""
    grid = Table(*columns, title=title)
    for column in grid.columns:
        if column.header not in ("class", "true", "predicted"):
            column.justify = "right"
    return grid


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    text = StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())
