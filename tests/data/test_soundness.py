"""What is a whole picture, by its structure, against Pillow: over kinds, places where it is cut, and damage."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageOps

from fastflower.arrays import Bytes
from fastflower.data.converted import UnreadableError
from fastflower.data.decoding import decodable
from fastflower.data.soundness import convert, is_cut_off, is_sound, needs_conversion, size_of
from tests.data.kinds import CONVERTED, KINDS, encode, noise


def as_bytes(data: bytes) -> Bytes:
    return np.frombuffer(data, np.uint8)


def with_segment(jpeg: bytes, marker: int, body: bytes) -> bytes:
    return jpeg[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


@pytest.mark.parametrize("name", KINDS)
def test_whole_pictures_are_sound_and_have_pillows_size(name: str) -> None:
    whole = KINDS[name]()
    followed = () if "AVIF" in name else (whole + b"more", whole + encode(noise(8, 8), "JPEG"))  # Pillow refuses those
    for data in (whole, *followed):
        assert is_sound(as_bytes(data))
        assert size_of(as_bytes(data)) == Image.open(BytesIO(whole)).size[::-1]
    assert needs_conversion(as_bytes(whole)) == (name in CONVERTED)


@pytest.mark.parametrize("name", KINDS)
def test_what_is_cut_off_anywhere_is_not_sound(name: str) -> None:
    whole = KINDS[name]()
    lengths = np.random.default_rng(0).integers(0, len(whole) - 1, 25).tolist()
    for length in (*range(40), *lengths, len(whole) - 200, len(whole) - 20):
        cut = as_bytes(whole[:length])
        if name in ("MPO", "moving GIF") or ("TIFF" in name and is_sound(cut)):  # the last bytes are not the picture's
            assert decodable(cut) == is_sound(cut)
            continue
        assert not is_sound(cut), length
        with pytest.raises(UnreadableError):
            convert(cut)


def thumbnails_within() -> Iterator[bytes]:
    """Camera pictures: a JPEG, or several, within one's segments, of which the first is EXIF or not."""
    whole, small = encode(noise(90, 70), "JPEG"), encode(noise(16, 16), "JPEG")
    for marker in (0xE0, 0xE1, 0xE2, 0xED, 0xFE):
        yield with_segment(whole, marker, b"Exif\0\0" + small)
        yield with_segment(with_segment(whole, marker, small + small), 0xE1, b"\xff\xd9" * 40)
    progressive = encode(noise(90, 70), "JPEG", progressive=True)
    yield with_segment(progressive, 0xE1, small)
    yield whole[:2] + b"\xff\xff\xff" + whole[2:]  # fill bytes before a marker
    yield encode(noise(90, 70), "JPEG", restart_marker_blocks=1)


@pytest.mark.parametrize("whole", list(thumbnails_within()))
def test_a_thumbnails_end_is_not_the_pictures(whole: bytes) -> None:
    assert is_sound(as_bytes(whole))
    assert decodable(as_bytes(whole))
    for missing in (1, 2, 3, len(whole) // 50, len(whole) // 4):
        cut = whole[:-missing]
        assert is_cut_off(as_bytes(cut))
        with pytest.raises(OSError):  # noqa: PT011 - Pillow thinks the same
            Image.open(BytesIO(cut)).load()


def test_a_second_picture_does_not_replace_the_end_of_the_first_header() -> None:
    whole = encode(noise(40, 30), "JPEG")
    scan = whole.index(b"\xff\xda")
    for length in range(2, scan + 4, 7):
        assert not decodable(as_bytes(whole[:length] + b"\xff\xd9"))


def test_webp_with_exif_after_a_chunk_of_any_length_is_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    padded = 0
    for width in range(20, 36):
        picture = noise(width, 17)
        data = as_bytes(encode(picture, "WEBP", lossless=True, exif=exif.tobytes()))
        padded += needs_conversion(data)
        assert is_sound(data)
        assert size_of(data) == (17, width)
        assert decodable(data)
        if needs_conversion(data):
            pixels = np.asarray(Image.open(BytesIO(convert(data).tobytes())))
            np.testing.assert_array_equal(pixels, np.rot90(np.asarray(picture), -1))
    assert 0 < padded < 16


@pytest.mark.parametrize("name", KINDS)
def test_damaged_pictures_are_read_or_refused_but_nothing_else(name: str) -> None:
    """Nor do they end the process, as damaged JPEG 2000 did."""
    whole, rng = KINDS[name](), np.random.default_rng(len(name))
    for _ in range(12):
        damaged = bytearray(whole)
        for place in rng.integers(4, min(len(whole), 300) if rng.random() < 0.5 else len(whole), 4).tolist():
            damaged[place] = int(rng.integers(256))
        data = as_bytes(bytes(damaged))
        readable = decodable(data)
        if readable:
            assert is_sound(data)


def exif_block(orientation: int, more: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "c" * more
    return exif.tobytes()


def with_exif(encoded: bytes, block: bytes) -> bytes:
    """A JPEG, or a PNG after whose header it goes, with one more EXIF block before the others."""
    if encoded.startswith(b"\xff\xd8"):
        return with_segment(encoded, 0xE1, block)
    chunk = b"eXIf" + block.removeprefix(b"Exif\0\0")
    framed = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return encoded[:33] + framed + encoded[33:]


@pytest.mark.parametrize(("kind", "chosen"), [("JPEG", 0), ("PNG", -1)])
def test_one_of_several_exif_blocks_says_how_a_picture_is_turned(kind: str, chosen: int) -> None:
    """As Pillow has it; DALI 2.4 corrupts its memory where one block turns a picture and another does not."""
    rng, picture = np.random.default_rng(0), noise(48, 32)
    plain = encode(picture, kind)
    for _ in range(40):
        orientations = rng.integers(1, 9, int(rng.integers(2, 4))).tolist()
        data = plain
        for orientation in orientations[::-1]:
            data = with_exif(data, exif_block(orientation, int(rng.integers(1, 400))))
        whole = as_bytes(data)
        assert is_sound(whole)
        assert needs_conversion(whole)
        assert size_of(whole) == (32, 48)
        expected = as_bytes(with_exif(plain, exif_block(orientations[chosen], 1)))
        pixels = [
            np.asarray(ImageOps.exif_transpose(Image.open(BytesIO(one.tobytes()))))
            for one in (whole, convert(whole), expected)
        ]
        np.testing.assert_array_equal(pixels[0], pixels[2])
        np.testing.assert_array_equal(pixels[1], pixels[2])
        assert not needs_conversion(convert(whole))
        assert decodable(whole)
        with pytest.raises(UnreadableError):
            convert(whole[: -len(plain) // 4])
