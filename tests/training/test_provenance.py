"""What checkpoints say of the data: the same when read again, in the entries that a checkpoint must have; and less of
earlier versions.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from fastflower.config import Config, DataConfig, TrainConfig
from fastflower.data.dataset import open_dataset
from fastflower.data.identity import identity, names_digest
from fastflower.data.view import IMAGENET, Normalization
from fastflower.errors import UserError
from fastflower.runtime.checkpoint import load_checkpoint, save_checkpoint
from fastflower.runtime.device import Precision
from fastflower.runtime.distributed import Ranks
from fastflower.runtime.entries import Checkpoint, Identity, TrainRecords
from fastflower.runtime.progress import Display
from fastflower.training.provenance import Provenance, provenance_of
from fastflower.training.state import new_state
from tests.conftest import TinyNet

three = st.tuples(*[st.floats(0.01, 1)] * 3)
counts, digests = st.integers(0, 9999), st.text("0123456789abcdef", min_size=16, max_size=16)
identities = st.builds(Identity, count=counts, names=digests, content=digests)
train_records = st.builds(
    TrainRecords, count=counts, names=digests, content=digests, whole=digests, left_out=st.lists(counts, max_size=5)
)
provenances = st.builds(
    Provenance,
    classes=st.lists(st.text(max_size=5), min_size=1, max_size=4),
    normalization=st.builds(Normalization, three, three),
    train_records=train_records,
    val_records=st.none() | identities,
)
skips = st.sampled_from([None, Path("bad.json")])


def state_of(provenance: Provenance, skip: Path | None = None) -> Checkpoint:
    """All that a checkpoint holds at the start of a run."""
    config = Config(data=DataConfig(skip=skip), train=TrainConfig(lr=0.1))
    state = new_state(TinyNet("", 3), config, torch.device("cpu"), Precision(None))
    setup: Any = SimpleNamespace(config=config, provenance=provenance, ranks=Ranks())
    return state.to_dict(setup)


def read_again(saved: Any) -> Checkpoint:
    """What is read of the file that it is written to."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "last.pt"
        save_checkpoint(path, saved)
        return load_checkpoint(path)


@settings(max_examples=20, deadline=None)
@given(provenances, skips)
def test_what_is_written_is_read_again_and_is_what_a_checkpoint_must_hold(
    provenance: Provenance, skip: Path | None
) -> None:
    saved: Any = state_of(provenance, skip)
    assert saved.keys() == get_type_hints(Checkpoint).keys()
    more = {"of a later version": 1}  # which notes more
    saved["train_records"] = provenance.train_records | more
    saved["val_records"] = provenance.val_records and provenance.val_records | more
    read = read_again(saved)
    assert read["classes"] == provenance.classes
    assert Normalization.of(read["normalization"]) == provenance.normalization
    assert (read["train_records"], read["val_records"]) == (saved["train_records"], saved["val_records"])


@pytest.mark.parametrize("name", get_type_hints(Identity))
@pytest.mark.parametrize("entry", ["train_records", "val_records"])
def test_a_checkpoint_that_lacks_a_key_is_refused(entry: str, name: str) -> None:
    train = TrainRecords(count=3, names="a", content="b", whole="c", left_out=[])
    damaged: Any = state_of(Provenance(["rose"], IMAGENET, train, Identity(count=3, names="a", content="b")))
    del damaged[entry][name]
    if (entry, name) == ("train_records", "content"):  # which earlier versions did not note
        assert read_again(damaged)["train_records"] == damaged["train_records"]
        return
    with pytest.raises(UserError, match=f"last.pt (is damaged .val_records|lacks its entry train_records.{name})"):
        read_again(damaged)


@settings(max_examples=20, deadline=None)
@given(provenances, skips, st.booleans(), st.booleans(), st.booleans())
def test_earlier_versions_noted_less(
    provenance: Provenance, skip: Path | None, has_content: bool, has_val: bool, has_names: bool
) -> None:
    """Not what is left out, of which there was none without data.skip; older ones not the bytes, and the ids and
    classes under another name; nor what validates.
    """
    older: Any = state_of(provenance, skip)
    records = provenance.train_records
    expected: dict[str, Any] = {"count": records["count"], "names": records["names"]}
    if has_content:
        expected["content"] = records["content"]
    older["train_records"] = dict(expected)
    if not has_names:
        older["train_records"]["digest"] = older["train_records"].pop("names")
    if not has_val:
        del older["val_records"]
    read = read_again(older)
    names = {} if has_names else {"digest": records["names"]}
    assert read["train_records"] == expected | names | ({} if skip else {"whole": records["names"], "left_out": []})
    assert read["val_records"] == (provenance.val_records if has_val else {})


@pytest.mark.parametrize("final", [False, True])
def test_a_runs_own_is_of_its_records(small: Path, final: bool) -> None:
    data = DataConfig(root=(small,), train_on="train+val" if final else "train")
    dataset = open_dataset(data, 0)
    provenance = provenance_of(dataset, IMAGENET, Ranks(), Display(Console(quiet=True), shown=False))
    its = identity(dataset.train)
    train = TrainRecords(
        count=its["count"], names=its["names"], content=its["content"], whole=names_digest(dataset.whole), left_out=[]
    )
    val = identity(dataset.val) if dataset.val else None
    assert provenance == Provenance(dataset.classes, IMAGENET, train, val)
    assert (provenance.val_records is None) == final
