"""Sample submissions: how their competition wants answers written, as the sample's own bytes show it."""

from __future__ import annotations

import codecs
import csv
import io
import unicodedata
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from fastflower.errors import UserError
from fastflower.evaluation.predictions import refuse_repeated, some

DELIMITERS = ",;\t"
FIRST_LINES = 20  # which show how the rest is written
FEW_COLUMNS = 4  # of which any may be the ids'; of more it is the first
# An id as the sample may have it, from the most exact reading to the least.
READINGS: tuple[Callable[[str], str], ...] = (
    lambda name: name,
    lambda name: unicodedata.normalize("NFC", name),
    lambda name: _without_suffix(unicodedata.normalize("NFC", name)),
    lambda name: _without_suffix(PurePosixPath(unicodedata.normalize("NFC", name)).name),
)
SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".heic", ".avif"}


@dataclass(frozen=True)
class Sample:
    """A table of text, and how it is written."""

    header: list[str]
    rows: list[list[str]]
    id_column: int
    ids: dict[str, str]  # as the sample has them, in its order: the record's id
    dialect: Dialect

    @property
    def columns(self) -> list[str]:
        """The headers of all columns but the ids'."""
        return self.header[: self.id_column] + self.header[self.id_column + 1 :]

    def cells(self, column: int) -> list[str]:
        """What is below one of those headers."""
        place = column + (column >= self.id_column)
        return [row[place] for row in self.rows]


@dataclass(frozen=True)
class Dialect:
    """How a CSV file is written."""

    delimiter: str = ","
    line_end: str = "\n"
    mark: bytes = b""  # which some programs begin a file with, to say that it is UTF-8
    quoted: bool = False  # every field is, also where it need not be

    def text(self, rows: Collection[Collection[str]]) -> bytes:
        """The file's bytes."""
        file = io.StringIO(newline="")
        writer = csv.writer(
            file,
            delimiter=self.delimiter,
            lineterminator=self.line_end,
            quoting=csv.QUOTE_ALL if self.quoted else csv.QUOTE_MINIMAL,
        )
        writer.writerows(rows)
        return self.mark + file.getvalue().encode()

    def rows(self, content: bytes) -> list[list[str]]:
        """The fields of a file's lines, without empty lines."""
        text = content.removeprefix(self.mark).decode()
        return [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=self.delimiter) if row]


def read_sample(path: Path, ids: Collection[str]) -> Sample:
    """A sample submission of these records.

    Args:
        path: a CSV file with a header: ids in one of its columns, in any order.
        ids: the records'.

    Raises:
        UserError: it is no such file, or has other ids.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give the sample submission.") from error
    try:
        dialect = _dialect(content)
        rows = dialect.rows(content)
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not CSV in UTF-8 ({error}): give the sample submission.") from error
    if not rows:
        raise UserError(f"{path} is empty: give the sample submission.")
    header, *below = rows
    for row in below:
        if len(row) != len(header):
            raise UserError(
                f"{path} has {len(row)} fields in the line of {row[0]!r}, and {len(header)} in its header: "
                "give the sample submission as the competition has it."
            )
    places = range(len(header)) if len(header) <= FEW_COLUMNS else [0]
    column = max(places, key=lambda place: _shared([row[place] for row in below], ids))
    if header[column] in ids:
        raise UserError(f"{path} has no header, but begins with id {header[column]}: give the sample submission.")
    wanted = [row[column] for row in below]
    refuse_repeated(np.array(wanted, np.str_), str(path))
    return Sample(header, below, column, _matched(path, wanted, ids), dialect)


def _dialect(content: bytes) -> Dialect:
    mark = codecs.BOM_UTF8 if content.startswith(codecs.BOM_UTF8) else b""
    text = content.removeprefix(mark).decode()
    lines = text.splitlines()[:FIRST_LINES]
    widths = {sign: {len(row) for row in csv.reader(lines, delimiter=sign)} for sign in DELIMITERS}
    delimiter = next((sign for sign, counts in widths.items() if len(counts) == 1 and counts != {1}), None)
    delimiter = delimiter or max(DELIMITERS, key="".join(lines[:1]).count)
    quoted = bool(lines) and all(len(line) > 1 and line[0] == line[-1] == '"' for line in lines[:2])
    return Dialect(delimiter, "\r\n" if "\r\n" in text else "\n", mark, quoted)


def _shared(cells: Collection[str], ids: Collection[str]) -> int:
    """How many of a column's cells are ids in some reading."""
    return max(len({read(cell) for cell in cells} & {read(name) for name in ids}) for read in READINGS)


def _matched(path: Path, wanted: Collection[str], ids: Collection[str]) -> dict[str, str]:
    """Of each id of the sample the record's, by the most exact reading in which they are the same.

    Raises:
        UserError: they are in none.
    """
    for read in READINGS:
        of_record = {read(name): name for name in ids}
        if len(of_record) == len(ids) == len(wanted) and {read(name) for name in wanted} == set(of_record):
            return {name: of_record[read(name)] for name in wanted}
    missing, extra = set(wanted) - set(ids), set(ids) - set(wanted)
    parts = [f"the records lack {some(missing)}"] * bool(missing) + [f"it lacks {some(extra)}"] * bool(extra)
    raise UserError(
        f"{path} has other ids than the records: {', and '.join(parts)}. "
        "Give the data and the sample of one competition."
    )


def _without_suffix(name: str) -> str:
    path = PurePosixPath(name)
    return str(path.with_suffix("")) if path.suffix.lower() in SUFFIXES else name
