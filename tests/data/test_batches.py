"""A rank's batches by the settings, beside requests and loaders that are put together by hand."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from fastflower.config import DataConfig
from fastflower.data.batches import evaluation_batches, training_batches, whole_pictures
from fastflower.data.decoding import shapes_of
from fastflower.data.loader import Batch, Loader, Loading
from fastflower.data.sampler import evaluation_requests, training_requests, whole_requests
from fastflower.data.sources.kaggle import load_split
from fastflower.data.view import Engine, View
from fastflower.evaluation.pictures import find_pictures, read_pictures
from fastflower.runtime.distributed import Ranks
from tests.conftest import jpeg
from tests.data.test_loader import CPU, PLAIN


def test_training_batches_follow_the_settings_and_validation_does_not(small: Path) -> None:
    records = load_split(small, "train").select(np.flatnonzero(np.arange(48) % 3 != 1))
    data, lighting = DataConfig(crop=32, scale=(36, 48), sampling="balanced", lighting=0.1), np.diag([0.2, 0.3, 0.1])
    loading = Loading(PLAIN, Engine(), CPU)
    made = training_batches(data, records, loading, batch_size=8, seed=5, lighting=lighting)
    requests = partial(training_requests, len(records), seed=5, epoch=2, scale=(36, 48), global_batch=8, start=8)
    expected = list(made.loader.batches(requests(labels=records.labels, lighting=lighting)))
    for batch, other in zip(made.epoch(2, start=8), expected, strict=True):
        assert torch.equal(batch.images, other.images)
        assert batch.indices.tolist() == other.indices.tolist()
    validation = evaluation_batches(data, records, loading, batch_size=8)
    each_once = evaluation_requests(len(records), shorter=256, batch=8)
    plain = Loader(records, View(32), 8, loading).batches(each_once)
    for batch, other in zip(validation.once(), plain, strict=True):
        assert torch.equal(batch.images, other.images)


def assert_same(batches: list[Batch], others: list[Batch]) -> None:
    for batch, other in zip(batches, others, strict=True):
        assert torch.equal(batch.images, other.images)
        assert batch.indices.tolist() == other.indices.tolist()


@pytest.mark.parametrize("val_resize", [None, 45])
def test_evaluation_and_whole_pictures_follow_val_resize(tmp_path: Path, val_resize: int | None) -> None:
    """None leaves pictures as they are stored, but for those that are smaller than the crop."""
    shapes = [(90, 60), (60, 90), (90, 60), (61, 75), (33, 32), (20, 50)]
    paths = [tmp_path / f"{seed}.jpg" for seed in range(len(shapes))]
    for seed, (path, (width, height)) in enumerate(zip(paths, shapes, strict=True)):
        path.write_bytes(jpeg(width, height, seed))
    records, data = read_pictures(find_pictures(paths)), DataConfig(crop=32, val_resize=val_resize)
    for rank in range(2):
        loading = Loading(PLAIN, Engine(), CPU, Ranks(rank, 2))
        center = evaluation_batches(data, records, loading, batch_size=4)
        asked = evaluation_requests(6, shorter=val_resize, batch=2, rank=rank, world_size=2)
        assert center.steps == 2
        assert_same(list(center.once()), list(Loader(records, View(32), 2, loading).batches(asked)))
        whole = whole_pictures(data, records, shapes_of(records), loading, batch_size=4)
        stored = np.array([(height, width) for width, height in shapes])
        asked = whole_requests(stored, shorter=val_resize, crop=32, batch=2, rank=rank, world_size=2)
        made = list(whole.once())
        assert_same(made, list(Loader(records, View(32, "whole"), 2, loading).batches(asked)))
        for batch in made:
            for index, image in zip(batch.indices.tolist(), batch.images, strict=True):
                width, height = shapes[index]
                target = val_resize or max(32, min(width, height))
                assert image.shape[1:] == tuple(side * target // min(width, height) for side in (height, width))
