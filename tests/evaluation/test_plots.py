"""Pictures for reports: that they show what they are given, legibly, and the same each time."""

from __future__ import annotations

import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from fastflower.data.names import kaggle_names
from fastflower.evaluation import plots
from fastflower.evaluation.plots import contact_sheet, plot_confusion


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved, with a warning for anything that Matplotlib finds wrong."""
    figures: list[Figure] = []
    save = plots.save_figure

    def note(path: Path, figure: Figure, format: Literal["png", "jpeg", "svg"]) -> None:
        figures.append(figure)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            save(path, figure, format)

    monkeypatch.setattr(plots, "save_figure", note)
    return figures


def matrix_of(classes: int) -> np.ndarray:
    rng = np.random.default_rng(classes)
    matrix = np.diag(rng.integers(10, 40, classes))
    matrix[rng.integers(0, classes, 2 * classes), rng.integers(0, classes, 2 * classes)] += 2
    matrix[1] = 0  # a class without records
    return matrix


def plot(path: Path, matrix: np.ndarray, names: list[str]) -> None:
    """A matrix of all classes."""
    plot_confusion(path, matrix, matrix.sum(axis=1), names, "title")


def overlapping(texts: list[Text], figure: Figure) -> int:
    """How many neighbors among these texts lie over each other, or outside the figure."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in texts if text.get_text()]
    outside: int = sum(box.x0 < 0 or box.y0 < 0 or box.x1 > figure.bbox.x1 or box.y1 > figure.bbox.y1 for box in boxes)
    overlapping: int = sum(a.overlaps(b) for a, b in pairwise(boxes))
    return outside + overlapping


@pytest.mark.parametrize("classes", [3, 20, 104])
def test_a_confusion_matrix_is_legible_from_3_to_104_classes(classes: int, tmp_path: Path, drawn: list[Figure]) -> None:
    names, matrix = kaggle_names()[:classes], matrix_of(classes)
    plot(tmp_path / "confusion.png", matrix, names)
    axes = drawn[0].axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == names
    assert [text.get_text() for text in axes.get_yticklabels()] == names
    assert overlapping(axes.get_xticklabels(), drawn[0]) == 0
    assert overlapping(axes.get_yticklabels(), drawn[0]) == 0
    assert overlapping(drawn[0].axes[1].get_yticklabels(), drawn[0]) == 0  # the color bar's
    shown = axes.images[0].get_array()
    assert shown is not None
    np.testing.assert_allclose(shown.sum(axis=1), np.arange(classes) != 1)
    assert shown[2, 2] == matrix[2, 2] / matrix[2].sum()
    assert axes.get_title() == "title"
    with Image.open(tmp_path / "confusion.png") as image:
        assert max(image.size) < 4000
        cell = axes.get_window_extent().width / classes * plots.DPI / drawn[0].dpi
        assert cell >= 24  # pixels
        # the picture is one of grays
        red, green, blue = (np.asarray(image.convert("RGB"), int)[..., k] for k in range(3))
        assert max(np.abs(red - green).max(), np.abs(red - blue).max()) <= 1


def test_as_many_names_as_there_may_be_have_room(tmp_path: Path, drawn: list[Figure]) -> None:
    names = [f"class number {k}" for k in range(plots.MOST_NAMES)]
    plot(tmp_path / "confusion.png", np.eye(len(names), dtype=np.int64), names)
    labels = drawn[0].axes[0].get_yticklabels()
    assert [text.get_text() for text in labels] == names
    assert overlapping(labels, drawn[0]) == 0


def test_shares_are_of_all_pictures_of_a_class(tmp_path: Path, drawn: list[Figure]) -> None:
    matrix, support = np.array([[3, 1], [0, 2]]), np.array([8, 4])  # the others are taken for classes not shown
    plot_confusion(tmp_path / "confusion.png", matrix, support, ["a", "b"], "title")
    shown = drawn[0].axes[0].images[0].get_array()
    assert shown is not None
    np.testing.assert_allclose(shown, [[3 / 8, 1 / 8], [0, 1 / 2]])


def test_names_are_shown_as_they_are(tmp_path: Path, drawn: list[Figure]) -> None:
    # a dollar would begin a formula, which this is none; the last is in no font that is sure to be there
    names = ["$\\frac{$", "Gänseblümchen", "подснежник", "long " * 50, "バラ"]
    plot(tmp_path / "confusion.png", np.eye(5, dtype=np.int64), names)
    contact_sheet(tmp_path / "sheet.jpg", [np.zeros((9, 30, 3), np.uint8)] * 5, names)
    shown = [text.get_text() for text in drawn[0].axes[0].get_yticklabels()]
    assert shown[:3] == names[:3]
    assert len(shown[3]) == plots.LONGEST_NAME
    assert shown[3].endswith("…")
    assert [axes.texts[0].get_text() for axes in drawn[1].axes[:3]] == names[:3]


def test_nothing_to_show_is_shown(tmp_path: Path, drawn: list[Figure]) -> None:
    plot(tmp_path / "confusion.png", np.zeros((3, 3), np.int64), ["a", "b", "c"])
    assert drawn[0].axes[0].get_title() == "title"


def test_the_same_numbers_are_the_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        plot(tmp_path / f"{name}.png", matrix_of(5), ["v", "w", "x", "y", "z"])
        contact_sheet(tmp_path / f"{name}.jpg", [np.full((30, 20, 3), 99, np.uint8)] * 2, ["one", "two"])
    for kind in ("png", "jpg"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


@pytest.mark.parametrize("count", [1, 6, 7, 24])
def test_a_contact_sheet_has_each_picture_above_its_caption(count: int, tmp_path: Path, drawn: list[Figure]) -> None:
    shapes = [(160, 20 + 6 * i) if i % 2 else (20 + 6 * i, 160) for i in range(count)]
    pictures = [np.full((*shape, 3), (10 * i, 250 - 10 * i, 128), np.uint8) for i, shape in enumerate(shapes)]
    captions = [f"true: hard-leaved pocket orchid\npredicted: prince of wales feathers\n9{i}.0%" for i in range(count)]
    contact_sheet(tmp_path / "sheet.jpg", pictures, captions)
    filled = [axes for axes in drawn[0].axes if axes.images]
    assert len(filled) == count
    for axes, picture, caption in zip(filled, pictures, captions, strict=True):
        shown = axes.images[0].get_array()
        assert shown is not None
        np.testing.assert_array_equal(shown, picture)
        assert axes.texts[0].get_text() == caption
        width, height = axes.get_window_extent().size
        assert width / height == pytest.approx(picture.shape[1] / picture.shape[0], rel=0.01)
    for start in range(0, count, plots.ACROSS):
        assert overlapping([axes.texts[0] for axes in filled[start : start + plots.ACROSS]], drawn[0]) == 0
    with Image.open(tmp_path / "sheet.jpg") as image:
        scale = plots.DPI / drawn[0].dpi
        box = filled[-1].get_window_extent()
        x, y = (box.x0 + box.x1) / 2 * scale, image.height - (box.y0 + box.y1) / 2 * scale
        assert np.abs(np.array(image.getpixel((int(x), int(y)))) - pictures[-1][0, 0]).max() < 6


def test_drawing_leaves_no_global_state() -> None:
    script = "import sys, fastflower.evaluation.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], check=False).returncode == 0
