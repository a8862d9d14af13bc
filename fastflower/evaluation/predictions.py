"""What networks say of pictures: class probabilities by id in one Parquet file.

It has a row for each id, of a split's sorted: `id` (text); `class`, the true class (empty where it is unknown), and
`label`, the likeliest, as places in the run's list of classes, from 0; `class_name` and `label_name`, what these are
called; and the probability (float32) of each class in a column of its name, with "p:" before it where that would be
another column's. pandas.read_parquet reads it, and has the list of classes in `.attrs["classes"]`. Files of earlier
versions have columns `p0`, `p1`, ... by the classes' places.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastflower.arrays import Ints, Singles, Strings
from fastflower.data.names import display_names, places
from fastflower.data.records import NO_LABEL
from fastflower.errors import UserError
from fastflower.files import atomic_write, remove_temporaries, to_json

REPR = 10  # pictures that are shown
NAMED = 5  # ids that a message names
SUM_TOLERANCE = 1e-3  # of a picture's probabilities, whose sum is 1
_FIXED = ("id", "class", "label", "class_name", "label_name")  # columns beside those of the classes
_OWN = "p:"  # before the name of a class that is not a column's name as it is
_BY_PLACE = re.compile(r"p\d+")  # the columns of classes in files of earlier versions
_METADATA = b"PANDAS_ATTRS"  # which pandas shows as a table's attrs, and writes again
_METADATA_BEFORE = b"fastflower"  # where it was in files of earlier versions


@dataclass(frozen=True, repr=False)
class Predictions:
    """Class probabilities of pictures."""

    split: str  # empty where they are of none
    classes: list[str]  # what each column and label stands for
    ids: Strings  # [n], each once; a split's are sorted
    probabilities: Singles  # [n, C]
    labels: Ints  # [n], the true classes; NO_LABEL where unknown
    source: dict[str, Any] = field(default_factory=dict)  # plain values: which run and checkpoint, by which views
    unreadable: dict[str, str] = field(default_factory=dict)  # files that were named too, and why they are not here

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        shown = list(zip(self.ids, self.names, self.confidence, strict=True))[:REPR]
        more = [f"  … and {len(self) - REPR} more"] if len(self) > REPR else []
        lines = [f"  {picture}  {name} {p:.1%}" for picture, name, p in shown]
        return "\n".join([f"Predictions of {len(self)} pictures, {len(self.classes)} classes", *lines, *more])

    @property
    def names(self) -> list[str]:
        """[n], what the likeliest classes are called."""
        return [self.classes[k] for k in self.likeliest.tolist()]

    @property
    def confidence(self) -> Singles:
        """[n], the probabilities of the likeliest classes."""
        highest: Singles = self.probabilities.max(axis=1)
        return highest

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
    ids, probabilities, labels = predictions.ids[order], predictions.probabilities[order], predictions.labels[order]
    return replace(predictions, ids=ids, probabilities=probabilities, labels=labels)


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


def column_of(name: str) -> str:
    """The column of a class in a predictions file: another one for each name, and none of the fixed ones."""
    own = name in _FIXED or name.startswith(_OWN) or _BY_PLACE.fullmatch(name)
    return as_text(_OWN + name if own else name)


def as_text(name: str) -> str:
    """A name that any file can hold: what is not UTF-8 in it, as a file's name may have it, as \\udc80 to \\udcff."""
    return name.encode(errors="backslashreplace").decode()


def write_predictions(path: Path, predictions: Predictions, names: Sequence[str] | None = None) -> None:
    """Write the Parquet file, atomically; what a kill left of an earlier one goes. See `predictions_writer`."""
    with predictions_writer(path, predictions, names) as write:
        write(predictions)


@contextlib.contextmanager
def predictions_writer(
    path: Path, form: Predictions, names: Sequence[str] | None = None
) -> Iterator[Callable[[Predictions], None]]:
    """What writes a Parquet file part by part; the file takes its name when the block ends without an error.

    Args:
        path: where to.
        form: split, classes and source of all parts.
        names: what the classes are called in it; None = as `fastflower.data.names.display_names` has it.
    """
    remove_temporaries(path)
    names = display_names(form.classes, None) if names is None else names
    columns = [column_of(name) for name in names]
    metadata = {"split": form.split, "classes": form.classes, "columns": columns, "source": form.source}
    texts = pa.array([as_text(name) for name in names], pa.string())
    kinds = [pa.string(), pa.int64(), pa.int64(), pa.string(), pa.string()]
    schema = pa.schema([*zip(_FIXED, kinds, strict=True), *((column, pa.float32()) for column in columns)])
    schema = schema.with_metadata({_METADATA: to_json(metadata)})

    def write(part: Predictions) -> None:
        true, likeliest = pa.array(part.labels, mask=part.labels == NO_LABEL), pa.array(part.likeliest)
        ids = pa.array([as_text(name) for name in part.ids.tolist()], pa.string())
        fixed = [ids, true, likeliest, texts.take(true), texts.take(likeliest)]
        writer.write_table(pa.table([*fixed, *part.probabilities.T], schema=schema))

    with atomic_write(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        yield write


def read_predictions(path: Path) -> Predictions:
    """Read what `write_predictions` wrote, or Parquet with such columns; without our metadata classes are called as
    their columns, or by their numbers.

    Raises:
        UserError: no such file, of another kind, an id that is there twice, probabilities that are none, or class names
            that the metadata has lost.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{path} cannot be read as a predictions file: give what `fastflower predict` wrote as .parquet."
        ) from error
    kept = table.schema.metadata or {}
    metadata = json.loads(kept.get(_METADATA, kept.get(_METADATA_BEFORE, b"{}")))
    columns, classes = _columns(table, metadata)
    missing = [name for name in ("id", *columns) if name not in table.column_names]
    if missing or not columns:
        lacking = f"column {missing[0]!r}" if missing else "columns of classes"
        raise UserError(
            f"{path} has no {lacking}: a predictions file has id and the probability of each class, as `fastflower "
            "predict` writes them."
        )
    named = "classes" not in metadata and {"label", "label_name"} <= set(table.column_names)
    if (
        named
        and [dict(enumerate(classes)).get(k) for k in table["label"].to_pylist()] != table["label_name"].to_pylist()
    ):
        raise UserError(
            f"{path} has lost what its classes are called, which `fastflower predict` keeps in its metadata: give the "
            "file as it was written."
        )
    try:
        ids = table["id"].cast(pa.string())
        probabilities = [table[name].cast(pa.float32()).to_numpy() for name in columns]
        true = table["class"].cast(pa.int64()) if "class" in table.column_names else pa.nulls(len(ids), pa.int64())
    except pa.ArrowException as error:
        raise UserError(f"{path} is damaged ({error}): predict again.") from error
    predictions = Predictions(
        metadata.get("split", ""),
        classes,
        np.array(ids.fill_null("").to_pylist(), np.str_),
        np.column_stack(probabilities),
        true.fill_null(NO_LABEL).to_numpy(),
        metadata.get("source", {}),
    )
    _refuse_damage(predictions, path)
    return sort_by_id(predictions)


def _columns(table: pa.Table, metadata: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The columns of the classes, which may be missing, and what these are called."""
    if "columns" in metadata:
        return [*metadata["columns"]], [*metadata["classes"]]
    count = sum(_BY_PLACE.fullmatch(name) is not None for name in table.column_names)
    if count:
        return [f"p{k}" for k in range(count)], metadata.get("classes", [str(k) for k in range(count)])
    columns = [name for name in table.column_names if name not in _FIXED]
    return columns, [name.removeprefix(_OWN) for name in columns]


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
