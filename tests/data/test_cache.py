"""Pictures decoded once: the same batches, what fits where, and memory that processes share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastflower import machine
from fastflower.config import DataConfig
from fastflower.data import cache
from fastflower.data.batches import evaluation_batches, training_batches
from fastflower.data.cache import Decoded, choose_place, open_cache
from fastflower.data.loader import Loading
from fastflower.data.records import Records
from fastflower.data.sources.kaggle import load_split
from fastflower.data.view import IMAGENET, Engine
from fastflower.errors import UserError
from fastflower.evaluation.pictures import find_pictures, read_pictures
from fastflower.machine import Memory
from fastflower.runtime.distributed import Ranks
from tests.conftest import READABLE, fastflower, train_arguments, write_folders
from tests.processes import in_ranks
from tests.training import tiny_worker
from tests.training.test_run import without_times

CPU, ALONE = torch.device("cpu"), Ranks()


def decoded(records: Records, choice: Any = "ram") -> tuple[Decoded | None, list[str]]:
    said: list[str] = []
    (pixels,) = open_cache(choice, [(records, None)], Engine(), ALONE, said.append, lambda _: lambda done, total: None)
    return pixels, said


def batches(records: Records, pixels: Decoded | None, epoch: int) -> list[torch.Tensor]:
    data = DataConfig(crop=32, scale=(36, 60), val_resize=40)
    loading = Loading(IMAGENET, Engine(), CPU)
    train = training_batches(data, records, loading, batch_size=4, seed=0, decoded=pixels)
    val = evaluation_batches(data, records, loading, batch_size=3, decoded=pixels)
    return [batch.images for loader in (train.epoch(epoch), val.once()) for batch in loader]


def test_batches_are_the_same_bit_for_bit(odd_images: Path) -> None:
    records = read_pictures(find_pictures([odd_images / name for name in READABLE]))
    records = Records(**{**vars(records), "labels": np.zeros(len(records), np.int64)})
    pixels, said = decoded(records)
    assert pixels
    assert "Keeping the decoded pictures in host memory: 0.0" in said[0]
    for epoch in (0, 1, 5):
        for images, others in zip(batches(records, pixels, epoch), batches(records, None, epoch), strict=True):
            assert torch.equal(images, others)


def test_real_photographs_at_all_sizes(flowers5: Path) -> None:
    records = load_split(flowers5, "val", sizes="all")
    pixels, _ = decoded(records)
    assert pixels
    assert pixels.pixels.nbytes == 3 * 50 * (192**2 + 224**2 + 331**2 + 512**2)
    for images, others in zip(batches(records, pixels, 0), batches(records, None, 0), strict=True):
        assert torch.equal(images, others)


@pytest.mark.parametrize(
    ("choice", "needed", "place", "words"),
    [
        ("off", 1, None, ""),
        ("ram", 799, "ram", "Keeping the decoded pictures in host memory: 8e-07 GB"),
        ("ram", 801, None, "would take 8e-07 GB, and 1e-06 GB of host memory are free"),
        ("auto", 499, "ram", "in host memory"),
        ("auto", 501, None, "each epoch decodes them anew"),
    ],
)
def test_what_does_not_fit_is_said(
    choice: Any, needed: int, place: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "memory", lambda: Memory(total=2000, free=1000, limit=None))
    chosen, sentence = choose_place(choice, needed, Engine(), ALONE)
    assert chosen == place
    assert words in sentence


def test_a_gpu_comes_first_and_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_free", lambda place, *_: {"gpu": 1000, "ram": 2000}[place])
    on_gpu = Engine(device="gpu", device_id=0)
    for choice, needed, place in [("auto", 499, "gpu"), ("auto", 501, "ram"), ("auto", 1001, None), ("gpu", 801, None)]:
        assert choose_place(choice, needed, on_gpu, ALONE)[0] == place  # type: ignore[arg-type]
    with pytest.raises(UserError, match="data.cache gpu needs DALI on a GPU"):
        choose_place("gpu", 1, Engine(), ALONE)


def test_shared_memory_counts_between_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    two = Ranks(rank=0, world_size=2, local_rank=0, local_world_size=2)
    free = os.statvfs("/dev/shm")
    monkeypatch.setattr(machine, "memory", lambda: Memory(total=10**15, free=10**15, limit=None))
    assert cache._free("ram", Engine(), two) == free.f_bavail * free.f_frsize
    assert cache._free("ram", Engine(), ALONE) == 10**15


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    return write_folders(tmp_path / "data", {"train/rose": 13, "train/tulip": 12, "val/rose": 4, "val/tulip": 3})


def test_runs_are_the_same_with_and_without(folders: Path, tmp_path: Path, tiny_net: None) -> None:
    rows = {}
    for choice in ("off", "ram", "auto"):
        result = fastflower(*train_arguments(folders, tmp_path / choice), "--train.epochs", 2, "--data.cache", choice)
        assert result.code == 0, result.err
        assert ("Keeping the decoded pictures in host memory" in result.out) == (choice != "off")
        rows[choice] = without_times(tmp_path / choice)
    assert rows["off"] == rows["ram"] == rows["auto"]
    refused = fastflower(*train_arguments(folders, tmp_path / "gpu"), "--data.cache", "gpu")
    assert refused.code == 2
    assert "data.cache gpu needs DALI on a GPU" in refused.err


def test_a_picture_that_cannot_be_decoded_is_named(folders: Path, tmp_path: Path, tiny_net: None) -> None:
    bad = folders / "train/rose/000003.jpg"
    measured = ("--data.mean", 0.4, 0.4, 0.4, "--data.std", 1, 1, 1)  # else that would find it
    for content in (b"<html>", bad.read_bytes()[:200]):
        bad.write_bytes(content)
        refused = fastflower(*train_arguments(folders, tmp_path / "run"), *measured, "--data.cache", "ram")
        assert refused.code == 2
        assert f"{bad} cannot be decoded" in refused.err


def test_two_processes_share_memory_and_leave_none(folders: Path, tmp_path: Path, tiny_net: None) -> None:
    before = set(os.listdir("/dev/shm"))
    rows = []
    for choice in ("off", "ram"):
        arguments = [*train_arguments(folders, tmp_path / choice), "--train.epochs", 1, "--data.cache", choice]
        done = in_ranks(tiny_worker.main, *arguments)
        assert done.code == 0, done.err
        rows.append(without_times(tmp_path / choice))
    assert rows[0] == rows[1]
    assert "Keeping the decoded pictures in host memory" in done.out
    assert {name for name in set(os.listdir("/dev/shm")) - before if name.startswith("fastflower-")} == set()
