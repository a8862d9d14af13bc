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
from fastflower.evaluation.plots import MOST_NAMES, contact_sheet, plot_confusion
from fastflower.files import atomic_write, remove_temporaries, to_json
from fastflower.runtime.distributed import Ranks
from fastflower.tables import new_table, written
from fastflower.training.metrics import ClassCounts

FILES = ("confusion.csv", "classes.csv", "confused.csv", "figures.json", "confusion.png", "mistakes.jpg")
BINS = 15  # of confidence, as in Guo et al. 2017
PICTURES = 24  # on the contact sheet
SIDE = 224  # pixels, longer side of each
SHOWN_PAIRS, SHOWN_CLASSES = 10, 5  # in the terminal
MOST_IN_MATRIX = 1000  # classes of confusion.csv: of 10,000 it would be 200 MB of zeros


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
    confusion: Ints  # [k, 3]: true class, predicted class and count of each pair that occurs, in this order
    precision: Floats  # [C]
    recall: Floats  # [C]
    f1: Floats  # [C]
    support: Ints  # [C], pictures of the class
    predictions: Ints  # [C], pictures that are taken for it
    confused: list[Confused]  # the most frequent first
    mistakes: list[Mistake]  # the most confident first
    ece: float  # expected calibration error

    def matrix(self, chosen: Ints) -> Ints:
        """Counts of the chosen classes ([m], rising) alone: [m, m], a row for each true one, a column for each
        predicted one.
        """
        true, predicted, count = self.confusion[np.isin(self.confusion[:, :2], chosen).all(axis=1)].T
        matrix = np.zeros((len(chosen), len(chosen)), np.int64)
        matrix[np.searchsorted(chosen, true), np.searchsorted(chosen, predicted)] = count
        return matrix

    def most_confused(self, most: int) -> Ints:
        """So many classes, rising: those of the most frequent confusions. All, where there are no more."""
        if len(self.names) <= most:
            return np.arange(len(self.names))
        classes = dict.fromkeys(label for pair in self.confused for label in (pair.true, pair.predicted))
        return np.sort(np.array(list(classes)[:most], np.int64))


def analyse_run(evaluated: Evaluated) -> Analysis:
    """Where a run's network errs."""
    records = evaluated.records
    ids = [name or records.describe(index) for index, name in enumerate(records.ids.tolist())]
    return analyse(records.labels, evaluated.predicted, evaluated.confidence, ids, evaluated.names)


def figures_of(evaluated: Evaluated, analysis: Analysis) -> dict[str, Any]:
    """What figures.json holds: the figures, and how they were made."""
    made_from = {key: value for key, value in evaluated.source.items() if key != "views"}
    figures = {"split": evaluated.split, **asdict(evaluated.metrics), "ece": analysis.ece}
    return {**figures, **evaluated.source["views"], **made_from}


def write_run(evaluated: Evaluated, analysis: Analysis) -> None:
    """Write an analysis with the pictures of its mistakes into `evaluated.folder`."""
    shown = [mistake.index for mistake in analysis.mistakes[:PICTURES]]
    engine = choose_engine(DataConfig(), torch.device("cpu"), Ranks())
    pictures = thumbnails(evaluated.records, shown, SIDE, engine)
    write_analysis(evaluated.folder, analysis, figures_of(evaluated, analysis), pictures)


def analyse(
    labels: Ints, predicted: Ints, confidence: Singles | Floats, ids: Sequence[str] | Strings, names: list[str]
) -> Analysis:
    """Compare true classes with predicted ones. Memory grows with records and classes, and not with their square.

    Args:
        labels: [n], each in 0..C-1; n is at least 1.
        predicted: [n], each in 0..C-1.
        confidence: [n], probability of the predicted class.
        ids: [n], what each picture is called.
        names: [C], to show for the classes.
    """
    classes, confidence = len(names), confidence.astype(np.float64)
    cells, count = np.unique(labels * classes + predicted, return_counts=True)
    confusion: Ints = np.stack([cells // classes, cells % classes, count], axis=1)
    support, predictions = np.bincount(labels, minlength=classes), np.bincount(predicted, minlength=classes)
    hits = np.bincount(labels[labels == predicted], minlength=classes)
    counts = ClassCounts(*(torch.from_numpy(column).double() for column in (support, predictions, hits)))
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
        support=support,
        predictions=predictions,
        confused=_confused(confusion, support),
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


def write_analysis(folder: Path, analysis: Analysis, figures: dict[str, Any], pictures: Sequence[Bytes]) -> None:
    """Write all of it into a folder, replacing an earlier one's files.

    classes.csv, confused.csv, figures.json, mistakes.jpg if there are any; confusion.csv of at most MOST_IN_MATRIX
    classes, and confusion.png, of many classes the most confused ones, if there are any.

    Args:
        folder: made if it is not there.
        analysis: what to write.
        figures: plain values for figures.json.
        pictures: uint8 RGB [h, w, 3] of the first PICTURES of `analysis.mistakes` (of all, where there are fewer), in
            that order, for the contact sheet.
    """
    names = analysis.names
    for name in FILES:
        remove_temporaries(folder / name)  # which a kill has left
    matrix = folder / "confusion.csv"
    if len(names) <= MOST_IN_MATRIX:
        counts = analysis.matrix(np.arange(len(names))).tolist()
        rows = ([name, *row] for name, row in zip(names, counts, strict=True))
        _write_csv(matrix, ["true \\ predicted", *names], rows)
    else:
        matrix.unlink(missing_ok=True)
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
        file.write(to_json(figures, indent=2).encode() + b"\n")
    _draw_confusion(folder / "confusion.png", analysis)
    sheet = folder / "mistakes.jpg"
    captions = [_caption(mistake, names) for mistake in analysis.mistakes[:PICTURES]]
    if captions:
        contact_sheet(sheet, pictures, captions)
    else:
        sheet.unlink(missing_ok=True)


def _draw_confusion(path: Path, analysis: Analysis) -> None:
    """The matrix; of more classes than an axis can name the most confused ones, without any of which nothing."""
    chosen = analysis.most_confused(MOST_NAMES)
    n, hits = int(analysis.support.sum()), int(analysis.support.sum()) - len(analysis.mistakes)
    title = f"{n:,} pictures, top-1 {written('accuracy', hits / max(n, 1))}"
    if len(chosen) < len(analysis.names):
        title += f"; the {len(chosen)} most confused of {len(analysis.names):,} classes"
    if len(chosen):
        names = [analysis.names[label] for label in chosen.tolist()]
        plot_confusion(path, analysis.matrix(chosen), analysis.support[chosen], names, title)
    else:
        path.unlink(missing_ok=True)


def _caption(mistake: Mistake, names: Sequence[str]) -> str:
    """Three lines below a picture."""
    true, predicted = names[mistake.true], names[mistake.predicted]
    return f"true: {true}\npredicted: {predicted}\n{mistake.confidence:.1%}  {mistake.id}"


def summary(analysis: Analysis) -> list[Table]:
    """For a terminal: the most confused pairs, if there are any, and the classes with the lowest F1."""
    names = analysis.names
    pairs = new_table("true", "predicted", "count", "share", names=2, title="Most confused")
    for pair in analysis.confused[:SHOWN_PAIRS]:
        pairs.add_row(Text(names[pair.true]), Text(names[pair.predicted]), f"{pair.count:,}", f"{pair.share:.1%}")
    worst = new_table("class", "F1", "precision", "recall", "support", title="Lowest F1")
    occurring = np.flatnonzero(analysis.predictions + analysis.support)  # those that macro F1 counts
    for k in occurring[np.argsort(analysis.f1[occurring], kind="stable")][:SHOWN_CLASSES]:
        shares = (f"{column[k]:.3f}" for column in (analysis.f1, analysis.precision, analysis.recall))
        worst.add_row(Text(names[k]), *shares, f"{analysis.support[k]:,}")
    return [pairs, worst] if analysis.confused else [worst]


def _confused(confusion: Ints, support: Ints) -> list[Confused]:
    """Pairs with at least one picture: by count, then share, then class numbers."""
    pairs = [
        Confused(true, predicted, count, count / int(support[true]))
        for true, predicted, count in confusion.tolist()
        if true != predicted
    ]
    return sorted(pairs, key=lambda pair: (-pair.count, -pair.share, pair.true, pair.predicted))


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    text = StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())
