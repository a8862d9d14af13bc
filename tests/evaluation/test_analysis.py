"""Where a network errs: against scikit-learn and definitions, and what is written of it."""

from __future__ import annotations

import csv
import json
import tracemalloc
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from fastflower.evaluation.analysis import (
    MOST_IN_MATRIX,
    PICTURES,
    Analysis,
    calibration_error,
    summary,
    write_analysis,
)
from fastflower.evaluation.analysis import analyse as analyse_predicted

ODD_NAMES = ['rose, "red"', "Gänseblümchen", "[bold]x[/bold]", "lily\nof the valley", "=1+1", "$a$", "never seen"]


def random_case(seed: int, n: int, classes: int, used: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels and float32 probabilities; only the first `used` classes occur, as true ones or as predicted ones."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, used, n)
    logits = rng.normal(size=(n, classes)).astype(np.float32) * 2
    logits[np.arange(n), labels] += 2
    logits[:, used:] = -20
    return labels, torch.from_numpy(logits).softmax(1).numpy()


def analyse(labels: np.ndarray, probabilities: np.ndarray, ids: list[str] | np.ndarray, names: list[str]) -> Analysis:
    """Of probabilities [n, C]."""
    return analyse_predicted(labels, probabilities.argmax(axis=1), probabilities.max(axis=1), ids, names)


def names_of(classes: int) -> list[str]:
    return [f"class {k}" for k in range(classes)]


def hard(true: list[int], predicted: list[int], classes: int, confidence: float = 0.9) -> Analysis:
    """Each picture with this confidence in its predicted class."""
    probabilities = np.full((len(true), classes), (1 - confidence) / (classes - 1))
    probabilities[np.arange(len(true)), predicted] = confidence
    return analyse(np.array(true), probabilities, [f"id{i}" for i in range(len(true))], ODD_NAMES[:classes])


@pytest.mark.parametrize(("classes", "used"), [(2, 2), (7, 5), (104, 90)])
def test_figures_of_classes_are_scikit_learns(classes: int, used: int) -> None:
    labels, probabilities = random_case(classes, 400, classes, used)
    predicted = probabilities.argmax(axis=1)
    analysis = analyse(labels, probabilities, np.arange(400).astype(str), names_of(classes))
    numbers = range(classes)
    matrix = analysis.matrix(np.arange(classes))
    np.testing.assert_array_equal(matrix, confusion_matrix(labels, predicted, labels=numbers))
    assert matrix.dtype == analysis.confusion.dtype == np.int64
    np.testing.assert_array_equal(analysis.predictions, matrix.sum(axis=0))
    chosen = np.sort(np.random.default_rng(used).choice(classes, classes // 2 + 1, replace=False))
    np.testing.assert_array_equal(analysis.matrix(chosen), matrix[np.ix_(chosen, chosen)])
    expected = precision_recall_fscore_support(labels, predicted, labels=numbers, zero_division=0)
    actual = (analysis.precision, analysis.recall, analysis.f1, analysis.support)
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_rows_are_true_classes() -> None:
    analysis = hard([0, 0, 0, 1], [1, 1, 0, 1], 2)
    assert analysis.matrix(np.arange(2)).tolist() == [[1, 2], [0, 1]]
    assert (analysis.recall[0], analysis.precision[1]) == pytest.approx((1 / 3, 1 / 3))


def binned_gaps(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Expected calibration error of 15 bins, bin by bin as it is defined."""
    total = 0.0
    for k in range(15):
        inside = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return total


@pytest.mark.parametrize("seed", range(3))
def test_calibration_error_is_that_of_its_bins(seed: int) -> None:
    labels, probabilities = random_case(seed, 700, 9, 9)
    confidence, correct = probabilities.max(axis=1).astype(np.float64), probabilities.argmax(axis=1) == labels
    analysis = analyse(labels, probabilities, np.arange(700).astype(str), names_of(9))
    assert analysis.ece == pytest.approx(binned_gaps(confidence, correct), abs=1e-12)
    assert analysis.ece > 0.01


@pytest.mark.parametrize(
    ("confidence", "correct", "expected"),
    [
        ([1.0, 1.0], [True, True], 0),
        ([1.0, 1.0], [True, False], 0.5),
        ([0.75] * 4, [True, True, True, False], 0),
        # in one bin too low and too high make up for each other, in two they do not
        ([0.55, 0.58], [True, False], abs(1 - 0.55 - 0.58) / 2),
        ([0.1, 0.9], [True, False], 0.9),
        # 3/15 belongs to the bin below it, with 0.15, and not to the one above, with 0.25
        ([0.15, 3 / 15, 0.25], [True, False, False], (0.85 - 0.2 + 0.25) / 3),
    ],
)
def test_calibration_error_by_hand(confidence: list[float], correct: list[bool], expected: float) -> None:
    assert calibration_error(np.array(confidence), np.array(correct)) == pytest.approx(expected, abs=1e-12)


def test_the_most_confused_pairs_come_first() -> None:
    # 0: 4 pictures, 2 as 1; 1: 8 pictures, 2 as 0; 2: 4 pictures, 2 as 0, 1 as 3; 3: 3 pictures, 3 as 0
    true = [0] * 4 + [1] * 8 + [2] * 4 + [3] * 3
    predicted = [*[1, 1, 0, 0], *[0, 0, 1, 1, 1, 1, 1, 1], *[0, 0, 3, 2], *[0, 0, 0]]
    pairs = [(pair.true, pair.predicted, pair.count, pair.share) for pair in hard(true, predicted, 4).confused]
    assert pairs == [(3, 0, 3, 1.0), (0, 1, 2, 0.5), (2, 0, 2, 0.5), (1, 0, 2, 0.25), (2, 3, 1, 0.25)]


def test_the_most_confident_mistakes_come_first_and_equal_ones_in_order() -> None:
    probabilities = np.array([[0.6, 0.4], [0.1, 0.9], [0.2, 0.8], [0.8, 0.2], [0.3, 0.7], [0.5, 0.5]])
    mistakes = analyse(np.array([1, 1, 0, 1, 0, 1]), probabilities, list("abcdef"), ["x", "y"]).mistakes
    assert [mistake.index for mistake in mistakes] == [2, 3, 4, 0, 5]
    assert [mistake.id for mistake in mistakes] == ["c", "d", "e", "a", "f"]
    assert [(mistake.true, mistake.predicted) for mistake in mistakes] == [(0, 1), (1, 0), (0, 1), (1, 0), (1, 0)]
    assert [mistake.confidence for mistake in mistakes] == [0.8, 0.8, 0.7, 0.6, 0.5]
    sure = np.tile([0.6, 0.9, 0.7], 200)
    many = analyse(
        np.ones(600, np.int64), np.stack([sure, 1 - sure], axis=1), np.arange(600).astype(str), ["x", "y"]
    ).mistakes
    assert [mistake.index for mistake in many] == sorted(range(600), key=lambda i: -sure[i])


def read(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_what_is_written_reads_back_whatever_the_names(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "analysis"
    analysis = hard([0, 0, 1, 2, 3, 4, 5, 5], [1, 1, 1, 3, 2, 4, 0, 5], 7)
    pictures = [np.full((20 + 9 * i, 60, 3), 40 * i, np.uint8) for i in range(len(analysis.mistakes))]
    metrics = {"split": "val", "n": 8, "loss": 0.5, "accuracy": 3 / 8, "top5": 1.0, "macro_f1": 0.25}
    write_analysis(folder, analysis, metrics, pictures)
    header, *rows = read(folder / "confusion.csv")
    assert header[1:] == ODD_NAMES
    assert [row[0] for row in rows] == ODD_NAMES
    np.testing.assert_array_equal(np.array([row[1:] for row in rows], int), analysis.matrix(np.arange(7)))
    header, *rows = read(folder / "classes.csv")
    assert header == ["name", "precision", "recall", "f1", "support"]
    assert [row[0] for row in rows] == ODD_NAMES
    expected = np.stack([analysis.precision, analysis.recall, analysis.f1, analysis.support], axis=1)
    np.testing.assert_array_equal(np.array([row[1:] for row in rows], float), expected)
    header, first, *rest = read(folder / "confused.csv")
    assert header == ["true", "predicted", "count", "share"]
    assert first == [ODD_NAMES[0], ODD_NAMES[1], "2", "1.0"]
    assert len(rest) == 3
    assert json.loads((folder / "figures.json").read_text()) == metrics
    for name in ("confusion.png", "mistakes.jpg"):
        with Image.open(folder / name) as image:
            image.load()
            assert image.format == {"confusion.png": "PNG", "mistakes.jpg": "JPEG"}[name]
    assert len(list(folder.iterdir())) == 6


def test_a_network_without_mistakes_leaves_no_sheet_of_an_earlier_one(tmp_path: Path) -> None:
    (tmp_path / "mistakes.jpg").write_bytes(b"of an earlier network")
    analysis = hard([0, 1, 1], [0, 1, 1], 3)
    write_analysis(tmp_path, analysis, {"split": "val"}, [])
    assert not (tmp_path / "mistakes.jpg").exists()
    assert read(tmp_path / "confused.csv") == [["true", "predicted", "count", "share"]]
    assert len(summary(analysis)) == 1


def test_the_summary_shows_the_worst_and_takes_names_literally() -> None:
    # F1: 0 and 4 in between; 1 right; 2 and 3 taken for each other; 5 never right nor true; 6 does not occur at all
    analysis = hard([0, 0, 1, 2, 3, 4, 4], [0, 4, 1, 3, 2, 4, 5], 7)
    pairs, worst = summary(analysis)
    for table in (pairs, worst):
        out = StringIO()
        Console(file=out, width=100).print(table)
        assert "[bold]x[/bold]" in out.getvalue()
    assert [str(cell) for cell in worst.columns[0].cells] == [ODD_NAMES[k] for k in (2, 3, 5, 4, 0)]
    assert pairs.row_count == 4
    many = hard([k for k in range(7) for _ in range(6)], [p for k in range(7) for p in range(7) if p != k], 7)
    assert summary(many)[0].row_count == 10


def test_the_sheet_holds_the_first_mistakes_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sheets: list[list[str]] = []
    monkeypatch.setattr(
        "fastflower.evaluation.analysis.contact_sheet", lambda path, pictures, captions: sheets.append(captions)
    )
    probabilities = np.linspace(0.6, 0.9, 40)
    analysis = analyse(
        np.ones(40, int), np.stack([probabilities, 1 - probabilities], 1), np.arange(40).astype(str), ["x", "y"]
    )
    write_analysis(tmp_path, analysis, {}, [np.zeros((2, 2, 3), np.uint8)] * PICTURES)
    assert len(sheets[0]) == PICTURES
    assert sheets[0][0] == "true: y\npredicted: x\n90.0%  39"
    assert [caption.split()[-1] for caption in sheets[0]] == [str(k) for k in range(39, 15, -1)]


def test_many_classes_leave_no_matrix_and_a_picture_of_the_most_confused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[list[str], np.ndarray, str]] = []
    monkeypatch.setattr(
        "fastflower.evaluation.analysis.plot_confusion",
        lambda path, matrix, support, names, title: drawn.append((names, matrix, title)),
    )
    classes = MOST_IN_MATRIX + 1
    labels = np.repeat(np.arange(classes), 3)
    predicted = labels.copy()
    predicted[:2], predicted[30] = 900, 7  # 0 as 900 twice, 10 as 7 once
    names, sure = names_of(classes), np.full(len(labels), 0.5)
    (tmp_path / "confusion.csv").write_text("of an earlier network")
    analysis = analyse_predicted(labels, predicted, sure, labels.astype(str), names)
    write_analysis(tmp_path, analysis, {}, [np.zeros((2, 2, 3), np.uint8)] * 3)
    assert not (tmp_path / "confusion.csv").exists()
    assert read(tmp_path / "confused.csv")[1:] == [
        ["class 0", "class 900", "2", str(2 / 3)],
        ["class 10", "class 7", "1", str(1 / 3)],
    ]
    assert len(read(tmp_path / "classes.csv")) == classes + 1
    ((shown, matrix, title),) = drawn
    assert shown == ["class 0", "class 7", "class 10", "class 900"]
    assert matrix.tolist() == [[1, 0, 0, 2], [0, 3, 0, 0], [0, 1, 2, 0], [0, 0, 0, 3]]
    accuracy = 1 - 3 / len(labels)
    assert title == f"{3 * classes:,} pictures, top-1 {accuracy:.1%}; the 4 most confused of {classes:,} classes"
    perfect = analyse_predicted(labels, labels, sure, labels.astype(str), names)
    (tmp_path / "confusion.png").write_text("of an earlier network")
    write_analysis(tmp_path, perfect, {}, [])
    assert len(drawn) == 1
    assert not (tmp_path / "confusion.png").exists()


def test_memory_does_not_grow_with_the_square_of_the_classes() -> None:
    classes = 20_000  # a matrix of them would be 3.2 GB
    rng = np.random.default_rng(1)
    labels, predicted = rng.integers(0, classes, (2, 500))
    tracemalloc.start()
    analysis = analyse_predicted(labels, predicted, rng.random(500), labels.astype(str), names_of(classes))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert analysis.confusion[:, 2].sum() == 500
    assert peak < 50e6
