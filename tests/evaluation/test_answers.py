"""Predictions for people and programs: what is written is what a reader of the form gives back."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastflower.data.records import NO_LABEL
from fastflower.errors import UserError
from fastflower.evaluation.answers import answers, answers_table, answers_writer, printable, require_form
from fastflower.evaluation.predictions import Predictions, column_of, read_predictions
from fastflower.runtime.output import Console

HOSTILE = [
    *("a.jpg", "-rf.jpg", "a,b.jpg", 'say "x".jpg', "two\nlines.jpg", "\r.jpg", " a.jpg", "ü 🌷.jpg", "caf\udce9.jpg"),
    *("=1+1.jpg", "'", '"', ",", "\\", "\x1b[31mred.jpg", "id", "file", "name", "label", "p0", "p:id", "p:", "p12"),
]


@st.composite
def predictions(draw: st.DrawFn) -> Predictions:
    """With equal probabilities among them."""
    ids = draw(st.lists(st.sampled_from(HOSTILE), min_size=1, max_size=6, unique=True))
    classes = draw(st.lists(st.sampled_from(HOSTILE), min_size=1, max_size=6, unique=True))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    probabilities = (rng.integers(1, 4, (len(ids), len(classes))) / 7).astype(np.float32)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    return Predictions("", classes, np.array(ids), probabilities, np.full(len(ids), NO_LABEL), {"run": "a"})


def text(name: str) -> str:
    return name.replace("\udce9", "\\udce9")


def write(path: Path, made: Predictions, top: int) -> Path:
    with answers_writer(path, made, made.classes, "file", top) as write_part:
        half = len(made) // 2
        for rows in (slice(half), slice(half, None)):
            write_part(
                Predictions("", made.classes, made.ids[rows], made.probabilities[rows], made.labels[rows], made.source)
            )
    return path


def ranked(made: Predictions, row: int, top: int) -> list[tuple[str, float]]:
    """By sorting what is said of one picture, with Python's own sort."""
    pairs = zip(made.classes, made.probabilities[row].tolist(), strict=True)
    return [(text(name), p) for name, p in sorted(pairs, key=lambda pair: -pair[1])][:top]


@settings(max_examples=30)
@given(made=predictions(), top=st.integers(1, 7))
def test_every_form_gives_back_ids_classes_and_probabilities(
    tmp_path_factory: pytest.TempPathFactory, made: Predictions, top: int
) -> None:
    folder = tmp_path_factory.mktemp("forms")
    wanted = [(text(picture), ranked(made, row, top)) for row, picture in enumerate(made.ids.tolist())]
    with write(folder / "p.csv", made, top).open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    count = min(top, len(made.classes))
    assert header[:3] == ["file", "name", "probability"]
    assert header[3:] == [f"{what}_{k}" for k in range(2, count + 1) for what in ("name", "probability")]
    singles = [[row[0], *zip(row[1::2], map(np.float32, row[2::2]), strict=True)] for row in rows]
    assert singles == [[picture, *best] for picture, best in wanted]
    listed = json.loads(write(folder / "p.json", made, top).read_text(encoding="ascii"))
    assert [row["file"] for row in listed] == [picture for picture, _ in wanted]
    for row, (_, best) in zip(listed, wanted, strict=True):
        assert [(guess["name"], float(np.float32(guess["probability"]))) for guess in row["best"]] == best
        assert {"name": row["name"], "probability": row["probability"]} == row["best"][0]
    frame = pd.read_parquet(write(folder / "p.PARQUET", made, top))
    assert frame["id"].tolist() == [picture for picture, _ in wanted]
    assert frame["label_name"].tolist() == [best[0][0] for _, best in wanted]
    for name, column in zip(made.classes, made.probabilities.T, strict=True):
        np.testing.assert_array_equal(frame[column_of(name)], column)
    assert len(set(frame.columns)) == 5 + len(made.classes)
    read = read_predictions(folder / "p.PARQUET")
    assert read.classes == made.classes
    order = np.argsort([picture for picture, _ in wanted], kind="stable")
    np.testing.assert_array_equal(read.probabilities, made.probabilities[order])
    frame.attrs = {}  # without our metadata columns say what classes are called
    frame.drop(columns=["class", "label", "class_name", "label_name"]).to_parquet(folder / "q.parquet", index=False)
    assert read_predictions(folder / "q.parquet").classes == [text(name) for name in made.classes]


@given(made=predictions(), top=st.integers(1, 7))
def test_a_table_has_a_line_for_each_picture(made: Predictions, top: int) -> None:
    rows = answers(made, made.classes, top)
    console = Console(width=10_000, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(answers_table(rows, "file"))
    lines = console.export_text().splitlines()[2:]
    assert len(lines) == len(made)
    for line, row in zip(lines, rows, strict=True):
        assert line.startswith(printable(row.id))
        best = (rf"{re.escape(printable(guess.name))} +{guess.probability:.1%}" for guess in row.best)
        assert re.search(" +".join(best), line)
        assert line.isprintable()


@pytest.mark.parametrize("form", [".csv", ".json", ".parquet"])
def test_no_pictures_are_an_empty_file_and_what_fails_leaves_none(tmp_path: Path, form: str) -> None:
    none: Any = np.zeros(0, np.str_), np.zeros((0, 2), np.float32), np.zeros(0, np.int64)
    path = tmp_path / f"p{form}"
    nothing = Predictions("", ["a", "b"], *none)
    with answers_writer(path, nothing, nothing.classes, "file", 3):
        pass
    read = {".csv": pd.read_csv, ".json": pd.read_json, ".parquet": pd.read_parquet}[form]
    assert len(read(path)) == 0
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt), answers_writer(path, nothing, nothing.classes, "file", 3) as write_part:
        write_part(nothing)
        raise KeyboardInterrupt
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["x.txt", "x", "x.csv.gz", "x.xlsx", ".csv", "parquet"])
def test_other_extensions_are_refused_with_those_that_there_are(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"is none of .csv, .json, .parquet, which predictions are written as"):
        require_form(tmp_path / name)
    for form in (".csv", ".JSON", ".Parquet"):
        require_form(tmp_path / f"x{form}")
