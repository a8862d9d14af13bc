"""What a network costs: parameters, multiply-adds (MACs) and FLOPs of one forward pass, in all and layer by layer."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastflower.errors import UserError
from fastflower.models import NETWORKS, create_model, find_network
from fastflower.models.layers import BNReLU, both

if TYPE_CHECKING:
    from rich.table import Table

V1 = "-v1"  # after a name: bottlenecks that subsample in their first 1x1 convolution, as in the paper
NUM_CLASSES = 1000  # of the named networks, as in the published figures


@dataclass(frozen=True)
class Layer:
    """A module that computes by itself, as it ran."""

    name: str
    kind: str
    shape: list[int]  # of its output, without N
    params: int
    macs: int


@dataclass(frozen=True)
class Cost:
    """Of one forward pass of one image."""

    model: str
    size: int  # side of the image (pixels)
    params: int
    macs: int  # multiply-adds, which the ResNet paper calls FLOPs
    flops: int  # 2 * macs
    layers: list[Layer]  # in the order in which they ran


def variants() -> tuple[str, ...]:
    """The names that `count` takes: each network's, and with V1 after it where it has bottlenecks."""
    return tuple(name + suffix for name, network in NETWORKS.items() for suffix in ("", V1)[: 1 + network.bottlenecks])


def count(network: str | nn.Module, size: int = 224) -> Cost:
    """Count the parameters of a network and its work for one image, [1, 3, size, size].

    Work is that of convolutions and matrix products, by torch.utils.flop_counter. Not counted: normalization, ReLU,
    pooling, addition and biases. It runs without data on the meta device, in evaluation mode; a network that is given
    is neither run nor changed, and costs the same compiled and by any implementation of BatchNorm.

    Args:
        network: one of `variants`, of 1000 classes, or a network, which may be compiled.
        size: pixels.

    Raises:
        UserError: an unknown name, or images that are too small for the network of that name.
    """
    if isinstance(network, str):
        model, on_meta = network, _by_name(network, size)
    else:
        on_meta = _without_data(network)
        model = type(on_meta).__name__
    on_meta.eval()
    shapes: dict[str, list[int]] = {}
    leaves = {
        name: module
        for name, module in on_meta.named_modules()
        if not any(module.children()) and not isinstance(module, nn.Identity)
    }
    for name, module in leaves.items():
        module.register_forward_hook(
            lambda _, __, output, name=name: shapes.__setitem__(name, list(both(output)[0].shape[1:]))
        )
    parameter = next(on_meta.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        on_meta(torch.empty(1, 3, size, size, device="meta", dtype=parameter.dtype))
    flops = {name: sum(by_operator.values()) for name, by_operator in counter.get_flop_counts().items()}
    layers = [
        Layer(
            name,
            kind=type(leaves[name]).__name__,
            shape=shape,
            params=sum(p.numel() for p in leaves[name].parameters()),
            macs=flops.get(f"{type(on_meta).__name__}.{name}", 0) // 2,
        )
        for name, shape in shapes.items()
    ]
    total = counter.get_total_flops()
    return Cost(model, size, sum(p.numel() for p in on_meta.parameters()), total // 2, total, layers)


def _by_name(name: str, size: int) -> nn.Module:
    if name not in (names := variants()):
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"there is no network {name}{hint}: give some of {', '.join(names)}.")
    base = name.removesuffix(V1)
    least = find_network(base).min_size
    if size < least:
        raise UserError(f"--size is {size} pixels, but {name} needs at least {least}: raise it.")
    with torch.device("meta"):
        return create_model(base, NUM_CLASSES, bottleneck_stride="3x3" if base == name else "1x1")


def _without_data(network: nn.Module) -> nn.Module:
    """A copy on the meta device of what was compiled, by torch's operators, which the counter knows."""
    network = getattr(network, "_orig_mod", network)
    no_data: dict[int, torch.Tensor] = {id(p): nn.Parameter(p.detach().to("meta")) for p in network.parameters()}
    no_data |= {id(buffer): buffer.to("meta") for buffer in network.buffers()}
    copied = copy.deepcopy(network, no_data)
    for module in copied.modules():
        if isinstance(module, BNReLU):
            module.norm = "torch"
    return copied


def costs_table(costs: Sequence[Cost]) -> Table:
    """A line for each network, for a terminal."""
    from fastflower.tables import new_table  # here: what counts does without

    size = costs[0].size
    grid = new_table(
        *("model", "parameters (M)", "MACs (G)", "FLOPs (G)"),
        caption=f"One image of {size} x {size}, {NUM_CLASSES} classes. MACs: multiply-adds of convolutions and matrix "
        "products; FLOPs: 2 x MACs. Normalization, ReLU, pooling, addition and biases are not counted. Bottlenecks "
        "subsample in the 3x3 (v1.5) or the first 1x1 convolution (v1, the paper's).",
    )
    for cost in costs:
        counts = (cost.params / 1e6, cost.macs / 1e9, cost.flops / 1e9)
        grid.add_row(title(cost.model), *(f"{count:.2f}" for count in counts))
    return grid


def layers_table(cost: Cost) -> Table:
    """A line for each layer, for a terminal."""
    from fastflower.tables import new_table

    grid = new_table(
        *("layer", "kind", "output", "parameters", "MACs (M)"),
        names=2,
        title=f"{title(cost.model)}, {cost.size} x {cost.size}",
    )
    for layer in cost.layers:
        shape = " x ".join(map(str, layer.shape))
        grid.add_row(layer.name, layer.kind, shape, f"{layer.params:,}", f"{layer.macs / 1e6:.2f}")
    return grid


def title(model: str) -> str:
    """The name, with the version that a bottleneck network is where it does not say so."""
    return f"{model} (v1.5)" if model in NETWORKS and NETWORKS[model].bottlenecks else model
