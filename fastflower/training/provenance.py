"""What a checkpoint says of the data that its network was trained and validated on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from fastflower.config import to_plain
from fastflower.data.dataset import Dataset
from fastflower.data.identity import Identity, identity, names_digest
from fastflower.data.view import Normalization
from fastflower.runtime.distributed import Ranks
from fastflower.runtime.progress import Display


@dataclass(frozen=True)
class TrainRecords:
    """The records that train, and which data.skip leaves out; None where an earlier version did not note it."""

    count: int
    names: str  # digest of the ids and classes, in their order
    content: str | None  # digest of the encoded pictures, in the same order
    whole: str | None  # digest of the ids and classes with those that are left out
    left_out: list[int] | None  # their places among all


@dataclass(frozen=True)
class Provenance:
    """What checkpoints hold beside the state and the settings. Its fields are the checkpoint's entries, see
    `fastflower.runtime.entries`.
    """

    classes: list[str]
    normalization: Normalization
    train_records: TrainRecords
    val_records: Identity | None  # None in a final fit, and where an earlier version did not note it

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Provenance:
        """That of a checkpoint that `load_checkpoint` read to go on from."""
        records, val = saved["train_records"], saved["val_records"]
        train = TrainRecords(**{field.name: records.get(field.name) for field in fields(TrainRecords)})
        if train.left_out is None and not saved["config"]["data"]["skip"]:  # then an earlier version left out none
            train = replace(train, whole=train.names, left_out=[])
        normalization = Normalization.of(saved["normalization"])
        validation = Identity(**{field.name: val[field.name] for field in fields(Identity)}) if val else None
        return cls(saved["classes"], normalization, train, validation)

    def to_dict(self) -> dict[str, Any]:
        """For `save_checkpoint`."""
        return to_plain(self)


def provenance_of(dataset: Dataset, normalization: Normalization, ranks: Ranks, display: Display) -> Provenance:
    """That of a run on a data set, each record of which is read for it.

    Raises:
        UserError: a record cannot be read.
    """
    with ranks.main_first():
        train = identity(dataset.train, display.follow("read records for training"))
        val = identity(dataset.val, display.follow("read records for validation")) if dataset.val else None
    left_out = np.flatnonzero(~dataset.kept).tolist()
    records = TrainRecords(**asdict(train), whole=names_digest(dataset.whole), left_out=left_out)
    return Provenance(dataset.classes, normalization, records, val)
