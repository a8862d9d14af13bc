"""The same bits each time: what torch is told, where it holds, and that no network needs what cannot do so."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fastflower.errors import UserError
from fastflower.models import NETWORKS, create_model
from fastflower.models.layers import pooled_by_parts
from fastflower.runtime.checkpoint import load_checkpoint
from fastflower.runtime.repeatable import VARIABLE, repeatable
from tests.conftest import TinyNet, fastflower, train_arguments, write_dataset

CUDA = torch.device("cuda", 0)

# By torch's documentation of use_deterministic_algorithms, these gradients on a GPU have no repeatable algorithm.
NONE = (
    *("AvgPool3D", "AdaptiveAvgPool2D", "AdaptiveAvgPool3D", "AdaptiveMaxPool2D", "FractionalMaxPool", "MaxUnpool"),
    *("Upsample", "ReflectionPad", "NllLoss2D", "CtcLoss", "GridSampler", "Put"),
)


def state() -> tuple[bool, ...]:
    cudnn, inductor = torch.backends.cudnn, torch._inductor.config
    return torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark, inductor.deterministic


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


@pytest.mark.parametrize("benchmark", [False, True])
def test_torch_is_told_until_the_block_ends_however_it_ends(monkeypatch: pytest.MonkeyPatch, benchmark: bool) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", benchmark)
    before = state()
    with repeatable(False, CUDA):
        assert state() == before
    with repeatable(True, CUDA):
        assert state() == (True, True, False, True)
        with pytest.raises(KeyError), repeatable(True, CUDA):
            raise KeyError
        assert state() == (True, True, False, True)
    assert state() == before


def test_products_of_matrices_add_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    with repeatable(False, CUDA):
        assert VARIABLE not in os.environ
    with repeatable(True, CUDA):
        assert os.environ[VARIABLE] == ":4096:8"
    monkeypatch.setenv(VARIABLE, ":16:8")
    with repeatable(True, CUDA):
        assert os.environ[VARIABLE] == ":16:8"
    monkeypatch.setenv(VARIABLE, ":32768:2")
    with pytest.raises(UserError, match="CUBLAS_WORKSPACE_CONFIG is :32768:2.*unset it"), repeatable(True, CUDA):
        pass
    with repeatable(False, CUDA), repeatable(True, torch.device("cpu")):  # which has no use for it
        pass


def gradients(network: torch.nn.Module) -> set[str]:
    """Names of the functions that a training step's backward pass calls, with a GPU that is not there."""
    loss = F.cross_entropy(network(torch.empty(2, 3, 256, 256)), torch.zeros(2, dtype=torch.long))
    seen, left = set(), [loss.grad_fn]
    while left:
        function = left.pop()
        if function is not None and function not in seen:
            seen.add(function)
            left += [below for below, _ in function.next_functions]
    return {function.name() for function in seen}


@pytest.mark.parametrize("name", NETWORKS)
def test_no_network_needs_a_gradient_that_differs_each_time(name: str) -> None:
    needed = []
    for wanted in (False, True):
        with repeatable(wanted, CUDA), FakeTensorMode(), torch.device("cuda"):
            names = gradients(create_model(name, 10).train())
        assert "ConvolutionBackward0" in names
        needed.append({one for one in names if one.startswith(NONE)})
    classic = not NETWORKS[name].global_pooling
    assert needed == [{"AdaptiveAvgPool2DBackward0"} if classic else set(), set()]


def by_parts(x: torch.Tensor, side: int) -> torch.Tensor:
    return pooled_by_parts(pooled_by_parts(x, 2, side), 3, side)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 8))
def test_pooling_by_parts_is_adaptive_average_pooling(height: int, width: int, side: int) -> None:
    """Values and gradients, also where positions are repeated."""
    torch.manual_seed(0)
    x, weights = torch.randn(2, 3, height, width, dtype=torch.float64), torch.randn(2, 3, side, side).double()
    results = []
    for pool in (F.adaptive_avg_pool2d, by_parts):
        input = x.clone().requires_grad_()
        output = pool(input, side)
        results.append((output.detach(), torch.autograd.grad(output, input, weights)))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data", {"train": 48, "val": 20})


def test_it_holds_in_training_a_dry_run_and_evaluation_and_nowhere_else(
    data: Path, tmp_path: Path, tiny_net: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, ...]] = []
    forward = TinyNet.forward

    def noted(network: TinyNet, x: torch.Tensor) -> torch.Tensor:
        seen.append(state())
        return forward(network, x)

    monkeypatch.setattr(TinyNet, "forward", noted)
    for name, options in (("plain", ()), ("same", ("--train.deterministic",))):
        run = tmp_path / name
        arguments = [*train_arguments(data, run), "--train.epochs", 1, *options]
        for command in ([*arguments, "--dry_run"], arguments, ("eval", run), ("predict", run, "--split", "val")):
            seen.clear()
            result = fastflower(*command)
            assert result.code == 0, result.err
            assert set(seen) == ({(True, True, False, True)} if options else {(False, False, seen[0][2], False)})
        assert state()[0] is False
    plain, same = (load_checkpoint(tmp_path / name / "checkpoints/last.pt") for name in ("plain", "same"))
    assert (plain["config"]["train"]["deterministic"], same["config"]["train"]["deterministic"]) == (False, True)
    assert (plain["config"]["data"]["hw_decoder_load"], same["config"]["data"]["hw_decoder_load"]) == (None, 0.0)
    assert all(torch.equal(tensor, same["model"][key]) for key, tensor in plain["model"].items())


def test_a_share_for_the_hardware_decoder_beside_it_is_refused(data: Path, tmp_path: Path, tiny_net: None) -> None:
    arguments = [*train_arguments(data, tmp_path / "run"), "--train.epochs", 1]
    for load in (0.65, 1):
        refused = fastflower(*arguments, "--train.deterministic", "--data.hw_decoder_load", load)
        assert refused.code == 2
        assert "but train.deterministic needs 0" in refused.err
    assert fastflower(*arguments, "--data.hw_decoder_load", 0.65).code == 0
    resume = ("train", "--resume", tmp_path / "run", "--train.epochs", 2, "--train.deterministic")
    resumed = fastflower(*resume)
    assert resumed.code == 0, resumed.err
    assert "data.hw_decoder_load 0.65 → 0, to fit train.deterministic on." in resumed.out
    assert "train.deterministic False → True" in resumed.out
