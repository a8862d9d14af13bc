"""Values and gradients against float64, over awkward shapes, data types, values and memory layouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastflower.kernels import launch
from fastflower.kernels.batch_norm import bn_relu
from fastflower.kernels.tiles import Tiles
from tests.kernels.reference import (
    DTYPES,
    FLOAT32_EPS,
    FORMS,
    Form,
    Normalization,
    Results,
    assert_exact,
    expected,
    make_problem,
    run,
    torch_bn_relu,
)

Shape = tuple[int, int, int, int]


class Mode(NamedTuple):
    form: Form
    dtype: torch.dtype
    training: bool
    fork: bool


MODES = [Mode(*mode) for mode in product(FORMS, DTYPES, (True, False), (False, True))]
# [N, C, H, W]: channels and rows that fill no tile, from the fewest rows that have a variance to several blocks of them
SHAPES: tuple[Shape, ...] = (
    (2, 1, 1, 1),
    (1, 1, 127, 1),
    (5, 1, 23, 23),
    (1, 3, 1, 5),
    (1, 3, 53, 57),
    (17, 17, 1, 1),
    (3, 17, 19, 19),
    (1, 24, 127, 1),
    (1, 24, 23, 29),
    (5, 48, 1, 1),
    (1, 65, 17, 1),
    (2, 65, 5, 11),
    (2, 100, 1, 1),
)
# in 72 of the 468 combinations every shape meets every form, type, training or not, fork or not (and every form ...)
CASES = [(SHAPES[i % len(SHAPES)], MODES[5 * i % len(MODES)]) for i in range(2 * len(MODES))]
ONCE, AGAIN = CASES[: len(MODES)], CASES[len(MODES) :]  # every mode and every shape; every mode at another shape
WIDE: list[tuple[Shape, Mode]] = [  # few: the interpreter takes seconds for each
    ((17, 512, 1, 1), Mode("dual", torch.float16, False, False)),
    ((127, 512, 1, 1), Mode("plain", torch.float16, True, False)),
    ((5, 2048, 1, 1), Mode("residual", torch.bfloat16, True, True)),
]


def name(value: object) -> str | None:
    if isinstance(value, Mode):
        of = f"{value.form}-{str(value.dtype).removeprefix('torch.')}-{'training' if value.training else 'evaluation'}"
        return of + ("-fork" if value.fork else "")
    return "x".join(map(str, value)) if isinstance(value, tuple) else None


@pytest.mark.parametrize(
    ("shape", "mode"),
    [*ONCE, *WIDE[:2], *(pytest.param(*case, marks=pytest.mark.slow) for case in [*AGAIN, *WIDE[2:]])],
    ids=name,
)
def test_every_result_is_exact_to_rounding(shape: Shape, mode: Mode, device: torch.device) -> None:
    problem = make_problem(shape, mode.dtype, mode.form, training=mode.training, fork=mode.fork, device=device)
    results = run(bn_relu, problem)
    assert results["y"].dtype == results["dx"].dtype == mode.dtype
    assert_exact(results, expected(problem, results["y"]))


@pytest.mark.parametrize(("form", "dtype"), [*product(FORMS, DTYPES)])
def test_no_less_accurate_than_torch(form: Form, dtype: torch.dtype, device: torch.device) -> None:
    """In the mean over elements, where torch's layers round after each operation."""
    problem = make_problem((2, 24, 17, 31), dtype, form, device=device)
    ours, theirs = run(bn_relu, problem), run(torch_bn_relu, problem)
    exact = expected(problem, ours["y"])
    for key in ("y", "dx", "dr", "norm.dweight", "norm.dbias", "norm.running_mean", "norm.running_var"):
        if key in ours:
            value = exact[key].value
            error, peer = ((outputs[key].double() - value).norm() / value.norm() for outputs in (ours, theirs))
            assert error <= max(1.25 * peer.item(), 4 * torch.finfo(ours[key].dtype).eps), key


class TestValues:
    # measured errors 2e-7, 2e-7, 7e-7 and 1.5e-5; E[x²] - E[x]² has 5e-3 from 1e2 on
    @pytest.mark.parametrize(("ratio", "bound"), [(1, 1e-6), (1e2, 1e-6), (1e3, 3e-6), (1e4, 6e-5)])
    def test_variance_where_the_mean_is_larger(self, ratio: float, bound: float, device: torch.device) -> None:
        problem = make_problem((3, 5, 23, 29), device=device)
        problem.norm.momentum = 1.0  # the running statistics become the batch's
        std = torch.tensor([1, 1e-3, 10, 1, 1], device=device).view(-1, 1, 1)
        problem.x = (torch.randn_like(problem.x) + ratio) * std
        results, exact = run(bn_relu, problem), Normalization(problem.x, problem.norm)
        var = exact.running()["running_var"].value

        def error(estimate: Tensor) -> float:
            return (estimate / var - 1).abs().max().item()

        assert error(results["norm.running_var"]) <= bound
        if ratio > 1:
            squares = problem.x.square().mean((0, 2, 3)) - problem.x.mean((0, 2, 3)).square()
            assert error(squares * exact.rows / (exact.rows - 1)) > 10 * bound, "the test would not tell"
        assert ((results["y"] - exact.value.relu()).abs() <= 4 * FLOAT32_EPS * exact.terms).all()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_first_rows_unlike_the_rest(self, dtype: torch.dtype, device: torch.device) -> None:
        """The differences are taken from the mean of the first rows, which may be far away."""
        problem = make_problem((3, 17, 19, 19), dtype, device=device)
        problem.x[:, :, 0] += torch.linspace(-1000, 1000, 17, device=device).to(dtype).view(1, -1, 1)
        problem.x[0, ::2, :5] = 300
        results = run(bn_relu, problem)
        exact = expected(problem, results["y"])
        var = exact.pop("norm.running_var").value
        torch.testing.assert_close(results.pop("norm.running_var").double(), var, rtol=16 * FLOAT32_EPS, atol=0)
        assert_exact(results, exact)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_constant_channels_give_beta(self, dtype: torch.dtype, device: torch.device) -> None:
        problem = make_problem((3, 17, 19, 19), dtype, device=device)
        problem.norm.momentum = 1.0
        constants = torch.linspace(-3, 3, 17, device=device).view(-1, 1, 1) / 3
        problem.x = constants.to(dtype).expand(problem.x.shape).contiguous(memory_format=torch.channels_last)
        results = run(bn_relu, problem)
        # an error of the mean is multiplied by 1 / sqrt(eps) = 316
        assert_exact(results, expected(problem, results["y"]))
        last_digit = (FLOAT32_EPS * problem.x[0, :, 0, 0].float()).square()  # the mean may be off by one
        rows = problem.x[:, 0].numel()
        assert (results["norm.running_var"] <= last_digit * rows / (rows - 1)).all()

    @pytest.mark.parametrize(("dtype", "scale"), [*product(DTYPES, (1e-3, 4e3)), *product(DTYPES[:2], (1e-15, 1e15))])
    def test_large_and_small_values(self, dtype: torch.dtype, scale: float, device: torch.device) -> None:
        problem = make_problem((3, 17, 7, 7), dtype, device=device)
        problem.x = problem.x * scale
        results = run(bn_relu, problem)
        assert results["y"].isfinite().all()
        assert_exact(results, expected(problem, results["y"]))

    @pytest.mark.parametrize("form", FORMS)
    def test_zero_and_negative_gamma(self, form: Form, device: torch.device) -> None:
        problem = make_problem((3, 17, 7, 7), form=form, device=device)
        with torch.no_grad():
            problem.norm.weight[::3] = 0
            problem.norm.weight[1::3] = -1.5
        results = run(bn_relu, problem)
        assert_exact(results, expected(problem, results["y"]))
        assert not results["dx"][:, ::3].any()
        assert results["norm.dweight"][::3].any()

    @pytest.mark.parametrize("form", FORMS)
    def test_no_gradient_at_zero(self, form: Form, device: torch.device) -> None:
        """Nor at -0.0: ReLU's derivative at zero is zero, as torch has it."""
        problem = make_problem((3, 17, 7, 7), form=form, training=False, device=device)
        problem.norm.reset_parameters()
        problem.x = torch.zeros_like(problem.x)
        problem.x[1:] = -0.0
        if problem.residual is not None:
            problem.residual = torch.full_like(problem.residual, -0.0)
        if problem.residual_norm is not None:
            problem.residual_norm.reset_parameters()
        results = run(bn_relu, problem)
        assert all(not value.any() for key, value in results.items() if key in ("y", "dx", "dr") or ".d" in key)

    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
    @pytest.mark.parametrize(("form", "dtype"), [*product(FORMS, DTYPES)])
    def test_nan_and_infinity_pass_as_in_torch(self, form: Form, dtype: torch.dtype, device: torch.device) -> None:
        """In evaluation they stay where they are; ReLU passes the gradient at NaN and at infinity."""
        problem = make_problem((2, 17, 5, 5), dtype, form, training=False, device=device)
        x = problem.x if problem.residual is None else problem.residual
        problem.x[0, :, 1, 1] = x[1, :, 2, 2] = float("nan")
        problem.x[0, :, 3, 3] = x[1, :, 3, 3] = float("inf")
        problem.x[0, :, 4, 4] = x[1, :, 4, 4] = -float("inf")
        ours, theirs = run(bn_relu, problem), run(torch_bn_relu, problem)
        for key in ("y", "dx", "dr", "norm.dweight", "norm.dbias"):
            if key in ours:
                assert torch.equal(ours[key].isnan(), theirs[key].isnan()), key
                assert torch.equal(ours[key].isinf(), theirs[key].isinf()), key
        passed = ours["dx"] != 0
        assert passed[0, :, 1, 1].all()
        assert passed[1, :, 2, 2].all()
        assert torch.equal(passed[0, :, 3, 3], problem.norm.weight > 0)

    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
    @pytest.mark.parametrize("form", FORMS)
    def test_a_nan_spoils_its_channel_in_training(self, form: Form, device: torch.device) -> None:
        problem = make_problem((2, 17, 5, 5), form=form, device=device)
        problem.x[0, 3, 1, 1] = float("nan")
        problem.x[1, 7, 2, 2] = float("inf")
        ours, theirs = run(bn_relu, problem), run(torch_bn_relu, problem)
        for key in ours:
            # a mean of infinities may be infinite or NaN
            assert torch.equal(ours[key].isfinite(), theirs[key].isfinite()), key
        assert ours["y"].isnan().sum() == 2 * 2 * 25


def sliced(x: Tensor) -> Tensor:
    """The same values as every second row and column of a larger map."""
    larger = x.new_full((*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3]), float("nan"))
    larger[:, :, ::2, ::2] = x
    return larger[:, :, ::2, ::2]


def tail(x: Tensor) -> Tensor:
    """The same values behind others in memory: not aligned to 16 bytes."""
    longer = x.new_full((1 + x.shape[0], *x.shape[1:]), float("nan")).contiguous(memory_format=torch.channels_last)
    longer[1:] = x
    return longer[1:]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nchw": lambda x: x.contiguous(),
    "sliced": sliced,
    "tail": tail,
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "mean's": lambda x: x.mean((2, 3), keepdim=True).expand(x.shape),
    "sum's": lambda x: x.mean().expand(x.shape),
    "one picture's": lambda x: x[:1].expand(x.shape),
}


class TestLayouts:
    # maps of one pixel, one picture and one channel fit several memory formats at once
    @pytest.mark.parametrize(
        ("shape", "layout", "form"),
        [
            *product([(3, 9, 5, 4)], LAYOUTS, ["dual"]),
            *product([(4, 5, 1, 1), (1, 3, 6, 5), (5, 1, 4, 3)], ["nchw", "sliced"], ["residual"]),
        ],
        ids=name,
    )
    def test_strides_change_no_result(self, shape: Shape, layout: str, form: Form, device: torch.device) -> None:
        """Of inputs, and of gradients: .mean() and .sum() give expanded ones."""
        problem = make_problem(shape, form=form, fork=True, device=device)
        assert problem.residual is not None
        inputs = (problem.x, problem.residual, *problem.grads)

        def run_on(change: Callable[[Tensor], Tensor]) -> Results:
            tensors = [change(LAYOUTS[layout](t)) for t in inputs]
            return run(bn_relu, replace(problem, x=tensors[0], residual=tensors[1], grads=tuple(tensors[2:])))

        ours, same = run_on(lambda x: x), run_on(dense)
        for key in ours:
            torch.testing.assert_close(ours[key], same[key], rtol=1e-5, atol=1e-6, msg=key)
        for key in ("y", "dx", "dr"):
            assert ours[key].is_contiguous(memory_format=torch.channels_last), key

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize(
        "reduce", [Tensor.sum, lambda y: y.mean((2, 3)).square().sum(), lambda y: y[1:, ::2].sum()]
    )
    def test_gradients_as_autograd_makes_them(
        self, reduce: Callable[[Tensor], Tensor], form: Form, device: torch.device
    ) -> None:
        problem = make_problem((3, 17, 5, 4), form=form, device=device)
        grads = []
        for function in (bn_relu, torch_bn_relu):
            x = problem.x.clone().requires_grad_()
            y = function(x, problem.norm, problem.residual, problem.residual_norm)
            assert isinstance(y, Tensor)
            reduce(y).backward()
            assert x.grad is not None
            grads.append(x.grad)
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def dense(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last).copy_(x)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode.dtype != torch.bfloat16], ids=name)
def test_every_element_is_written(mode: Mode, device: torch.device) -> None:
    """Also where the last tile and the last byte of the mask are not full."""
    problem = make_problem((3, 9, 5, 7), mode.dtype, mode.form, training=mode.training, fork=mode.fork, device=device)
    results = run(bn_relu, problem)
    assert_exact(results, expected(problem, results["y"]))  # which no NaN is


@pytest.mark.parametrize("form", FORMS)
def test_two_runs_give_the_same_bits(form: Form, device: torch.device) -> None:
    problem = make_problem((1, 9, 32, 33), form=form, fork=True, device=device)
    first, second = (run(bn_relu, problem) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("device", ["triton"], indirect=True)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tiles", [Tiles(16, 8, 1), Tiles(32, 16, 8)], ids=str)
def test_however_the_work_is_cut_up(
    tiles: Tiles, form: Form, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In many blocks, merged a few at a time: the results stay exact."""
    monkeypatch.setattr(launch, "choose_tiles", lambda m, c, dtype: tiles)
    monkeypatch.setattr(launch, "MERGED_BLOCKS", 2)
    problem = make_problem((1, 9, 16, 17), form=form, device=device)
    results = run(bn_relu, problem)
    assert_exact(results, expected(problem, results["y"]))


@pytest.mark.gpu
def test_more_than_2_31_elements() -> None:
    """Offsets need 64 bits: the last picture's values and all sums over the batch."""
    if torch.cuda.mem_get_info()[0] < 32e9:
        pytest.skip("needs 32 GB of memory for six tensors of 4.3 GB")
    shape = (2676, 64, 112, 112)
    problem = make_problem((2, 64, 2, 2), torch.bfloat16, "residual", device="cuda")
    problem.norm.momentum = 1.0

    def normal() -> Tensor:
        x = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last)
        return x.normal_()

    problem.x, problem.residual, problem.grads = normal(), normal(), (normal(),)
    assert problem.x.numel() > 2**31
    problem.x[-4:] += 2
    results = run(bn_relu, problem)

    def total(summand: Callable[[slice], Tensor]) -> Tensor:
        parts = [summand(slice(first, first + 64)).sum((0, 2, 3)) for first in range(0, shape[0], 64)]
        return torch.stack(parts).sum(0)

    rows = problem.x.numel() // shape[1]
    mean = total(lambda part: problem.x[part].double()) / rows
    var = total(lambda part: (problem.x[part].double() - mean.view(-1, 1, 1)).square()) / rows
    torch.testing.assert_close(results["norm.running_mean"].double(), mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(results["norm.running_var"].double(), var, rtol=1e-6, atol=0)
    # sums of 17 million gradients near 1, to 1e-6 of the sum of their magnitudes
    dbias = total(lambda part: torch.where(results["y"][part] > 0, problem.grads[0][part], 0).double())
    torch.testing.assert_close(results["norm.dbias"].double(), dbias, rtol=0, atol=14)
    # against these sums the last picture's gradient is as in evaluation, where no batch statistics take part
    end = replace(
        problem,
        x=problem.x[-1:],
        residual=problem.residual[-1:],
        grads=(problem.grads[0][-1:],),
        norm=problem.norm.eval(),
    )
    end.norm.running_mean, end.norm.running_var = mean.float(), var.float()
    for key, (value, _, _) in expected(end, results["y"][-1:]).items():
        if key in ("y", "dx", "dr"):
            torch.testing.assert_close(results[key][-1:].double(), value, rtol=0.01, atol=0.01, msg=key)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("form", FORMS)
def test_on_a_device_other_than_the_current_one(form: Form) -> None:
    problem = make_problem((3, 17, 9, 11), form=form, device="cuda:1")
    assert torch.cuda.current_device() == 0
    results = run(bn_relu, problem)
    assert all(value.device == torch.device("cuda:1") for value in results.values())
    assert_exact(results, expected(problem, results["y"]))
