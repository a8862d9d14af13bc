"""What nn.BatchNorm2d does with its settings, state and bad input; and what autograd expects."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastflower.kernels.batch_norm import bn_relu
from fastflower.models.layers import BNReLU
from tests.kernels.reference import (
    DTYPES,
    FORMS,
    Form,
    assert_exact,
    expected,
    make_problem,
    run,
    torch_bn_relu,
)

SHAPE = (3, 5, 4, 3)


def assert_as_torch(settings: dict[str, Any], device: torch.device, *, steps: int = 2) -> None:
    """Two steps of training and one in evaluation give torch's outputs, gradients and state, to rounding."""
    torch.manual_seed(0)
    ours = nn.BatchNorm2d(SHAPE[1], **settings).to(device)
    theirs = deepcopy(ours)
    for step in range(steps + 1):
        ours.train(step < steps)
        theirs.train(step < steps)
        problem = make_problem(SHAPE, seed=step, device=device)
        problem.norm = ours
        a = run(bn_relu, problem)
        problem.norm = theirs
        b = run(torch_bn_relu, problem)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert list(a) == list(b)
        bn_relu(problem.x, ours)  # once more, for the state to go on from: `run` works on a copy
        F.relu(theirs(problem.x))
    torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()), rtol=1e-5, atol=1e-6)


class TestSettings:
    @pytest.mark.parametrize(
        "settings",
        [
            {"momentum": None},
            {"momentum": 0.1, "eps": 0.1},
            {"momentum": 1.0},
            {"momentum": 0.0},
            {"affine": False},
            {"track_running_stats": False},
            {"affine": False, "track_running_stats": False, "momentum": None},
        ],
        ids=str,
    )
    def test_as_batch_norm(self, settings: dict[str, Any], device: torch.device) -> None:
        assert_as_torch(settings, device)

    def test_momentum_none_is_the_average_over_all_batches(self, device: torch.device) -> None:
        norm = nn.BatchNorm2d(SHAPE[1], momentum=None).to(device)
        batches = [make_problem(SHAPE, seed=seed, device=device).x for seed in range(4)]
        for x in batches:
            bn_relu(x, norm)
        assert norm.num_batches_tracked == 4
        means = torch.stack([x.mean((0, 2, 3)) for x in batches])
        variances = torch.stack([x.var((0, 2, 3), correction=1) for x in batches])
        torch.testing.assert_close(norm.running_mean, means.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm.running_var, variances.mean(0), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("training", [True, False])
    def test_tracking_switched_off_later(self, training: bool, device: torch.device) -> None:
        """Torch then leaves the statistics alone in training, and still uses them in evaluation."""
        problem = make_problem(SHAPE, training=training, device=device)
        problem.norm.track_running_stats = False
        torch.testing.assert_close(run(bn_relu, problem), run(torch_bn_relu, problem), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("trains", ["norm", "residual_norm"])
    def test_one_of_two_norms_in_evaluation(self, trains: str, device: torch.device) -> None:
        problem = make_problem(SHAPE, form="dual", training=False, device=device)
        getattr(problem, trains).train()
        results = run(bn_relu, problem)
        assert_exact(results, expected(problem, results["y"]))

    def test_two_norms_of_different_settings(self, device: torch.device) -> None:
        problem = make_problem(SHAPE, form="dual", device=device)
        problem.norm.eps, problem.norm.momentum = 1e-2, 0.3
        problem.residual_norm = nn.BatchNorm2d(SHAPE[1], eps=1e-1, momentum=None, affine=False).to(device)
        results = run(bn_relu, problem)
        assert_exact(results, expected(problem, results["y"]))
        assert "residual_norm.dweight" not in results

    @pytest.mark.parametrize("dtype", DTYPES[1:])
    def test_norms_of_half_precision(self, dtype: torch.dtype, device: torch.device) -> None:
        """As `model.bfloat16()` makes them; parameters' gradients and running statistics keep their type."""
        problem = make_problem(SHAPE, dtype, device=device)
        problem.norm.to(dtype)
        ours, theirs = run(bn_relu, problem), run(torch_bn_relu, problem)
        assert {key: value.dtype for key, value in ours.items()} == {key: v.dtype for key, v in theirs.items()}
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)

    def test_half_precision_data_under_autocast(self, device: torch.device) -> None:
        """Autocast hands over half-precision activations; parameters stay float32, and so do their gradients."""
        conv = nn.Conv2d(3, 8, 3).to(device)
        norm = nn.BatchNorm2d(8).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            x = conv(torch.randn(2, 3, 6, 6, device=device))
            y = cast(torch.Tensor, bn_relu(x, norm))
            assert x.dtype == y.dtype == torch.bfloat16
            y.sum().backward()
        tensors = (norm.weight, norm.weight.grad, norm.running_mean, norm.running_var, conv.weight.grad)
        assert all(tensor is not None and tensor.dtype == torch.float32 for tensor in tensors)


class TestBadInput:
    @pytest.mark.parametrize("form", FORMS)
    def test_one_value_a_channel(self, form: Form, device: torch.device) -> None:
        """An error in training, in torch's words and without a trace in the statistics; in evaluation as any other."""
        problem = make_problem((1, 5, 1, 1), form=form, device=device)
        before = deepcopy(problem.norm.state_dict())
        messages = []
        for function in (bn_relu, torch_bn_relu):
            with pytest.raises(ValueError, match="more than 1 value per channel") as error:
                function(problem.x, deepcopy(problem.norm) if function is torch_bn_relu else problem.norm)
            messages.append(str(error.value))
        assert messages[0] == messages[1]
        for key, value in problem.norm.state_dict().items():
            assert torch.equal(value, before[key]), key
        problem = make_problem((1, 5, 1, 1), form=form, training=False, device=device)
        results = run(bn_relu, problem)
        assert_exact(results, expected(problem, results["y"]))

    def test_an_empty_batch_in_evaluation(self, device: torch.device) -> None:
        problem = make_problem((0, 5, 4, 3), form="residual", training=False, device=device)
        results = run(bn_relu, problem)
        assert results["y"].shape == results["dx"].shape == results["dr"].shape == (0, 5, 4, 3)
        assert not results["norm.dweight"].any()
        assert not results["norm.dbias"].any()

    def test_unknown_types_are_named(self, device: torch.device) -> None:
        norm = nn.BatchNorm2d(SHAPE[1]).to(device)
        x = torch.randn(SHAPE, device=device)
        for dtype in (torch.float64, torch.int64):
            with pytest.raises(TypeError, match=str(dtype)):
                bn_relu(x.to(dtype), norm)
        with pytest.raises(TypeError, match="float64"):
            bn_relu(x, norm, x.double())

    def test_shapes_that_do_not_fit(self, device: torch.device) -> None:
        norm, x = nn.BatchNorm2d(SHAPE[1]).to(device), torch.randn(SHAPE, device=device)
        for other in (x[:, :, :1], x[:1], x[:, :3], x[0]):
            with pytest.raises(ValueError, match="residual") as error:
                bn_relu(x, norm, other)
            assert str(tuple(other.shape)) in str(error.value)
        with pytest.raises(ValueError, match="channels"):
            bn_relu(x[:, :3], norm)
        with pytest.raises(ValueError, match="4D"):
            bn_relu(x[0], norm)
        with pytest.raises(ValueError, match="residual"):
            bn_relu(x, norm, residual_norm=norm)
        with pytest.raises(ValueError, match="channels"):
            bn_relu(x, norm, x, nn.BatchNorm2d(3).to(device))
        assert norm.num_batches_tracked == 0, "a refused batch is not counted"


class TestAutograd:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("wanted", ["x", "residual", "parameters"])
    def test_only_what_asks_for_a_gradient_gets_one(
        self, wanted: str, training: bool, form: Form, device: torch.device
    ) -> None:
        problem = make_problem(SHAPE, form=form, training=training, device=device)
        everything = run(bn_relu, problem)
        tensors = {"dx": problem.x}
        if problem.residual is not None:
            tensors["dr"] = problem.residual
        for module, norm in (("norm", problem.norm), ("residual_norm", problem.residual_norm)):
            if norm is not None:
                tensors |= {f"{module}.d{name}": parameter for name, parameter in norm.named_parameters()}
        for key, tensor in tensors.items():
            tensor.requires_grad_({"dx": "x", "dr": "residual"}.get(key, "parameters") == wanted)
        y = bn_relu(problem.x, problem.norm, problem.residual, problem.residual_norm)
        assert isinstance(y, Tensor)
        assert y.requires_grad == any(tensor.requires_grad for tensor in tensors.values())
        if y.requires_grad:
            y.backward(problem.grads[0])
        for key, tensor in tensors.items():
            assert (tensor.grad is not None) == tensor.requires_grad, key
            if tensor.grad is not None:
                torch.testing.assert_close(tensor.grad, everything[key], rtol=0, atol=0, msg=key)

    def test_a_consumer_may_work_in_the_output(self, device: torch.device) -> None:
        """Where torch's ReLU forbids it, which keeps its output for backward."""
        problem = make_problem(SHAPE, device=device)
        x = problem.x.requires_grad_()
        y = bn_relu(x, problem.norm)
        assert isinstance(y, Tensor)
        (plain,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        (doubled,) = torch.autograd.grad(y.mul_(2).sum(), x)
        torch.testing.assert_close(doubled, 2 * plain)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("differentiate", [lambda g: g.square().sum().backward(), lambda g: g.sum().backward()])
    def test_double_backward_is_refused(
        self, differentiate: Callable[[Tensor], None], form: Form, device: torch.device
    ) -> None:
        problem = make_problem(SHAPE, form=form, device=device)
        x = problem.x.requires_grad_()
        y = bn_relu(x, problem.norm, problem.residual, problem.residual_norm)
        assert isinstance(y, Tensor)
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            differentiate(g)

    def test_saved_tensors_are_checked_for_changes(self, device: torch.device) -> None:
        """An input overwritten before backward is an error, not a wrong gradient."""
        problem = make_problem(SHAPE, device=device)
        x = problem.x.clone().requires_grad_()
        conv = x * 1
        y = bn_relu(conv, problem.norm)
        assert isinstance(y, Tensor)
        conv.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    def test_training_again_before_backward(self, device: torch.device) -> None:
        """Two batches forward, then both backward: the batch's own statistics are kept, not the module's."""
        problem = make_problem(SHAPE, device=device)
        alone = run(bn_relu, problem)
        x = problem.x.requires_grad_()
        y = bn_relu(x, problem.norm)
        bn_relu(2 * x.detach() + 1, problem.norm)
        assert isinstance(y, Tensor)
        (dx,) = torch.autograd.grad(y, x, problem.grads[0])
        torch.testing.assert_close(dx, alone["dx"], rtol=0, atol=0)


class TestModule:
    def test_state_dict_is_batch_norms(self) -> None:
        ours, theirs = BNReLU(SHAPE[1], norm="triton"), nn.BatchNorm2d(SHAPE[1])
        assert list(ours.state_dict()) == list(theirs.state_dict())
        theirs.running_mean = torch.randn(SHAPE[1])
        ours.load_state_dict(theirs.state_dict(), strict=True)
        assert torch.equal(ours.state_dict()["running_mean"], theirs.running_mean)
        theirs.load_state_dict(ours.state_dict(), strict=True)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("training", [True, False])
    def test_both_implementations_agree(self, training: bool, form: Form, device: torch.device) -> None:
        problem = make_problem(SHAPE, form=form, training=training, fork=True, device=device)
        results = []
        for norm in ("torch", "triton"):
            module = BNReLU(SHAPE[1], norm=norm, fork=True).to(device).train(training)
            module.load_state_dict(problem.norm.state_dict())

            def through(x: Tensor, norm: BNReLU, *residual: Any, fork: bool) -> tuple[Tensor, Tensor]:
                outputs: tuple[Tensor, Tensor] = norm(x, *residual)
                assert isinstance(outputs, tuple) == fork
                return outputs

            problem.norm = module
            results.append(run(through, problem))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("copy", [deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
    def test_copies_and_pickles(self, copy: Callable[[BNReLU], BNReLU], device: torch.device) -> None:
        module = BNReLU(SHAPE[1], eps=0.1, momentum=None, norm="triton", fork=True).to(device)
        problem = make_problem(SHAPE, device=device)
        module(problem.x)
        twin = copy(module)
        outputs = [m(problem.x) for m in (module, twin)]
        assert all(isinstance(output, tuple) for output in outputs)
        torch.testing.assert_close(*outputs, rtol=0, atol=0)
        torch.testing.assert_close(module.state_dict(), twin.state_dict(), rtol=0, atol=0)
        assert twin.num_batches_tracked == 2
