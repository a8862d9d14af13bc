"""From encoded bytes to pixels: which can be decoded, and small pictures to look at, against PIL."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from fastflower.arrays import Bytes
from fastflower.data.decoding import BATCH, ShapeDecoder, decodable, thumbnails
from fastflower.data.records import Records
from fastflower.data.soundness import has_header, is_sound
from fastflower.data.sources.kaggle import load_split
from fastflower.data.sources.tfrecord import write_tfrecord
from fastflower.data.view import Engine
from fastflower.errors import UserError
from tests.conftest import READABLE, example, jpeg


@pytest.mark.parametrize("name", ["truncated.jpg", "zero_bytes.jpg", "html_error_page.jpg"])
def test_files_that_no_decoder_reads(odd_images: Path, name: str) -> None:
    assert not decodable(np.fromfile(odd_images / name, np.uint8))


def test_a_header_tells_pictures_from_other_files() -> None:
    whole = example(0, 0)["image"]
    assert isinstance(whole, bytes)
    for data, has in ((whole, True), (whole[:-200], True), (whole[:30], False), (b"no picture", False), (b"", False)):
        assert has_header(np.frombuffer(data, np.uint8)) == has


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_what_is_cut_off_anywhere_is_not_sound(kind: str) -> None:
    buffer = BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    whole = buffer.getvalue()
    assert is_sound(np.frombuffer(whole, np.uint8))
    assert is_sound(np.frombuffer(whole + b"more", np.uint8))
    for length in (*range(0, len(whole), 97), len(whole) - 1):
        cut = np.frombuffer(whole[:length], np.uint8)
        assert not is_sound(cut), length


def test_shapes_are_those_of_upright_pictures_and_zero_of_broken_ones(odd_images: Path) -> None:
    rng = np.random.default_rng(0)
    pictures: list[tuple[bytes, tuple[int, int]]] = []
    for name in READABLE:
        upright = ImageOps.exif_transpose(Image.open(odd_images / name))
        pictures.append(((odd_images / name).read_bytes(), (upright.height, upright.width)))
    for width, height in rng.integers(8, 90, (2 * BATCH, 2)).tolist():
        whole = jpeg(width, height)
        pictures.append((whole, (height, width)) if rng.random() < 0.8 else (whole[:200], (0, 0)))
    decoder = ShapeDecoder(threads=2)
    for _ in range(6):  # it goes on after broken ones
        chosen = rng.choice(len(pictures), rng.integers(1, BATCH + 1), replace=False).tolist()
        shapes = decoder.shapes([np.frombuffer(pictures[i][0], np.uint8) for i in chosen])
        assert shapes.tolist() == [list(pictures[i][1]) for i in chosen]


def records_of(folder: Path, images: list[bytes]) -> Records:
    write_tfrecord(folder / "train" / "a.tfrec", [example(i, 0, image) for i, image in enumerate(images)])
    return load_split(folder, "train")


def expected(encoded: bytes, side: int) -> Bytes:
    """Upright, the longer side `side` pixels, by PIL."""
    picture = ImageOps.exif_transpose(Image.open(BytesIO(encoded))).convert("RGB")
    scale = side / max(picture.size)
    width, height = (max(1, round(scale * pixels)) for pixels in picture.size)
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))


def test_pictures_come_in_the_order_asked_for_with_their_longer_side_as_asked(tmp_path: Path) -> None:
    shapes = [(40 + 7 * i, 90 - 2 * i) for i in range(20)]  # more than a batch, wide ones and tall ones
    images = [jpeg(width, height, seed) for seed, (width, height) in enumerate(shapes)]
    order = [*range(19, -1, -2), 3, 3, 0]
    small = thumbnails(records_of(tmp_path, images), order, 48, Engine())
    assert len(small) == len(order)
    for index, picture in zip(order, small, strict=True):
        wanted = expected(images[index], 48)
        assert picture.dtype == np.uint8
        assert picture.shape == wanted.shape
        assert max(picture.shape) == 48
        assert np.abs(picture.astype(int) - wanted).max() <= 4


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_odd_pictures_are_shown_as_they_are_meant(tmp_path: Path, odd_images: Path) -> None:
    images = [(odd_images / name).read_bytes() for name in READABLE]
    small = thumbnails(records_of(tmp_path, images), np.arange(len(images)), 160, Engine())
    for name, image, picture in zip(READABLE, images, small, strict=True):
        wanted = expected(image, 160)
        assert picture.shape == wanted.shape, name
        assert np.abs(picture.astype(int) - wanted).mean() < 1, name


def test_nothing_asked_for_is_nothing(tmp_path: Path) -> None:
    assert thumbnails(records_of(tmp_path, [jpeg(40, 40)]), [], 32, Engine()) == []


@pytest.mark.parametrize("broken", [jpeg(40, 40)[:300], b"<html>404</html>"], ids=["cut", "no picture"])
def test_a_record_that_cannot_be_decoded_is_named(tmp_path: Path, broken: bytes) -> None:
    records = records_of(tmp_path, [jpeg(40, 40), broken, jpeg(40, 40)])
    assert len(thumbnails(records, [0, 2], 32, Engine())) == 2
    with pytest.raises(UserError, match=r"a\.tfrec, record 1 \(id 000001\) cannot be decoded"):
        thumbnails(records, [0, 1], 32, Engine())
