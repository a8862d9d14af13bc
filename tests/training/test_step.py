"""Steps of training and validation give the device its work and wait for nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastflower.config import Config, resolve
from fastflower.data.loader import Batch
from fastflower.runtime.device import Precision
from fastflower.runtime.distributed import Ranks
from fastflower.runtime.signals import Signals
from fastflower.training.loss import Criterion
from fastflower.training.metrics import EvaluationSums, TrainingSums
from fastflower.training.state import State, new_state
from fastflower.training.step import training_step
from fastflower.training.validate import evaluate
from tests.conftest import TinyNet

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)  # of tensors that have a shape and a place, and no content
CLASSES = 12
# What may be switched on in a step, each with what it is beside the others.
CHOICES = [
    {},
    {"optimizer": "adamw", "accumulate": 3},
    {"clip_grad": 1.0, "ema": 0.9},
    {"mixup": 0.4, "label_smoothing": 0.1},
    {"cutmix": 1.0},
]


class NoWaiting(TorchDispatchMode):
    """Refuses what a GPU would be waited for: results that the host needs, and copies from one to the other."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch says no types

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        needed = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}.intersection(func.tags)
        assert not needed, f"{func} waits for the device"
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            places = {leaf.device.type for leaf in tree_leaves((args, result)) if isinstance(leaf, torch.Tensor)}
            assert len(places) == 1, f"{func} copies between {places}"
        return result


@pytest.fixture
def gpu() -> Iterator[None]:
    """Tensors of this test have no content, so that they may be on a GPU that is not there."""
    with FakeTensorMode():
        yield


def batches(*sizes: int, device: torch.device) -> Iterator[Batch]:
    for n in sizes:
        images = torch.zeros(n, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
        yield Batch(images, torch.zeros(n, dtype=torch.int64, device=device), np.arange(n))


def training(choices: dict[str, Any]) -> tuple[Any, State]:
    config = resolve(Config())
    config = replace(config, train=replace(config.train, **choices))
    setup = SimpleNamespace(
        config=config,
        device=CPU,
        precision=Precision(None),
        ranks=SimpleNamespace(world_size=1),
        criterion=Criterion(config.train.label_smoothing),
        train=SimpleNamespace(global_batch=8),
    )
    return setup, new_state(TinyNet("resnet18", CLASSES), config, CPU, Precision(None))


@pytest.mark.parametrize("pad_to", [None, 8])
def test_a_validation_step_does_not_wait_for_the_device(
    gpu: None, pad_to: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EvaluationSums, "result", lambda sums, ranks: sums)  # asked for once, behind the last step
    counted: list[tuple[int, ...]] = []
    monkeypatch.setattr(EvaluationSums, "add", noting(counted, EvaluationSums.add))
    with GPU:
        network = TinyNet("resnet18", CLASSES)
    with NoWaiting():
        evaluate(
            network,
            batches(8, 8, 5, device=GPU),
            classes=CLASSES,
            device=GPU,
            precision=Precision(None),
            ranks=Ranks(),
            signals=Signals(),
            pad_to=pad_to,
        )
    assert counted == [(8, CLASSES), (8, CLASSES), (5, CLASSES)]


def noting(shapes: list[tuple[int, ...]], add: Callable[..., None]) -> Callable[..., None]:
    """The same function, which notes the shapes of the logits that it counts."""

    def call(sums: EvaluationSums, logits: torch.Tensor, labels: torch.Tensor) -> None:
        shapes.append(tuple(logits.shape))
        add(sums, logits, labels)

    return call


@pytest.mark.parametrize("choices", CHOICES, ids=lambda choices: "+".join(choices) or "plain")
def test_a_training_step_asks_for_no_result(choices: dict[str, Any]) -> None:
    """On a CPU, since gradients need a device that is there."""
    setup, state = training(choices)
    network = state.network.train()
    for warm, batch in enumerate(batches(8, 8, 8, device=CPU)):
        if not warm:  # optimizers make their state in the first step
            training_step(setup, state, network, batch)
            continue
        with NoWaiting():
            training_step(setup, state, network, batch)
    assert state.step == 3


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: int(x[0]),
        lambda x: bool((x > 0).any()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.bincount(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.unique(),
        lambda x: torch.equal(x, x + 1),
        lambda x: torch.zeros(4, dtype=torch.int64).copy_(x),
        lambda x: x.copy_(torch.zeros(4, dtype=torch.int64)),
        lambda x: x + torch.tensor([1, 2, 3, 4]).to(GPU),
        lambda x: TrainingSums(GPU).first_bad(),
        lambda x: TrainingSums(GPU).means(),
    ],
)
def test_what_waits_is_noticed(gpu: None, wait: Callable[[torch.Tensor], Any]) -> None:
    x = torch.ones(4, dtype=torch.int64, device=GPU)
    with NoWaiting(), pytest.raises(AssertionError, match="waits for the device|copies between"):
        wait(x)
