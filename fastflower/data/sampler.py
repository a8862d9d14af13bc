"""Who comes when, and how it is augmented: pure functions of (seed, epoch, position), by a counter-based generator.

What a position of an epoch sees does not depend on rank, world size, batch size, threads or history. So resuming in
mid-epoch is starting at another position, and ranks split one stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from fastflower.arrays import Bools, Floats, Hashes, Int32s, Ints, Singles
from fastflower.data.geometry import resized
from fastflower.data.shuffle import ROUNDS, KeptOrder, KeyedOrder

# The highest word of Philox's 256-bit counter separates uses of one key, so that no two share random numbers.
_ORDER, _AUGMENT, _LIGHTING, _CLASSES, _MIX, _KEYS = 0, 1, 2, 3, 4, 5

KEYED_ABOVE = 2**20  # records of a table; the order of a larger one is computed where it is asked for, not sorted


@dataclass(frozen=True)
class Request:
    """One batch to make: which records, and for each how it is resized, cropped, flipped and shifted in color."""

    indices: Ints  # [n] into the split's records
    shorter: Int32s | None  # [n] pixels of the shorter side after resizing; None = as stored, or enlarged to the crop
    crop_yx: Singles  # [n, 2] in [0, 1], share of the free height and width before the crop
    mirror: Int32s  # [n], 1 = flipped left to right
    shift: Singles | None = None  # [n, 3], added to R, G, B in [0, 1]; None = nothing

    def __len__(self) -> int:
        return len(self.indices)

    def select(self, chosen: Ints) -> Request:
        """The pictures at `chosen` ([m]) alone."""
        shorter = None if self.shorter is None else self.shorter[chosen]
        shift = None if self.shift is None else self.shift[chosen]
        return Request(self.indices[chosen], shorter, self.crop_yx[chosen], self.mirror[chosen], shift)


def training_requests(
    count: int,
    *,
    seed: int,
    epoch: int,
    scale: tuple[int, int],
    global_batch: int,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
    kept: Bools | None = None,
    keyed: bool = False,
    labels: Ints | None = None,
    lighting: Floats | None = None,
) -> Iterator[Request]:
    """A rank's batches of one training epoch, from position `start`; the incomplete last global batch is dropped.

    Each rank takes its own span of every global batch, `global_batch / world_size` pictures.

    Args:
        count: records.
        seed: of order and augmentation.
        epoch: from 0.
        scale: smallest and largest shorter side (pixels).
        global_batch: pictures of a step over all ranks.
        start: position in the epoch.
        rank: whose batches.
        world_size: ranks.
        kept: [n], which of a larger table these records are; None = it is theirs alone.
        keyed: take the order from `keyed_order`, which needs no memory, instead of `permutation`.
        labels: [count] classes, for an order in which all classes come equally often; None = each record once.
        lighting: [3, 3], a column for each independent direction of the color shift, as long as its standard deviation
            in RGB of [0, 1]; None = colors as they are.
    """
    kept = np.ones(count, bool) if kept is None else kept
    if labels is not None:
        part = _parts_of(balanced_order(labels, seed=seed, epoch=epoch))
    elif keyed:
        whole = keyed_order(len(kept), seed=seed, epoch=epoch)
        part = whole.part if kept.all() else KeptOrder(whole, kept).part
    else:
        part = _parts_of(kept_order(kept, seed=seed, epoch=epoch))
    share = global_batch // world_size
    for position in range(start, count - global_batch + 1, global_batch):
        first = position + rank * share
        shorter, crop_yx, mirror = augmentation(first, first + share, seed=seed, epoch=epoch, scale=scale)
        shift = None
        if lighting is not None:
            shift = (normals(first, first + share, seed=seed, epoch=epoch) @ lighting.T).astype(np.float32)
        yield Request(part(first, first + share), shorter, crop_yx, mirror, shift)


def _parts_of(order: Ints) -> Callable[[int, int], Ints]:
    return lambda start, stop: order[start:stop]


def evaluation_requests(
    count: int, *, shorter: int | None, batch: int, rank: int = 0, world_size: int = 1
) -> Iterator[Request]:
    """A rank's batches of every record once: record i goes to rank i mod world_size; the last batch may be short.

    `shorter` is the side that pictures are resized to (pixels); None = they are cropped as they are stored.
    """
    mine = np.arange(rank, count, world_size)
    for first in range(0, len(mine), batch):
        yield _centered(mine[first : first + batch], shorter)


def whole_requests(
    shapes: Ints, *, shorter: int | None, crop: int, batch: int, rank: int = 0, world_size: int = 1
) -> Iterator[Request]:
    """A rank's batches of every record once, as whole pictures, with those of one shape together.

    Args:
        shapes: [n, 2] height and width of each picture (pixels).
        shorter: side that they are resized to; None = as they are, enlarged where they are smaller than `crop`.
        crop: pixels.
        batch: most pictures of `crop` by `crop` pixels; of larger ones it has fewer, so that it takes no more memory.
        rank: whose batches; record i goes to rank i mod world_size.
        world_size: ranks.
    """
    sizes = resized(shapes, shorter, crop)
    mine = np.arange(rank, len(shapes), world_size)
    mine = mine[np.lexsort(sizes[mine].T)]
    _, starts = np.unique(sizes[mine], axis=0, return_index=True)
    for alike in np.split(mine, np.sort(starts)[1:]):
        height, width = sizes[alike[0]].tolist()
        most = max(1, batch * crop**2 // (height * width))
        for first in range(0, len(alike), most):
            yield _centered(alike[first : first + most], shorter)


def _centered(indices: Ints, shorter: int | None) -> Request:
    n = len(indices)
    sides = None if shorter is None else np.full(n, shorter, np.int32)
    return Request(indices, sides, np.full((n, 2), 0.5, np.float32), np.zeros(n, np.int32))


def permutation(count: int, *, seed: int, epoch: int) -> Ints:
    """The order of an epoch: [count], each index once.

    It sorts raw generator output, which numpy keeps the same over its versions (Generator.permutation is not).
    """
    return np.argsort(_raw(count, seed=seed, epoch=epoch, use=_ORDER), kind="stable")


def keyed_order(count: int, *, seed: int, epoch: int) -> KeyedOrder:
    """Another order of an epoch than `permutation`, as even, any part of which is had without the rest."""
    return KeyedOrder(count, _raw(ROUNDS, seed=seed, epoch=epoch, use=_KEYS))


def kept_order(kept: Bools, *, seed: int, epoch: int) -> Ints:
    """The order of an epoch of those records of a table that are `kept` ([n]): their numbers among themselves.

    They come in the order that they have in the whole table's, whichever others are kept.
    """
    order = permutation(len(kept), seed=seed, epoch=epoch)
    return (np.cumsum(kept) - 1)[order[kept[order]]]


def moved_position(position: int, before: Bools, now: Bools, *, seed: int, epoch: int, keyed: bool = False) -> int:
    """Where an epoch goes on, in which other records of a table are kept `now` than were `before` (both [n]).

    What had come does not come again, and the rest of the whole table's order does, as far as it is kept now.
    """
    if keyed:
        whole = keyed_order(len(before), seed=seed, epoch=epoch)
        return KeptOrder(whole, now).before(KeptOrder(whole, before).turn(position))
    order = permutation(len(before), seed=seed, epoch=epoch)
    done = int(np.searchsorted(np.cumsum(before[order]), position)) + 1 if position else 0
    return int(now[order[:done]].sum())


def balanced_order(labels: Ints, *, seed: int, epoch: int) -> Ints:
    """An epoch's order in which all classes come equally often: [n] for labels [n].

    Each position draws a class, uniformly among those that have records, and takes the class's next record in an order
    that changes each epoch, from its start again when all have come. So two records of a class come equally often in an
    epoch, or one of them once more.
    """
    _, member, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    drawn = np.floor(_uniform(len(labels), seed=seed, epoch=epoch, use=_CLASSES) * len(sizes)).astype(np.int64)
    order = permutation(len(labels), seed=seed, epoch=epoch)
    by_class = order[np.argsort(member[order], kind="stable")]
    positions = np.argsort(drawn, kind="stable")  # of all draws, class by class
    draws = np.bincount(drawn, minlength=len(sizes))
    turn = np.arange(len(labels)) - np.repeat(np.cumsum(draws) - draws, draws)  # how often its class came before
    first = np.cumsum(sizes) - sizes
    balanced = np.empty_like(order)
    balanced[positions] = by_class[np.repeat(first, draws) + turn % np.repeat(sizes, draws)]
    return balanced


def augmentation(
    start: int, stop: int, *, seed: int, epoch: int, scale: tuple[int, int]
) -> tuple[Int32s, Singles, Int32s]:
    """Random augmentation of positions start..stop-1 of an epoch: shorter, crop_yx and mirror as in `Request`.

    The shorter side is uniform over the whole pixels scale[0]..scale[1], both included; half of the pictures flip.
    """
    # One counter step gives four words: scale, y, x and flip of one position.
    u = _uniform(4 * (stop - start), seed=seed, epoch=epoch, use=_AUGMENT, skip=start).reshape(-1, 4)
    low, high = scale
    shorter = (low + np.floor(u[:, 0] * (high - low + 1))).astype(np.int32)
    return shorter, u[:, 1:3].astype(np.float32), (u[:, 3] < 0.5).astype(np.int32)


def normals(start: int, stop: int, *, seed: int, epoch: int) -> Floats:
    """Three independent numbers of the standard normal distribution for positions start..stop-1 of an epoch: [n, 3].

    By the transformation of Box and Muller (1958), since Generator.normal may change with numpy's versions.
    """
    u = _uniform(4 * (stop - start), seed=seed, epoch=epoch, use=_LIGHTING, skip=start).reshape(-1, 4)
    radius, angle = np.sqrt(-2 * np.log(1 - u[:, :2])), 2 * np.pi * u[:, 2:]
    return np.column_stack([radius * np.cos(angle), radius[:, 0] * np.sin(angle[:, 0])])


def _uniform(count: int, *, seed: int, epoch: int, use: int, skip: int = 0) -> Floats:
    """[count] in [0, 1), from counter step `skip` on; a step gives four."""
    return (_raw(count, seed=seed, epoch=epoch, use=use, skip=skip) >> np.uint64(11)) * np.float64(2.0**-53)


def generator(*, seed: int, epoch: int, position: int) -> np.random.Generator:
    """Random numbers for a whole batch, the one that begins at `position` of an epoch."""
    return np.random.Generator(_philox(seed=seed, epoch=epoch, use=_MIX, skip=position))


def _raw(count: int, *, seed: int, epoch: int, use: int, skip: int = 0) -> Hashes:
    return _philox(seed=seed, epoch=epoch, use=use, skip=skip).random_raw(count)


def _philox(*, seed: int, epoch: int, use: int, skip: int) -> np.random.Philox:
    return np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=np.array([skip, 0, 0, use], np.uint64))
