"""Which records are tested: each picture once, from its largest record."""

from __future__ import annotations

import numpy as np

from fastflower.data.records import Records


def largest_of_each(records: Records) -> tuple[Records, list[str]]:
    """Each id's record at the largest of its stored sizes, in the order of the ids' first records.

    Records without an id stay, each for itself.

    Returns:
        The records, and a sentence for each id that is there more than once at that size: the first record is taken.
    """
    size = records.side
    names = np.where(records.ids == "", [f"\0{i}" for i in range(len(records))], records.ids)
    _, first, member = np.unique(names, return_index=True, return_inverse=True)
    largest = np.zeros(len(first), np.int64)
    np.maximum.at(largest, member, size)
    candidates = np.flatnonzero(size == largest[member])
    _, place, copies = np.unique(member[candidates], return_index=True, return_counts=True)
    chosen = candidates[place]  # of each id, in the order of `first`
    notes = []
    for number in np.flatnonzero(copies > 1).tolist():
        twice = candidates[member[candidates] == number]
        again = "; ".join(records.describe(index) for index in twice[1:])
        notes.append(f"{records.describe(chosen[number])} is taken for its id, which is there again: {again}")
    return records.select(chosen[np.argsort(first)]), notes
