"""What the loader says of bytes that are no picture, or no longer those that were indexed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fastflower.data.pipeline import Decoder
from fastflower.data.sampler import evaluation_requests
from fastflower.data.sources.kaggle import load_split
from fastflower.data.sources.tfrecord import write_tfrecord
from fastflower.data.view import View
from fastflower.errors import UserError
from tests.conftest import example, jpeg, write_dataset
from tests.data.test_loader import loader


def test_a_file_that_goes_while_a_failure_is_looked_into_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = load_split(write_dataset(tmp_path, {"val": 8}, files=1), "val")
    made = loader(records, View(32), 2)

    def fail(*_: Any) -> None:
        os.truncate(records.files[0], 10)
        raise RuntimeError("the decoder failed")

    monkeypatch.setattr(Decoder, "take", fail)
    with pytest.raises(UserError, match="record 0 .* has changed since it was indexed"):
        list(made.batches(evaluation_requests(8, shorter=36, batch=2)))


def test_a_picture_that_cannot_be_decoded_is_named_after_the_good_batches(tmp_path: Path) -> None:
    records = [example(i, 0) for i in range(12)]
    records[9]["image"] = jpeg(40, 40)[:200]
    write_tfrecord(tmp_path / "val" / "a.tfrec", records)
    made = loader(load_split(tmp_path, "val"), View(32), 4)
    seen = []
    with pytest.raises(UserError, match=r"a\.tfrec, record 9 \(id 000009\) cannot be decoded as a picture"):
        for batch in made.batches(evaluation_requests(12, shorter=36, batch=4)):
            seen += batch.indices.tolist()
    assert seen == list(range(8))
    good = made.batches(evaluation_requests(8, shorter=36, batch=4))
    assert sum(len(batch.labels) for batch in good) == 8  # the loader is usable again


@pytest.mark.parametrize("image", [b"", b"<html>not found</html>"])
def test_bytes_that_are_no_picture_are_named(tmp_path: Path, image: bytes) -> None:
    write_tfrecord(tmp_path / "val" / "a.tfrec", [example(0, 0), example(1, 0, image)])
    made = loader(load_split(tmp_path, "val"), View(32), 2)
    with pytest.raises(UserError, match="record 1 .* cannot be decoded"):
        list(made.batches(evaluation_requests(2, shorter=36, batch=2)))


@pytest.mark.parametrize("missing", [2, 300])
def test_a_picture_that_is_cut_off_is_named_though_no_crop_reaches_its_end(tmp_path: Path, missing: int) -> None:
    write_tfrecord(tmp_path / "val" / "a.tfrec", [example(0, 0), example(1, 0, jpeg(200, 200)[:-missing])])
    made = loader(load_split(tmp_path, "val"), View(32), 2)
    with pytest.raises(UserError, match="record 1 .* cannot be decoded"):
        list(made.batches(evaluation_requests(2, shorter=100, batch=2)))


def test_bytes_after_the_end_of_a_picture_do_no_harm(tmp_path: Path) -> None:
    write_tfrecord(tmp_path / "val" / "a.tfrec", [example(0, 0, jpeg(40, 40)), example(1, 0, jpeg(40, 40) + b"more")])
    made = loader(load_split(tmp_path, "val"), View(32), 2)
    (batch,) = made.batches(evaluation_requests(2, shorter=36, batch=2))
    assert torch.equal(batch.images[0], batch.images[1])


def test_a_file_that_shrinks_is_a_sentence(tmp_path: Path) -> None:
    root = write_dataset(tmp_path, {"val": 8}, files=1)
    records = load_split(root, "val")
    os.truncate(records.files[0], int(records.offset[5]) + 10)
    made = loader(records, View(32), 2)
    with pytest.raises(UserError, match="record 0 .* has changed since it was indexed"):
        list(made.batches(evaluation_requests(8, shorter=36, batch=2)))
