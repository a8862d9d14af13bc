"""Orders that are computed where they are asked for: permutations, as even as numpy's, of all records or some."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastflower.arrays import Bools, Floats, Ints
from fastflower.data import shuffle
from fastflower.data.sampler import keyed_order, moved_position, training_requests
from fastflower.data.shuffle import KeptOrder

EPOCHS = 1500


def whole(count: int, *, seed: int = 3, epoch: int = 0) -> Ints:
    return keyed_order(count, seed=seed, epoch=epoch).part(0, count)


@given(st.integers(0, 5000), st.integers(0, 2**63 - 1), st.integers(0, 1000))
def test_each_record_comes_once(count: int, seed: int, epoch: int) -> None:
    order = whole(count, seed=seed, epoch=epoch)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(count))


@given(st.data(), st.integers(1, 3000))
def test_a_part_is_that_of_the_whole(data: st.DataObject, count: int) -> None:
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    part = keyed_order(count, seed=3, epoch=0).part(start, stop)
    np.testing.assert_array_equal(part, whole(count)[start:stop], strict=True)


def test_the_last_of_very_many_records_are_had_at_once() -> None:
    order = keyed_order(10**12, seed=0, epoch=0)
    records = order.part(10**12 - 1000, 10**12)
    assert len(set(records.tolist())) == 1000
    assert 0 <= records.min() < 10**10 < 99 * 10**10 < records.max() < 10**12


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    pairs = [(0, 0), (0, 1), (1, 0), (1, 1), (2**63 - 1, 0)]
    assert len({tuple(whole(200, seed=seed, epoch=epoch).tolist()) for seed, epoch in pairs}) == len(pairs)
    np.testing.assert_array_equal(whole(200, seed=1, epoch=1), whole(200, seed=1, epoch=1))


def test_pinned_numbers() -> None:
    """A run of an older version must go on as it was: these change only together with a note to the users."""
    assert keyed_order(100_000_000, seed=7, epoch=3).part(0, 4).tolist() == [32955960, 67239439, 55950871, 60194915]


# As even as numpy's: each figure below is measured of numpy's permutations too, under the same bound.


def numpys(count: int, *, epoch: int) -> Ints:
    return np.random.default_rng([5, epoch]).permutation(count)


@cache
def orders(kind: str, count: int, epochs: int) -> Ints:
    """[epochs, count], each row an epoch."""
    if kind == "numpy":
        return np.stack([numpys(count, epoch=epoch) for epoch in range(epochs)])
    return np.stack([whole(count, epoch=epoch) for epoch in range(epochs)])


def chi_square(counts: Floats | Ints, expected: float, freedom: int) -> float:
    """Of `freedom` degrees, in standard deviations from its mean."""
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


both = pytest.mark.parametrize("kind", ["keyed", "numpy"])


@both
@pytest.mark.parametrize("count", [17, 24, 32, 50])
def test_every_record_comes_everywhere_equally_often(kind: str, count: int) -> None:
    counts = np.zeros((count, count))
    for order in orders(kind, count, EPOCHS):
        counts[np.arange(count), order] += 1
    assert abs(chi_square(counts, EPOCHS / count, (count - 1) ** 2)) < 4


@both
@pytest.mark.parametrize("distance", [1, 2, 8, 16])
def test_two_positions_hold_every_pair_of_records_equally_often(kind: str, distance: int) -> None:
    count = 24
    drawn = orders(kind, count, EPOCHS)
    first, second = drawn[:, :-distance], drawn[:, distance:]
    gaps = np.bincount(((second - first) % count).ravel(), minlength=count)[1:]
    # the pairs of an epoch depend on each other: the bound is wide, and a linear order would be thousands away
    assert abs(chi_square(gaps, gaps.sum() / (count - 1), count - 2)) < 6


@both
@pytest.mark.parametrize("count", [24, 1000])
def test_fixed_points_are_one_on_average_and_poisson(kind: str, count: int) -> None:
    fixed = (orders(kind, count, EPOCHS) == np.arange(count)).sum(axis=1)
    assert abs(fixed.mean() - 1) < 4 / np.sqrt(EPOCHS)
    assert abs(fixed.var() - 1) < 4 * np.sqrt(3 / EPOCHS)
    assert abs((fixed == 0).mean() - np.exp(-1)) < 4 * np.sqrt(0.37 * 0.63 / EPOCHS)


def _standardized_bits(numbers: Ints) -> Floats:
    """[18, n], each with mean 0 and variance 1."""
    bits = (numbers >> np.arange(18)[:, None] & 1).astype(float)
    standardized: Floats = (bits - bits.mean(axis=1, keepdims=True)) / bits.std(axis=1, keepdims=True)
    return standardized


@both
def test_a_large_order_has_no_trend_and_no_echo(kind: str) -> None:
    count = 300_000  # of 2**19, so that cycle walking has its part
    order = whole(count) if kind == "keyed" else numpys(count, epoch=0)
    after = whole(count, epoch=1) if kind == "keyed" else numpys(count, epoch=1)
    places = order / count - 0.5
    pairs = [(places, np.arange(count) / count - 0.5), (places, after / count - 0.5)]
    pairs += [(places[lag:], places[:-lag]) for lag in (1, 2, 3, 64, 1024, 2048)]
    for one, other in pairs:
        assert abs((one * other).mean() * 12 * np.sqrt(count)) < 4.5
    records, positions = _standardized_bits(order), _standardized_bits(np.arange(count))
    assert np.abs(records @ positions.T).max() < 4.5 * np.sqrt(count)  # each bit of one against each of the other
    cells = np.histogram2d(np.arange(count), order, bins=64)[0]
    assert abs(chi_square(cells, count / 64**2, 63**2)) < 4.5


# Some of the records


@st.composite
def masks(draw: st.DrawFn) -> tuple[Bools, Bools]:
    """Which records of one table are kept, twice; at least one each time."""
    count = draw(st.integers(1, 60))
    chances = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    before, now = chances.random((2, count)) < draw(st.sampled_from([0.05, 0.5, 0.95]))
    before[draw(st.integers(0, count - 1))] = now[draw(st.integers(0, count - 1))] = True
    return before, now


@given(masks(), st.integers(0, 5), st.integers(1, 9), st.data())
def test_leaving_records_out_does_not_move_the_others(
    kept: tuple[Bools, Bools], epoch: int, block: int, data: st.DataObject
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shuffle, "_BLOCK", block)
        for mask in kept:
            order = KeptOrder(keyed_order(len(mask), seed=3, epoch=epoch), mask)
            names = np.flatnonzero(mask)
            wanted = [name for name in whole(len(mask), epoch=epoch).tolist() if mask[name]]
            start = data.draw(st.integers(0, len(names)))
            stop = data.draw(st.integers(start, len(names)))
            assert names[order.part(start, stop)].tolist() == wanted[start:stop]


@given(masks(), st.integers(0, 5), st.integers(1, 9), st.data())
def test_an_epoch_goes_on_with_the_rest_of_what_is_kept_now(
    kept: tuple[Bools, Bools], epoch: int, block: int, data: st.DataObject
) -> None:
    before, now = kept
    position = data.draw(st.integers(0, int(before.sum())))
    order = whole(len(before), epoch=epoch)
    turn = int(np.flatnonzero(before[order])[position - 1]) + 1 if position else 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shuffle, "_BLOCK", block)
        moved = moved_position(position, before, now, seed=3, epoch=epoch, keyed=True)
    assert moved == now[order[:turn]].sum()


@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 3), st.sampled_from([None, 0.5]))
def test_ranks_and_resuming_share_one_stream(ranks: int, share: int, steps: int, left: float | None) -> None:
    count, batch = 40, ranks * share
    kept = None if left is None else np.random.default_rng(0).random(count) < left
    number = count if kept is None else int(kept.sum())
    order = whole(count) if kept is None else (np.cumsum(kept) - 1)[[r for r in whole(count) if kept[r]]]

    def indices(start: int, rank: int) -> list[list[int]]:
        requests = training_requests(
            number, seed=3, epoch=0, scale=(256, 480), global_batch=batch, start=start, rank=rank, world_size=ranks,
            kept=kept, keyed=True,
        )  # fmt: skip
        return [request.indices.tolist() for request in requests]

    parts = [indices(steps * batch, rank) for rank in range(ranks)]
    stream = [index for step in zip(*parts, strict=True) for part in step for index in part]
    assert stream == order[steps * batch :][: len(stream)].tolist()
    assert len(stream) == max(0, (number - steps * batch) // batch * batch)
