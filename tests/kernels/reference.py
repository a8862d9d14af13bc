"""BatchNorm + ReLU in float64, from the formulas, and what the tests of the kernels share.

With the batch's mean and biased variance (or, in evaluation, the running ones), M = N·H·W and xhat = (x - mean) / std:

    y = relu(gamma · xhat + beta [+ residual, or the residual normalized the same way])
    g = dy where y > 0                  dbeta = sum(g)        dgamma = sum(g · xhat)
    dx = gamma / std · (g - dbeta / M - xhat · dgamma / M)    or, in evaluation, gamma / std · g

(Ioffe and Szegedy, 2015, sections 3 and 3.1.)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Form = Literal["plain", "residual", "dual"]
Results = dict[str, Tensor]

FORMS: tuple[Form, ...] = ("plain", "residual", "dual")
FLOAT32_EPS = torch.finfo(torch.float32).eps
FLOAT32_ROUNDINGS = 4  # that a result may be off by, of the magnitudes that it is computed from
SMALLEST = 2**-25  # half the smallest float16, which is what it rounds to zero
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Problem:
    """Arguments of `bn_relu`, and a gradient for each of its outputs (two: forked)."""

    x: Tensor
    norm: nn.BatchNorm2d
    residual: Tensor | None
    residual_norm: nn.BatchNorm2d | None
    grads: tuple[Tensor, ...]


def make_problem(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    form: Form = "plain",
    *,
    training: bool = True,
    fork: bool = False,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Problem:
    """Random channels-last tensors, whose channels differ in mean and scale, and norms with random state."""
    generator = torch.Generator().manual_seed(seed)

    def channels(low: float, high: float) -> Tensor:
        return torch.rand(shape[1], generator=generator) * (high - low) + low

    def tensor(*, center: bool = False) -> Tensor:
        values = torch.randn(shape, generator=generator)
        if not center:
            values = values * channels(0.5, 2).view(-1, 1, 1) + channels(-2, 2).view(-1, 1, 1)
        return values.to(device, dtype).contiguous(memory_format=torch.channels_last)

    def norm() -> nn.BatchNorm2d:
        module = nn.BatchNorm2d(shape[1])
        module.weight.data = channels(0.5, 1.5) * (channels(-1, 3).sign())  # a quarter of them negative
        module.bias.data = channels(-0.5, 0.5)
        module.running_mean = channels(-2, 2)
        module.running_var = channels(0.5, 2)
        return module.to(device).train(training)

    return Problem(
        tensor(),
        norm(),
        tensor() if form != "plain" else None,
        norm() if form == "dual" else None,
        tuple(tensor(center=True) for _ in range(2 if fork else 1)),
    )


def torch_bn_relu(
    x: Tensor,
    norm: nn.BatchNorm2d,
    residual: Tensor | None = None,
    residual_norm: nn.BatchNorm2d | None = None,
    *,
    fork: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same by torch's own layers, each of which rounds to x's type."""
    z = norm(x)
    if residual is not None:
        z = z + (residual if residual_norm is None else residual_norm(residual))
    y = F.relu(z)
    return (y, y) if fork else y


def run(function: Callable[..., Tensor | tuple[Tensor, ...]], problem: Problem) -> Results:
    """What `function` makes of a problem, which stays as it is: output, gradients and running statistics, by name."""
    norm, residual_norm = deepcopy((problem.norm, problem.residual_norm))
    x = problem.x.detach().requires_grad_()
    residual = None if problem.residual is None else problem.residual.detach().requires_grad_()
    outputs = function(x, norm, residual, residual_norm, fork=len(problem.grads) == 2)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    inputs = {"dx": x} if residual is None else {"dx": x, "dr": residual}
    results = {"y": outputs[0].detach()}
    for name, module in (("norm", norm), ("residual_norm", residual_norm)):
        if module is not None:
            inputs |= {f"{name}.d{key}": parameter for key, parameter in module.named_parameters()}
            results |= {f"{name}.{key}": buffer for key, buffer in module.named_buffers()}
    gradients = torch.autograd.grad(outputs, list(inputs.values()), problem.grads)
    return results | dict(zip(inputs, gradients, strict=True))


class Exact(NamedTuple):
    """A result in float64, and what its error is measured by."""

    value: Tensor
    rounded: Tensor  # sum of the magnitudes that are stored in x's type on the way to it, the value's own included
    terms: Tensor  # sum of the magnitudes that it is computed from in float32: more than the value where they cancel


class Normalization:
    """One batch normalization in float64."""

    def __init__(self, x: Tensor, norm: nn.BatchNorm2d) -> None:
        x = x.double()
        self.rows = x.numel() // x.shape[1]
        self.of_batch = norm.training or norm.running_mean is None
        if norm.running_mean is None or norm.training:
            self.mean = x.mean((0, 2, 3))
            self.var = (x - column(self.mean)).square().mean((0, 2, 3))
        else:
            assert norm.running_var is not None
            self.mean, self.var = norm.running_mean.double(), norm.running_var.double()
        rstd = (self.var + norm.eps).rsqrt()
        one = torch.ones_like(rstd)
        gamma, beta = (one, 0 * one) if norm.weight is None else (norm.weight.double(), norm.bias.double())
        self.scale = column(gamma * rstd)
        self.xhat = (x - column(self.mean)) * column(rstd)
        self.xhat_terms = (x.abs() + column(self.mean).abs()) * column(rstd)
        self.value = column(gamma) * self.xhat + column(beta)
        self.terms = column(gamma).abs() * self.xhat_terms + column(beta).abs()
        self.norm = norm

    def running(self) -> dict[str, Exact]:
        """The running statistics after it."""
        if self.norm.running_mean is None or self.norm.running_var is None or self.norm.num_batches_tracked is None:
            return {}
        count = self.norm.num_batches_tracked.double() + (1 if self.norm.training else 0)
        share = 0.0
        if self.norm.training:
            share = 1 / count.item() if self.norm.momentum is None else self.norm.momentum
        unbiased = self.var * (self.rows / max(self.rows - 1, 1))
        mean = self.norm.running_mean.double().lerp(self.mean, share)
        var = self.norm.running_var.double().lerp(unbiased, share)
        mean_terms = self.norm.running_mean.double().abs().lerp(self.mean.abs() + self.var.sqrt(), share)
        var_terms = self.norm.running_var.double().lerp(unbiased * (1 + self.xhat_terms.mean((0, 2, 3))), share)
        return {
            "running_mean": Exact(mean, 0 * mean, mean_terms),
            "running_var": Exact(var, 0 * var, var_terms),
            "num_batches_tracked": Exact(count, 0 * count, 0 * count),
        }

    def backward(self, g: Tensor, g_terms: Tensor, g_rounded: Tensor) -> tuple[Exact, dict[str, Exact]]:
        """Gradients of x and of the parameters, from that of the value."""
        dbias, dbias_terms = (t.sum((0, 2, 3)) for t in (g, g_terms))
        dweight, dweight_terms = ((t * u).sum((0, 2, 3)) for t, u in ((g, self.xhat), (g_terms, self.xhat_terms)))
        dx, dx_terms = g, g_terms
        if self.of_batch:
            dx = g - (column(dbias) + self.xhat * column(dweight)) / self.rows
            dx_terms = g_terms + (column(dbias_terms) + self.xhat_terms * column(dweight_terms)) / self.rows
        dx, dx_terms, g_rounded = self.scale * dx, self.scale.abs() * dx_terms, self.scale.abs() * g_rounded
        parameters = {
            "dweight": Exact(dweight, 0 * dweight, dweight_terms),
            "dbias": Exact(dbias, 0 * dbias, dbias_terms),
        }
        return Exact(dx, dx.abs() + g_rounded, dx_terms), {} if self.norm.weight is None else parameters


def column(per_channel: Tensor) -> Tensor:
    """[C] to [C, 1, 1], in float64."""
    return per_channel.double().view(-1, 1, 1)


def expected(problem: Problem, y: Tensor) -> dict[str, Exact]:
    """The results of `run` in float64.

    Where the sum before ReLU is so near zero that float32 may round it to either side, the gradient passes as the
    output `y` under test says: everywhere else y must agree. Few elements may be that near.
    """
    main = Normalization(problem.x, problem.norm)
    z, terms, other = main.value, main.terms, None
    if problem.residual is not None:
        r = problem.residual.double()
        other = None if problem.residual_norm is None else Normalization(r, problem.residual_norm)
        z, terms = (z + r, terms + r.abs()) if other is None else (z + other.value, terms + other.terms)
    undecided = z.abs() <= FLOAT32_ROUNDINGS * FLOAT32_EPS * terms
    assert undecided.sum() <= 2 + z.numel() / 1000
    passes = torch.where(undecided, y > 0, z > 0)
    g = torch.where(passes, sum(grad.double() for grad in problem.grads), 0)
    g_terms = torch.where(passes, sum(grad.double().abs() for grad in problem.grads), 0)
    # a plain residual's gradient is stored, and x's may be computed from it: exact but for the sum of two
    g_stored = problem.residual is not None and other is None and len(problem.grads) == 2
    exact = {"y": Exact(z.relu(), z.relu(), terms)}
    for name, part in (("norm", main), ("residual_norm", other)):
        if part is not None:
            dx, parameters = part.backward(g, g_terms, g.abs() if g_stored else 0 * g)
            exact["dx" if part is main else "dr"] = dx
            exact |= {f"{name}.{key}": value for key, value in (part.running() | parameters).items()}
    if problem.residual is not None and other is None:
        exact["dr"] = Exact(g, g.abs(), g_terms)
    return exact


def assert_exact(results: Results, exact: dict[str, Exact]) -> None:
    """Every element is right to its rounding to the data type, and a few roundings of float32 on the way there."""
    assert results.keys() == exact.keys()
    for name, result in results.items():
        value, rounded, terms = exact[name]
        error = (result.double() - value).abs()
        limit = half_ulp(result.dtype) * rounded + FLOAT32_ROUNDINGS * FLOAT32_EPS * terms
        over = (error / (limit + SMALLEST)).max().item()
        assert over <= 1, f"{name}: {over:.3g} times the error that rounding explains"


def half_ulp(dtype: torch.dtype) -> float:
    """The relative error of a rounding to dtype; Triton's interpreter truncates to bfloat16, compiled code rounds."""
    if not dtype.is_floating_point:
        return 0.0
    truncates = dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1"
    return torch.finfo(dtype).eps / (1 if truncates else 2)
