"""What networks say of pictures: class probabilities by id in one Parquet file.

It has a row for each id, sorted: `id` (text); `class`, the true class (empty where it is unknown), and `label`, the
likeliest, as places in the run's list of classes, from 0; `class_name` and `label_name`, what these are called; and
`p0`, `p1`, ..., the probability (float32) of the class at each place. pandas.read_parquet reads it, and has the list of
classes in `.attrs["classes"]`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastflower.arrays import Ints, Singles, Strings
from fastflower.data.names import places
from fastflower.data.records import NO_LABEL
from fastflower.errors import UserError
from fastflower.files import atomic_write, remove_temporaries, to_json

NAMED = 5  # ids that a message names
SUM_TOLERANCE = 1e-3  # of a picture's probabilities, whose sum is 1
_METADATA = b"PANDAS_ATTRS"  # which pandas shows as a table's attrs, and writes again
_METADATA_BEFORE = b"fastflower"  # where it was in files of earlier versions


@dataclass(frozen=True)
class Predictions:
    """Class probabilities of a split's pictures."""

    split: str
    classes: list[str]  # what each column and label stands for
    ids: Strings  # [n], each once, sorted
    probabilities: Singles  # [n, C]
    labels: Ints  # [n], the true classes; NO_LABEL where unknown
    source: dict[str, Any] = field(default_factory=dict)  # plain values: which run and checkpoint, by which views

    @property
    def labelled(self) -> bool:
        """Whether the true class of every picture is known."""
        return bool((self.labels != NO_LABEL).all())

    @property
    def likeliest(self) -> Ints:
        """[n]; of equally likely classes the first."""
        classes: Ints = self.probabilities.argmax(axis=1)
        return classes


def sort_by_id(predictions: Predictions) -> Predictions:
    """The same, in the order of the ids as text, which no batch size or number of processes has a say in."""
    order = np.argsort(predictions.ids, kind="stable")
    columns = (predictions.ids[order], predictions.probabilities[order], predictions.labels[order])
    return Predictions(predictions.split, predictions.classes, *columns, predictions.source)


def in_order_of(classes: list[str], predictions: Predictions) -> Predictions | None:
    """The same with columns and labels in another order of the classes; None where those are others.

    Names count, or numbers where the names are numbers (see `fastflower.data.names.places`).
    """
    place = places(classes, predictions.classes)
    if place is None:
        return None
    labelled = predictions.labels != NO_LABEL
    labels = np.full(len(labelled), NO_LABEL)
    labels[labelled] = np.argsort(place)[predictions.labels[labelled]]
    return replace(predictions, classes=classes, probabilities=predictions.probabilities[:, place], labels=labels)


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Write the Parquet file, atomically; what a kill left of an earlier one goes."""
    remove_temporaries(path)
    names = pa.array([name.encode(errors="replace").decode() for name in predictions.classes], pa.string())
    unknown = predictions.labels == NO_LABEL
    columns = {
        "id": pa.array(predictions.ids.tolist(), pa.string()),
        "class": (true := pa.array(predictions.labels, mask=unknown)),
        "label": (likeliest := pa.array(predictions.likeliest)),
        "class_name": names.take(true),
        "label_name": names.take(likeliest),
    }
    for k, column in enumerate(predictions.probabilities.T):
        columns[f"p{k}"] = pa.array(column, pa.float32())
    metadata = {"split": predictions.split, "classes": predictions.classes, "source": predictions.source}
    table = pa.table(columns).replace_schema_metadata({_METADATA: to_json(metadata)})
    with atomic_write(path) as file:
        pq.write_table(table, file, compression="zstd")


def read_predictions(path: Path) -> Predictions:
    """Read what `write_predictions` wrote, or Parquet with such columns; without our metadata classes are numbers.

    Raises:
        UserError: no such file, of another kind, an id that is there twice, probabilities that are none, or class names
            that the metadata has lost.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{path} cannot be read as a predictions file: give what `fastflower predict` wrote."
        ) from error
    count = sum(name[:1] == "p" and name[1:].isdecimal() for name in table.column_names)
    wanted = ["id", *(f"p{k}" for k in range(count))]
    missing = [name for name in wanted if name not in table.column_names]
    if missing or count == 0:
        raise UserError(
            f"{path} has no column {(missing or ['p0'])[0]!r}: a predictions file has id, p0, p1, ... "
            "as `fastflower predict` writes them."
        )
    kept = table.schema.metadata or {}
    metadata = json.loads(kept.get(_METADATA, kept.get(_METADATA_BEFORE, b"{}")))
    classes = metadata.get("classes", [str(k) for k in range(count)])
    named = "classes" not in metadata and {"label", "label_name"} <= set(table.column_names)
    if named and [str(label) for label in table["label"].to_pylist()] != table["label_name"].to_pylist():
        raise UserError(
            f"{path} has lost what its classes are called, which `fastflower predict` keeps in its metadata: give the "
            "file as it was written."
        )
    try:
        ids = table["id"].cast(pa.string())
        columns = [table[f"p{k}"].cast(pa.float32()).to_numpy() for k in range(count)]
        true = table["class"].cast(pa.int64()) if "class" in table.column_names else pa.nulls(len(ids), pa.int64())
    except pa.ArrowException as error:
        raise UserError(f"{path} is damaged ({error}): predict again.") from error
    predictions = Predictions(
        metadata.get("split", ""),
        classes,
        np.array(ids.fill_null("").to_pylist(), np.str_),
        np.column_stack(columns),
        true.fill_null(NO_LABEL).to_numpy(),
        metadata.get("source", {}),
    )
    _refuse_damage(predictions, path)
    return sort_by_id(predictions)


def _refuse_damage(predictions: Predictions, path: Path) -> None:
    ids, probabilities, labels = predictions.ids, predictions.probabilities, predictions.labels
    refuse_repeated(ids, str(path))
    classes = len(predictions.classes)
    sound = np.isfinite(probabilities).all(axis=1) & (probabilities >= 0).all(axis=1) & (ids != "")
    sound &= (labels == NO_LABEL) | ((labels >= 0) & (labels < classes))
    sound &= np.abs(probabilities.sum(axis=1) - 1) < SUM_TOLERANCE
    if not sound.all():
        raise UserError(
            f"{path} is damaged (of id {str(ids[np.argmin(sound)])!r} the class or the probabilities are none): "
            "predict again."
        )
    if not probabilities.shape[1] == classes == len(set(predictions.classes)):
        raise UserError(f"{path} is damaged (it names {classes} classes): predict again.")


def refuse_repeated(ids: Strings, where: str) -> None:
    """Raise UserError naming the ids ([n]) that are there more than once."""
    if twice := [name for name, times in Counter(ids.tolist()).items() if times > 1]:
        raise UserError(f"{where} has {some(twice)} more than once: keep each id once.")


def some(ids: Iterable[str]) -> str:
    """The first ids in words: "id a", "ids a, b", "ids a, b, c, d, e and 7 more"."""
    names = sorted(ids)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"id{'s' * (len(names) > 1)} {', '.join(names[:NAMED])}{more}"
