"""The custom operators as torch sees them: their contracts, compiled graphs, and the fork's two gradients."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from fastflower.kernels import launch, plain
from fastflower.kernels.batch_norm import bn_relu
from fastflower.models.layers import BNReLU
from tests.kernels.reference import DTYPES, FORMS, Form, make_problem

OPS = torch.ops.fastflower
Shape = tuple[int, int, int, int]
SHAPE: Shape = (2, 5, 3, 4)
Call = tuple[Any, tuple[Any, ...]]


def same(x: Tensor) -> Tensor:
    return x


def calls(
    form: Form,
    dtype: torch.dtype,
    device: torch.device,
    shape: Shape = SHAPE,
    layout: Callable[[Tensor], Tensor] = same,
) -> list[Call]:
    """Each operator with arguments as `bn_relu` passes them."""
    problem = make_problem(shape, dtype, form, fork=True, device=device)
    norm, x, dys = problem.norm, layout(problem.x), [layout(dy) for dy in problem.grads]
    r = None if problem.residual is None else layout(problem.residual)
    norm.num_batches_tracked.fill_(3)  # type: ignore[union-attr]
    running = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    untracked = (None, None, None, 0.0)
    mean, var, count = OPS.bn_stats(x, *untracked)
    main = (x, mean, var, norm.weight.detach(), norm.bias.detach(), 1e-5)
    second: tuple[Any, ...] = (None, None, None, None, 0.0)
    if problem.residual_norm is not None:
        mean_r, var_r, _ = OPS.bn_stats(r, *untracked)
        second = (mean_r, var_r, problem.residual_norm.weight.detach(), problem.residual_norm.bias.detach(), 1e-3)
    forward = (*main, r, *second, form == "residual")
    mask = OPS.bn_relu(*forward)[1] if form == "residual" else None
    dual = form == "dual"
    backward = (*main, count, r if dual else None, *second, count if dual else None, mask, False)
    moments = torch.stack([OPS.bn_moments(x), OPS.bn_moments(2 * x)])
    return [
        (OPS.bn_stats, (x, *running, norm.momentum)),
        (OPS.bn_stats, (x, *running, None)),
        (OPS.bn_moments, (x,)),
        (OPS.bn_merge, (moments, *running, norm.momentum)),
        (OPS.bn_merge, (moments, *untracked)),
        (OPS.bn_relu, forward),
        (OPS.bn_relu, (*forward[:-1], False)),
        (OPS.bn_relu_backward, (dys[0], None, *backward)),
        (OPS.bn_relu_backward, (*dys, *backward)),
    ]


@pytest.mark.parametrize(("form", "dtype"), [*zip(FORMS, DTYPES, strict=True)])
def test_opcheck(form: Form, dtype: torch.dtype, device: torch.device) -> None:
    """Schema (what is mutated, nothing aliased), autograd registration, fakes, and tracing with dynamic shapes."""
    for op, arguments in calls(form, dtype, device):
        torch.library.opcheck(op, arguments)


INPUTS: dict[str, tuple[Shape, Callable[[Tensor], Tensor]]] = {
    "channels-last": ((2, 5, 3, 4), same),
    "nchw": ((2, 5, 3, 4), Tensor.contiguous),
    "one pixel": ((2, 5, 1, 1), same),
    "one pixel of a map": ((2, 5, 3, 4), lambda x: x[:, :, :1, :1]),
    "one channel": ((2, 1, 3, 4), same),
    "one picture": ((1, 5, 3, 4), same),
    "one nchw picture": ((1, 5, 3, 4), Tensor.contiguous),
}


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("inputs", INPUTS)
def test_fakes_are_like_the_real_results(inputs: str, form: Form, device: torch.device) -> None:
    """In shape, strides and type: compiled code trusts them."""
    for op, arguments in calls(form, torch.bfloat16, device, *INPUTS[inputs]):
        real = op(*arguments)
        with FakeTensorMode() as mode:
            fake = op(*tree_map(lambda a, mode=mode: mode.from_tensor(a) if isinstance(a, Tensor) else a, arguments))
        for a, b in zip(tree_leaves(real), tree_leaves(fake), strict=True):
            assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device), op


@pytest.mark.usefixtures("poisoned")
def test_mask_has_a_bit_for_each_element(device: torch.device) -> None:
    problem = make_problem((3, 17, 5, 4), form="residual", device=device)
    mean, var, _ = OPS.bn_stats(problem.x, None, None, None, 0.0)
    arguments = (problem.x, mean, var, None, None, 1e-5, problem.residual, None, None, None, None, 0.0)
    y, mask = OPS.bn_relu(*arguments, True)
    assert mask.shape == (3 * 5 * 4, 3)
    bits = (mask[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=device)) & 1
    assert torch.equal(bits.flatten(1)[:, :17] == 1, (y > 0).permute(0, 2, 3, 1).reshape(-1, 17))


class Net(nn.Module):
    """A stem, a block with a shortcut of its own (both norms at once) and one without, as ResNets have them."""

    def __init__(self, fork: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 5), BNReLU(5, norm="triton", fork=fork)
        self.conv2, self.bn2 = conv(5, 6), BNReLU(6, norm="triton", fork=fork)
        self.conv3, self.bn3 = conv(5, 6), nn.BatchNorm2d(6)
        self.conv4, self.bn4 = conv(6, 6), BNReLU(6, norm="triton")
        self.fc = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x))
        main, short = x if self.bn1.fork else (x, x)
        x = self.bn2(self.conv2(main), self.conv3(short), self.bn3)
        main, short = x if self.bn2.fork else (x, x)
        logits: Tensor = self.fc(self.bn4(self.conv4(main), short).mean((2, 3)))
        return logits


def conv(c_in: int, c_out: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)


def step(net: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """Output, gradients and state."""
    x = x.clone().requires_grad_()
    net.zero_grad()
    y = function(x)
    y.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    return {"y": y, "dx": x.grad, **net.state_dict(), **{f"d{name}": gradient for name, gradient in gradients.items()}}


def assert_compiled_as_eager(device: torch.device, *, fork: bool, training: bool, backend: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = Net(fork).to(device).to(memory_format=torch.channels_last).train(training)
    twin = deepcopy(net)
    compiled = torch.compile(twin, backend=backend, fullgraph=True, dynamic=True)
    for batch in (2, 3):
        x = torch.randn(batch, 3, 4, 3, device=device)
        torch.testing.assert_close(step(twin, compiled, x), step(net, net, x), rtol=1e-4, atol=1e-5)
    assert net.bn3.num_batches_tracked == (2 if training else 0)


@pytest.mark.parametrize(("training", "fork"), [(True, True), (True, False), (False, True)])
def test_compiled_networks_equal_eager_ones(training: bool, fork: bool, device: torch.device) -> None:
    """In one graph, with outputs, gradients and running statistics, for more than one batch size."""
    assert_compiled_as_eager(device, fork=fork, training=training, backend="aot_eager")


def test_code_generated_around_them_is_right(device: torch.device) -> None:
    assert_compiled_as_eager(device, fork=True, training=True, backend="inductor")


def test_compiled_evaluation_without_gradients(device: torch.device) -> None:
    torch._dynamo.reset()
    net = Net(fork=True).to(device).eval()
    x = torch.randn(2, 3, 4, 3, device=device)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(net, backend="aot_eager", fullgraph=True)(x), net(x))


@pytest.fixture
def arrived(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor | None]]:
    """The gradients that arrive at each call of the backward operator."""
    seen: list[tuple[Tensor, Tensor | None]] = []

    def spy(module: ModuleType) -> None:
        original = module.reduce_gradient

        def reduce_gradient(dy: Tensor, dy2: Tensor | None, *rest: Any) -> Any:
            seen.append((dy, dy2))
            return original(dy, dy2, *rest)

        monkeypatch.setattr(module, "reduce_gradient", reduce_gradient)

    spy(launch)
    spy(plain)
    return seen


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("form", FORMS)
class TestFork:
    def gradients(
        self, form: Form, device: torch.device, uses: int, *, fork: bool, compiled: bool
    ) -> tuple[Tensor, ...]:
        """Of the inputs, where the first output is used and perhaps the second; each use scales by a tensor."""
        problem = make_problem(SHAPE, form=form, fork=True, device=device)
        inputs = [problem.x.requires_grad_(), problem.norm.weight, problem.norm.bias]
        inputs += [] if problem.residual is None else [problem.residual.requires_grad_()]

        def loss(x: Tensor, residual: Tensor | None, *scales: Tensor) -> Tensor:
            y = bn_relu(x, problem.norm, residual, problem.residual_norm, fork=fork)
            outputs = y if isinstance(y, tuple) else (y, y)
            return torch.stack([(y * scale).sum() for y, scale in zip(outputs, scales, strict=False)]).sum()

        if compiled:
            torch._dynamo.reset()
            loss = torch.compile(loss, backend="aot_eager", fullgraph=True)
        return torch.autograd.grad(loss(problem.x, problem.residual, *problem.grads[:uses]), inputs)

    def test_both_gradients_arrive_apart(
        self, form: Form, compiled: bool, device: torch.device, arrived: list[tuple[Tensor, Tensor | None]]
    ) -> None:
        gradients = self.gradients(form, device, 2, fork=True, compiled=compiled)
        ((dy, dy2),) = arrived
        one, other = make_problem(SHAPE, form=form, fork=True, device=device).grads
        assert dy2 is not None
        assert torch.equal(dy, one)
        assert torch.equal(dy2, other)
        unforked = self.gradients(form, device, 2, fork=False, compiled=False)
        assert torch.equal(arrived[1][0], one + other)
        assert arrived[1][1] is None
        torch.testing.assert_close(gradients, unforked, rtol=1e-5, atol=1e-6)

    def test_one_use_is_enough(
        self, form: Form, compiled: bool, device: torch.device, arrived: list[tuple[Tensor, Tensor | None]]
    ) -> None:
        gradients = self.gradients(form, device, 1, fork=True, compiled=compiled)
        dy2 = arrived[0][1]
        assert dy2 is None or (compiled and not dy2.any())  # the compiler makes a gradient of zeros
        unforked = self.gradients(form, device, 1, fork=False, compiled=False)
        torch.testing.assert_close(gradients, unforked, rtol=0, atol=0)


def test_no_mask_is_saved_without_gradients(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = []
    for module in (launch, plain):
        original = module.forward

        def forward(*arguments: Any, original: Any = original, **options: Any) -> Any:
            y, mask = original(*arguments, **options)
            masks.append(mask)
            return y, mask

        monkeypatch.setattr(module, "forward", forward)
    for training, gradients in product((True, False), (True, False)):
        problem = make_problem(SHAPE, form="residual", training=training, device=device)
        with torch.set_grad_enabled(gradients):
            bn_relu(problem.x, problem.norm, problem.residual)
        assert (masks.pop() is None) != gradients
