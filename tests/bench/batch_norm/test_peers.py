"""The contenders of the kernels' benchmark, and the float64 results that they are held against."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.batch_norm import layers, peers
from bench.batch_norm.layers import Layer, Problem
from bench.batch_norm.peers import all_contenders, parse_tiles
from bench.harness.missing import MissingError
from fastflower.errors import UserError
from fastflower.kernels import launch  # before the interpreter's variable is taken away below
from fastflower.kernels.tiles import choose_tiles, make_grid

CPU = torch.device("cpu")
TRITON_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # of the interpreter, without a GPU
KINDS = ("bn_relu", "bn_add_relu", "fork", "dual", "dual_fork")


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain torch in place of the interpreter and of the compiler."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    torch.manual_seed(0)


def a_layer(kind: str, shape: tuple[int, int, int, int] = (3, 24, 5, 4)) -> Layer:
    return Layer(kind, shape)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_contenders_agree_with_float64(kind: str) -> None:
    problem = Problem(a_layer(kind, (4, 40, 9, 7)), torch.float32, CPU)
    data = problem.data()
    problem.avoid_corner(data)
    names = {"y", "dx", "dgamma", "dbeta"}
    names |= {"dr"} if problem.layer.added else set()
    names |= {"dgamma_r", "dbeta_r"} if problem.layer.dual else set()
    for contender in all_contenders(())[:3]:
        errors = problem.errors(data, contender.build(problem, data))
        assert errors.keys() == names
        # about the square root of 252 values a channel, times float32's 1.2e-7; a wrong sign or term gives 0.01 or more
        assert 0 < max(errors.values()) < 2e-6


def test_reference_goes_through_channels_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(a_layer("dual_fork"), torch.float32, CPU)
    data = problem.data()
    forward = peers.eager(problem, data)
    whole = problem.errors(data, forward)
    monkeypatch.setattr(layers, "REFERENCE_ELEMENTS", 17 * 60)  # of 24 channels with 60 values each
    assert [(part.start, z.shape[1]) for part, z, _ in problem.reference(data)] == [(0, 17), (17, 7)]
    assert problem.errors(data, forward) == pytest.approx(whole, rel=1e-6)


def test_gradients_vanish_just_where_rounding_could_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "CORNER", 0.25)
    problem = Problem(a_layer("fork", (2, 8, 30, 30)), torch.float32, CPU)
    data = problem.data()
    problem.avoid_corner(data)
    z = torch.cat([z for _, z, _ in problem.reference(data)], 1)
    for dy in data.dys:
        assert torch.equal(dy == 0, z.abs() < 0.25)
    assert 0.1 < (data.dys[0] == 0).double().mean() < 0.3  # a sum of two normal variables


def test_errors_see_a_lost_second_gradient_and_a_wrong_output() -> None:
    problem = Problem(a_layer("fork"), torch.float32, CPU)
    data = problem.data()
    ours = peers.ours(problem, data)
    lost = problem.errors(data, lambda data: ours(data)[:1])
    assert lost["y"] < 1e-6
    for name in ("dx", "dr", "dgamma", "dbeta"):
        assert lost[name] > 0.5  # one of two equal shares: 0.71 on average
    scaled = problem.errors(data, lambda data: tuple(1.01 * y for y in ours(data)))
    assert scaled["y"] == pytest.approx(0.01, rel=1e-3)
    assert scaled["dx"] == pytest.approx(0.01, rel=1e-3)


def test_tiles_take_the_place_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    if TRITON_DEVICE.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    (contender,) = all_contenders(["8x16x2"])[5:]
    assert contender.name == "ours 8x16x2"
    asked = []

    def grid(m: int, c: int, tiles: Any) -> Any:
        asked.append(tiles)
        return make_grid(m, c, tiles)

    monkeypatch.setattr(launch, "make_grid", grid)
    problem = Problem(a_layer("dual_fork"), torch.float32, TRITON_DEVICE)
    data = problem.data()
    problem.avoid_corner(data)
    with contender.during():
        errors = problem.errors(data, contender.build(problem, data))
    assert set(asked) == {(8, 16, 2)}
    assert max(errors.values()) < 1e-6
    problem.errors(data, contender.build(problem, data))
    assert asked[-1] == choose_tiles(60, 24, torch.float32) != (8, 16, 2)


@pytest.mark.parametrize("name", ["32x64", "32x64x4r", "33x64x4", "32x4x4", "32x64x0", "r32x64x4", ""])
def test_tiles_that_cannot_be(name: str) -> None:
    with pytest.raises(UserError, match="32x64x4"):
        parse_tiles(name)


def test_peers_that_are_not_installed_or_do_not_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cudnn", None)
    monkeypatch.setitem(sys.modules, "apex", None)

    def reason(build: Any, dtype: torch.dtype) -> str:
        with pytest.raises(MissingError) as missing:
            build(SimpleNamespace(device=torch.device("cuda"), dtype=dtype), None)
        return str(missing.value)

    assert "pip install nvidia-cudnn-frontend" in reason(peers.cudnn_graphs, torch.bfloat16)
    assert reason(peers.cudnn_graphs, torch.float32) == "does not take float32"
    assert "NVIDIA's apex" in reason(peers.apex_groupbn, torch.float16)
    assert reason(peers.apex_groupbn, torch.bfloat16) == "does not take bfloat16"


class Node:
    """A tensor of `Graph`: given, or computed from others."""

    def __init__(self, compute: Callable[[Callable[[Node], Tensor]], Tensor] | None = None) -> None:
        self.compute = compute

    def set_output(self, is_output: bool) -> Node:
        return self

    def set_data_type(self, data_type: object) -> Node:
        return self


class Graph:
    """What cudnn.pygraph promises of the operations that the benchmark uses; masks are bits, along channels."""

    def __init__(self, **_: object) -> None:
        pass

    def tensor(self, **_: object) -> Node:
        return Node()

    def tensor_like(self, tensor: Tensor) -> Node:
        return Node()

    def batchnorm(
        self, *, name: str, input: Node, scale: Node, bias: Node, in_running_mean: Node, in_running_var: Node,
        epsilon: Node, momentum: Node,
    ) -> list[Node]:  # fmt: skip
        def run(get: Callable[[Node], Tensor]) -> tuple[Tensor, ...]:
            x, share = get(input).float(), get(momentum)
            var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
            rstd = (var + get(epsilon)).rsqrt()
            unbiased = var * x[:, 0].numel() / (x[:, 0].numel() - 1)
            running = get(in_running_mean).lerp(mean, share), get(in_running_var).lerp(unbiased, share)
            return (x - mean) * rstd * get(scale) + get(bias), mean, rstd, *running

        return [Node(lambda get, i=i: run(get)[i]) for i in range(5)]  # type: ignore[misc]

    def batchnorm_backward(
        self, *, name: str, grad: Node, input: Node, scale: Node, mean: Node, inv_variance: Node
    ) -> list[Node]:
        def run(get: Callable[[Node], Tensor]) -> tuple[Tensor, ...]:
            g, rstd = get(grad).float(), get(inv_variance)
            normalized = (get(input).float() - get(mean)) * rstd
            dscale, dbias = ((g * factor).sum((0, 2, 3), keepdim=True) for factor in (normalized, 1))
            through = (dbias + normalized * dscale) / g[:, 0].numel()
            return get(scale) * rstd * (g - through), dscale, dbias

        return [Node(lambda get, i=i: run(get)[i]) for i in range(3)]  # type: ignore[misc]

    def add(self, *, name: str, a: Node, b: Node) -> Node:
        return Node(lambda get: get(a) + get(b))

    def mul(self, *, name: str, a: Node, b: Node) -> Node:
        return Node(lambda get: get(a) * get(b))

    def relu(self, *, name: str, input: Node) -> Node:
        return Node(lambda get: get(input).relu())

    def cmp_gt(self, *, name: str, input: Node, comparison: Node) -> Node:
        return Node(lambda get: get(input) > get(comparison))

    def get_workspace_size(self) -> int:
        return 0

    def __getattr__(self, name: str) -> Callable[..., None]:
        assert name in ("validate", "build_operation_graph", "create_execution_plans", "check_support", "build_plans")
        return lambda *_: None

    def execute(self, buffers: dict[Node, Tensor], workspace: Tensor, handle: object) -> None:
        powers = 2 ** torch.arange(8, dtype=torch.uint8)

        def get(node: Node) -> Tensor:
            if node.compute is not None:
                return node.compute(get)
            given = buffers[node]
            if given.dtype != torch.uint8:
                return given
            return (given.unsqueeze(2) & powers.view(8, 1, 1) != 0).flatten(1, 2)

        for node, value in {node: get(node) for node in buffers if node.compute}.items():
            if value.dtype == torch.bool:
                value = (value.unflatten(1, (-1, 8)) * powers.view(8, 1, 1)).sum(2)
            buffers[node].copy_(value)


@pytest.mark.parametrize("kind", KINDS)
def test_cudnn_graphs_are_wired_right(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in for the library, which needs a GPU."""
    names = SimpleNamespace(FLOAT=0, HALF=1, BFLOAT16=2, BOOLEAN=3, A=4, FALLBACK=5)
    library = SimpleNamespace(
        pygraph=Graph, data_type=names, heur_mode=names, cudnnGraphNotSupportedError=RuntimeError,
        create_handle=object, set_stream=lambda handle, stream: None,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "cudnn", library)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(peers, "_require_half_on_cuda", lambda problem, *dtypes: None)
    problem = Problem(a_layer(kind), torch.float16, CPU)
    data = problem.data()
    problem.avoid_corner(data)
    errors = problem.errors(data, peers.cudnn_graphs(problem, data))
    assert max(errors.values()) < 2e-3  # two roundings of 4.9e-4 each, and the added gradients
    expected = nn.BatchNorm2d(24)
    expected(data.x.detach().float())
    torch.testing.assert_close(problem.norm.running_mean, expected.running_mean)
    torch.testing.assert_close(problem.norm.running_var, expected.running_var)
