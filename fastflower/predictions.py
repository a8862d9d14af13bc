"""What networks say of pictures: class probabilities by id in one Parquet file, and a competition's submission.

The file has a row for each id, sorted: `id` (text), `class` (the true one's number, empty where it is unknown), `label`
(the likeliest one's number) and `p0`, `p1`, ... (probability of each class, float32). pandas.read_parquet reads it.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastflower.data.records import NO_LABEL
from fastflower.errors import UserError
from fastflower.files import atomic_write, to_json

HEADER = ("id", "label")  # of a submission
NAMED = 5  # ids that a message names
SUM_TOLERANCE = 1e-3  # of a picture's probabilities, whose sum is 1
_METADATA = b"fastflower"


@dataclass(frozen=True)
class Predictions:
    """Class probabilities of a split's pictures."""

    split: str
    classes: list[str]  # names by number
    ids: np.ndarray  # [n] str, each once, sorted
    probabilities: np.ndarray  # [n, C] float32
    labels: np.ndarray  # [n] int64, the true classes; NO_LABEL where unknown
    source: dict[str, Any] = field(default_factory=dict)  # plain values: which run and checkpoint, by which views

    @property
    def labelled(self) -> bool:
        """Whether the true class of every picture is known."""
        return bool((self.labels != NO_LABEL).all())

    @property
    def likeliest(self) -> np.ndarray:
        """[n] int64; of equally likely classes the first."""
        return self.probabilities.argmax(axis=1)


def sort_by_id(predictions: Predictions) -> Predictions:
    """The same, in the order of the ids as text, which no batch size or number of processes has a say in."""
    order = np.argsort(predictions.ids, kind="stable")
    columns = (predictions.ids[order], predictions.probabilities[order], predictions.labels[order])
    return Predictions(predictions.split, predictions.classes, *columns, predictions.source)


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Write the Parquet file, atomically."""
    found = predictions
    columns = {
        "id": pa.array(found.ids.tolist(), pa.string()),
        "class": pa.array(found.labels, mask=found.labels == NO_LABEL),
        "label": pa.array(found.likeliest),
    }
    columns |= {f"p{k}": pa.array(found.probabilities[:, k], pa.float32()) for k in range(len(found.classes))}
    metadata = {"split": found.split, "classes": found.classes, "source": found.source}
    table = pa.table(columns).replace_schema_metadata({_METADATA: to_json(metadata)})
    with atomic_write(path) as file:
        pq.write_table(table, file, compression="zstd")


def read_predictions(path: Path) -> Predictions:
    """Read what `write_predictions` wrote, or Parquet with such columns; without our metadata classes are numbers.

    Raises:
        UserError: no such file, of another kind, an id that is there twice, or probabilities that are none.
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
    metadata = json.loads((table.schema.metadata or {}).get(_METADATA, b"{}"))
    classes = metadata.get("classes", [str(k) for k in range(count)])
    try:
        ids = table["id"].cast(pa.string())
        columns = [table[f"p{k}"].cast(pa.float32()).to_numpy() for k in range(count)]
        known = table["class"].cast(pa.int64()) if "class" in table.column_names else pa.nulls(len(ids), pa.int64())
    except pa.ArrowException as error:
        raise UserError(f"{path} is damaged ({error}): predict again.") from error
    found = Predictions(
        metadata.get("split", ""),
        classes,
        np.array(ids.fill_null("").to_pylist(), np.str_),
        np.column_stack(columns),
        known.fill_null(NO_LABEL).to_numpy(),
        metadata.get("source", {}),
    )
    _refuse_damage(found, path)
    return sort_by_id(found)


def _refuse_damage(found: Predictions, path: Path) -> None:
    refuse_repeated(found.ids, str(path))
    sound = np.isfinite(found.probabilities).all(axis=1) & (found.probabilities >= 0).all(axis=1) & (found.ids != "")
    known = found.labels != NO_LABEL
    sound &= ~known | ((found.labels >= 0) & (found.labels < len(found.classes)))
    sound &= np.abs(found.probabilities.sum(axis=1) - 1) < SUM_TOLERANCE
    if not sound.all():
        raise UserError(
            f"{path} is damaged (of id {str(found.ids[np.argmin(sound)])!r} the class or the probabilities are none): "
            "predict again."
        )
    if found.probabilities.shape[1] != len(found.classes):
        raise UserError(f"{path} is damaged (it names {len(found.classes)} classes): predict again.")


def refuse_repeated(ids: np.ndarray, where: str) -> None:
    """Raise UserError naming the ids ([n] str) that are there more than once."""
    if twice := [name for name, times in Counter(ids.tolist()).items() if times > 1]:
        raise UserError(f"{where} has {some(twice)} more than once: keep each id once.")


def some(ids: Iterable[str]) -> str:
    """The first ids in words: "id a", "ids a, b", "ids a, b, c, d, e and 7 more"."""
    names = sorted(ids)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"id{'s' * (len(names) > 1)} {', '.join(names[:NAMED])}{more}"


def write_submission(path: Path, labels: Mapping[str, int], wanted: Collection[str], classes: int) -> None:
    """Write the competition's CSV, `id,label`, sorted by id: ids as they are, labels as class numbers.

    It is read again and checked before it takes the name `path`.

    Args:
        path: where to.
        labels: class number of each id.
        wanted: the ids that the records have.
        classes: how many there are.

    Raises:
        UserError: it would lack an id, have one too many or a label out of range; an earlier file is as it was.
    """
    with atomic_write(path) as file:
        rows = [HEADER, *sorted(labels.items())]
        file.write("".join(f"{_field(name)},{label}\n" for name, label in rows).encode())
        _check_submission(file, path, wanted, classes)


def _field(text: str) -> str:
    """A field of a CSV file: as it is, in quotes where it must be."""
    return '"' + text.replace('"', '""') + '"' if any(mark in text for mark in ',"\r\n') else text


def _check_submission(file: IO[bytes], path: Path, wanted: Collection[str], classes: int) -> None:
    file.seek(0)
    header, *rows = csv.reader(io.StringIO(file.read().decode(), newline=""))
    refuse_repeated(np.array([row[0] for row in rows]), str(path))
    misplaced = {row[0] for row in rows} ^ set(wanted)
    misplaced |= {row[0] for row in rows if not (row[1].isdecimal() and int(row[1]) < classes)}
    if tuple(header) != HEADER or misplaced:
        raise UserError(
            f"{path} was not written: {some(misplaced)} would be missing, too many or without a class of "
            f"0..{classes - 1}; predict the same records again."
        )


def check_sample(sample: Path, ids: Iterable[str]) -> None:
    """Compare a competition's sample submission with the ids that would be handed in.

    Raises:
        UserError: it cannot be read, or has other ids; names those that are missing and those that are too many.
    """
    try:
        with sample.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except OSError as error:
        raise UserError(f"{sample} cannot be read ({error.strerror}): give the sample submission.") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{sample} is not CSV ({error}): give the sample submission.") from error
    if not rows or rows[0][0] != HEADER[0]:
        raise UserError(f"{sample} does not begin with the header {','.join(HEADER)}: give the sample submission.")
    wanted = np.array([row[0] for row in rows[1:]], np.str_)
    refuse_repeated(wanted, str(sample))
    missing, extra = set(wanted.tolist()) - set(ids), set(ids) - set(wanted.tolist())
    if missing or extra:
        parts = [f"the records lack {some(missing)}"] * bool(missing) + [f"it lacks {some(extra)}"] * bool(extra)
        raise UserError(
            f"{sample} has other ids than the records: {', and '.join(parts)}. "
            "Give the data and the sample of one competition."
        )
