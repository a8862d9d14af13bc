"""Pieces of bounded bytes, and what comes out of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastflower.data import view
from fastflower.data.decoding import decoded_batches, decoded_pictures
from fastflower.data.pieces import pieces
from fastflower.data.sources.kaggle import load_split
from fastflower.data.stats import pixel_statistics
from fastflower.data.view import Engine, View
from tests.data.test_loader import epoch, loader


@given(st.lists(st.integers(0, 50)), st.integers(1, 60), st.integers(1, 9) | st.none())
def test_pieces_are_all_pictures_in_order_within_the_bounds_and_no_smaller_than_need_be(
    sizes: list[int], most: int, count: int | None
) -> None:
    made = list(pieces(np.array(sizes, np.int64), most, count))
    assert [i for piece in made for i in range(piece.start, piece.stop)] == list(range(len(sizes)))
    for number, piece in enumerate(made):
        alone = piece.stop - piece.start == 1
        assert alone or sum(sizes[piece]) <= most
        assert not count or piece.stop - piece.start <= count
        if number + 1 < len(made) and piece.stop - piece.start != count:
            assert sum(sizes[piece.start : piece.stop + 1]) > most


@pytest.mark.parametrize("place", ["random", "center", "whole"])
@pytest.mark.parametrize("most", [1, 9000, 20000])
def test_batches_do_not_depend_on_their_pieces(
    small: Path, place: Any, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = load_split(small, "train")
    wanted = epoch(loader(records, View(32, place), 8))
    monkeypatch.setattr(view, "PIECE", most)
    for one, other in zip(epoch(loader(records, View(32, place), 8)), wanted, strict=True):
        assert torch.equal(one.images, other.images)
        assert one.indices.tolist() == other.indices.tolist()


def test_what_is_decoded_at_once_is_bounded(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In statistics, which stay the same, and for whoever else asks for decoded pictures."""
    records, engine = load_split(small, "train"), Engine(threads=1)
    everything = np.arange(len(records))
    numbers = [(i, np.array(picture)) for i, picture in decoded_pictures(records, everything, engine, lambda x: x)]
    measured = pixel_statistics(records, engine)
    largest = max(picture.nbytes for _, picture in numbers)
    assert [len(batch) for batch, _ in decoded_batches(records, everything, engine, lambda x: x)] == [32, 16]
    monkeypatch.setattr(view, "PIECE", 3 * largest)
    parts = [
        (batch, [np.array(picture) for picture in pictures])
        for batch, pictures in decoded_batches(records, everything, engine, lambda x: x)
    ]
    assert all(len(batch) == 1 or sum(p.nbytes for p in pictures) <= 3 * largest for batch, pictures in parts)
    assert len(parts) >= len(records) // 4
    for (i, picture), (j, other) in zip(
        [(i, p) for batch, pictures in parts for i, p in zip(batch.tolist(), pictures, strict=True)],
        numbers,
        strict=True,
    ):
        assert i == j
        np.testing.assert_array_equal(picture, other)
    monkeypatch.setenv("FASTFLOWER_CACHE", str(small / "none"))
    assert pixel_statistics(records, engine).normalization == measured.normalization
