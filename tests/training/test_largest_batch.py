"""The largest batch that fits a GPU, by a stand-in for its memory; and the steps that are tried, on the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fastflower.api import load_config, load_data
from fastflower.config import Config
from fastflower.errors import UserError
from fastflower.runtime.device import Precision
from fastflower.runtime.distributed import Ranks
from fastflower.runtime.progress import Display
from fastflower.training import largest_batch, setup
from fastflower.training.largest_batch import _sizes, _try_steps, largest, with_batch_size
from fastflower.training.step import evaluate_in, training_step
from tests.conftest import fastflower, train_arguments, train_settings

GPU, FP32 = torch.device("cuda", 0), Precision(None)


class Memory:
    """A GPU's: pictures that fit it, and what was tried."""

    def __init__(self, room: int) -> None:
        self.room, self.share, self.tried, self.emptied = room, 1.0, [], 0  # type: ignore[var-annotated]

    def limit(self, share: float, device: torch.device) -> None:
        self.share = share

    def empty(self) -> None:
        self.emptied += 1

    def take(self, config: Config, device: torch.device, precision: Precision, size: int, classes: int) -> None:
        self.tried.append(size)
        if size > self.room * self.share:
            raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    memory = Memory(100)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", memory.limit)
    monkeypatch.setattr(torch.cuda, "empty_cache", memory.empty)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(largest_batch, "_try_steps", memory.take)
    monkeypatch.setattr(largest_batch, "gc", SimpleNamespace(collect=int))  # of all that the tests have made: seconds
    yield memory
    assert memory.share == 1.0, "the limit holds for the search alone"
    assert memory.emptied == len(memory.tried), "each trial gives its memory back"


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,200 pictures, of which there is no more than their number."""
    table = SimpleNamespace(train=range(1200), classes=["a", "b", "c"])
    monkeypatch.setattr(largest_batch, "open_dataset", lambda *_: table)


def settings(root: Path, **train: Any) -> Config:
    config = load_config(None, train_settings(root, epochs=1))
    return replace(config, train=replace(config.train, **train))


def found(config: Config, ranks: Ranks | None = None) -> int:
    silent = Display(Console(quiet=True), shown=False)
    return with_batch_size(config, GPU, FP32, ranks or Ranks(), silent).train.pictures


@pytest.mark.parametrize(
    ("asked", "accumulate", "batch"), [("auto", 1, 64), (0.5, 1, 48), (0.97, 1, 96), ("auto", 5, 80), (0.01, 1, 1)]
)
def test_it_is_the_largest_of_the_tried_sizes_that_fits_the_share(
    asked: Any, accumulate: int, batch: int, tmp_path: Path, memory: Memory, many: None
) -> None:
    assert found(settings(tmp_path, batch_size=asked, accumulate=accumulate)) == batch
    assert all(size % accumulate == 0 for size in memory.tried)
    assert memory.tried == sorted(memory.tried)
    assert len(memory.tried) < 20


def test_ten_steps_stay_in_an_epoch(small: Path, memory: Memory, capsys: pytest.CaptureFixture[str]) -> None:
    memory.room = 10**9
    config = settings(small, batch_size="auto")  # of 48 pictures
    with_batch_size(config, GPU, FP32, Ranks(), Display(Console(), shown=True))
    shown = capsys.readouterr().out
    assert "train.batch_size auto → 4: the largest of those tried that leaves 10 steps an epoch" in shown
    assert found(config) == 4


def test_the_rank_with_the_least_memory_decides(
    tmp_path: Path, memory: Memory, many: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ranks, "max", lambda ranks, value: max(value, -24))  # the others fit 24 pictures at least
    monkeypatch.setattr(Ranks, "gather", lambda ranks, value: [value])
    assert found(settings(tmp_path, batch_size="auto"), Ranks(0, 3)) == 3 * 24  # this one 32 of its 40


def test_what_cannot_be_found_is_said(small: Path, memory: Memory) -> None:
    memory.room = 0
    with pytest.raises(UserError, match="not even 1 pictures fit 80% of the memory of a GPU; take a smaller"):
        found(settings(small, batch_size="auto"))
    for cache in ("gpu", "auto"):
        config = settings(small, batch_size=0.5)
        with pytest.raises(UserError, match="data.cache ram or off"):
            found(replace(config, data=replace(config.data, cache=cache)))


def test_a_number_is_left_as_it_is(small: Path, memory: Memory) -> None:
    assert found(settings(small, batch_size=123)) == 123
    assert not memory.tried


@given(st.integers(1, 12), st.integers(0, 5000))
def test_the_search_finds_the_last_size_that_fits(unit: int, room: int) -> None:
    sizes = [size for size in _sizes(unit) if size <= 4096]
    assert sizes == sorted(set(sizes))
    assert all(later <= 2 * earlier for earlier, later in itertools.pairwise(sizes))
    assert largest(sizes, lambda size: size <= room) == max((size for size in sizes if size <= room), default=0)


@pytest.mark.parametrize(
    "options", [{}, {"accumulate": 2, "ema": 0.9}, {"optimizer": "adamw", "class_weights": "balanced", "mixup": 0.4}]
)
def test_what_is_tried_are_steps_and_a_validation(
    options: dict[str, Any], small: Path, tiny_net: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, int]] = []

    def step(setup: Any, state: Any, network: Any, batch: Any) -> None:
        training_step(setup, state, network, batch)
        calls.append(("step", len(batch.labels)))

    def validation(setup: Any, network: Any, batches: Any, signals: Any) -> None:
        assert evaluate_in(setup, network, batches, signals).n == 6
        calls.append(("validation", len(batches[0].labels)))

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append(("synchronized", 0)))
    monkeypatch.setattr(largest_batch, "training_step", step)
    monkeypatch.setattr(largest_batch, "evaluate_in", validation)
    _try_steps(settings(small, batch_size="auto", **options), torch.device("cpu"), FP32, 6, 3)
    assert calls == [("step", 6), ("step", 6), ("validation", 6), ("synchronized", 0)]


def test_on_a_cpu_it_is_refused(small: Path, tmp_path: Path) -> None:
    for asked in ("auto", "0.8"):
        result = fastflower(*train_arguments(small, tmp_path / "run"), "--train.batch_size", asked)
        assert result.code == 2
        assert f"train.batch_size {asked} tries how much fits a GPU's memory" in " ".join(result.err.split())
    for wrong in ("1.5", "0", "-3", "many"):
        assert fastflower(*train_arguments(small, tmp_path / "run"), "--train.batch_size", wrong).code == 2
    with pytest.raises(UserError, match="only found where training begins: give a number"):
        load_data(settings(small, batch_size="auto"))


def test_the_number_stands_in_the_run_as_if_typed(
    small: Path, tmp_path: Path, tiny_net: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search is replaced here, since there is no GPU."""

    def replaced(config: Config, *others: Any) -> Config:
        return replace(config, train=replace(config.train, batch_size=12))

    monkeypatch.setattr(setup, "with_batch_size", replaced)
    run = tmp_path / "run"
    options = ("--train.epochs", 1, "--train.batch_size", "auto")
    assert fastflower(*train_arguments(small, run), *options).code == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["batch_size"] == 12
    assert fastflower("eval", run).code == 0
