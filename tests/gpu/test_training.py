"""Training on a GPU: precisions, compiled and eager, both implementations of BatchNorm + ReLU, a real short run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from fastflower.config import TrainConfig
from fastflower.kernels.batch_norm import bn_relu
from fastflower.models import create_model
from fastflower.runtime.checkpoint import load_checkpoint
from fastflower.runtime.compilations import counted_compilations
from fastflower.runtime.device import Precision
from fastflower.runtime.distributed import Ranks
from fastflower.training.metrics import EvaluationSums
from fastflower.training.state import CUDA_GRAPH_MODES
from fastflower.training.step import training_step
from fastflower.training.validate import outputs
from tests.conftest import ROOT, fastflower, train_arguments
from tests.training.test_choices import EVERYTHING
from tests.training.test_cuda_graphs import eager, last, trained
from tests.training.test_overflow import LET_GO, Case, assert_as_by_hand, by_us
from tests.training.test_run import rows
from tests.training.test_step import CHOICES, CLASSES, batches, training

pytestmark = pytest.mark.gpu


@pytest.mark.usefixtures("tiny_net")
@pytest.mark.parametrize("options", [["--amp_dtype", "fp16"], ["--amp_dtype", "bf16"], []], ids=lambda o: "".join(o))
def test_mixed_precision_trains_as_float32_does(small: Path, tmp_path: Path, options: list[str]) -> None:
    if "bf16" in options and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU computes no bf16")
    losses = {}
    for name, precision in (("fp32", []), ("amp", ["--amp", *options])):
        arguments = (*train_arguments(small, tmp_path / name), "--train.epochs", 3, "--train.compile", "off")
        result = fastflower(*arguments, *precision)
        assert result.code == 0, result.err
        assert "cuda" in result.out
        losses[name] = [row["val_loss"] for row in rows(tmp_path / name)]
    assert losses["amp"] == pytest.approx(losses["fp32"], rel=0.1)
    saved = load_checkpoint(tmp_path / "amp" / "checkpoints" / "last.pt")
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in saved["model"].values())


def eager_and_compiled(data: Path, folder: Path, *options: object) -> list[list[float]]:
    """The validation losses of two runs that differ in nothing else."""
    losses = []
    for choice in ("off", "on"):
        torch._dynamo.reset()
        result = fastflower(*train_arguments(data, folder / choice), *options, "--train.compile", choice)
        assert result.code == 0, result.err
        losses.append([row["val_loss"] for row in rows(folder / choice)])
    return losses


@pytest.mark.usefixtures("tiny_net")
@pytest.mark.parametrize("norm", ["torch", "triton"])
def test_compiled_and_eager_agree(small: Path, tmp_path: Path, norm: str) -> None:
    eager, compiled = eager_and_compiled(small, tmp_path, "--train.epochs", 2, "--model.norm", norm)
    assert eager == pytest.approx(compiled, rel=0.02)


@pytest.mark.usefixtures("tiny_net")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_every_choice_trains_compiled_in_fp16(small: Path, tmp_path: Path, mode: str) -> None:
    options = (*EVERYTHING, "--train.epochs", 3, "--train.compile_mode", mode, "--amp", "--amp_dtype", "fp16")
    eager, compiled = eager_and_compiled(small, tmp_path, *options)
    assert eager == pytest.approx(compiled, rel=0.05)


@pytest.fixture
def unwritten_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device="cuda").isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("unwritten_memory_is_nan")
@pytest.mark.parametrize(
    "case", [*LET_GO, *(replace(case, frozen=0, overflows=[True, True, False]) for case in LET_GO)]
)
def test_first_steps_that_overflow_in_fp16_leave_nothing_behind(case: Case) -> None:
    assert_as_by_hand(by_us(case, torch.device("cuda", 0)), case)


@pytest.mark.parametrize("mode", CUDA_GRAPH_MODES)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_pieces_in_cuda_graphs_train_as_in_eager_mode(
    mode: Any, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    train, device = TrainConfig(accumulate=accumulate, compile_mode=mode), torch.device("cuda", 0)

    def graphs(network: nn.Module) -> nn.Module:
        return cast(nn.Module, torch.compile(network, mode=mode, dynamic=False))

    torch.compiler.reset()
    with counted_compilations() as counted:
        counts = [(state, counted.compiled, counted.recorded) for state in trained(train, graphs, device=device)]
    state, compiled, recorded = counts[-1]
    assert recorded > 0, "nothing ran as CUDA graphs"
    assert counts[2][1:] == (compiled, recorded), "compiled or recorded anew in later steps"
    for name, expected in last(trained(train, eager, device=device)).items():
        torch.testing.assert_close(state.network.state_dict()[name], expected, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("precision", [Precision(None), Precision(torch.float16)], ids=str)
@pytest.mark.parametrize("choices", CHOICES, ids=lambda choices: "+".join(choices) or "plain")
def test_steps_wait_for_nothing_and_keep_pictures_channels_last(choices: dict[str, Any], precision: Precision) -> None:
    gpu = torch.device("cuda", 0)
    setup, state = training(choices, gpu, precision)
    layouts: list[bool] = []
    state.network.get_submodule("conv1").register_forward_pre_hook(
        lambda _, inputs: layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    given = list(batches(8, 8, 8, 5, device=gpu))
    training_step(setup, state, state.network, given[0])  # makes what the optimizer remembers
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in given[1:]:
            training_step(setup, state, state.network, batch)
        sums = EvaluationSums(CLASSES, gpu)
        for batch, logits in outputs(state.network.eval(), given, device=gpu, precision=precision, pad_to=8):
            sums.add(logits.detach(), batch.labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(layouts)
    assert sums.result(Ranks()).n == 29


TO_THE_END = """
import torch
from fastflower import cli
try:
    cli.main()
finally:
    print("has taken memory of", [gpu for gpu in range(2) if torch._C._cuda_hasPrimaryContext(gpu)])
"""


def test_a_process_takes_memory_of_its_own_gpu_only(small: Path, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    arguments = [*train_arguments(small, tmp_path / "run"), "--train.epochs", 1]
    result = subprocess.run(
        [sys.executable, "-c", TO_THE_END, *map(str, arguments)],
        env=os.environ | place | {"MASTER_ADDR": "localhost", "MASTER_PORT": "29517", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "has taken memory of [1]" in result.stdout


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "plain18"])
def test_networks_on_the_kernels_equal_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # the convolutions' rounding is not what is tested
    torch.manual_seed(0)
    reference = create_model(name, 3)
    network = create_model(name, 3, norm="triton")
    network.load_state_dict(reference.state_dict())
    reference.double().cuda()
    network.cuda().to(memory_format=torch.channels_last)
    images, labels = torch.randn(16, 3, 64, 64, device="cuda"), torch.arange(16, device="cuda") % 3
    outputs = [network(images), reference(images.double())]
    for output in outputs:
        F.cross_entropy(output, labels).backward()
    assert (outputs[0] - outputs[1]).norm() / outputs[1].norm() < 1e-3
    for (key, parameter), expected in zip(network.named_parameters(), reference.parameters(), strict=True):
        assert parameter.grad is not None
        assert expected.grad is not None
        assert (parameter.grad - expected.grad).norm() / expected.grad.norm() < 0.05, key


def test_statistics_over_ranks_by_nccl(tmp_path: Path) -> None:
    """One rank, which must find what it finds alone; the exchange itself runs."""
    x = torch.randn(4, 8, 5, 5, device="cuda").to(memory_format=torch.channels_last)
    alone, synced = nn.BatchNorm2d(8).cuda(), nn.BatchNorm2d(8).cuda()
    expected = bn_relu(x, alone)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        leaf = x.clone().requires_grad_()
        output = bn_relu(leaf, synced, sync=True)
        assert isinstance(output, torch.Tensor)
        output.sum().backward()
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(synced.running_var, alone.running_var)
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


def test_a_short_run_learns(tmp_path: Path) -> None:
    """The built-in flowers, three epochs with everything on; then one more, and the same figures from eval."""
    root, run = tmp_path / "flowers", tmp_path / "run"
    assert fastflower("data", "demo", root).code == 0
    arguments = ("train", "--config", "demo", "--data.root", root, "--run", run, "--amp", "--train.epochs")
    result = fastflower(*arguments, 3)
    assert result.code == 0, result.err
    assert ", compiled" in result.out
    last = rows(run)[-1]
    assert last["val_accuracy"] > 0.3  # 0.54 on a CPU; one class in twelve by chance
    metrics = json.loads(fastflower("eval", run, "--json").out)
    best = min(rows(run), key=lambda row: row["val_loss"])
    assert metrics["loss"] == pytest.approx(best["val_loss"], rel=1e-3)
    assert fastflower("train", "--resume", run, "--train.epochs", 4).code == 0
    assert len(rows(run)) == 4
