"""Layers that the networks share."""

from __future__ import annotations

import importlib.util
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from fastflower.errors import UserError
from fastflower.kernels.batch_norm import bn_relu
from fastflower.models.names import Norm, NormChoice

# Kinds of GPU, as torch.cuda.get_device_name calls them, on which "triton" trains faster than "torch" compiled, by
# bench/results/gpu_check-GPU.jsonl, whose last sentence says so.
TRITON_WINS: frozenset[str] = frozenset()

Forked = tuple[torch.Tensor, torch.Tensor]  # one activation for each of two consumers


class BNReLU(nn.BatchNorm2d):
    """Batch normalization, an optional residual added to it, and ReLU, as one module.

    Its parameters, buffers and state_dict are BatchNorm2d's.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        norm: Norm = "torch",
        sync: bool = False,
        fork: bool = False,
    ) -> None:
        """As BatchNorm2d, and how it is computed.

        Args:
            num_features: channels.
            eps: added to the variance.
            momentum: share of a batch in the running statistics; None averages over all batches.
            affine: learn weight and bias.
            track_running_stats: keep running statistics, and use them in evaluation.
            device: of the parameters.
            dtype: of the parameters.
            norm: "torch" = torch's operators, for torch.compile to fuse; "triton" = this package's kernels.
            sync: take statistics over all ranks; "triton" only.
            fork: return the output twice, once for each of two consumers. With "triton" both gradients then enter one
                kernel, where autograd would add them in a pass of its own.

        Raises:
            ValueError: sync with "torch".
        """
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if sync and norm == "torch":
            raise ValueError("sync needs norm='triton'")
        self.norm, self.sync, self.fork = norm, sync, fork

    def forward(  # type: ignore[override]
        self, input: torch.Tensor, residual: torch.Tensor | None = None, residual_norm: nn.BatchNorm2d | None = None
    ) -> torch.Tensor | Forked:
        """relu(batch_norm(input) + residual), or + residual_norm(residual); all are [N, C, H, W]."""
        if self.norm == "triton":
            return bn_relu(input, self, residual, residual_norm, sync=self.sync, fork=self.fork)
        if residual is not None and residual_norm is not None:
            residual = residual_norm(residual)
        normalized = super().forward(input)  # a new tensor, which no gradient needs: the rest may work in its memory
        output = F.relu_(normalized if residual is None else normalized.add_(residual))
        return (output, output) if self.fork else output


class AveragePool(nn.AdaptiveAvgPool2d):
    """To a square of fixed size; by parts on a GPU where torch is to be deterministic, as its own gradient is not."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] to [N, C, output_size, output_size]."""
        if input.is_cuda and torch.are_deterministic_algorithms_enabled():
            side = cast(int, self.output_size)
            return pooled_by_parts(pooled_by_parts(input, 2, side), 3, side)
        return super().forward(input)


def pooled_by_parts(x: torch.Tensor, dim: int, count: int) -> torch.Tensor:
    """A dimension averaged to `count` values, as adaptive average pooling divides it: parts may overlap."""
    size = x.shape[dim]
    places = [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]
    return torch.stack([x.narrow(dim, start, end - start).mean(dim) for start, end in places], dim)


class Classic(nn.Module):
    """Convolutions, average pooling to a fixed size, and fully connected layers: AlexNet and VGG.

    Modules are named as torchvision has them.
    """

    def __init__(self, features: nn.Sequential, pooled: int, classifier: nn.Sequential) -> None:
        """Initialize the layers before a ReLU; the last one keeps torch's own initialization, as it does in ResNet.

        Args:
            features: images [N, 3, H, W] to [N, C, h, w].
            pooled: side of the map that `classifier` takes, averaged or, from smaller images, repeated.
            classifier: [N, C * pooled * pooled] to logits.
        """
        super().__init__()
        self.features, self.avgpool, self.classifier = features, AveragePool(pooled), classifier
        for layer in [*features, *classifier[:-1]]:
            if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
                # He et al. 2015, "Delving Deep into Rectifiers", eq. 10: the activations keep their size, which no
                # BatchNorm restores here
                nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [N, 3, H, W] to logits [N, num_classes]."""
        logits: torch.Tensor = self.classifier(self.avgpool(self.features(x)).flatten(1))
        return logits


def head_prefix(network: nn.Module) -> str:
    """What the names of the last linear layer's parameters begin with: `fc.`, or `classifier.6.`."""
    names: list[str] = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    return names[-1] + "."


def uses_kernels(network: nn.Module) -> bool:
    """Whether BatchNorm + ReLU is computed by this package's kernels."""
    return any(isinstance(module, BNReLU) and module.norm == "triton" for module in network.modules())


def both(x: torch.Tensor | Forked) -> Forked:
    """An activation for two consumers, whether or not it comes forked."""
    return x if isinstance(x, tuple) else (x, x)


def choose_norm(choice: NormChoice, device: torch.device, *, sync: bool = False) -> Norm:
    """The implementation of BNReLU: as chosen, or the one measured to be faster; statistics over ranks need "triton".

    Raises:
        UserError: the choice cannot be had.
    """
    if sync and choice == "torch":
        raise UserError("model.sync_norm needs the kernels: set model.norm to triton or auto.")
    on_gpu = device.type == "cuda"
    if choice == "auto" and not sync:
        return "triton" if on_gpu and torch.cuda.get_device_name(device) in TRITON_WINS else "torch"
    if choice == "torch":
        return "torch"
    if on_gpu and importlib.util.find_spec("triton") is None:
        raise UserError("model.norm triton needs the package triton, which is not installed: set model.norm to torch.")
    return "triton"
