"""TFRecord files against the independent package `tfrecord` (protobuf, crc32c), and the ways a file can be broken."""

from __future__ import annotations

import gzip
import itertools
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tfrecord import example_pb2
from tfrecord.reader import tfrecord_loader
from tfrecord.writer import TFRecordWriter

from fastflower.data.sources.tfrecord import encode_example, scan, write_tfrecord
from fastflower.errors import UserError
from fastflower.framing import masked_crc
from tests.conftest import example, jpeg

FEATURES = {"image": ([b"pixels"], "byte"), "id": ([b"a1"], "byte"), "class": ([7], "int")}


def frame(payload: bytes) -> bytes:
    """One record as the format's documentation has it, with the other package's CRC."""
    length = struct.pack("<Q", len(payload))
    framed: bytes = length + TFRecordWriter.masked_crc(length) + payload + TFRecordWriter.masked_crc(payload)
    return framed


def field(number: int, payload: bytes) -> bytes:
    """A length-delimited protocol-buffer field, its length as a number of two bytes."""
    assert number < 16
    assert len(payload) < 1 << 14
    return bytes([number << 3 | 2, len(payload) & 0x7F | 0x80, len(payload) >> 7]) + payload


def message(**features: bytes) -> bytes:
    """An Example from serialized Feature messages."""
    return field(1, b"".join(field(1, field(1, k.encode()) + field(2, v)) for k, v in features.items()))


def load(path: Path) -> list[tuple[bytes | None, str | None, int | str | None]]:
    """All records of a file with the image bytes that they point to."""
    data = path.read_bytes()
    return [(e.image and data[e.image[0] : sum(e.image)], e.id, e.label) for e in scan(path)]


def refusal(path: Path) -> str:
    """The message with which a file is refused: one sentence that names it."""
    with pytest.raises(UserError) as caught:
        list(scan(path))
    text = str(caught.value)
    assert str(path) in text
    assert text.endswith(".")
    assert "\n" not in text
    assert ". " not in text.replace(str(path), "")
    return text


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "some.tfrec"


# Round trips


def test_reads_what_the_other_package_writes(path: Path) -> None:
    images = [jpeg(40 + i, 30, seed=i) for i in range(5)]
    writer = TFRecordWriter(str(path))
    for i, image in enumerate(images):
        writer.write({"image": (image, "byte"), "id": (f"{i:09x}".encode(), "byte"), "class": (i - 2, "int")})
    writer.close()
    assert load(path) == [(image, f"{i:09x}", i - 2) for i, image in enumerate(images)]


def test_the_other_package_reads_what_is_written(path: Path) -> None:
    # One image needs a one-byte, one a two-byte and one a three-byte length.
    images = [b"", b"x" * 300, np.random.default_rng(0).bytes(70_000)]
    labels = [-(2**63), 2**63 - 1, 103]
    write_tfrecord(path, ({"id": b"0", "image": m, "class": k} for m, k in zip(images, labels, strict=True)))
    read = list(tfrecord_loader(str(path), None, {"id": "byte", "image": "byte", "class": "int"}))
    assert [r["image"] for r in read] == images
    assert [r["class"].tolist() for r in read] == [[k] for k in labels]
    assert [r["id"] for r in read] == [b"0"] * 3


def test_written_bytes_are_those_of_the_other_package(path: Path, tmp_path: Path) -> None:
    features: dict[str, bytes | int] = {"image": jpeg(40, 40), "id": "é花".encode(), "class": -3}
    write_tfrecord(path, [features])
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    payload = data[12 : 12 + length]
    assert data == frame(payload)
    message = example_pb2.Example.FromString(payload)
    assert message.features.feature["class"].int64_list.value[:] == [-3]
    assert message.features.feature["id"].bytes_list.value[:] == ["é花".encode()]
    assert set(message.features.feature) == set(features)


@pytest.mark.parametrize("data", [b"", b"\0" * 8, b"123456789", bytes(range(256)) * 9])
def test_masked_crc(data: bytes) -> None:
    assert struct.pack("<I", masked_crc(data)) == TFRecordWriter.masked_crc(data)


def test_masked_crc_of_the_published_check_value() -> None:
    # CRC-32C("123456789") is E3069283 in the catalogue of CRC algorithms; masked by hand.
    assert masked_crc(b"123456789") == ((0xE3069283 >> 15 | 0xE3069283 << 17 & 0xFFFFFFFF) + 0xA282EAD8) % 2**32


# What a record may look like


@pytest.mark.parametrize("names", list(itertools.permutations(["image", "id", "class", "other"])))
def test_features_in_any_order(path: Path, names: tuple[str, ...]) -> None:
    features: dict[str, bytes | int] = {"image": b"pixels", "id": b"a1", "class": 7, "other": 12}
    write_tfrecord(path, [{name: features[name] for name in names}])
    assert load(path) == [(b"pixels", "a1", 7)]


def test_foreign_features_are_skipped(path: Path) -> None:
    foreign = {
        "box": ([0.5, 1.5], "float"),
        "names": ([b"x", b"yy"], "byte"),
        "counts": ([1, 2, 3], "int"),
        "empty": ([], "byte"),
        "Image": ([b"no"], "byte"),
        "image/id": ([b"no"], "byte"),
    }
    writer = TFRecordWriter(str(path))
    writer.write(foreign | FEATURES)
    writer.write(FEATURES | foreign)
    writer.close()
    assert load(path) == [(b"pixels", "a1", 7)] * 2


@pytest.mark.parametrize(
    "unknown",
    [
        pytest.param(b"\x48\x96\x01", id="varint"),
        pytest.param(b"\x49" + b"\x0a" * 8, id="fixed64"),
        pytest.param(b"\x4a\x03\x0a\x01x", id="bytes"),
        pytest.param(b"\x4d" + b"\x0a" * 4, id="fixed32"),
        pytest.param(b"\xfa\xff\xff\xff\x0f\x01x", id="large field number"),
    ],
)
def test_unknown_fields_are_skipped_at_every_level(path: Path, unknown: bytes) -> None:
    image = field(1, unknown + field(1, b"pixels") + unknown)
    label = unknown + field(3, unknown + b"\x08\x07" + unknown)
    entries = unknown.join(
        field(1, field(1, key) + field(2, unknown + value + unknown))
        for key, value in ((b"image", image), (b"class", label))
    )
    payload = unknown + field(1, unknown + entries + unknown) + unknown
    assert example_pb2.Example.FromString(payload).features.feature["class"].int64_list.value[:] == [7]
    path.write_bytes(frame(payload))
    assert load(path) == [(b"pixels", None, 7)]


@pytest.mark.parametrize("label", [0, 1, 127, 128, 103, -1, -5, 2**31, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("packed", [True, False])
def test_packed_and_unpacked_class(path: Path, label: int, packed: bool) -> None:
    # protobuf writes packed; older writers give each value its own tag.
    serialized = example_pb2.Int64List(value=[label]).SerializeToString()
    assert serialized[0] == 0x0A
    values = serialized if packed else b"\x08" + serialized[2:]
    assert example_pb2.Int64List.FromString(values).value[:] == [label]
    path.write_bytes(frame(message(**{"class": field(3, values)})))
    assert load(path) == [(None, None, label)]


@pytest.mark.parametrize("name", ["", "0", "007", "000", "1e5", "-1", "a b", " a ", "é", "花", "🌸", "x" * 500])
def test_an_id_is_text_as_it_stands(path: Path, name: str) -> None:
    write_tfrecord(path, [{"id": name.encode(), "image": b"m"}])
    assert load(path) == [(b"m", name, None)]


def test_what_a_record_lacks_is_none(path: Path) -> None:
    write_tfrecord(path, [{}, {"image": b"m"}, {"id": b"i"}, {"class": 0}])
    assert load(path) == [(None, None, None), (b"m", None, None), (None, "i", None), (None, None, 0)]


def test_an_empty_image_is_not_a_missing_one(path: Path) -> None:
    write_tfrecord(path, [{"image": b""}])
    (record,) = scan(path)
    assert record.image is not None
    assert record.image[1] == 0


def test_of_a_repeated_key_the_last_counts(path: Path) -> None:
    # A protocol-buffer map is a list of entries, of which readers keep the last.
    path.write_bytes(frame(encode_example({"id": b"old", "class": 1}) + encode_example({"id": b"new", "class": 2})))
    assert load(path) == [(None, "new", 2)]


# What is refused


def test_missing_file(path: Path) -> None:
    assert "cannot be read (No such file or directory)" in refusal(path)


def test_folder(path: Path) -> None:
    path.mkdir()
    assert "cannot be read (Is a directory)" in refusal(path)


def test_empty_file(path: Path) -> None:
    path.touch()
    assert "holds no records (0 bytes)" in refusal(path)


RECORDS = [frame(encode_example({"image": bytes([65 + i]) * (i + 1), "id": b"%d" % i, "class": i})) for i in range(3)]
WHOLE = b"".join(RECORDS)
STARTS = list(itertools.accumulate(map(len, RECORDS), initial=0))


def test_cut_off_at_every_byte(path: Path) -> None:
    for cut in sorted(set(range(1, len(WHOLE))) - set(STARTS)):
        path.write_bytes(WHOLE[:cut])
        number = sum(start <= cut for start in STARTS) - 1
        if cut < 12:  # not even a header to tell what it is
            assert f"is not a TFRecord file (it has only {cut} bytes)" in refusal(path)
        else:
            assert f"is cut off in record {number} (the file ends at byte {cut})" in refusal(path)
        whole_records = itertools.islice(scan(path), number)
        assert [record.label for record in whole_records] == list(range(number))


def test_between_records_a_cut_leaves_a_file_that_reads(path: Path) -> None:
    path.write_bytes(WHOLE[: STARTS[2]])
    assert load(path) == [(b"A", "0", 0), (b"BB", "1", 1)]


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        pytest.param(b"id,label\n" * 9, "give TFRecord files", id="text"),
        pytest.param(b"<!DOCTYPE html><html>404</html>", "give TFRecord files", id="html"),
        pytest.param(jpeg(16, 16), "give TFRecord files", id="jpeg"),
        pytest.param(b"\0" * 64, "give TFRecord files", id="zeros"),
        pytest.param(b"\xff" * 64, "give TFRecord files", id="ones"),
        pytest.param(gzip.compress(WHOLE), "but gzip: decompress it first", id="gzip"),
    ],
)
def test_other_kinds_of_file(path: Path, content: bytes, hint: str) -> None:
    path.write_bytes(content)
    text = refusal(path)
    assert "is not a TFRecord file" in text
    assert hint in text


def test_damaged_later_header(path: Path) -> None:
    for bit in range(12 * 8):
        data = bytearray(WHOLE)
        data[STARTS[1] + bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        assert f"is damaged at record 1 (byte {STARTS[1]})" in refusal(path)


def test_length_beyond_the_file_with_a_right_crc(path: Path) -> None:
    length = struct.pack("<Q", 2**64 - 1)
    path.write_bytes(WHOLE + length + TFRecordWriter.masked_crc(length) + b"x" * 50)
    assert "is cut off in record 3" in refusal(path)


ONE = field(1, b"x")  # a BytesList of one value


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        pytest.param(b"just some text that is no message", "", id="text"),
        pytest.param(jpeg(16, 16), "", id="jpeg"),
        pytest.param(b"\x0a\x7fshort", "longer than its message", id="length beyond the record"),
        pytest.param(b"\x0a", "", id="tag without a length"),
        pytest.param(b"\xff" * 11, "longer than 64 bits", id="endless number"),
        pytest.param(b"\x4d\0\0", "longer than its message", id="cut fixed32"),
        pytest.param(b"\x0b\x0c", "wire type", id="group"),
        pytest.param(
            message(image=field(1, ONE + ONE)), "'image' is not one bytes value", id="image twice in the list"
        ),
        pytest.param(message(image=field(1, b"")), "'image' is not one bytes value", id="image list empty"),
        pytest.param(message(image=b""), "'image' is not one bytes value", id="image feature empty"),
        pytest.param(message(image=field(3, b"\x08\x01")), "'image' is not one bytes value", id="image as int"),
        pytest.param(message(id=field(3, b"\x08\x01")), "'id' is not one bytes value", id="id as int"),
        pytest.param(message(id=field(1, field(1, b"\xff\xfe"))), "utf-8", id="id not UTF-8"),
        pytest.param(
            message(**{"class": field(2, field(1, struct.pack("<f", 3)))}),
            "'class' is not one int64",
            id="class as float",
        ),
        pytest.param(
            message(**{"class": field(1, field(1, b"\xff"))}), "'class' is not UTF-8 text", id="class as bytes"
        ),
        pytest.param(
            message(**{"class": field(1, field(1, b"a") + field(1, b"b"))}), "'class' is not one bytes", id="two names"
        ),
        pytest.param(message(**{"class": field(3, b"\x0a\x02\x01\x02")}), "'class' is not one int64", id="class twice"),
        pytest.param(message(**{"class": field(3, b"\x08\x01\x08\x01")}), "'class' is not one int64", id="two classes"),
        pytest.param(message(**{"class": field(3, b"")}), "'class' is not one int64", id="class list empty"),
    ],
)
def test_payload_that_is_no_such_example(path: Path, payload: bytes, reason: str) -> None:
    path.write_bytes(WHOLE + frame(payload))
    text = refusal(path)
    assert "record 3 is not a tf.train.Example" in text
    assert reason.lower() in text.lower()


def test_a_number_that_runs_on_to_the_end_of_the_file(path: Path) -> None:
    path.write_bytes(WHOLE + frame(b"\xff")[:-4] + b"\xff" * 4)
    assert "record 3 is not a tf.train.Example" in refusal(path)


# Writing


def test_nothing_is_left_when_the_examples_raise(tmp_path: Path) -> None:
    def examples() -> Iterator[dict[str, bytes | int]]:
        yield example(0, 0)
        raise RuntimeError("decoder")

    with pytest.raises(RuntimeError, match="decoder"):
        write_tfrecord(tmp_path / "new.tfrec", examples())
    assert list(tmp_path.iterdir()) == []


def test_the_old_file_stays_when_the_examples_raise(path: Path) -> None:
    path.write_bytes(WHOLE)
    with pytest.raises(AttributeError):
        write_tfrecord(path, [example(0, 0), None])  # type: ignore[list-item]
    assert path.read_bytes() == WHOLE
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c.tfrec"
    write_tfrecord(path, [example(1, 2)])
    assert len(load(path)) == 1


# Fuzzing: whatever the bytes, records or a sentence

edits = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8)
fuzz = settings(
    max_examples=1000,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # each example overwrites the one file
)


def mutate(data: bytes, edits: list[tuple[int, int]]) -> bytes:
    out = bytearray(data)
    for position, byte in edits:
        out[position % len(out)] = byte
    return bytes(out)


def records_or_sentence(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        records = list(scan(path))
    except UserError:
        refusal(path)
    else:
        images = [record.image for record in records if record.image is not None]
        assert all(0 <= offset <= offset + length <= len(data) for offset, length in images)


@pytest.mark.slow
@fuzz
@given(edits=edits, keep=st.integers(1, len(WHOLE)))
def test_mutated_files(path: Path, edits: list[tuple[int, int]], keep: int) -> None:
    records_or_sentence(path, mutate(WHOLE, edits)[:keep])


@pytest.mark.slow
@fuzz
@given(edits=edits, number=st.integers(0, 2), keep=st.integers(1, 100))
def test_mutated_payloads_in_sound_frames(path: Path, edits: list[tuple[int, int]], number: int, keep: int) -> None:
    # Without sound CRCs nearly all mutations would be stopped at the header.
    records_or_sentence(path, frame(mutate(RECORDS[number][12:-4], edits)[:keep]) + WHOLE)


@pytest.mark.slow
@fuzz
@given(payload=st.binary(max_size=60))
def test_random_payloads(path: Path, payload: bytes) -> None:
    records_or_sentence(path, frame(payload))
    records_or_sentence(path, frame(field(1, field(1, field(1, b"class") + field(2, payload)))))
