"""A data set as a training run needs it: both splits as tables of records, and their classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fastflower.arrays import Bools
from fastflower.config import DataConfig
from fastflower.data import demo
from fastflower.data.classes import class_notes, pictures_per_class
from fastflower.data.contents import content_digests, require_pictures
from fastflower.data.demo import write_demo
from fastflower.data.records import Progress, Records, concatenate, miscounted
from fastflower.data.sources.layout import NOTHING_ELSE, Inventory
from fastflower.data.splits import class_list, inventory_of, is_listed, join, load_parts, require_alike
from fastflower.errors import UserError
from fastflower.files import cache_dir, code_digest
from fastflower.runtime.distributed import Ranks
from fastflower.runtime.progress import Display


def builtin_root() -> Path:
    """Where the built-in synthetic flowers are, or will be."""
    return cache_dir() / f"synthetic-flowers-{code_digest(demo.__file__)}"


def ensure_builtin(progress: Callable[[int, int], None] | None = None) -> Path:
    """Draw the built-in synthetic flowers unless they are there; `progress` gets pictures done and to do.

    Raises:
        UserError: the cache folder cannot be written.
    """
    root = builtin_root()
    if not root.is_dir():
        try:
            write_demo(root, progress=progress)
        except UserError as error:
            if not root.is_dir():  # else another process was faster
                raise UserError(f"{error} FASTFLOWER_CACHE names another cache folder.") from error
    return root


def with_folders(data: DataConfig, ranks: Ranks, display: Display) -> DataConfig:
    """The settings with absolute data folders: those named, or the synthetic flowers, drawn where needed.

    Raises:
        UserError: the cache folder cannot be written.
    """
    if data.root is None:
        display.say("No data.root given: training on the built-in synthetic flowers.")
        with ranks.main_first():
            if not builtin_root().is_dir():
                display.say(f"Drawing them, once, into {builtin_root()}")
            data = replace(data, root=(ensure_builtin(display.follow("draw synthetic flowers")),))
    return data.absolute()


@dataclass(frozen=True)
class Dataset:
    """The training and validation splits."""

    train: Records
    val: Records | None  # None where training takes both splits
    classes: list[str]
    whole: Records  # what would train if data.skip listed nothing
    kept: Bools  # [n], which of `whole` train
    left_out: int = 0  # records of both splits that data.skip lists
    inventory: Inventory = NOTHING_ELSE  # of all their folders


def open_dataset(data: DataConfig, seed: int, progress: Progress | None = None) -> Dataset:
    """Index both splits and check that every record has an image and a class in range.

    `seed` chooses what validates with data.folds, or where a folder of classes has no val; `progress` takes records
    read and to read, where that needs their bytes.

    Raises:
        UserError: names the file, record or key.
    """
    train_parts, val_parts = load_parts(data, seed, "train", "val", progress=progress)
    # with folds, all pictures of a class may be in one, and it counts even where that one validates
    classes = class_list([*train_parts, *val_parts] if data.folds else train_parts)
    require_alike([*train_parts, *val_parts])
    inventory = inventory_of([*train_parts, *val_parts])
    train, val = join(train_parts, classes), join(val_parts, classes)
    for records in (train, val):
        records.require_classes(len(classes))
    train_kept, val_kept = (
        ~is_listed(records, data.skip) if data.skip else np.ones(len(records), bool) for records in (train, val)
    )
    left_out = int((~train_kept).sum() + (~val_kept).sum())
    if data.train_on == "train+val":
        whole, kept = concatenate([train, val]), np.concatenate([train_kept, val_kept])
        return Dataset(whole.select(kept), None, classes, whole, kept, left_out, inventory)
    return Dataset(train.select(train_kept), val.select(val_kept), classes, train, train_kept, left_out, inventory)


def look_over(dataset: Dataset, progress: Progress | None = None) -> tuple[Dataset, list[str]]:
    """Read each record once, so that what is wrong with it is said before the first step.

    Returns:
        The data set, whose records know what they hold, and sentences for the user.

    Raises:
        UserError: names the records that are no pictures.
    """
    splits = require_pictures([dataset.train] if dataset.val is None else [dataset.train, dataset.val], progress)
    train, val = splits[0], None if dataset.val is None else splits[1]
    notes = list(dict.fromkeys(sentence for records in splits for sentence in miscounted(records)))
    if val is not None:
        again = np.flatnonzero(np.isin(content_digests(val), content_digests(train)))
        if len(again):
            notes.append(
                f"{len(again)} of the {len(val)} validation records are also in train, such as "
                f"{val.describe(again[0])}: `fastflower data check ROOT --json > bad.json` lists those of a folder, "
                "and --data.skip bad.json leaves them out."
            )
    return replace(dataset, train=train, val=val), notes


def summary(dataset: Dataset, data: DataConfig) -> list[str]:
    """What trains, what validates and what is left out: sentences for the user."""
    sentences = [*dataset.inventory.notes]
    for name, records in (("train", dataset.train), ("val", dataset.val)):
        if records is None:
            continue
        sizes = ", ".join(f"{size}x{size}" for size in records.sizes)
        stored = f" ({sizes})" if sizes else ""
        sentences.append(f"{name:>5}: {records.pictures} pictures, {len(records)} records{stored}")
    if data.folds:
        sentences.append(f"Fold {data.fold} of 0 to {data.folds - 1} validates, the others train.")
    if data.skip:
        sentences.append(f"Left out {dataset.left_out} records that {data.skip} lists.")
    if line := dataset.inventory.left_out_line():
        sentences.append(line)
    splits = {"train": dataset.train} | ({"val": dataset.val} if dataset.val else {})
    sentences += class_notes(
        dataset.classes, {split: pictures_per_class(part, len(dataset.classes)) for split, part in splits.items()}
    )
    return sentences
