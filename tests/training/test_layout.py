"""Pictures stay channels-last from the loader to the network on a GPU, whatever is done to them in between."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastflower.config import Config
from fastflower.data.loader import Batch, normalize
from fastflower.evaluation.views import Views
from fastflower.runtime.device import Precision
from fastflower.training.state import new_state
from fastflower.training.step import training_step
from fastflower.training.validate import outputs
from tests.conftest import TinyNet
from tests.training.no_data import setup_without_data

GPU = torch.device("cuda", 0)  # of tensors that have a shape, a layout and a place, and no content
CLASSES, SIDE = 3, 32
MIXTURES = [{}, {"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}]

pytestmark = pytest.mark.filterwarnings("ignore:CUDA is not available")  # so that nothing is cast automatically


@pytest.fixture(autouse=True)
def _on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)  # which needs a device that is there
    with FakeTensorMode():
        yield


def network_of() -> TinyNet:
    with GPU:
        return TinyNet("", CLASSES)


def watched(network: TinyNet) -> list[int]:
    """How many pictures each call of the network gets from now on; those in another layout are refused."""
    counts: list[int] = []

    def check(_: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        (images,) = inputs
        assert images.is_contiguous(memory_format=torch.channels_last), images.stride()
        assert not images.is_contiguous(), "these are in both layouts"
        counts.append(len(images))
        return images.float()

    network.conv1.register_forward_pre_hook(check)
    return counts


def batch(size: int = 8, side: int = SIDE, dtype: torch.dtype = torch.float32) -> Batch:
    images = torch.zeros(size, side, side, 3, dtype=dtype, device=GPU).permute(0, 3, 1, 2)
    return Batch(images, torch.zeros(size, dtype=torch.int64, device=GPU), np.arange(size))


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("choices", MIXTURES, ids=lambda choices: "+".join(choices) or "plain")
@pytest.mark.parametrize("precision", [Precision(None), Precision(torch.float16)], ids=str)
def test_in_training(choices: dict[str, Any], accumulate: int, precision: Precision) -> None:
    config = Config()
    config = replace(config, train=replace(config.train, lr=0.1, accumulate=accumulate, **choices))
    setup = replace(setup_without_data(config, 8), device=GPU, precision=precision)
    network = network_of()
    pictures, state = watched(network), new_state(network, config, GPU, Precision(None))
    for _ in range(6):  # mixup or cutmix, and each with another share and place
        training_step(setup, state, network, batch(dtype=precision.dtype or torch.float32))
    assert sum(pictures) == 6 * 8
    assert len(pictures) == 6 * accumulate


@pytest.mark.parametrize("pad_to", [None, 8])
@pytest.mark.parametrize("precision", [Precision(None), Precision(torch.float16)], ids=str)
def test_in_validation(pad_to: int | None, precision: Precision) -> None:
    network, images = network_of().eval(), precision.dtype or torch.float32
    pictures = watched(network)
    batches = [batch(8, dtype=images), batch(5, dtype=images)]
    shapes = [logits.shape for _, logits in outputs(network, batches, device=GPU, precision=precision, pad_to=pad_to)]
    assert shapes == [(8, CLASSES), (5, CLASSES)]
    assert pictures == [8, pad_to or 5]


@pytest.mark.parametrize("views", [Views(), Views(crops=10), Views(scales=(40,))], ids=["center", "crops", "scales"])
def test_in_every_view_of_an_evaluation(views: Views) -> None:
    network = network_of().eval()
    scorer = views.scorer(network, SIDE)
    pictures = watched(network)
    assert scorer(batch(5, side=40).images).shape == (5, CLASSES)
    assert pictures == [5] * (2 if views.scales else views.crops)


@pytest.mark.parametrize("mean", [(3,), (8, 3)])
def test_when_they_are_normalized(mean: tuple[int, ...]) -> None:
    images = normalize(batch(dtype=torch.uint8).images, torch.zeros(mean, device=GPU), torch.ones(3, device=GPU))
    assert images.is_contiguous(memory_format=torch.channels_last)
