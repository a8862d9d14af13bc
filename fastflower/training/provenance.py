"""What a checkpoint says of the data that its network was trained and validated on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastflower.data.dataset import Dataset
from fastflower.data.identity import identity, names_digest
from fastflower.data.view import Normalization
from fastflower.runtime.distributed import Ranks
from fastflower.runtime.entries import Identity, TrainRecords
from fastflower.runtime.progress import Display


@dataclass(frozen=True)
class Provenance:
    """What checkpoints hold beside the state and the settings, by the same names."""

    classes: list[str]
    normalization: Normalization
    train_records: TrainRecords
    val_records: Identity | None  # None in a final fit


def provenance_of(
    dataset: Dataset, normalization: Normalization, ranks: Ranks, display: Display, *, keyed: bool = False
) -> Provenance:
    """That of a run on a data set, each record of which is read for it; `keyed` as of `TrainRecords`.

    Raises:
        UserError: a record cannot be read.
    """
    with ranks.main_first():
        train = identity(dataset.train, display.follow("read records for training"))
        val = identity(dataset.val, display.follow("read records for validation")) if dataset.val else None
    left_out = np.flatnonzero(~dataset.kept).tolist()
    records = TrainRecords(
        count=train["count"],
        names=train["names"],
        content=train["content"],
        whole=names_digest(dataset.whole),
        left_out=left_out,
    )
    if keyed:
        records["keyed"] = True
    return Provenance(dataset.classes, normalization, records, val)
