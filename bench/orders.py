"""Time and memory of an epoch's order of very many records: python bench/orders.py keyed 100000000

Kinds: numpy = sorted, keyed = computed where it is asked for, left_out = keyed with a tenth of the records left out.
Prints the time to the first batch, the time of a batch anywhere (median) and the memory over what it began with.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from fastflower.arrays import Ints
from fastflower.data.sampler import keyed_order, permutation
from fastflower.data.shuffle import KeptOrder

BATCH = 256


def main(argv: Sequence[str] | None = None) -> int:
    """Measure one kind in this process."""
    kind, number = sys.argv[1:] if argv is None else argv
    count = int(number)
    rng = np.random.default_rng(0)
    kept = np.ones(count if kind == "left_out" else 0, bool)
    kept[::10] = False
    part: Callable[[int, int], Ints]
    before, start = _peak(), time.perf_counter()
    if kind == "numpy":
        part = partial(_copied, permutation(count, seed=0, epoch=0))
    else:
        keyed = keyed_order(count, seed=0, epoch=0)
        part = KeptOrder(keyed, kept).part if kind == "left_out" else keyed.part
    part(0, BATCH)
    first_batch = time.perf_counter() - start
    times = []
    for position in rng.integers(0, count // 2, 1000).tolist():
        start = time.perf_counter()
        part(position, position + BATCH)
        times.append(time.perf_counter() - start)
    print(
        f"{kind}, {count} records: first batch after {first_batch:.3f} s, a batch of {BATCH} in "
        f"{statistics.median(times) * 1e6:.0f} us, {_peak() - before:.1f} MB"
    )
    return 0


def _copied(order: Ints, start: int, stop: int) -> Ints:
    return order[start:stop].copy()


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    sys.exit(main())
