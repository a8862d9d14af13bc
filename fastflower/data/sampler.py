"""Who comes when, and how it is augmented: pure functions of (seed, epoch, position), by a counter-based generator.

What a position of an epoch sees does not depend on rank, world size, batch size, threads or history. So resuming in
mid-epoch is starting at another position, and ranks split one stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

# The highest word of Philox's 256-bit counter separates uses of one key, so that no two share random numbers.
_ORDER, _AUGMENT, _MIX = 0, 1, 2


@dataclass(frozen=True)
class Request:
    """One batch to make: which records, and for each how it is resized, cropped and flipped."""

    indices: np.ndarray  # [n] int64 into the split's records
    shorter: np.ndarray  # [n] int32, pixels of the shorter side after resizing
    crop_yx: np.ndarray  # [n, 2] float32 in [0, 1], share of the free height and width before the crop
    mirror: np.ndarray  # [n] int32, 1 = flipped left to right

    def __len__(self) -> int:
        return len(self.indices)


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
) -> Iterator[Request]:
    """A rank's batches of one training epoch, from position `start`; the incomplete last global batch is dropped.

    Each rank takes its own span of every global batch, `global_batch / world_size` pictures.
    """
    order = permutation(count, seed=seed, epoch=epoch)
    share = global_batch // world_size
    for position in range(start, count - global_batch + 1, global_batch):
        first = position + rank * share
        shorter, crop_yx, mirror = augmentation(first, first + share, seed=seed, epoch=epoch, scale=scale)
        yield Request(order[first : first + share], shorter, crop_yx, mirror)


def evaluation_requests(
    count: int, *, shorter: int, batch: int, rank: int = 0, world_size: int = 1
) -> Iterator[Request]:
    """A rank's batches of every record once: record i goes to rank i mod world_size; the last batch may be short."""
    mine = np.arange(rank, count, world_size)
    for first in range(0, len(mine), batch):
        indices = mine[first : first + batch]
        n = len(indices)
        yield Request(indices, np.full(n, shorter, np.int32), np.full((n, 2), 0.5, np.float32), np.zeros(n, np.int32))


def permutation(count: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: [count] int64, each index once.

    It sorts raw generator output, which numpy keeps the same over its versions (Generator.permutation is not).
    """
    return np.argsort(_raw(count, seed=seed, epoch=epoch, use=_ORDER), kind="stable")


def augmentation(
    start: int, stop: int, *, seed: int, epoch: int, scale: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random augmentation of positions start..stop-1 of an epoch: shorter, crop_yx and mirror as in `Request`.

    The shorter side is uniform over the whole pixels scale[0]..scale[1], both included; half of the pictures flip.
    """
    # One counter step gives four words: scale, y, x and flip of one position.
    raw = _raw(4 * (stop - start), seed=seed, epoch=epoch, use=_AUGMENT, skip=start).reshape(-1, 4)
    u = (raw >> np.uint64(11)) * 2.0**-53  # [n, 4] float64 in [0, 1)
    low, high = scale
    shorter = (low + np.floor(u[:, 0] * (high - low + 1))).astype(np.int32)
    return shorter, u[:, 1:3].astype(np.float32), (u[:, 3] < 0.5).astype(np.int32)


def generator(*, seed: int, epoch: int, position: int) -> np.random.Generator:
    """Random numbers for a whole batch, the one that begins at `position` of an epoch."""
    return np.random.Generator(_philox(seed=seed, epoch=epoch, use=_MIX, skip=position))


def _raw(count: int, *, seed: int, epoch: int, use: int, skip: int = 0) -> np.ndarray:
    return _philox(seed=seed, epoch=epoch, use=use, skip=skip).random_raw(count)


def _philox(*, seed: int, epoch: int, use: int, skip: int) -> np.random.Philox:
    return np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=np.array([skip, 0, 0, use], np.uint64))
