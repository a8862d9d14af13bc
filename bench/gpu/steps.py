"""The product's own training step and validation on synthetic pictures: in all precisions, compiled and not.

A network with every form of block learns one batch by heart; each way must do so as float32 does.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from statistics import mean
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn

from bench.gpu.task import FailedError, Outcome, Task, attempt
from fastflower.models import Norm, create_model
from fastflower.runtime.device import Precision
from fastflower.runtime.distributed import Ranks
from fastflower.training.loss import Criterion, Targets
from fastflower.training.metrics import EvaluationSums
from fastflower.training.state import Setup, State, new_state
from fastflower.training.step import training_network, training_step
from fastflower.training.validate import outputs

CLASSES = 12
SIDE = 64  # pixels
STEPS, LAST = 40, 8  # all, and those whose mean loss is compared
ALIKE = 0.15  # by which losses may differ, relatively; and a fifth of that absolutely
WAITS = "called a synchronizing"  # in torch's warning
UNTIL_STEADY = 5  # steps in which memory is allocated and code compiled


@dataclass(frozen=True)
class Recipe:
    """The settings that a step reads, as `fastflower.config.TrainConfig` has them, which needs more than torch."""

    optimizer: str = "sgd"
    lr: float = 0.02
    head_lr: float | None = None
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    decay_norm_and_bias: bool = True
    schedule: str = "step"
    accumulate: int = 1
    clip_grad: float | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    ema: float = 0.0
    freeze_epochs: int = 0
    compile: bool | None = False
    compile_mode: str = "default"

    @property
    def peak_lr(self) -> float:
        """As of TrainConfig."""
        return self.lr


@dataclass(frozen=True)
class Way:
    """How a cell trains."""

    dtype: torch.dtype | None = None
    norm: Norm = "torch"
    recipe: Recipe = Recipe()

    @property
    def mixes(self) -> bool:
        """Whether its loss is another one than the others'."""
        return bool(self.recipe.mixup or self.recipe.cutmix)


def ways(task: Task) -> dict[str, Way]:
    """All cells, the plainest first, and those that compile for long last."""
    compiled = Recipe(compile=True)
    graphs = replace(compiled, compile_mode="reduce-overhead")
    bf16, fp16 = Way(torch.bfloat16), Way(torch.float16)
    if task.tiny:
        return {"bf16": bf16, "bf16, kernels": replace(bf16, norm="triton"), "fp32, compiled": Way(recipe=compiled)}
    return {
        "fp16": fp16,
        "bf16": bf16,
        "bf16, kernels": replace(bf16, norm="triton"),
        "bf16, pieces, clipped, averaged": replace(bf16, recipe=Recipe(accumulate=2, clip_grad=10.0, ema=0.9)),
        "bf16, mixup and cutmix": replace(bf16, recipe=Recipe(mixup=0.4, cutmix=1.0)),
        "bf16, compiled": replace(bf16, recipe=compiled),
        "fp16, compiled": replace(fp16, recipe=compiled),
        "bf16, reduce-overhead": replace(bf16, recipe=graphs),
        "fp16, kernels, compiled": Way(torch.float16, "triton", compiled),
        "bf16, kernels, reduce-overhead": Way(torch.bfloat16, "triton", graphs),
        "bf16, pieces, reduce-overhead": replace(bf16, recipe=replace(graphs, accumulate=2)),
    }


def small_network(norm: Norm) -> nn.Module:
    """The first half of resnet18, which has every form of block."""
    torch.manual_seed(0)
    network = create_model("resnet18", CLASSES, norm=norm)
    network.layer3, network.layer4, network.fc = nn.Identity(), nn.Identity(), nn.Linear(128, CLASSES)
    return network


def prepare(
    network: nn.Module, recipe: Recipe, dtype: torch.dtype | None, batch: int, device: torch.device, ranks: Ranks
) -> tuple[Setup, State]:
    """What `training_step` works with; `batch` pictures over all ranks."""
    config: Any = SimpleNamespace(train=recipe, seed=0)
    network = network.to(device).to(memory_format=torch.channels_last)
    precision = Precision(dtype)
    setup = Setup(
        config=config,
        device=device,
        precision=precision,
        ranks=ranks,
        criterion=Criterion(),
        train=cast(Any, SimpleNamespace(global_batch=batch)),
        val=None,
        provenance=cast(Any, None),
    )
    return setup, new_state(network, config, device, precision)


def pictures(n: int, device: torch.device, side: int = SIDE) -> Any:
    """A batch as the loader hands it over."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n, 3, side, side, generator=generator).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    return SimpleNamespace(images=images.to(device), labels=labels.to(device))


@contextmanager
def counted_waits(device: torch.device) -> Iterator[list[str]]:
    """Sentences about each time that the host waits for the GPU, as far as torch notices."""
    waits: list[str] = []
    if device.type != "cuda":
        yield waits
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits += [str(warning.message) for warning in caught if WAITS in str(warning.message)]


@dataclass(frozen=True)
class Noted:
    """A criterion, and the losses that it has given."""

    criterion: Criterion
    losses: list[torch.Tensor]

    def __call__(self, logits: torch.Tensor, targets: Targets) -> torch.Tensor:
        """As of the criterion."""
        loss = self.criterion(logits, targets)
        self.losses.append(loss.detach())
        return loss


def train(task: Task, way: Way, batch: int) -> list[float]:
    """The losses of all steps; FailedError where they are not finite, or where the host waited for the GPU."""
    setup, state = prepare(small_network(way.norm), way.recipe, way.dtype, batch, task.device, Ranks())
    called, held = training_network(setup, state), pictures(batch, task.device)
    losses: list[torch.Tensor] = []
    setup = replace(setup, criterion=cast(Criterion, Noted(setup.criterion, losses)))

    def take(steps: int) -> None:
        for _ in range(steps):
            # a copy, since cutmix writes into it
            batch: Any = SimpleNamespace(images=held.images.clone(), labels=held.labels)
            training_step(setup, state, called, batch)

    take(UNTIL_STEADY)
    with counted_waits(task.device) as waits:
        take(STEPS - UNTIL_STEADY)
        sums = EvaluationSums(CLASSES, task.device)
        with torch.no_grad():
            for _, logits in outputs(state.network.eval(), [held], device=setup.device, precision=setup.precision):
                sums.add(logits, held.labels)
    if waits:
        raise FailedError(f"the host waited for the GPU {len(waits)} times in {STEPS - UNTIL_STEADY} steps: {waits[0]}")
    if state.sums.first_bad() or not all(parameter.isfinite().all() for parameter in state.network.parameters()):
        raise FailedError("losses or weights are not finite")
    return torch.stack(losses).tolist()


def steps(task: Task) -> Outcome:
    """Every way learns as float32 does, without waiting for the GPU."""
    batch = 8 if task.tiny else 32
    reference = mean(train(task, Way(), batch)[-LAST:])
    task.row(way="fp32", loss=reference)
    losses = {"fp32": reference}

    def check(name: str, way: Way) -> None:
        every = train(task, way, batch)
        losses[name] = mean(every[-LAST:])
        task.row(way=name, loss=losses[name], first_loss=every[0])
        if way.mixes:
            if not losses[name] < every[0]:
                raise FailedError(f"its loss rose from {every[0]:.3f} to {losses[name]:.3f}")
        elif abs(losses[name] - reference) > ALIKE * (reference + 0.2):
            raise FailedError(f"its loss is {losses[name]:.3f}, of float32 {reference:.3f}")

    cells = {name: partial(check, name, way) for name, way in ways(task).items()}
    done = attempt(task, cells)
    return Outcome(
        f"{done} of {len(cells)} ways learn as float32 does (its loss {reference:.3f}), without waiting for the GPU"
    )
