"""The BatchNorm layers of the networks, and what is right: their results in float64."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastflower.errors import UserError
from fastflower.models import create_model
from fastflower.models.layers import BNReLU

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CORNER = 1e-4  # elements as close as this to ReLU's corner get no gradient in the check: rounding decides their mask
REFERENCE_ELEMENTS = 2**25  # that are taken to float64 at a time

Kind = Literal["bn_relu", "bn_add_relu", "fork", "dual", "dual_fork"]
# Passes over an activation: what the kernels read and write of x, y, the residual and their gradients. Statistics read
# x; normalizing reads x and the residual and writes y. The gradient's sums read x and the gradients of y; then dx
# reads and writes once more. A residual that is only added is not read again, but a mask of one bit an element, and
# its gradient is written with the sums and read in place of y's. One that is normalized (dual) is treated as x is.
FORWARD_PASSES = {"bn_relu": 3, "bn_add_relu": 4, "fork": 4, "dual": 5, "dual_fork": 5}
BACKWARD_PASSES = {"bn_relu": 5, "bn_add_relu": 6, "fork": 7, "dual": 8, "dual_fork": 10}


class Layer(NamedTuple):
    """A BatchNorm with what follows it.

    kind: bn_relu; bn_add_relu adds a residual; fork also, and its output is used twice; dual adds a residual that is
    normalized too, by its own BatchNorm; dual_fork is both.
    """

    kind: Kind
    shape: tuple[int, int, int, int]  # N, C, H, W

    @property
    def added(self) -> bool:
        """Whether a residual is added."""
        return self.kind != "bn_relu"

    @property
    def dual(self) -> bool:
        """Whether the residual is normalized."""
        return self.kind in ("dual", "dual_fork")

    @property
    def fork(self) -> bool:
        """Whether the output is used twice."""
        return self.kind in ("fork", "dual_fork")

    def bytes_moved(self, dtype: torch.dtype) -> tuple[int, int]:
        """Bytes that the kernels read and write forward and backward."""
        n, c, h, w = self.shape
        activation = n * c * h * w * dtype.itemsize
        mask = n * h * w * math.ceil(c / 8) if self.added and not self.dual else 0
        return FORWARD_PASSES[self.kind] * activation + mask, BACKWARD_PASSES[self.kind] * activation + mask


def find_layers(model: str, batch: int, size: int) -> Counter[Layer]:
    """The network's layers and how many there are of each: from running it on the meta device, without data.

    Raises UserError for an unknown network, and for pictures that are too small.
    """
    with torch.device("meta"):
        network = create_model(model, 1000, norm="triton").train()
        images = torch.empty(batch, 3, size, size)
    calls: list[tuple[tuple[Any, ...], list[bool]]] = []

    def record(module: nn.Module, args: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        uses: list[bool] = []
        calls.append((args, uses))
        for y in output if isinstance(output, tuple) else (output,):
            y.register_hook(lambda gradient: uses.append(gradient is not None))

    for module in network.modules():
        if isinstance(module, BNReLU):
            module.register_forward_hook(record)
    try:
        network(images).sum().backward()
    except ValueError as error:  # one value a channel
        raise UserError(f"{model} cannot train on this ({error}): raise --batch or --size.") from error
    kinds: dict[tuple[bool, bool, bool], Kind] = {
        (False, False, False): "bn_relu",
        (True, False, False): "bn_add_relu",
        (True, False, True): "fork",
        (True, True, False): "dual",
        (True, True, True): "dual_fork",
    }
    layers: Counter[Layer] = Counter()
    for args, uses in calls:
        x, residual, residual_norm = (*args, None, None)[:3]
        layers[Layer(kinds[residual is not None, residual_norm is not None, sum(uses) == 2], tuple(x.shape))] += 1
    return layers


class Data(NamedTuple):
    """One copy of a layer's inputs, channels-last [N, C, H, W]."""

    x: Tensor
    residual: Tensor | None
    dys: tuple[Tensor, ...]  # gradients of the output, one for each of its uses


Norm = TypeVar("Norm", bound=nn.BatchNorm2d)
Forward = Callable[[Data], tuple[Tensor, ...]]  # the output, once for each gradient that backward is to hand in


class Problem:
    """A layer in one type on one device: its parameters, and copies of its inputs."""

    def __init__(self, layer: Layer, dtype: torch.dtype, device: torch.device) -> None:
        self.layer, self.dtype, self.device = layer, dtype, device
        channels = layer.shape[1]
        self.norm = _randomized(BNReLU(channels, device=device, fork=layer.fork))
        self.residual_norm = _randomized(nn.BatchNorm2d(channels, device=device)) if layer.dual else None

    def data(self) -> Data:
        """Random inputs."""
        x = self._activation(0.5).requires_grad_()
        residual = self._activation(0.25).requires_grad_() if self.layer.added else None
        return Data(x, residual, tuple(self._activation(0) for _ in range(2 if self.layer.fork else 1)))

    def _activation(self, mean: float) -> Tensor:
        empty = torch.empty(self.layer.shape, dtype=self.dtype, device=self.device, memory_format=torch.channels_last)
        return empty.normal_(mean)

    def inputs(self, data: Data) -> dict[str, Tensor]:
        """What gradients are taken of, by the gradient's name."""
        tensors = {"dx": data.x, "dr": data.residual, "dgamma": self.norm.weight, "dbeta": self.norm.bias}
        if self.residual_norm is not None:
            tensors |= {"dgamma_r": self.residual_norm.weight, "dbeta_r": self.residual_norm.bias}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def backward(self, data: Data, outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """The gradients by name; frees the graph."""
        inputs = self.inputs(data)
        gradients = torch.autograd.grad(outputs, list(inputs.values()), data.dys[: len(outputs)])
        return dict(zip(inputs, gradients, strict=True))

    def reference(self, data: Data) -> Iterator[tuple[slice, Tensor, dict[str, Tensor]]]:
        """In float64, some channels at a time: which, ReLU's input and the leaves that it was computed from."""
        n, c, h, w = self.layer.shape
        step = max(1, REFERENCE_ELEMENTS // (n * h * w))
        for first in range(0, c, step):
            part = slice(first, first + step)
            leaves = {
                name: (tensor[:, part] if tensor.ndim == 4 else tensor[part]).detach().double().requires_grad_()
                for name, tensor in self.inputs(data).items()
            }
            z = _normalize(leaves["dx"], leaves["dgamma"], leaves["dbeta"], self.norm.eps)
            if self.layer.dual:
                z = z + _normalize(leaves["dr"], leaves["dgamma_r"], leaves["dbeta_r"], self.norm.eps)
            elif self.layer.added:
                z = z + leaves["dr"]
            yield part, z, leaves

    def avoid_corner(self, data: Data) -> None:
        """Set the gradients to zero where ReLU's input is so small that rounding decides whether they pass."""
        for part, z, _ in self.reference(data):
            for dy in data.dys:
                dy[:, part].masked_fill_(z.detach().abs() < CORNER, 0)

    def errors(self, data: Data, forward: Forward) -> dict[str, float]:
        """Relative L2 errors of the output and of all gradients against float64."""
        outputs = forward(data)
        results = {"y": outputs[0].detach(), **self.backward(data, outputs)}
        squares = {name: torch.zeros(2, dtype=torch.float64, device=self.device) for name in results}
        for part, z, leaves in self.reference(data):
            dy = torch.stack([dy[:, part].double() for dy in data.dys]).sum(0)
            y = F.relu(z)
            gradients = torch.autograd.grad(y, list(leaves.values()), dy)
            for name, exact in {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}.items():
                computed = results[name][:, part] if exact.ndim == 4 else results[name][part]
                squares[name] += torch.stack(((computed.double() - exact).square().sum(), exact.square().sum()))
        return {name: float((wrong / exact).sqrt()) for name, (wrong, exact) in squares.items()}


def _normalize(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """By the definition: torch's batch_norm would leave it to cuDNN, which is among what is measured."""
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
    return (x - mean) * (var + eps).rsqrt() * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)


def _randomized(norm: Norm) -> Norm:
    """With weights that are not all alike."""
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(0, 0.2)
    return norm
