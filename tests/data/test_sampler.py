"""The sampler: pure functions of (seed, epoch, position), with the distributions they promise."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastflower.arrays import Bools, Int32s, Singles
from fastflower.data.sampler import (
    Request,
    augmentation,
    balanced_order,
    evaluation_requests,
    kept_order,
    moved_position,
    normals,
    permutation,
    training_requests,
)

SCALE = (256, 480)
LABELS = np.repeat([0, 5, 7, 2], [200, 3, 40, 1])[permutation(244, seed=1, epoch=0)]  # classes 1, 3, 4, 6 are empty


def joined(requests: list[Request]) -> tuple[np.ndarray, ...]:
    """All columns of several requests, one after another."""
    names = ("indices", "shorter", "crop_yx", "mirror")
    return tuple(np.concatenate([getattr(r, name) for r in requests]) for name in names)


def assert_same(a: tuple[np.ndarray, ...], b: tuple[np.ndarray, ...]) -> None:
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y, strict=True)


def epoch(
    count: int = 100, *, global_batch: int = 12, start: int = 0, rank: int = 0, world_size: int = 1, number: int = 3
) -> list[Request]:
    return list(
        training_requests(
            count,
            seed=7,
            epoch=number,
            scale=SCALE,
            global_batch=global_batch,
            start=start,
            rank=rank,
            world_size=world_size,
        )
    )


# Order


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 1000, 12753])
def test_permutation_holds_each_index_once(count: int) -> None:
    order = permutation(count, seed=5, epoch=2)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(count))


def test_permutation_is_a_function_of_seed_and_epoch() -> None:
    pairs = [(0, 0), (0, 1), (1, 0), (1, 1), (2**63 - 1, 0)]
    orders = {pair: permutation(200, seed=pair[0], epoch=pair[1]).tolist() for pair in pairs}
    assert len({tuple(order) for order in orders.values()}) == len(pairs)
    np.random.default_rng(0).random(5)  # other generators have no part in it
    for (seed, number), order in orders.items():
        assert permutation(200, seed=seed, epoch=number).tolist() == order


@st.composite
def masks(draw: st.DrawFn) -> tuple[Bools, Bools]:
    """Which records of one table are kept, twice; at least one each time."""
    count = draw(st.integers(1, 30))
    both = draw(st.lists(st.lists(st.booleans(), min_size=count, max_size=count), min_size=2, max_size=2))
    before, now = (np.array(numbers) for numbers in both)
    before[draw(st.integers(0, count - 1))] = now[draw(st.integers(0, count - 1))] = True
    return before, now


@given(masks(), st.integers(0, 5))
def test_leaving_records_out_does_not_move_the_others(kept: tuple[Bools, Bools], number: int) -> None:
    whole = permutation(len(kept[0]), seed=3, epoch=number).tolist()
    assert kept_order(np.ones(len(whole), bool), seed=3, epoch=number).tolist() == whole
    for mask in kept:
        names = np.flatnonzero(mask)  # of those that are kept, in the whole table
        assert [names[i] for i in kept_order(mask, seed=3, epoch=number)] == [name for name in whole if mask[name]]


@given(masks(), st.integers(0, 5), st.data())
def test_an_epoch_goes_on_with_the_rest_of_what_is_kept_now(
    kept: tuple[Bools, Bools], number: int, data: st.DataObject
) -> None:
    before, now = kept
    orders = [np.flatnonzero(mask)[kept_order(mask, seed=3, epoch=number)].tolist() for mask in kept]
    position = data.draw(st.integers(0, len(orders[0])))
    moved = moved_position(position, before, now, seed=3, epoch=number)
    done, rest = orders[0][:position], orders[1][moved:]
    assert not set(done) & set(rest)
    assert set(orders[0][position:]) & set(np.flatnonzero(now)) <= set(rest)
    # what was left out before comes if its turn is still to come
    whole = permutation(len(before), seed=3, epoch=number).tolist()
    turn = whole.index(done[-1]) + 1 if done else 0
    assert rest == [name for name in whole[turn:] if now[name]]


@given(st.integers(1, 60), st.lists(st.tuples(st.integers(1, 70), st.integers(0, 9)), min_size=1, max_size=5))
def test_batches_of_changing_sizes_take_each_record_once(count: int, parts: list[tuple[int, int]]) -> None:
    taken: list[int] = []
    for number, (batch, steps) in enumerate(parts, start=1):
        batch = min(batch, count)
        requests = epoch(count, global_batch=batch, start=len(taken))
        for request in requests if number == len(parts) else requests[:steps]:
            taken += request.indices.tolist()
    assert len(set(taken)) == len(taken) > count - batch
    assert taken == permutation(count, seed=7, epoch=3)[: len(taken)].tolist()


def test_every_index_comes_everywhere_equally_often() -> None:
    # 3,000 permutations of 8: each of the 64 cells expects 375, and chi-square with 49 degrees of freedom
    # (rows and columns are fixed) is below 85.4 in 99.9% of cases; the seeds are fixed, so it never changes.
    counts = np.zeros((8, 8))
    for number in range(3000):
        counts[np.arange(8), permutation(8, seed=0, epoch=number)] += 1
    assert ((counts - 375) ** 2 / 375).sum() < 85.4


def test_pinned_numbers() -> None:
    """A run of an older version must go on as it was: these change only together with a note to the users."""
    assert permutation(10, seed=0, epoch=0)[:5].tolist() == [0, 2, 9, 1, 8]
    shorter, crop_yx, mirror = augmentation(1000, 1002, seed=7, epoch=3, scale=SCALE)
    assert shorter.tolist() == [406, 375]
    np.testing.assert_allclose(crop_yx, [[0.5373295, 0.8719566], [0.5742778, 0.8456830]], rtol=0, atol=1e-6)
    assert mirror.tolist() == [1, 1]
    np.testing.assert_allclose(
        normals(1000, 1001, seed=7, epoch=3), [[1.7111636, -0.2987024, -1.1661286]], rtol=0, atol=1e-6
    )
    assert balanced_order(LABELS, seed=0, epoch=0)[:6].tolist() == [51, 178, 54, 51, 224, 38]


# Augmentation does not depend on how it is asked for


def test_slices_agree_with_the_whole() -> None:
    whole = augmentation(0, 300, seed=7, epoch=3, scale=SCALE)
    rng = np.random.default_rng(0)
    for start, stop in [(0, 1), (1, 2), (299, 300), (5, 5), *np.sort(rng.integers(0, 301, (40, 2))).tolist()]:
        part = augmentation(start, stop, seed=7, epoch=3, scale=SCALE)
        assert_same(part, tuple(column[start:stop] for column in whole))


@pytest.mark.parametrize("batch", [1, 3, 4, 12, 50, 100])
def test_batch_size_does_not_matter(batch: int) -> None:
    requests = epoch(global_batch=batch)
    n = 100 // batch * batch
    order = permutation(100, seed=7, epoch=3)
    assert_same(joined(requests), (order[:n], *augmentation(0, n, seed=7, epoch=3, scale=SCALE)))


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_split_one_stream(world_size: int) -> None:
    single = epoch()
    ranks = [epoch(rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {len(requests) for requests in ranks} == {len(single)} == {8}
    for step, request in enumerate(single):
        parts = [requests[step] for requests in ranks]
        assert {len(part) for part in parts} == {12 // world_size}
        assert_same(joined(parts), joined([request]))


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("steps", [0, 1, 5, 7, 8])
def test_resuming_at_a_position_gives_the_tail(steps: int, world_size: int) -> None:
    rank = world_size - 1
    whole = epoch(rank=rank, world_size=world_size)
    tail = epoch(start=12 * steps, rank=rank, world_size=world_size)
    assert len(tail) == 8 - steps
    for a, b in zip(tail, whole[steps:], strict=True):
        assert_same(joined([a]), joined([b]))


def test_resuming_with_another_batch_size_sees_the_rest_of_the_epoch() -> None:
    whole = joined(epoch(global_batch=1))
    seen = joined(epoch(global_batch=12)[:4] + epoch(global_batch=4, start=48))
    assert_same(seen, whole)


@pytest.mark.parametrize(("count", "batches"), [(11, 0), (12, 1), (23, 1), (24, 2), (0, 0)])
def test_the_incomplete_last_batch_is_dropped(count: int, batches: int) -> None:
    requests = epoch(count)
    assert [len(r) for r in requests] == [12] * batches
    if requests:
        assert len(np.unique(joined(requests)[0])) == 12 * batches  # no picture twice


def test_what_an_epoch_drops_differs_by_epoch() -> None:
    dropped = [set(range(23)) - set(joined(epoch(23, number=n))[0].tolist()) for n in range(6)]
    assert len({frozenset(d) for d in dropped}) > 1


# Augmentation's distributions

N = 100_000


@pytest.fixture(scope="module")
def many() -> tuple[Int32s, Singles, Int32s]:
    return augmentation(0, N, seed=11, epoch=1, scale=SCALE)


def test_types_and_shapes(many: tuple[Int32s, Singles, Int32s]) -> None:
    assert [(str(c.dtype), c.shape) for c in many] == [("int32", (N,)), ("float32", (N, 2)), ("int32", (N,))]


@pytest.mark.parametrize("scale", [SCALE, (256, 257), (64, 80)])
def test_shorter_side_is_uniform_with_both_ends(scale: tuple[int, int]) -> None:
    low, high = scale
    shorter, _, _ = augmentation(0, N, seed=11, epoch=1, scale=scale)
    assert (shorter.min(), shorter.max()) == (low, high)
    counts = np.bincount(shorter - low, minlength=high - low + 1)
    expected = N / len(counts)
    freedom = high - low
    # Chi-square has mean k and variance 2k; four standard deviations and a little for its long tail at k = 1.
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 4 * np.sqrt(2 * freedom) + 4


def test_one_size_only() -> None:
    shorter, _, _ = augmentation(0, 1000, seed=0, epoch=0, scale=(256, 256))
    assert set(shorter.tolist()) == {256}


def test_crop_is_uniform(many: tuple[Int32s, Singles, Int32s]) -> None:
    _, crop_yx, _ = many
    assert crop_yx.min() >= 0
    assert crop_yx.max() <= 1
    # A uniform mean has standard deviation sqrt(1/12/N) = 0.0009.
    np.testing.assert_allclose(crop_yx.mean(0), 0.5, atol=0.004)
    for column in crop_yx.T:
        counts, _ = np.histogram(column, bins=20, range=(0, 1))
        assert ((counts - N / 20) ** 2 / (N / 20)).sum() < 43.8  # 99.9% of chi-square with 19 degrees of freedom


def test_half_flip(many: tuple[Int32s, Singles, Int32s]) -> None:
    _, _, mirror = many
    assert set(mirror.tolist()) == {0, 1}
    assert abs(mirror.mean() - 0.5) < 0.006  # four standard deviations of sqrt(1/4/N) = 0.0016


def test_columns_and_neighbours_are_independent(many: tuple[Int32s, Singles, Int32s]) -> None:
    shorter, crop_yx, mirror = many
    order = permutation(N, seed=11, epoch=1)
    next_epoch, _, _ = augmentation(0, N, seed=11, epoch=2, scale=SCALE)
    next_seed, _, _ = augmentation(0, N, seed=12, epoch=1, scale=SCALE)
    columns = np.array([shorter, *crop_yx.T, mirror, order, np.roll(shorter, 1), next_epoch, next_seed], np.float64)
    correlation = np.corrcoef(columns) - np.eye(len(columns))
    assert abs(correlation).max() < 0.015  # about five standard deviations of 1/sqrt(N) = 0.0032


def test_one_picture_at_sixteen_positions_is_augmented_in_sixteen_ways() -> None:
    shorter, crop_yx, mirror = augmentation(0, 16, seed=0, epoch=0, scale=SCALE)
    rows = np.column_stack([shorter, crop_yx, mirror])
    assert len(np.unique(rows, axis=0)) == 16
    assert len(np.unique(shorter)) > 10
    assert 0 < mirror.sum() < 16


def test_one_position_differs_by_epoch_and_seed() -> None:
    rows = [augmentation(40, 41, seed=s, epoch=e, scale=SCALE)[1].tolist() for s in range(4) for e in range(4)]
    assert len(np.unique(np.reshape(rows, (16, 2)), axis=0)) == 16


# Color shift


def test_color_shift_is_normal_along_each_component() -> None:
    lighting = np.array([[0.05, -0.02, 0.0], [0.04, 0.01, -0.01], [0.06, 0.01, 0.02]])
    (request,) = training_requests(N, seed=11, epoch=1, scale=SCALE, global_batch=N, lighting=lighting)
    assert request.shift is not None
    assert (str(request.shift.dtype), request.shift.shape) == ("float32", (N, 3))
    alpha = request.shift @ np.linalg.inv(lighting).T
    # standard deviations over N samples: of a mean 0.0032, of a variance 0.0045, of a fourth moment 0.031
    np.testing.assert_allclose(alpha.mean(0), 0, atol=0.015)
    np.testing.assert_allclose(np.cov(alpha.T), np.eye(3), atol=0.02)
    np.testing.assert_allclose((alpha**4).mean(0), 3, atol=0.13)
    assert 3.5 < abs(alpha).max() < 6
    shares = [(np.abs(alpha) < limit).mean() for limit in (0.5, 1, 2)]
    np.testing.assert_allclose(shares, [0.3829, 0.6827, 0.9545], atol=0.004)


def test_color_shift_leaves_all_else_as_it_is_and_follows_the_position_alone() -> None:
    requests = partial(training_requests, 96, seed=7, scale=SCALE, lighting=np.eye(3))

    def shifts(batch: int, number: int = 3, **place: Any) -> Singles:
        made = requests(epoch=number, global_batch=batch, **place)
        return np.concatenate([request.shift for request in made if request.shift is not None])

    whole = shifts(96)
    np.testing.assert_array_equal(shifts(12), whole)
    np.testing.assert_array_equal(shifts(12, start=36), whole[36:])
    halves = [shifts(12, rank=rank, world_size=2).reshape(8, 6, 3) for rank in range(2)]
    np.testing.assert_array_equal(np.concatenate(halves, axis=1).reshape(96, 3), whole)
    assert len(np.unique(np.concatenate([whole, shifts(96, number=4)]), axis=0)) == 192
    plain = requests(epoch=3, global_batch=12, lighting=None)
    for a, b in zip(plain, requests(epoch=3, global_batch=12), strict=True):
        assert_same(joined([a]), joined([b]))
        assert a.shift is None


def test_validation_has_no_color_shift() -> None:
    assert all(request.shift is None for request in evaluation_requests(10, shorter=8, batch=4))


# Balance


def test_balanced_order_draws_classes_evenly_and_each_of_their_records_equally_often() -> None:
    per_class = np.zeros(8)
    for number in range(50):
        order = balanced_order(LABELS, seed=3, epoch=number)
        assert (str(order.dtype), len(order)) == ("int64", len(LABELS))
        per_class += np.bincount(LABELS[order], minlength=8)
        times = np.bincount(order, minlength=len(LABELS))
        for label in (0, 5, 7, 2):
            assert np.ptp(times[label == LABELS]) <= 1
    drawn = per_class[[0, 5, 7, 2]]
    assert drawn.sum() == per_class.sum() == 50 * 244
    expected = drawn.sum() / 4
    assert ((drawn - expected) ** 2 / expected).sum() < 16.3  # 99.9% of chi-square with 3 degrees of freedom


def test_balanced_order_is_shuffled_anew_each_epoch() -> None:
    orders = [balanced_order(LABELS, seed=s, epoch=e) for s in range(2) for e in range(2)]
    assert len({tuple(order.tolist()) for order in orders}) == 4
    np.testing.assert_array_equal(balanced_order(LABELS, seed=1, epoch=1), orders[3])
    classes = LABELS[orders[0]]
    assert 0.15 < (classes[1:] == classes[:-1]).mean() < 0.35  # a quarter, if neighbours are independent
    common = [set(order[LABELS[order] == 0].tolist()) for order in orders]  # about 61 of 200 records
    assert len(common[0] & common[1]) < 40  # about 19 when each epoch starts with other ones


@pytest.mark.parametrize("labels", [[4], [4, 4, 4], [0, 1], []])
def test_balanced_order_of_few_records(labels: list[int]) -> None:
    order = balanced_order(np.array(labels, np.int64), seed=0, epoch=0)
    assert len(order) == len(labels)
    assert set(order.tolist()) <= set(range(len(labels)))
    if len(set(labels)) == 1:
        assert sorted(order.tolist()) == list(range(len(labels)))


def test_balanced_requests_take_that_order_and_the_augmentation_of_their_positions() -> None:
    requests = partial(training_requests, 244, seed=7, epoch=3, scale=SCALE, global_batch=12)
    uniform, balanced = joined(list(requests())), joined(list(requests(labels=LABELS)))
    assert_same((balanced_order(LABELS, seed=7, epoch=3)[:240], *uniform[1:]), balanced)


# Evaluation


@pytest.mark.parametrize("world_size", [1, 2, 3, 11])
@pytest.mark.parametrize("batch", [1, 3, 10, 64])
def test_evaluation_has_every_record_once(world_size: int, batch: int) -> None:
    ranks = [
        list(evaluation_requests(10, shorter=256, batch=batch, rank=r, world_size=world_size))
        for r in range(world_size)
    ]
    requests = [request for rank in ranks for request in rank]
    indices, shorter, crop_yx, mirror = joined(requests)
    assert sorted(indices.tolist()) == list(range(10))
    assert all(1 <= len(request) <= batch for request in requests)
    assert all(len(request) == batch for rank in ranks for request in rank[:-1])  # only the last may be short
    assert set(shorter.tolist()) == {256}
    assert set(crop_yx.ravel().tolist()) == {0.5}
    assert set(mirror.tolist()) == {0}


def test_evaluation_shares_are_even_and_in_order() -> None:
    ranks = [joined(list(evaluation_requests(10, shorter=8, batch=3, rank=r, world_size=3)))[0] for r in range(3)]
    assert [rank.tolist() for rank in ranks] == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]


def test_evaluation_and_training_requests_have_the_same_types() -> None:
    (a,) = evaluation_requests(4, shorter=8, batch=4)
    (b,) = epoch(4, global_batch=4)
    for x, y in zip(joined([a]), joined([b]), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
