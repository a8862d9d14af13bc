"""The predictions file and the submission: what is written is what is read, and nothing else is taken."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastflower.data.records import NO_LABEL
from fastflower.errors import UserError
from fastflower.predictions import (
    Predictions,
    check_sample,
    read_predictions,
    sort_by_id,
    write_predictions,
    write_submission,
)


def predictions(ids: list[str], labels: list[int] | None = None, classes: int = 3, seed: int = 0) -> Predictions:
    rng = np.random.default_rng(seed)
    found = rng.dirichlet(np.ones(classes), len(ids)).astype(np.float32)
    known = np.full(len(ids), NO_LABEL) if labels is None else np.array(labels)
    return sort_by_id(
        Predictions("val", [f"kind {k}" for k in range(classes)], np.array(ids), found, known, {"run": "a"})
    )


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    made = predictions(["000123", "7", "ü,x", 'q"'], [2, 0, 1, 1])
    path = tmp_path / "new" / "p.parquet"
    write_predictions(path, made)
    found = read_predictions(path)
    assert found.ids.tolist() == sorted(["000123", "7", "ü,x", 'q"'])
    assert (found.split, found.classes, found.source) == ("val", made.classes, {"run": "a"})
    np.testing.assert_array_equal(found.probabilities, made.probabilities)
    np.testing.assert_array_equal(found.labels, made.labels)
    assert found.labelled


def test_pandas_reads_it_and_what_pandas_writes_is_read(tmp_path: Path) -> None:
    made = predictions(["b", "0001", "a"])
    write_predictions(tmp_path / "p.parquet", made)
    frame = pd.read_parquet(tmp_path / "p.parquet")
    assert list(frame.columns) == ["id", "class", "label", "p0", "p1", "p2"]
    assert frame["id"].tolist() == ["0001", "a", "b"]
    assert frame["class"].isna().all()
    assert frame["label"].tolist() == made.likeliest.tolist()
    np.testing.assert_array_equal(frame[["p0", "p1", "p2"]].to_numpy(), made.probabilities)
    frame[["p2", "p0", "p1", "id"]].iloc[::-1].to_parquet(tmp_path / "other.parquet", index=False)
    found = read_predictions(tmp_path / "other.parquet")
    assert found.classes == ["0", "1", "2"]
    np.testing.assert_array_equal(found.probabilities, made.probabilities)
    assert not found.labelled


def _table(**columns: Any) -> pa.Table:
    return pa.table({"id": ["a", "b"], "p0": [0.5, 1.0], "p1": [0.5, 0.0]} | columns)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (_table(id=["a", "a"]), "has id a more than once"),
        (_table(p1=[0.5, float("nan")]), "is damaged .of id 'b'"),
        (_table(p1=[-0.5, 0.0]), "is damaged .of id 'a'"),
        (_table().drop_columns("id"), "has no column 'id'"),
        (_table().drop_columns("p0"), "has no column 'p0'"),
        (_table().drop_columns(["p0", "p1"]), "has no column 'p0'"),
        (_table(p1=["x", "y"]), "is damaged"),
        (_table(id=pa.array(["a", None])), "is damaged .of id ''"),
        (_table(**{"class": [0, 2]}), "is damaged .of id 'b'"),
        (_table(p0=[0.5, 0.9]), "is damaged .of id 'b'"),
    ],
)
def test_what_is_no_predictions_file_is_named(table: pa.Table, words: str, tmp_path: Path) -> None:
    pq.write_table(table, tmp_path / "p.parquet")
    with pytest.raises(UserError, match=words) as error:
        read_predictions(tmp_path / "p.parquet")
    assert str(tmp_path / "p.parquet") in str(error.value)


def test_missing_and_cut_files_are_sentences(tmp_path: Path) -> None:
    write_predictions(tmp_path / "p.parquet", predictions(["a", "b"]))
    data = (tmp_path / "p.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.parquet").write_text("id,label\n")
    for name in ("none.parquet", "cut.parquet", "text.parquet", "."):
        with pytest.raises(UserError, match="cannot be read as a predictions file"):
            read_predictions(tmp_path / name)


def test_a_submission_has_exact_ids_sorted_and_the_header(tmp_path: Path) -> None:
    path = tmp_path / "submission.csv"
    write_submission(path, {"b": 1, "000123": 103, "a,b": 0, 'q"\n': 2}, {"b", "000123", "a,b", 'q"\n'}, 104)
    assert path.read_bytes().startswith(b"id,label\n000123,103\n")
    with path.open(newline="") as file:
        assert list(csv.reader(file)) == [["id", "label"], ["000123", "103"], ["a,b", "0"], ["b", "1"], ['q"\n', "2"]]


@pytest.mark.parametrize("wanted", [{"a"}, {"a", "b", "c"}, {"a", "x"}])
def test_a_submission_with_other_ids_than_the_records_is_not_written(wanted: set[str], tmp_path: Path) -> None:
    path = tmp_path / "submission.csv"
    path.write_text("earlier")
    with pytest.raises(UserError, match="was not written"):
        write_submission(path, {"a": 0, "b": 1}, wanted, 2)
    with pytest.raises(UserError, match="id b would be"):
        write_submission(path, {"a": 0, "b": 2}, {"a", "b"}, 2)
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_a_sample_must_have_the_records_ids(tmp_path: Path) -> None:
    sample = tmp_path / "sample.csv"
    sample.write_bytes("\ufeffid,label\r\n01,0\r\n2,0\r\n".encode())
    check_sample(sample, ["2", "01"])
    with pytest.raises(UserError, match="the records lack id 01, and it lacks ids 1, 3"):
        check_sample(sample, ["1", "2", "3"])
    names = [f"{i:02}" for i in range(9)]
    with pytest.raises(UserError, match="it lacks ids 00, 02, 03, 04, 05 and 3 more"):
        check_sample(sample, [*names, "2"])
    for text, words in [
        ("", "does not begin with the header"),
        ("name,label\na,0\n", "does not begin with the header"),
        ("id,label\na,0\na,1\n", "has id a more than once"),
    ]:
        sample.write_text(text)
        with pytest.raises(UserError, match=words):
            check_sample(sample, ["a"])
    with pytest.raises(UserError, match="cannot be read"):
        check_sample(tmp_path / "none.csv", ["a"])
