"""Which encoded bytes can be decoded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastflower.data.decoding import decodable, has_header
from tests.conftest import example


@pytest.mark.parametrize("name", ["truncated.jpg", "zero_bytes.jpg", "html_error_page.jpg"])
def test_files_that_no_decoder_reads(odd_images: Path, name: str) -> None:
    assert not decodable(np.fromfile(odd_images / name, np.uint8))


def test_a_header_tells_pictures_from_other_files() -> None:
    whole = example(0, 0)["image"]
    assert isinstance(whole, bytes)
    for data, has in ((whole, True), (whole[:-200], True), (whole[:30], False), (b"no picture", False), (b"", False)):
        assert has_header(np.frombuffer(data, np.uint8)) == has
