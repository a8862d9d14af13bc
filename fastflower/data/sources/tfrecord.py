"""The TFRecord file format and the tf.train.Example message inside it, without TensorFlow.

A file is a sequence of frames: length (uint64), masked CRC32C of the length (uint32), that many bytes, masked CRC32C
of the bytes (uint32), all little-endian. Each frame holds a protocol buffer:
Example {features=1}, Features {map<string, Feature> feature=1}, Feature {bytes_list=1, float_list=2, int64_list=3}.
Sources: TensorFlow's documentation of TFRecord and tf.train.Example, Google's of the protocol-buffer wire format.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastflower.errors import UserError
from fastflower.files import atomic_write
from fastflower.framing import frame, masked_crc

SUFFIXES = (".tfrec", ".tfrecord", ".tfrecords")
# flowers.tfrec, flowers.tfrecord-00000-of-00002, train-00000-of-01024; those that are compressed too, to be refused
_SHARD = re.compile(
    r"(.*\.tfrec(ords?)?([-_.]\d+-of-\d+)?|.*[-_.]\d{5,}-of-\d{5,})(\.(gz|gzip|zlib|bz2|xz|zst))?",
    re.IGNORECASE | re.DOTALL,
)
_ONE_OF = re.compile(r"(?P<before>.*[-_.])(?P<number>\d+)-of-(?P<count>\d+)(?P<after>.*)", re.DOTALL)
HEADER_BYTES, FOOTER_BYTES = 12, 4
_NUMBER = re.compile(r"-?[0-9]{1,18}")  # of a class; int64 holds more
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Example:
    """What one record says. A feature that the record lacks is None."""

    image: tuple[int, int] | None  # (offset in the file, length), in bytes
    id: str | None
    label: int | str | None  # a number, or the class's name


def is_shard(name: str) -> bool:
    """Whether a file's name is one of those that TFRecord files have, in any case."""
    return _SHARD.fullmatch(name) is not None


def missing_shards(paths: Iterable[Path]) -> list[str]:
    """A sentence for each set of files, named NUMBER-of-COUNT, of which some are not there."""
    numbers: dict[tuple[Path, str, str, str], set[int]] = {}
    for path in paths:
        if match := _ONE_OF.fullmatch(path.name):
            key = (path.parent, match["before"], match["count"], match["after"])
            numbers.setdefault(key, set()).add(int(match["number"]))
    sentences = []
    for (folder, before, count, after), present in sorted(numbers.items()):
        first = 1 if int(count) in present else 0
        if lacking := sorted(set(range(first, first + int(count))) - present):
            some = ", ".join(map(str, lacking[:5])) + (", …" if len(lacking) > 5 else "")
            sentences.append(
                f"{folder / f'{before}*-of-{count}{after}'}: {len(lacking)} of the {int(count)} files are missing "
                f"(number {some}): copy or download them."
            )
    return sentences


def scan(path: Path) -> Iterator[Example]:
    """Read every record of a TFRecord file; image bytes are located, not read.

    Raises:
        UserError: the file cannot be read, is no TFRecord, is cut off or empty, or a record is no tf.train.Example
            with `image` and `id` as one bytes value and `class` as one int64, or as its name.
    """
    for data, number, start, end in _frames(path):
        try:
            yield _parse_example(data, start, end)
        except (ValueError, IndexError) as error:
            reason = error.args[0] if isinstance(error, ValueError) else "it ends within a field"
            raise UserError(
                f"{path}, record {number} is not a tf.train.Example with image, id and class ({reason}): "
                "write it again or remove the file."
            ) from error


def damaged_payloads(path: Path) -> Iterator[int]:
    """The numbers of the records whose bytes do not match their CRC. It reads the whole file.

    Raises:
        UserError: the file cannot be read, is no TFRecord, is cut off or empty.
    """
    for data, number, start, end in _frames(path):
        (crc,) = struct.unpack_from("<I", data, end)
        if masked_crc(bytes(data[start:end])) != crc:
            yield number


def _frames(path: Path) -> Iterator[tuple[memoryview, int, int, int]]:
    """Of each record: the file's bytes, the record's number, start and end of its payload."""
    try:
        size = path.stat().st_size
        data = memoryview(np.memmap(path, np.uint8, "r")) if size else memoryview(b"")  # type: ignore[arg-type]
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): check that it exists and its permissions."
        ) from error
    if not size:
        raise UserError(f"{path} holds no records (0 bytes): copy or download it again.")
    position = number = 0
    while position < size:
        start, end = _frame(path, data, position, number)
        yield data, number, start, end
        position, number = end + FOOTER_BYTES, number + 1


def _frame(path: Path, data: memoryview, position: int, number: int) -> tuple[int, int]:
    """Start and end of the payload of the frame at `position`."""
    cut_off = f"{path} is cut off in record {number} (the file ends at byte {len(data)}): copy or download it again."
    if position + HEADER_BYTES > len(data):
        if number:
            raise UserError(cut_off)
        raise UserError(f"{path} is not a TFRecord file (it has only {len(data)} bytes).")
    header = bytes(data[position : position + HEADER_BYTES])
    length, crc = struct.unpack("<QI", header)
    if masked_crc(header[:8]) != crc:
        if number:
            raise UserError(f"{path} is damaged at record {number} (byte {position}): copy or download it again.")
        hint = " but gzip: decompress it first" if header[:2] == b"\x1f\x8b" else ": give TFRecord files"
        raise UserError(f"{path} is not a TFRecord file{hint}.")
    end = position + HEADER_BYTES + length
    if end + FOOTER_BYTES > len(data):
        raise UserError(cut_off)
    return position + HEADER_BYTES, end


def _parse_example(data: memoryview, start: int, end: int) -> Example:
    image = name = label = None
    for _, features_start, features_end in _messages(data, start, end, field=1):
        for _, entry_start, entry_end in _messages(data, features_start, features_end, field=1):
            key, value = b"", None
            for field, a, b in _messages(data, entry_start, entry_end):
                if field == 1:
                    key = bytes(data[a:b])
                elif field == 2:
                    value = (a, b)
            if value is None:
                continue
            if key == b"image":
                a, b = _one_bytes(data, *value, feature="image")
                image = (a, b - a)
            elif key == b"id":
                a, b = _one_bytes(data, *value, feature="id")
                name = _text(bytes(data[a:b]), feature="id")
            elif key == b"class":
                label = _class(data, *value)
    return Example(image, name, label)


def _fields(data: memoryview, position: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(field number, wire type, start, end) of each field; a varint's "start" is its value."""
    while position < end:
        tag, position = _varint(data, position)
        field, wire = tag >> 3, tag & 7
        if wire == _BYTES:
            length, position = _varint(data, position)
            if position + length > end:
                raise ValueError("a field is longer than its message")
            yield field, wire, position, position + length
            position += length
        elif wire == _VARINT:
            value, position = _varint(data, position)
            yield field, wire, value, position
        elif wire in (_FIXED64, _FIXED32):
            position += 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"unknown wire type {wire}")
    if position != end:
        raise ValueError("a field is longer than its message")


def _messages(data: memoryview, start: int, end: int, field: int | None = None) -> Iterator[tuple[int, int, int]]:
    for number, wire, a, b in _fields(data, start, end):
        if wire == _BYTES and field in (None, number):
            yield number, a, b


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80 and value < 1 << 64:
            return value, position
        if shift > 63:
            raise ValueError("a number is longer than 64 bits")


def _one_bytes(data: memoryview, start: int, end: int, feature: str) -> tuple[int, int]:
    values = [
        (a, b)
        for _, list_start, list_end in _messages(data, start, end, field=1)
        for _, a, b in _messages(data, list_start, list_end, field=1)
    ]
    if len(values) != 1:
        raise ValueError(f"feature '{feature}' is not one bytes value")
    return values[0]


def _text(data: bytes, feature: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"feature '{feature}' is not UTF-8 text") from error


def _class(data: memoryview, start: int, end: int) -> int | str | None:
    """A number, also where it is written as text, or a name; None where the text is empty."""
    if not any(True for _ in _messages(data, start, end, field=1)):
        return _one_int64(data, start, end)
    a, b = _one_bytes(data, start, end, feature="class")
    text = _text(bytes(data[a:b]), feature="class")
    return int(text) if _NUMBER.fullmatch(text) else text or None


def _one_int64(data: memoryview, start: int, end: int) -> int:
    values = []
    for _, list_start, list_end in _messages(data, start, end, field=3):
        for field, wire, a, b in _fields(data, list_start, list_end):
            if field == 1 and wire == _VARINT:
                values.append(a)
            elif field == 1 and wire == _BYTES:  # packed
                while a < b:
                    value, a = _varint(data, a)
                    values.append(value)
                if a > b:
                    raise ValueError("a number is longer than its list")
    if len(values) != 1:
        raise ValueError("feature 'class' is not one int64 value")
    return values[0] - (1 << 64) if values[0] >> 63 else values[0]


def write_tfrecord(path: Path, examples: Iterable[Mapping[str, bytes | int]]) -> None:
    """Write examples (feature name → bytes or int64) as a TFRecord file with CRCs; `path` appears when all are written.

    Raises:
        OSError: the folder cannot be written; nothing named `path` is left behind.
    """
    with atomic_write(path) as file:
        for example in examples:
            file.write(frame(encode_example(example)))


def encode_example(features: Mapping[str, bytes | int]) -> bytes:
    """The tf.train.Example message of features that each hold one bytes or int64 value."""
    entries = []
    for name, value in features.items():
        if isinstance(value, bytes):
            feature = _field(1, _field(1, value))
        else:
            feature = _field(3, _field(1, _encode_varint(value % (1 << 64))))
        entries.append(_field(1, _field(1, name.encode()) + _field(2, feature)))
    return _field(1, b"".join(entries))


def _field(number: int, payload: bytes) -> bytes:
    return _encode_varint(number << 3 | _BYTES) + _encode_varint(len(payload)) + payload


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
