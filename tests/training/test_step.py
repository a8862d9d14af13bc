"""Steps of training and validation give the device its work and wait for nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
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
from fastflower.training.ema import Ema
from fastflower.training.loss import Criterion
from fastflower.training.metrics import EvaluationSums, TrainingSums
from fastflower.training.state import Setup, State, new_state
from fastflower.training.step import training_step
from fastflower.training.validate import evaluate
from tests.conftest import TinyNet
from tests.training.no_data import setup_without_data

CPU, FP32 = torch.device("cpu"), Precision(None)
GPU = torch.device("cuda", 0)  # of tensors that have a shape and a place, and no content
CLASSES = 12
# What may be switched on in a step, each with what it is beside the others.
CHOICES = [
    {},
    {"optimizer": "adamw", "accumulate": 3},
    {"clip_grad": 1.0, "ema": 0.9},
    {"mixup": 0.4, "label_smoothing": 0.1},
    {"cutmix": 1.0},
    {"nesterov": True, "class_weights": "balanced"},
]
# Operations on a GPU that write into what they are given, and whose effect on shapes torch has not defined.
WRITING = {
    torch.ops.aten._fused_sgd_,
    torch.ops.aten._fused_adamw_,
    torch.ops.aten._amp_foreach_non_finite_check_and_unscale_,
    torch.ops.aten._amp_update_scale_,
}


class NoWaiting(TorchDispatchMode):
    """Refuses what a GPU would be waited for: results that the host needs, and copies from one to the other."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch says no types

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket in WRITING:  # which do nothing to tensors without content
            return args[0] if func._schema.returns else None
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


def training(choices: dict[str, Any], device: torch.device = CPU, precision: Precision = FP32) -> tuple[Setup, State]:
    config = resolve(Config())
    config = replace(config, train=replace(config.train, **choices | {"ema": 0.0}))
    weights = torch.ones(CLASSES, device=device) if config.train.class_weights == "balanced" else None
    criterion = Criterion(config.train.label_smoothing, weights)
    setup = replace(setup_without_data(config, 8), device=device, precision=precision, criterion=criterion)
    state = new_state(network_on(device), config, device, precision)
    if "ema" in choices:
        with pytest.MonkeyPatch.context() as patch:  # a copy of a tensor without content would be of another kind
            patch.setattr("copy.deepcopy", lambda _: network_on(device))
            state.ema = Ema(state.network, choices["ema"])
    return setup, state


def network_on(device: torch.device) -> TinyNet:
    with device:
        return TinyNet("resnet18", CLASSES)


@pytest.mark.parametrize("pad_to", [None, 8])
def test_a_validation_step_does_not_wait_for_the_device(
    gpu: None, pad_to: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EvaluationSums, "result", lambda sums, ranks: sums)  # asked for once, behind the last step
    counted: list[tuple[int, ...]] = []
    monkeypatch.setattr(EvaluationSums, "add", noting(counted, EvaluationSums.add))
    network = network_on(GPU)
    with NoWaiting():
        evaluate(
            network,
            batches(8, 8, 5, device=GPU),
            classes=CLASSES,
            device=GPU,
            precision=FP32,
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


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("precision", [FP32, Precision(torch.float16)], ids=str)
@pytest.mark.parametrize("choices", CHOICES, ids=lambda choices: "+".join(choices) or "plain")
def test_a_training_step_on_a_gpu_waits_for_nothing_but_its_gradients(
    gpu: None, choices: dict[str, Any], precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which are there at once, since they need a device that is there."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    setup, state = training(choices, GPU, precision)
    assert state.scaler.is_enabled() == (precision.dtype is not None)

    def backward(loss: torch.Tensor) -> None:
        for parameter in state.network.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad + 1

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    for batch in batches(8, 8, 8, device=GPU):
        with NoWaiting():
            training_step(setup, state, state.network, batch)
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
