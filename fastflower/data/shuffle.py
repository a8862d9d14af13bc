"""An order of many records that is computed where it is asked for: a keyed permutation, which takes no memory.

A Feistel network (Luby and Rackoff, How to construct pseudorandom permutations, 1988) permutes the smallest power of
two that holds the records; what falls outside of them is permuted again until it lies inside (cycle walking: Black and
Rogaway, Ciphers with arbitrary finite domains, 2002). It is made for even orders, not against an adversary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fastflower.arrays import Bools, Hashes, Ints

ROUNDS = 8
_BLOCK = 4096  # positions of an order, or records of a table, between two counts of those that are kept


@dataclass(frozen=True)
class KeyedOrder:
    """A permutation of `count` records by `keys` ([ROUNDS], one a round)."""

    count: int
    keys: Hashes

    def part(self, start: int, stop: int) -> Ints:
        """The records at positions start..stop-1: [stop - start]."""
        values = self._network(np.arange(start, stop, dtype=np.uint64))
        outside = np.flatnonzero(values >= self.count)
        while len(outside):
            values[outside] = self._network(values[outside])
            outside = outside[values[outside] >= self.count]
        return values.astype(np.int64)

    def _network(self, values: Hashes) -> Hashes:
        bits = (self.count - 1).bit_length()
        low_bits = np.uint64(bits // 2)
        masks = [np.uint64((1 << bits // 2) - 1), np.uint64((1 << bits - bits // 2) - 1)]  # low and high part
        parts = [values & masks[0], values >> low_bits]
        for number, key in enumerate(self.keys):
            side = number % 2
            parts[side] ^= _mixed(parts[1 - side] + key) & masks[side]
        return parts[1] << low_bits | parts[0]


@dataclass(frozen=True)
class KeptOrder:
    """Those records of a table that are `kept` ([n]), in the order that they have in the whole table's."""

    order: KeyedOrder
    kept: Bools

    def part(self, start: int, stop: int) -> Ints:
        """The records at positions start..stop-1 of those that are kept, by their numbers among themselves."""
        if start >= stop:
            return np.empty(0, np.int64)
        first, last = np.searchsorted(self._turns, [start, stop - 1], side="right").tolist()
        records = self._block(first - 1, last)[start - int(self._turns[first - 1]) :][: stop - start]
        firsts = records - records % _BLOCK
        within = [np.count_nonzero(self.kept[first:record]) for first, record in zip(firsts, records, strict=True)]
        numbers: Ints = self._numbers[firsts // _BLOCK] + np.array(within, np.int64)
        return numbers

    def turn(self, position: int) -> int:
        """How many positions of the whole table's order are past when `position` records that are kept have come."""
        if not position:
            return 0
        block = int(np.searchsorted(self._turns, position - 1, side="right")) - 1
        flags = self.kept[self.order.part(block * _BLOCK, min((block + 1) * _BLOCK, self.order.count))]
        return block * _BLOCK + int(np.flatnonzero(flags)[position - 1 - int(self._turns[block])]) + 1

    def before(self, turn: int) -> int:
        """How many records that are kept come in the first `turn` positions of the whole table's order."""
        block = turn // _BLOCK
        rest = self.order.part(block * _BLOCK, turn)
        return int(self._turns[block]) + int(np.count_nonzero(self.kept[rest]))

    @cached_property
    def _turns(self) -> Ints:
        """Records that are kept before each block of the order, and in all: [blocks + 1]."""
        counts = [len(self._block(block, block + 1)) for block in range(-(-self.order.count // _BLOCK))]
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    @cached_property
    def _numbers(self) -> Ints:
        """Records that are kept before each block of the table: [blocks]."""
        counts = [np.count_nonzero(self.kept[first : first + _BLOCK]) for first in range(0, len(self.kept), _BLOCK)]
        return np.cumsum(np.array([0, *counts[:-1]], np.int64))

    def _block(self, first: int, last: int) -> Ints:
        """Those of the order's blocks first..last-1 that are kept, as numbers in the table."""
        records = self.order.part(first * _BLOCK, min(last * _BLOCK, self.order.count))
        return records[self.kept[records]]


def _mixed(values: Hashes) -> Hashes:
    """Each 64-bit word mixed by the finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
