"""Which encoded bytes can be decoded."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastflower.data.decoding import decodable, has_header, is_sound
from tests.conftest import example


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
