"""The predictions file: what is written is what is read, and nothing else is taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastflower.data.records import NO_LABEL
from fastflower.errors import UserError
from fastflower.evaluation.predictions import Predictions, in_order_of, read_predictions, sort_by_id, write_predictions


def predictions(ids: list[str], labels: list[int] | None = None, classes: int = 3, seed: int = 0) -> Predictions:
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.ones(classes), len(ids)).astype(np.float32)
    true = np.full(len(ids), NO_LABEL) if labels is None else np.array(labels)
    return sort_by_id(
        Predictions("val", [f"kind {k}" for k in range(classes)], np.array(ids), probabilities, true, {"run": "a"})
    )


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    made = predictions(["000123", "7", "ü,x", 'q"'], [2, 0, 1, 1])
    path = tmp_path / "new" / "p.parquet"
    write_predictions(path, made)
    loaded = read_predictions(path)
    assert loaded.ids.tolist() == sorted(["000123", "7", "ü,x", 'q"'])
    assert (loaded.split, loaded.classes, loaded.source) == ("val", made.classes, {"run": "a"})
    np.testing.assert_array_equal(loaded.probabilities, made.probabilities)
    np.testing.assert_array_equal(loaded.labels, made.labels)
    assert loaded.labelled


def test_pandas_reads_it_and_what_pandas_writes_is_read(tmp_path: Path) -> None:
    made = predictions(["b", "0001", "a"])
    write_predictions(tmp_path / "p.parquet", made)
    frame = pd.read_parquet(tmp_path / "p.parquet")
    assert list(frame.columns) == ["id", "class", "label", "class_name", "label_name", *made.classes]
    assert frame.attrs["classes"] == made.classes
    assert frame["label_name"].tolist() == [made.classes[k] for k in made.likeliest]
    assert frame["id"].tolist() == ["0001", "a", "b"]
    assert frame["class"].isna().all()
    assert frame["label"].tolist() == made.likeliest.tolist()
    np.testing.assert_array_equal(frame[made.classes].to_numpy(), made.probabilities)
    frame[["kind 2", "kind 0", "kind 1", "id"]].iloc[::-1].to_parquet(tmp_path / "other.parquet", index=False)
    loaded = read_predictions(tmp_path / "other.parquet")
    assert loaded.classes == made.classes
    np.testing.assert_array_equal(loaded.probabilities, made.probabilities)
    assert not loaded.labelled
    frame.attrs = {}
    frame.to_parquet(tmp_path / "other.parquet", index=False)
    assert read_predictions(tmp_path / "other.parquet").classes == made.classes
    frame = frame.rename(columns={name: f"p{k}" for k, name in enumerate(made.classes)})
    frame[["id", "p0", "p1", "p2"]].to_parquet(tmp_path / "other.parquet", index=False)
    assert read_predictions(tmp_path / "other.parquet").classes == ["0", "1", "2"]
    frame.to_parquet(tmp_path / "other.parquet", index=False)
    with pytest.raises(UserError, match="has lost what its classes are called"):
        read_predictions(tmp_path / "other.parquet")


def test_a_file_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    made = predictions(["a", "b"], [1, 0])
    write_predictions(tmp_path / "p.parquet", made)
    table = pq.read_table(tmp_path / "p.parquet")
    metadata = json.loads(table.schema.metadata[b"PANDAS_ATTRS"])
    kept = json.dumps({key: metadata[key] for key in ("split", "classes", "source")})
    table = table.rename_columns([*table.column_names[:5], "p0", "p1", "p2"])
    table = table.drop_columns(["class_name", "label_name"]).replace_schema_metadata({b"fastflower": kept})
    pq.write_table(table, tmp_path / "p.parquet")
    loaded = read_predictions(tmp_path / "p.parquet")
    assert (loaded.split, loaded.classes, loaded.source) == (made.split, made.classes, made.source)
    np.testing.assert_array_equal(loaded.labels, made.labels)


def test_columns_and_labels_follow_their_classes_into_another_order() -> None:
    made = predictions(["a", "b", "c", "d"], [2, 0, 1, NO_LABEL])
    reordered = in_order_of(["kind 2", "kind 0", "kind 1"], made)
    assert reordered
    np.testing.assert_array_equal(reordered.probabilities, made.probabilities[:, [2, 0, 1]])
    assert [reordered.classes[k] for k in reordered.labels[:3]] == [made.classes[k] for k in made.labels[:3]]
    assert reordered.labels[3] == NO_LABEL
    for other in (["kind 0", "kind 1"], ["kind 0", "kind 1", "rose"], [*made.classes, "rose"], ["0", "1", "2"]):
        assert in_order_of(other, made) is None


def table_with(**columns: Any) -> pa.Table:
    return pa.table({"id": ["a", "b"], "p0": [0.5, 1.0], "p1": [0.5, 0.0]} | columns)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (table_with(id=["a", "a"]), "has id a more than once"),
        (table_with(p1=[0.5, float("nan")]), "is damaged .of id 'b'"),
        (table_with(p1=[-0.5, 0.0]), "is damaged .of id 'a'"),
        (table_with().drop_columns("id"), "has no column 'id'"),
        (table_with().drop_columns("p0"), "has no column 'p0'"),
        (table_with().drop_columns(["p0", "p1"]), "has no columns of classes"),
        (table_with(p1=["x", "y"]), "is damaged"),
        (table_with(id=pa.array(["a", None])), "is damaged .of id ''"),
        (table_with(**{"class": [0, 2]}), "is damaged .of id 'b'"),
        (table_with(p0=[0.5, 0.9]), "is damaged .of id 'b'"),
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
