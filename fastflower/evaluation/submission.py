"""A competition's submission as CSV: `id,label` by the names or the places of the classes, or as its sample is."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastflower.data.names import number_of
from fastflower.errors import UserError
from fastflower.evaluation.predictions import Predictions, some
from fastflower.evaluation.sample import Dialect, Sample, read_sample
from fastflower.files import atomic_write, remove_temporaries

HEADER = ["id", "label"]
PLACEHOLDERS = {"", "0"}  # what the samples of competitions have in place of labels
NAMED = 5  # classes that a message names


@dataclass(frozen=True)
class Form:
    """How a submission is written: a label for each id, or a probability for each id and class."""

    labels: list[str]  # what a label is written as, by the class's place
    ids: dict[str, str]  # as they are written, in order: the record's id
    columns: list[int] | None = None  # the classes whose probabilities stand beside an id; None = its label does
    header: list[str] = field(default_factory=lambda: HEADER)
    id_column: int = 0
    dialect: Dialect = field(default_factory=Dialect)

    def rows(self, predictions: Predictions) -> list[list[str]]:
        """The header, and a row for each id."""
        row_of = {name: row for row, name in enumerate(predictions.ids.tolist())}
        likeliest, rows = predictions.likeliest.tolist(), [self.header]
        for name, record in self.ids.items():
            row = row_of[record]
            if self.columns is None:
                cells = [self.labels[likeliest[row]]]
            else:
                cells = [f"{predictions.probabilities[row, place]:.9g}" for place in self.columns]
            rows.append([*cells[: self.id_column], name, *cells[self.id_column :]])
        return rows


def form_of(classes: Sequence[str], ids: Collection[str], sample: Path | None = None) -> Form:
    """The form of a submission: that of its sample, or id,label sorted by id.

    A label is the class's name, exactly, where a class is called by a number, or where the sample has names; else its
    place. A place is the class's number, from 0, in the run's list: what TFRecords of named classes have for a class.
    So a number in the submission never means another class than the one that is called by it.

    Args:
        classes: their names.
        ids: what is handed in.
        sample: a sample submission: with one column beside its ids, whose labels decide whether names or places are
            written (all 0, or empty, they decide nothing), or with a column for each class, or for one that its header
            names.

    Raises:
        UserError: the sample cannot be read, has other ids, labels that are neither names nor places, or columns that
            are not the classes.
    """
    if sample is None:
        return Form(_usual_labels(classes), {name: name for name in sorted(ids)})
    shown = read_sample(sample, ids)
    if len(shown.columns) > 1:
        columns = _classes_of_columns(sample, shown, classes)
        return Form(_usual_labels(classes), shown.ids, columns, shown.header, shown.id_column, shown.dialect)
    if (alone := _class_alone(shown, classes)) is not None:
        return Form(_usual_labels(classes), shown.ids, [alone], shown.header, shown.id_column, shown.dialect)
    labels = _labels(sample, shown, classes)
    header = shown.header if shown.columns else HEADER
    return Form(labels, shown.ids, None, header, shown.id_column, shown.dialect)


def _usual_labels(classes: Sequence[str]) -> list[str]:
    by_number = any(number_of(name) is not None for name in classes)
    return list(classes) if by_number else [str(place) for place in range(len(classes))]


def _labels(path: Path, sample: Sample, classes: Sequence[str]) -> list[str]:
    """Names or places, as a sample with one column of labels has them."""
    usual, cells = _usual_labels(classes), sample.cells(0) if sample.columns else []
    if set(cells) <= PLACEHOLDERS or set(cells) <= set(usual):
        return usual
    if set(cells) <= set(classes):
        return list(classes)
    strange = [(name, cell) for name, cell in zip(sample.ids, cells, strict=True) if cell not in usual]
    name, cell = next((pair for pair in strange if pair[1] not in classes), strange[0])
    named = f" ({_listed(classes)})" if list(classes) != usual else ""
    raise UserError(
        f"{path} has the label {cell!r} (id {name}), and the classes are {_listed(usual)}{named}: "
        "give the sample of the competition that has these classes."
    )


def _classes_of_columns(path: Path, sample: Sample, classes: Sequence[str]) -> list[int]:
    """The place of the class that each column is for: its header is the class's name, or its number.

    Raises:
        UserError: the columns are not the classes, or hold something else than numbers.
    """
    plain_headers, plain_classes = [_plain(name) for name in sample.columns], [_plain(name) for name in classes]
    usual = _usual_labels(classes)
    for headers, names in ((sample.columns, classes), (plain_headers, plain_classes), (sample.columns, usual)):
        place_of = {name: place for place, name in enumerate(names)}
        if len(place_of) == len(classes) and sorted(headers) == sorted(place_of):
            break
    else:
        others = [name for name in sample.columns if _plain(name) not in plain_classes]
        lacking = [name for name in classes if _plain(name) not in plain_headers]
        parts = [f"{_listed(others)} are no classes"] * bool(others) + [f"it lacks {_listed(lacking)}"] * bool(lacking)
        raise UserError(
            f"{path} has {len(sample.columns)} columns beside its ids, and they are not the {len(classes)} classes"
            f"{': ' if parts else ''}{', and '.join(parts)}; give a sample with one column of labels, or one for each "
            "class."
        )
    for column, name in enumerate(sample.columns):
        strange = next((cell for cell in sample.cells(column) if not _is_number(cell)), None)
        if strange is not None:
            raise UserError(f"{path} has {strange!r} in the column {name}, where a probability belongs: give another.")
    return [place_of[name] for name in headers]


def _class_alone(sample: Sample, classes: Sequence[str]) -> int | None:
    """The place of the class whose probability a sample's only column is for, as of dog,0.5 for cats and dogs."""
    headers = [_plain(name) for name in sample.columns]
    matches = [place for place, name in enumerate(classes) if [_plain(name)] == headers]
    numbers = len(matches) == 1 and sample.columns != HEADER[1:] and all(map(_is_number, sample.cells(0)))
    return matches[0] if numbers else None


def _plain(name: str) -> str:
    """A name without what writers vary in it: capitals, and the form of accents."""
    return unicodedata.normalize("NFC", name).casefold().strip()


def _is_number(cell: str) -> bool:
    try:
        return cell.strip() == "" or float(cell) >= 0
    except ValueError:
        return False


def meaning(classes: Sequence[str], labels: Sequence[str]) -> str | None:
    """A sentence that says what a submission's labels stand for, where they are not what the classes are called."""
    if list(classes) == list(labels):
        return None
    pairs = [f"{label} = {name}" for label, name in zip(labels, classes, strict=True)]
    return f"Its labels are the numbers of the classes: {_listed(pairs)}."


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f", … {names[-1]}" if len(names) > NAMED else "")


def write_submission(path: Path, form: Form, predictions: Predictions) -> None:
    """Write the competition's CSV. It is read again and checked before it takes the name `path`.

    Args:
        path: where to.
        form: how (see `form_of`).
        predictions: of the same ids.

    Raises:
        UserError: it would lack an id, have one too many or an answer that is none; an earlier file is as it was.
    """
    misplaced = set(form.ids.values()) ^ set(predictions.ids.tolist())
    _refuse(path, misplaced, "be missing or too many")
    remove_temporaries(path)  # which a kill has left
    with atomic_write(path) as file:
        file.write(form.dialect.text(form.rows(predictions)))
        file.seek(0)
        header, *rows = form.dialect.rows(file.read())
        written = {row[form.id_column]: row[: form.id_column] + row[form.id_column + 1 :] for row in rows}
        intact = header == form.header and len(rows) == len(form.ids)
        _refuse(path, set(written) ^ set(form.ids) if intact else set(form.ids), "be lost in writing")
        _refuse(path, _without_answer(form, written), "have no answer")


def _without_answer(form: Form, written: Mapping[str, Sequence[str]]) -> set[str]:
    if form.columns is None:
        allowed = set(form.labels)
        return {name for name, cells in written.items() if len(cells) != 1 or cells[0] not in allowed}
    count = len(form.columns)
    return {
        name
        for name, cells in written.items()
        if len(cells) != count or not all(0 <= float(cell) <= 1 for cell in cells)
    }


def _refuse(path: Path, ids: Collection[str], what: str) -> None:
    if ids:
        raise UserError(f"{path} was not written: {some(ids)} would {what}; predict the same records again.")
