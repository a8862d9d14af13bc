"""Compiled as CUDA graphs, whose gradients lie in memory that the next call overwrites: pieces are added up anyway.

There are no CUDA graphs without a GPU; a stand-in gives gradients in such memory.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from torch import nn
from torch._inductor import list_mode_options
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from fastflower.config import Config, TrainConfig
from fastflower.data.loader import Batch
from fastflower.runtime.device import Precision
from fastflower.runtime.distributed import Ranks, processes
from fastflower.training.optimizer import freeze
from fastflower.training.state import CUDA_GRAPH_MODES, State, new_state
from fastflower.training.step import training_step
from tests.conftest import TinyNet
from tests.processes import in_ranks
from tests.training.no_data import setup_without_data

CPU, ALONE = torch.device("cpu"), Ranks()
PICTURES, STEPS, CLASSES = 12, 6, 3
Modes = get_type_hints(TrainConfig)["compile_mode"]


class FromPool(torch.autograd.Function):
    """A parameter whose gradient comes in the same memory each time, and belongs to who takes it."""

    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
        """The parameter as it is."""
        ctx.pool = pool
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The gradient in the memory of the pool, in a new tensor, as CUDA graphs give it."""
        return ctx.pool.copy_(gradient).detach(), None


class Graphed(nn.Module):
    """A network that gives gradients as one does that runs as CUDA graphs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.pools = {name: torch.empty_like(parameter) for name, parameter in network.named_parameters()}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """As the network."""
        parameters = {name: FromPool.apply(p, self.pools[name]) for name, p in self.network.named_parameters()}
        logits: torch.Tensor = functional_call(self.network, parameters, (images,))
        return logits


def trained(
    train: TrainConfig,
    wrap: Callable[[nn.Module], nn.Module],
    frozen: int = 0,
    device: torch.device = CPU,
    ranks: Ranks = ALONE,
) -> Iterator[State]:
    """The state after each of some steps, in the first of which only the head learns; by what `wrap` makes of it."""
    config = replace(Config(), train=replace(train, compile=True, lr=0.1))
    setup = replace(setup_without_data(config, PICTURES * ranks.world_size), device=device, ranks=ranks)
    torch.manual_seed(0)
    state = new_state(TinyNet("", CLASSES).to(device), config, device, Precision(None))
    network, random = wrap(state.network), torch.Generator().manual_seed(1 + ranks.rank)
    for step in range(STEPS):
        freeze(state.network, frozen=step < frozen)
        images = torch.randn(PICTURES, 3, 8, 8, generator=random).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(CLASSES, (PICTURES,), generator=random)
        training_step(setup, state, network, Batch(images.to(device), labels.to(device), np.arange(PICTURES)))
        yield state


def eager(network: nn.Module) -> nn.Module:
    """As it is."""
    return network


def last(states: Iterator[State]) -> dict[str, torch.Tensor]:
    """The weights and statistics after the last step."""
    (state,) = deque(states, maxlen=1)
    return state.network.state_dict()


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]


def test_these_are_torchs_modes_with_cuda_graphs() -> None:
    assert {mode for mode in get_args(Modes) if list_mode_options(mode).get("triton.cudagraphs")} == {*CUDA_GRAPH_MODES}


@pytest.mark.parametrize("mode", CUDA_GRAPH_MODES)
@pytest.mark.parametrize("accumulate", [1, 2, 5, 12])
@pytest.mark.parametrize("frozen", [0, 2])
@pytest.mark.parametrize("choices", [{}, {"optimizer": "adamw"}, {"clip_grad": 0.1}], ids="+".join)
def test_pieces_train_as_in_eager_mode(mode: Any, accumulate: int, frozen: int, choices: dict[str, Any]) -> None:
    train = TrainConfig(accumulate=accumulate, compile_mode=mode, **choices)
    alike = trained(replace(train, compile_mode="default"), eager, frozen)
    assert not differing(last(trained(train, Graphed, frozen)), last(alike))


def test_the_stand_in_does_overwrite_gradients() -> None:
    """Where they are left as a backward pass makes them, as they are in modes without CUDA graphs."""
    pieces, whole = TrainConfig(accumulate=2), TrainConfig(accumulate=1)
    assert differing(last(trained(pieces, Graphed)), last(trained(pieces, eager)))
    assert not differing(last(trained(whole, Graphed)), last(trained(whole, eager)))


def over_ranks() -> None:
    """Train as one of two processes, in eager mode and as CUDA graphs in the mode that is given, and compare."""
    mode: Any = sys.argv[1]

    def exchanging(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
        return lambda network: DistributedDataParallel(wrap(network), gradient_as_bucket_view=True)

    with processes(CPU) as ranks:
        assert ranks.world_size == 2
        for accumulate in (1, 3):
            train = TrainConfig(accumulate=accumulate)
            alike = last(trained(train, exchanging(eager), ranks=ranks))
            train = replace(train, compile_mode=mode)
            assert not differing(last(trained(train, exchanging(Graphed), ranks=ranks)), alike)


def test_pieces_train_as_in_eager_mode_behind_ddp() -> None:
    for mode, code in zip((*CUDA_GRAPH_MODES, "default"), (0, 0, 1), strict=True):
        result = in_ranks(over_ranks, mode)
        assert result.code == code, result.err
    assert "AssertionError" in result.err, "without memory of their own the gradients are overwritten"
