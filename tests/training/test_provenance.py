"""What checkpoints say of the data: the same when read again, in the entries that a checkpoint must have; and less of
earlier versions.
"""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fastflower.config import DataConfig
from fastflower.data.dataset import open_dataset
from fastflower.data.identity import Identity, identity, names_digest
from fastflower.data.view import IMAGENET, Normalization
from fastflower.errors import UserError
from fastflower.runtime import entries
from fastflower.runtime.distributed import Ranks
from fastflower.runtime.entries import require_entries
from fastflower.runtime.progress import Display
from fastflower.training.provenance import Provenance, TrainRecords, provenance_of

ENTRIES = ("classes", "normalization.mean", "normalization.std", "train_records", "val_records")
three = st.tuples(*[st.floats(0.01, 1)] * 3)
counts, digests = st.integers(0, 9999), st.text("0123456789abcdef", min_size=16, max_size=16)
identities = st.builds(Identity, counts, digests, digests)
provenances = st.builds(
    Provenance,
    classes=st.lists(st.text(max_size=5), min_size=1, max_size=4),
    normalization=st.builds(Normalization, three, three),
    train_records=st.builds(TrainRecords, counts, digests, digests, digests, st.lists(counts, max_size=5)),
    val_records=st.none() | identities,
)


def saved(provenance: Provenance, skip: str | None = None) -> dict[str, Any]:
    """Of a checkpoint, what `Provenance.of` reads."""
    return provenance.to_dict() | {"config": {"data": {"skip": skip}}}


@given(provenances, st.sampled_from([None, "bad.json"]))
def test_what_is_written_is_read_again_and_is_what_a_checkpoint_must_hold(
    provenance: Provenance, skip: str | None
) -> None:
    checkpoint = saved(provenance, skip)
    for records in (checkpoint["train_records"], checkpoint["val_records"] or {}):
        records |= {"of a later version": 1} if records else {}  # which says more
    require_entries(checkpoint, ENTRIES, Path("last.pt"))
    assert Provenance.of(checkpoint) == provenance


@pytest.mark.parametrize(
    ("kind", "entry"),
    [(Provenance, None), (TrainRecords, entries.TrainRecords), (Identity, entries.Records)],
)
def test_its_fields_are_the_entries(kind: type, entry: type | None) -> None:
    names = {field.name for field in fields(kind)}
    if entry:
        assert names == get_type_hints(entry).keys()
    else:
        assert names <= {name.partition(".")[0] for name in entries.TRAINED | entries.RESUMED}


@pytest.mark.parametrize("name", [field.name for field in fields(Identity)])
def test_a_checkpoint_that_lacks_a_key_is_refused(name: str) -> None:
    provenance = Provenance(["rose"], IMAGENET, TrainRecords(3, "a", "b", "c", []), Identity(3, "a", "b"))
    damaged = saved(provenance)
    del damaged["val_records"][name]
    with pytest.raises(UserError, match="last.pt is damaged .val_records"):
        require_entries(damaged, ENTRIES, Path("last.pt"))


@given(provenances, st.sampled_from([None, "bad.json"]), st.booleans(), st.booleans())
def test_earlier_versions_noted_less(
    provenance: Provenance, skip: str | None, has_content: bool, has_val: bool
) -> None:
    """Not what is left out, of which there was none without data.skip; older ones not the bytes; nor what validates."""
    older = saved(provenance, skip)
    for key in ("whole", "left_out", *([] if has_content else ["content"])):
        del older["train_records"][key]
    if not has_val:
        older["val_records"] = {}  # as `load_checkpoint` gives it
    require_entries(older, ENTRIES, Path("last.pt"))
    records = provenance.train_records
    expected = TrainRecords(
        count=records.count,
        names=records.names,
        content=records.content if has_content else None,
        whole=None if skip else records.names,
        left_out=None if skip else [],
    )
    val = provenance.val_records if has_val else None
    assert Provenance.of(older) == replace(provenance, train_records=expected, val_records=val)


@pytest.mark.parametrize("final", [False, True])
def test_a_runs_own_is_of_its_records(small: Path, final: bool) -> None:
    data = DataConfig(root=(small,), train_on="train+val" if final else "train")
    dataset = open_dataset(data, 0)
    provenance = provenance_of(dataset, IMAGENET, Ranks(), Display(Console(quiet=True), shown=False))
    train = asdict(identity(dataset.train)) | {"whole": names_digest(dataset.whole), "left_out": []}
    assert provenance.to_dict() == {
        "classes": dataset.classes,
        "normalization": {"mean": list(IMAGENET.mean), "std": list(IMAGENET.std)},
        "train_records": train,
        "val_records": None if final else asdict(identity(dataset.val)) if dataset.val else None,
    }
    assert (provenance.val_records is None) == final
