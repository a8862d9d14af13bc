"""Pictures that DALI does not read have Pillow's pixels, upright, in whatever is done with them."""

from __future__ import annotations

from io import BytesIO
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from fastflower.arrays import Bytes
from fastflower.data import converted
from fastflower.data.contents import examined, require_pictures
from fastflower.data.converted import UnreadableError
from fastflower.data.decoding import decoded_pictures, shapes_of
from fastflower.data.geometry import centered
from fastflower.data.loader import Loader, Loading
from fastflower.data.reading import Reader, known_sound
from fastflower.data.records import Records, read_image
from fastflower.data.sampler import Request
from fastflower.data.soundness import convert
from fastflower.data.sources.folder import load_folder
from fastflower.data.view import Engine, View
from fastflower.errors import UserError
from tests.conftest import fastflower
from tests.data.kinds import CONVERTED, KINDS, encode, noise

ORIENTATIONS = range(1, 9)


def as_bytes(data: bytes) -> Bytes:
    return np.frombuffer(data, np.uint8)


def expected(encoded: bytes) -> Bytes:
    picture = ImageOps.exif_transpose(Image.open(BytesIO(encoded)))
    if picture.mode == "I;16":
        return np.repeat(np.rint(np.asarray(picture)[..., None] / 257).astype(np.uint8), 3, axis=2)
    return np.asarray(picture.convert("RGB"))


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def folder_of(root: Path) -> tuple[Records, list[Bytes]]:
    """A table of all kinds, among them those that DALI reads, and their pixels."""
    (root / "rose").mkdir(parents=True)
    files = {f"{number:02}.jpg": KINDS[name]() for number, name in enumerate(KINDS)}
    files |= {f"turned{way}.avif": encode(noise(44, 31, seed=way), "AVIF", exif=turned(way)) for way in ORIENTATIONS}
    for name, data in files.items():
        (root / "rose" / name).write_bytes(data)
    records = load_folder(root, "train").records
    return records, [expected(read_image(records, i).tobytes()) for i in range(len(records))]


def test_pixels_are_pillows_whoever_reads_them(tmp_path: Path) -> None:
    records, wanted = folder_of(tmp_path)
    everything = np.arange(len(records))
    for index, picture in decoded_pictures(records, everything, Engine(), lambda pixels: pixels):
        np.testing.assert_array_equal(picture, wanted[index], err_msg=records.describe(index))
    assert shapes_of(records).prod(axis=1).tolist() == [pixels.size // 3 for pixels in wanted]
    for table in (records, examined(records)):
        for decode, place in product(("whole", "region"), ("whole", "center")):
            view = View(crop=24, place=place)  # type: ignore[arg-type]
            loading = Loading(None, Engine(decode=decode), torch.device("cpu"))  # type: ignore[arg-type]
            loader = Loader(table, view, len(table), loading)
            for batch in loader.batches([as_stored(len(table))] * 2):
                for pixels, index in zip(batch.images.permute(0, 2, 3, 1).numpy(), batch.indices, strict=True):
                    picture = wanted[index]
                    if place == "center":
                        top, left = centered(np.array(picture.shape[:2]) - 24).tolist()
                        picture = picture[top : top + 24, left : left + 24]
                    np.testing.assert_array_equal(pixels, picture, err_msg=records.describe(index))


def as_stored(count: int) -> Request:
    return Request(np.arange(count), None, np.zeros((count, 2), np.float32), np.zeros(count, np.int32))


@pytest.mark.parametrize("name", sorted(CONVERTED))
def test_each_is_made_anew_for_each_reader_and_looked_up_once(tmp_path: Path, name: str) -> None:
    (tmp_path / "rose").mkdir()
    for number, data in enumerate((KINDS[name](), KINDS["JPEG"]())):
        (tmp_path / f"rose/{number}.jpg").write_bytes(data)
    records = examined(load_folder(tmp_path, "train").records)
    assert records.contents
    assert records.contents.converted.tolist() == [True, False]
    assert records.contents.sound.tolist() == [True, True]
    assert known_sound(records).tolist() == [False, True]
    reader = Reader(records, known_sound(records), threads=2)
    for indices in ([0, 1, 0], [1], [0]):
        for index, encoded in zip(indices, reader.read(np.array(indices)), strict=True):
            np.testing.assert_array_equal(encoded, convert(read_image(records, index)))


def test_phones_pictures_are_upright() -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    for orientation in ORIENTATIONS:
        data = encode(noise(40, 30), "HEIF", exif=turned(orientation).tobytes())
        pixels = np.asarray(Image.open(BytesIO(convert(as_bytes(data)).tobytes())))
        np.testing.assert_array_equal(pixels, expected(data))


def refused(tmp_path: Path, data: bytes) -> str:
    (tmp_path / "rose").mkdir(exist_ok=True)
    (tmp_path / "rose/picture.heic").write_bytes(data)
    with pytest.raises(UserError) as caught:
        require_pictures([load_folder(tmp_path, "train").records])
    assert str(tmp_path / "rose/picture.heic") in str(caught.value)
    return str(caught.value)


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0\0\x07\xd0mdat" + bytes(1992)


def test_without_its_package_heic_is_refused_by_a_sentence_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(converted, "_has_heif", lambda: False)
    assert "pip install pillow-heif" in refused(tmp_path, HEIC)
    done = fastflower("data", "check", tmp_path)
    assert done.code == 1
    assert "pip install pillow-heif" in " ".join((done.out + done.err).split())


def test_what_says_that_it_is_heic_and_is_not_is_refused(tmp_path: Path) -> None:
    assert "cannot be decoded as a picture" in refused(tmp_path, HEIC)


def test_a_picture_beyond_pillows_limit_is_refused_by_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode(noise(300, 200, "P"), "GIF")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    assert "it is too large: Image size (60000 pixels) exceeds limit" in refused(tmp_path, data)
    with pytest.raises(UnreadableError, match="too large"):
        convert(as_bytes(data))
