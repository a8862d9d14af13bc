"""What networks say of pictures, for people and programs: the likeliest classes by name, as a table, CSV or JSON.

A class's probability is written by the fewest digits that give back its float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from rich.table import Table
from rich.text import Text

from fastflower.arrays import Ints, Singles
from fastflower.errors import UserError
from fastflower.evaluation.predictions import Predictions, as_text, predictions_writer
from fastflower.files import atomic_write, remove_temporaries, require_writable, to_json
from fastflower.tables import new_table

FORMS = (".csv", ".json", ".parquet")
TOP = 3  # classes of a picture, where nobody says how many
LISTED = 20  # pictures on screen of those that a file has
Writer = Callable[[Predictions], None]


class Guess(NamedTuple):
    """A class, and how likely it is."""

    name: str
    probability: float


class Answer(NamedTuple):
    """What is said of a picture."""

    id: str
    best: list[Guess]  # the likeliest first; at least one


def require_form(path: Path) -> None:
    """Find out, before the work whose result goes to `path`, whether it can be written there.

    Raises:
        UserError: its extension names no form that predictions are written in, or it is a folder.
        OSError: its folder cannot be made or written.
    """
    if path.suffix.lower() not in FORMS and not path.is_dir():
        raise UserError(f"{path} is none of {', '.join(FORMS)}, which predictions are written as: name such a file.")
    require_writable(path)


def require_top(top: int) -> None:
    """Raise UserError where so many classes of a picture cannot be named."""
    if top < 1:
        raise UserError(f"top is {top}: give at least 1, the number of classes to name.")


def best_of(probabilities: Singles, top: int) -> Ints:
    """The likeliest classes of each picture, [n, top] or fewer, the likeliest first; of equally likely ones the first.

    `probabilities` is [n, num_classes].
    """
    return np.argsort(-probabilities, axis=1, kind="stable")[:, :top]


def answers(predictions: Predictions, names: Sequence[str], top: int) -> list[Answer]:
    """What is said of each picture, by the `top` likeliest classes; `names` are what the classes are called."""
    places = best_of(predictions.probabilities, top)
    likely = np.take_along_axis(predictions.probabilities, places, axis=1)
    texts = [as_text(name) for name in names]
    return [
        Answer(as_text(picture), [Guess(texts[k], float(str(p))) for k, p in zip(best, row, strict=True)])
        for picture, best, row in zip(predictions.ids.tolist(), places.tolist(), likely, strict=True)
    ]


@contextlib.contextmanager
def answers_writer(path: Path | None, form: Predictions, names: Sequence[str], key: str, top: int) -> Iterator[Writer]:
    """What writes predictions part by part, as the file's extension says; it takes its name when the block ends well.

    Args:
        path: .csv or .json, of the `top` likeliest classes; or .parquet, of all; None = what is written goes nowhere.
        form: split, classes and source of all parts.
        names: what the classes are called.
        key: what the column of ids is called in CSV and JSON, such as "file".
        top: see above.
    """
    if path is None:
        yield lambda _: None
        return
    kind = path.suffix.lower()
    if kind == ".parquet":
        with predictions_writer(path, form, names) as write:
            yield write
        return
    remove_temporaries(path)
    with atomic_write(path) as file:
        rows = _to_csv(file, key, min(top, len(names))) if kind == ".csv" else _to_json(file, key)
        with rows as write_rows:
            yield lambda part: write_rows(answers(part, names, top))


@contextlib.contextmanager
def _to_csv(file: IO[bytes], key: str, top: int) -> Iterator[Callable[[Iterable[Answer]], None]]:
    further = (heading for k in range(2, top + 1) for heading in (f"name_{k}", f"probability_{k}"))

    def line(*values: object) -> bytes:
        return (",".join(_field(str(value)) for value in values) + "\n").encode()

    file.write(line(key, "name", "probability", *further))
    yield lambda rows: file.writelines(line(row.id, *(value for guess in row.best for value in guess)) for row in rows)


def _field(text: str) -> str:
    """A field of a CSV file: as it is, in quotes where it must be, as at \\r, which csv.writer may leave bare."""
    return '"' + text.replace('"', '""') + '"' if any(mark in text for mark in ',"\r\n') else text


@contextlib.contextmanager
def _to_json(file: IO[bytes], key: str) -> Iterator[Callable[[Iterable[Answer]], None]]:
    between = "[\n"

    def write(rows: Iterable[Answer]) -> None:
        nonlocal between
        for row in rows:
            file.write(f"{between}{to_json(to_plain(row, key))}".encode())
            between = ",\n"

    yield write
    file.write(b"\n]\n" if between == ",\n" else b"[]\n")


def to_plain(answer: Answer, key: str) -> dict[str, Any]:
    """An answer as JSON has it."""
    likeliest = answer.best[0]
    best = [guess._asdict() for guess in answer.best]
    return {key: answer.id, "name": likeliest.name, "probability": likeliest.probability, "best": best}


def answers_table(rows: Sequence[Answer], key: str) -> Table:
    """A row for each picture, for a terminal: its id and its likeliest classes."""
    top = max((len(row.best) for row in rows), default=1)
    headings = ["name", "", *(heading for k in range(2, top + 1) for heading in (f"name {k}", ""))]
    table = new_table(key, *headings, names=2)
    for row in rows:
        cells = (cell for guess in row.best for cell in (printable(guess.name), f"{guess.probability:.1%}"))
        table.add_row(*map(Text, (printable(row.id), *cells)))
    return table


def printable(text: str) -> str:
    """A name in one line, whatever is in it: what a terminal would act on is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in as_text(text))
