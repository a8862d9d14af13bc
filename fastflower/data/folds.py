"""What validates, by folds or by a share: of each class, and never a picture that trains.

Records are the same picture where their ids are equal (an id at several stored sizes) or their encoded bytes are, and
so along a chain of such records.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

from fastflower.arrays import Bools, Ints
from fastflower.data.contents import content_digests
from fastflower.data.records import Records
from fastflower.errors import UserError
from fastflower.files import digest


@dataclass(frozen=True)
class Duplicate:
    """One picture under several ids."""

    ids: tuple[str, ...]  # sorted
    labels: tuple[int, ...]  # the classes that they have, sorted; more than one = somebody mislabelled it


def assign_folds(records: Records, folds: int, seed: int) -> Ints:
    """The fold of each record, [n] in 0..folds-1; the same picture is never in two.

    Where no picture has several ids, the folds' numbers of pictures differ by at most one, of each class and in all.
    It is a function of the seed and the records' ids and classes (without an id: its bytes), not of their order, nor of
    the stored sizes that they come in.

    Raises:
        UserError: a record has no class or cannot be read, or there are fewer different pictures than folds.
    """
    records.require("class")
    group, members = _same_pictures(records)
    if folds > len(members):
        raise UserError(f"data.folds is {folds}, but there are only {len(members)} different pictures: lower it.")
    by_class: dict[int, list[int]] = defaultdict(list)
    for number, pictures in enumerate(members):
        by_class[_main_class(pictures)].append(number)
    sizes = [len({name for name, _ in pictures}) for pictures in members]
    ranks = [seeded_rank(seed, min(pictures)[0]) for pictures in members]
    fold, total = np.zeros(len(members), np.int64), [0] * folds
    for label in sorted(by_class):
        count = [0] * folds
        for number in sorted(by_class[label], key=lambda number: (-sizes[number], ranks[number])):
            chosen = min(range(folds), key=lambda k: (count[k], total[k], k))
            fold[number] = chosen
            count[chosen] += sizes[number]
            total[chosen] += sizes[number]
    return fold[group]


def hold_out(records: Records, folder: Ints, share: float, seed: int) -> Bools:
    """Which records validate where data folders have no val, [n]: of each class of each data folder
    round(share * n) of its n different pictures, but at least one and not all, with all copies of them.

    So a class that is one picture, however often it is there, only trains. What validates of one folder trains in no
    other. It is chosen by a hash of seed and id, so that neither order nor other classes or folders have a say.

    Args:
        records: with ids and classes.
        folder: which data folder each is from, [n].
        share: in 0..1.
        seed: of the choice.

    Raises:
        UserError: a record cannot be read.
    """
    group, _ = _same_pictures(records)
    validates = np.zeros(len(records), bool)  # by group
    _, part = np.unique(np.stack((folder, records.labels)), axis=1, return_inverse=True)
    last = {}
    for indices in np.split(np.argsort(part, kind="stable"), np.cumsum(np.bincount(part))[:-1]):
        names: dict[int, str] = {}
        for number, name in zip(group[indices].tolist(), records.ids[indices].tolist(), strict=True):
            names[number] = min(name, names.get(number, name))
        order = sorted(names, key=lambda number: seeded_rank(seed, names[number]))
        validates[order[: min(max(round(share * len(order)), 1), len(order) - 1)]] = True
        last[int(records.labels[indices[0]])] = order[-1]
    for label in np.setdiff1d(records.labels, records.labels[~validates[group]]).tolist():
        validates[last[label]] = False  # others that have the same pictures chose all of them
    return validates[group]


def seeded_rank(seed: int, name: str) -> bytes:
    """Where a name comes in an order that the seed shuffles, whatever else is there."""
    return digest(os.fsencode(f"{seed}\0{name}"), size=16)


def duplicates(records: Records) -> list[Duplicate]:
    """The pictures that stand under several ids, sorted.

    Raises:
        UserError: a record cannot be read.
    """
    repeated = []
    for pictures in _same_pictures(records.select(records.ids != ""))[1]:
        ids, labels = {name for name, _ in pictures}, {label for _, label in pictures}
        if len(ids) > 1:
            repeated.append(Duplicate(tuple(sorted(ids)), tuple(sorted(labels))))
    return sorted(repeated, key=lambda duplicate: duplicate.ids)


def _same_pictures(records: Records) -> tuple[Ints, list[set[tuple[str, int]]]]:
    """Of each record the number of its group ([n]), and of each group the different ids and labels in it."""
    digests = content_digests(records)
    names = np.where(records.ids == "", [f"{digest:016x}" for digest in digests.tolist()], records.ids)
    numbers = (np.unique(column, return_inverse=True)[1] for column in (names, digests))
    roots, group = np.unique(_connect(*numbers), return_inverse=True)
    members: list[set[tuple[str, int]]] = [set() for _ in roots]
    for number, *picture in zip(group.tolist(), names.tolist(), records.labels.tolist(), strict=True):
        members[number].add(tuple(picture))
    return group, members


def _connect(*columns: Ints) -> Ints:
    """Of each row the first row that it is connected to, by equal numbers in a column or through other rows, [n].

    The columns are [n] in 0..n-1.
    """
    root = np.arange(len(columns[0]))
    while True:
        before = root
        for column in columns:
            first = np.full(len(column), len(column))
            np.minimum.at(first, column, root)
            root = first[column]
        if np.array_equal(root, before):
            return root


def _main_class(pictures: set[tuple[str, int]]) -> int:
    """What most of these ids are labelled; of several the lowest."""
    votes = Counter(label for _, label in pictures)
    return min(votes, key=lambda label: (-votes[label], label))
