"""A competition's submission: `id,label` as CSV, by the names or the places of the classes, as its sample has them."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from fastflower.data.names import number_of
from fastflower.errors import UserError
from fastflower.evaluation.predictions import refuse_repeated, some
from fastflower.files import atomic_write, remove_temporaries

HEADER = ("id", "label")
PLACEHOLDERS = {"", "0"}  # what the samples of competitions have in place of labels
NAMED = 5  # classes that a message names


def labels_of(classes: Sequence[str], ids: Collection[str], sample: Path | None = None) -> list[str]:
    """What a submission writes for each class: its name, exactly, where a class is called by a number; else its place.

    A place is the class's number, from 0, in the run's list: what TFRecords of named classes have for a class. So a
    number in the submission never means another class than the one that is called by it.

    Args:
        classes: their names.
        ids: what is handed in.
        sample: a sample submission, whose labels decide whether names or places are written; all 0, or empty, they
            decide nothing.

    Raises:
        UserError: the sample cannot be read, has other ids, or labels that are neither names nor places.
    """
    by_number = any(number_of(name) is not None for name in classes)
    usual = list(classes) if by_number else [str(place) for place in range(len(classes))]
    shown = _read_sample(sample, ids) if sample else {}
    if set(shown.values()) <= PLACEHOLDERS or set(shown.values()) <= set(usual):
        return usual
    if set(shown.values()) <= set(classes):
        return list(classes)
    strange = [(name, label) for name, label in shown.items() if label not in usual]
    name, label = next((pair for pair in strange if pair[1] not in classes), strange[0])
    raise UserError(
        f"{sample} has the label {label!r} (id {name}), and the classes are {_listed(usual)}"
        f"{'' if by_number else f' ({_listed(classes)})'}: give the sample of the competition that has these classes."
    )


def meaning(classes: Sequence[str], labels: Sequence[str]) -> str | None:
    """A sentence that says what a submission's labels stand for, where they are not what the classes are called."""
    if list(classes) == list(labels):
        return None
    pairs = [f"{label} = {name}" for label, name in zip(labels, classes, strict=True)]
    return f"Its labels are the numbers of the classes: {_listed(pairs)}."


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f", … {names[-1]}" if len(names) > NAMED else "")


def write_submission(path: Path, labels: Mapping[str, str], wanted: Collection[str], allowed: Sequence[str]) -> None:
    """Write the competition's CSV, `id,label`, sorted by id: ids and labels as they are.

    It is read again and checked before it takes the name `path`.

    Args:
        path: where to.
        labels: of each id what is written (see `labels_of`).
        wanted: the ids that the records have.
        allowed: what may be written.

    Raises:
        UserError: it would lack an id, have one too many or a label that is none; an earlier file is as it was.
    """
    remove_temporaries(path)  # which a kill has left
    with atomic_write(path) as file:
        rows = [HEADER, *sorted(labels.items())]
        file.write("".join(f"{_field(name)},{_field(label)}\n" for name, label in rows).encode())
        _check(file, path, wanted, allowed)


def _field(text: str) -> str:
    """A field of a CSV file: as it is, in quotes where it must be."""
    return '"' + text.replace('"', '""') + '"' if any(mark in text for mark in ',"\r\n') else text


def _check(file: IO[bytes], path: Path, wanted: Collection[str], allowed: Sequence[str]) -> None:
    file.seek(0)
    header, *rows = csv.reader(io.StringIO(file.read().decode(), newline=""))
    refuse_repeated(np.array([row[0] for row in rows]), str(path))
    misplaced, labels = {row[0] for row in rows} ^ set(wanted), set(allowed)
    misplaced |= {row[0] for row in rows if row[1] not in labels}
    if tuple(header) != HEADER or misplaced:
        raise UserError(
            f"{path} was not written: {some(misplaced)} would be missing, too many or without one of the labels "
            f"{_listed(allowed)}; predict the same records again."
        )


def _read_sample(path: Path, ids: Collection[str]) -> dict[str, str]:
    """The labels of a sample submission, by id; UserError that names ids which are missing in it, or too many."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give the sample submission.") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not CSV ({error}): give the sample submission.") from error
    if not rows or rows[0][0] != HEADER[0]:
        raise UserError(f"{path} does not begin with the header {','.join(HEADER)}: give the sample submission.")
    wanted = np.array([row[0] for row in rows[1:]], np.str_)
    refuse_repeated(wanted, str(path))
    missing, extra = set(wanted.tolist()) - set(ids), set(ids) - set(wanted.tolist())
    if missing or extra:
        parts = [f"the records lack {some(missing)}"] * bool(missing) + [f"it lacks {some(extra)}"] * bool(extra)
        raise UserError(
            f"{path} has other ids than the records: {', and '.join(parts)}. "
            "Give the data and the sample of one competition."
        )
    return {row[0]: row[1] if len(row) > 1 else "" for row in rows[1:]}
