"""A process keeps to its own GPU: it is made CUDA's current one first, in every thread that CUDA is asked in."""

from __future__ import annotations

import ast
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from fastflower.data.cache import Decoded
from fastflower.data.loader import Loader, Loading, _Item, _Producer
from fastflower.data.memory import pageable
from fastflower.data.sampler import Request, evaluation_requests
from fastflower.data.sources.kaggle import load_split
from fastflower.data.view import Engine, View
from fastflower.runtime import distributed, launcher
from fastflower.runtime.distributed import Ranks, processes
from tests.conftest import ROOT

GPU = torch.device("cuda", 1)
# Functions of torch.cuda that are about no GPU, or about all; an event is on the GPU of the stream that records it.
OF_NONE = {"is_available", "is_initialized", "device_count", "get_rng_state_all", "set_rng_state_all", "Event"}
OF_NONE |= {"empty_cache"}  # of all GPUs that this process has memory of

Call = tuple[str, tuple[Any, ...]]  # what was called, and with what


def cuda_calls() -> Iterator[tuple[Path, ast.Call, str]]:
    """Where the package calls a function of torch.cuda, and which."""
    for path in sorted([*ROOT.glob("fastflower/**/*.py"), *ROOT.glob("kernels/**/*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("torch.cuda."):
                _, _, name = ast.unparse(node.func).split(".", 2)
                if name.isidentifier():  # and not a method of what it returns
                    yield path, node, name


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Call]]:
    """What each thread asks of a CUDA that is not there, in order."""
    noted: dict[str, list[Call]] = {}

    def standing_in_for(name: str) -> Any:
        def function(*arguments: Any) -> MagicMock:
            noted.setdefault(threading.current_thread().name, []).append((name, arguments))
            return MagicMock()

        return function

    for name in {name for _, _, name in cuda_calls()} - OF_NONE:
        monkeypatch.setattr(torch.cuda, name, standing_in_for(name))
    return noted


def test_every_question_names_its_gpu() -> None:
    asked = [(path, node, name) for path, node, name in cuda_calls() if name not in OF_NONE]
    assert len(asked) > 10
    for path, node, name in asked:
        assert node.args, f"{path}:{node.lineno} asks torch.cuda.{name} of whichever GPU is the current one"


def test_the_loaders_thread_begins_with_its_gpu(
    small: Path, calls: dict[str, list[Call]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_cpu(producer: _Producer, images: torch.Tensor, request: Request) -> _Item:
        torch.cuda.current_stream(GPU)
        return _Item(images.permute(0, 3, 1, 2), torch.zeros(len(request)), None, request.indices, None)

    monkeypatch.setattr(_Producer, "_item", on_cpu)
    monkeypatch.setattr("fastflower.data.loader.pinned", pageable)
    decoded = Decoded(np.full((20, 2), 40), np.zeros(20, np.int64), np.zeros(3 * 40 * 40, np.uint8))  # without DALI
    loader = Loader(load_split(small, "val"), View(32), 8, Loading(None, Engine(), GPU), decoded)
    for _ in range(2):  # each in a thread of its own
        calls.clear()
        assert len(list(loader.batches(evaluation_requests(20, shorter=36, batch=8)))) == 3
        assert calls["loader"][0] == ("set_device", (GPU,))
        assert {name for name, _ in calls["loader"]} == {"set_device", "stream", "current_stream"}


@pytest.mark.parametrize("place", [None, (1, 2, 1, 2)], ids=["alone", "by torchrun"])
def test_a_process_begins_with_its_gpu(
    place: tuple[int, int, int, int] | None, calls: dict[str, list[Call]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def meet(_: torch.device, ranks: Ranks) -> tuple[None, Ranks]:
        torch.cuda.current_stream(GPU)
        return None, ranks

    monkeypatch.setattr(launcher, "place", lambda: place)
    monkeypatch.setattr(distributed, "_meet", meet)
    monkeypatch.setattr(distributed, "near", contextlib.nullcontext)  # which machines of one node have no use for
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    with processes(GPU):
        torch.cuda.synchronize(GPU)
    names = [name for name, _ in calls[threading.current_thread().name]]
    assert names == ["set_device", *["current_stream"] * bool(place), "synchronize"]


def test_nothing_is_asked_of_cuda_on_a_cpu(calls: dict[str, list[Call]]) -> None:
    with processes(torch.device("cpu")):
        pass
    assert not calls
