"""The loaders of the throughput benchmark do the same work, and hand over the same."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from bench.contenders import loaders
from bench.contenders.loaders import DECODE, LIMIT, OURS, Work
from bench.harness.missing import MissingError
from fastflower.data.splits import load_pictures
from fastflower.data.view import Engine
from fastflower.errors import UserError
from fastflower.runtime.distributed import Ranks
from fastflower.settings import build
from tests.bench import fake_timm

pytestmark = pytest.mark.usefixtures("on_a_small_cpu")
PEERS = ["DataLoader, PIL and torchvision", "DataLoader, torchvision v2 on tensors", "DALI, separate operators"]
TIMM = "DataLoader, timm's"


@pytest.fixture
def work(small: Path) -> Work:
    """48 square pictures; with a shorter side like the crop nothing is random but the flip."""
    data = build({"data": {"root": [str(small)], "crop": 36, "scale": [36, 36], "val_resize": None}}, "test").data
    return Work(load_pictures(data, ["train"], seed=0), data, Engine(threads=1), torch.device("cpu"), Ranks())


def with_output(work: Work, output: str) -> Work:
    return Work(**vars(work) | {"output": output})


def assert_alike(ours: Iterator[Any], peer: Iterator[Any], levels: int) -> None:
    """The same pictures up to the flip, and up to `levels` of 255 by which resizers round apart."""
    batches = list(zip(ours, peer, strict=True))
    assert len(batches) == 5  # over the end of two epochs of 48 // 20 batches
    for a, b in batches:
        assert a.shape == b.shape == (20, 3, 36, 36)
        assert a.dtype == b.dtype
        scale = 1 if a.dtype == torch.uint8 else 1 / 255 / 0.224
        straight, flipped = ((a.float() - view).abs().amax(dim=(1, 2, 3)) for view in (b.float(), b.flip(3).float()))
        assert torch.minimum(straight, flipped).max() < (levels + 0.01) * scale
        assert (straight - flipped).abs().min() > 5 * scale  # so the flip was told apart


@pytest.mark.parametrize(
    ("peer", "output"),
    [
        *((peer, "float32") for peer in PEERS),
        (PEERS[2], "uint8"),
        *(pytest.param(peer, "uint8", marks=pytest.mark.slow) for peer in PEERS[:2]),
    ],
)
def test_peers_hand_over_the_same_pictures(work: Work, peer: str, output: str) -> None:
    work = with_output(work, output)
    makers = loaders.contenders(work, peers=True)
    ours, theirs = makers[OURS](20), makers[peer](20)
    for _ in range(2):  # workers serve a second repeat
        assert_alike(ours.start(5), theirs.start(5), levels=2)


def test_order_is_that_of_training_and_of_each_process(work: Work) -> None:
    requests = list(work.requests(20, 3))
    assert [len(request) for request in requests] == [20] * 3
    halves = [Work(**vars(work) | {"ranks": Ranks(rank, 2, rank, 2)}).requests(10, 3) for rank in range(2)]
    for request, first, second in zip(requests, *halves, strict=True):
        assert np.array_equal(request.indices, np.concatenate([first.indices, second.indices]))


def test_decoders_alone_give_the_pictures_or_what_is_kept_of_them(work: Work) -> None:
    makers = loaders.contenders(work, peers=False)
    assert list(makers) == [OURS, DECODE, LIMIT]
    by_dali: Any = next(makers[DECODE](20).start(1))
    by_turbo: Any = next(makers[LIMIT](20).start(1))
    assert len(by_dali) == len(by_turbo) == 20
    for one, two in zip(by_dali, by_turbo, strict=True):
        assert np.array_equal(np.asarray(one), two.permute(1, 2, 0).numpy())
    large = Work(**vars(work) | {"data": replace(work.data, scale=(90, 90))})
    parts: Any = next(loaders.decode_only(large, 20).start(1))
    assert sum(np.asarray(part).size for part in parts) < 0.5 * sum(two.numel() for two in by_turbo)


def test_a_cpu_is_no_limit_to_a_gpu(work: Work) -> None:
    gpu = Work(**vars(work) | {"engine": Engine("gpu", 0)})
    assert LIMIT not in loaders.contenders(gpu, peers=True)


def test_nothing_travels_on_a_cpu(work: Work) -> None:
    assert loaders.transfer_s(work) == 0


def test_too_few_records(work: Work) -> None:
    with pytest.raises(UserError, match="48 training records, fewer than --batch 49: lower it"):
        next(loaders.ours(work, 49).start(1))
    two = Work(**vars(work) | {"ranks": Ranks(0, 2, 0, 2)})
    with pytest.raises(UserError, match="fewer than --batch 25 in 2 processes"):
        next(loaders.ours(two, 25).start(1))


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_missing_packages(work: Work, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package] or [package]:
        monkeypatch.setitem(sys.modules, name, None)
    makers = loaders.contenders(work, peers=True)
    names = [TIMM] if package == "timm" else [LIMIT, *PEERS[:2], TIMM]
    for name in names:
        with pytest.raises(MissingError, match=f"not installed \\(pip install {package}\\)"):
            makers[name](8)


@pytest.fixture
def _timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of timm's names, which is not installed here."""
    contents: dict[str, dict[str, Callable[..., Any]]] = {
        "timm": {},
        "timm.data": {},
        "timm.data.loader": {"fast_collate": fake_timm.fast_collate, "PrefetchLoader": fake_timm.PrefetchLoader},
        "timm.data.transforms": {"ToNumpy": fake_timm.ToNumpy},
    }
    for name, content in contents.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("_timm")
@pytest.mark.parametrize("output", ["float32", pytest.param("uint8", marks=pytest.mark.slow)])
def test_timms_loader_does_the_same(work: Work, output: str) -> None:
    work = with_output(work, output)
    theirs = loaders.timms(work, 20)
    assert theirs.ahead == 2 + (output == "float32")
    assert_alike(loaders.ours(work, 20).start(5), theirs.start(5), levels=2)
