"""Networks on our kernels (model.norm triton) beside torch's operators, and how the implementation is chosen."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastflower.errors import UserError
from fastflower.models import create_model
from fastflower.models.layers import TRITON_WINS, BNReLU, both, choose_norm
from fastflower.runtime.checkpoint import load_checkpoint
from tests.conftest import fastflower, train_arguments

RESULTS = Path(__file__).parents[2] / "bench" / "results"
STEPS = 5


def networks(name: str) -> tuple[nn.Module, nn.Module]:
    """Equal weights in float64 on torch's operators and in float32 on the kernels."""
    torch.manual_seed(0)
    reference = create_model(name, 3)
    network = create_model(name, 3, norm="triton")
    network.load_state_dict(reference.state_dict())
    return reference.double(), network.to(memory_format=torch.channels_last)


def batches(count: int, size: int = 64) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        images = torch.randn(8, 3, size, size, generator=generator)
        yield images.to(memory_format=torch.channels_last), torch.arange(8) % 3


def relative(actual: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    assert actual is not None
    assert expected is not None
    difference, size = (actual.detach().double() - expected.detach()).norm(), expected.detach().double().norm()
    return float(difference / size)


def forward_and_signs(network: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits, and of each BNReLU in turn where its output is positive."""
    positive: list[torch.Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _, __, output: positive.append(both(output)[0].detach() > 0))
        for module in network.modules()
        if isinstance(module, BNReLU)
    ]
    logits = network(images)
    for hook in hooks:
        hook.remove()
    return logits, positive


def forward_by_signs(network: nn.Module, images: torch.Tensor, positive: list[torch.Tensor]) -> torch.Tensor:
    """Logits, where each ReLU in turn lets pass what was positive elsewhere.

    A value so near to zero that rounding decides on its sign would otherwise change the gradients by some percent.
    """
    signs = iter(positive)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastflower.models.layers.F.relu_", lambda x: x * next(signs))
        logits: torch.Tensor = network(images)
    assert next(signs, None) is None
    return logits


@pytest.mark.parametrize("name", ["resnet18", pytest.param("plain18", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "interpreted", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain torch", "interpreter"]
)
def test_five_steps_equal_float64(name: str, interpreted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", str(int(interpreted)))
    reference, network = networks(name)
    # The rate is so low that rounding is not amplified from step to step: at 1e-3, float32 on torch's own operators
    # and float64 have nothing in common after three steps of plain18.
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-5) for model in (reference, network)]
    for step, (images, labels) in enumerate(batches(STEPS, size=32 if interpreted else 64)):
        actual, positive = forward_and_signs(network, images)
        logits = [forward_by_signs(reference, images.double(), positive), actual]
        for optimizer, output in zip(optimizers, logits, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(output, labels).backward()
        assert relative(logits[1], logits[0]) < 1e-3  # 2e-5 found, 1e-4 with torch's operators in float32
        for (key, expected), parameter in zip(reference.named_parameters(), network.parameters(), strict=True):
            assert relative(parameter.grad, expected.grad) < 3e-4, f"{key} in step {step}"  # 5e-5 found
        for optimizer in optimizers:
            optimizer.step()
    for (key, buffer), ours in zip(reference.named_buffers(), network.buffers(), strict=True):
        assert relative(ours, buffer) < 1e-4, key
        if key.endswith("num_batches_tracked"):
            assert ours == STEPS


@pytest.mark.parametrize(
    "name", ["resnet18", *(pytest.param(name, marks=pytest.mark.slow) for name in ("plain18", "resnet50"))]
)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_equals_eager_without_a_graph_break(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    torch._dynamo.reset()
    _, eager = networks(name)
    network = copy.deepcopy(eager)
    compiled = torch.compile(network, backend=backend, fullgraph=True)
    for images, labels in batches(2, size=48):
        for model in (eager, compiled):
            F.cross_entropy(model(images), labels).backward()
    for (key, expected), actual in zip(eager.named_parameters(), network.parameters(), strict=True):
        assert relative(actual.grad, expected.grad) < 1e-5, key
    for (key, buffer), ours in zip(eager.named_buffers(), network.buffers(), strict=True):
        assert relative(ours, buffer) < 1e-6, key
    eager.eval(), network.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), eager(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_weights_keep_torchvisions_names(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    theirs = getattr(torchvision.models, name)(num_classes=3)
    ours = create_model(name, 3, norm="triton")
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize("shortcut", ["A", "B", "C"])
def test_every_shortcut_evaluates_as_with_torch(shortcut: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    torch.manual_seed(0)
    reference = create_model("resnet50", 3, shortcut=shortcut)  # type: ignore[arg-type]
    network = create_model("resnet50", 3, shortcut=shortcut, norm="triton")  # type: ignore[arg-type]
    network.load_state_dict(reference.state_dict())
    reference.double()
    (images, _), *_ = batches(1)
    for mode in (True, False):
        outputs = [model.train(mode)(x) for model, x in ((network, images), (reference, images.double()))]
        assert relative(*outputs) < 1e-3


def test_sync_needs_the_kernels() -> None:
    with pytest.raises(ValueError, match="triton"):
        BNReLU(4, sync=True)
    with pytest.raises(UserError, match="model.norm to triton"):
        choose_norm("torch", torch.device("cpu"), sync=True)
    assert choose_norm("auto", torch.device("cpu"), sync=True) == "triton"


def test_auto_follows_committed_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_norm("auto", torch.device("cpu")) == "torch"
    for choice, wins, expected in (
        ("auto", True, "triton"), ("auto", False, "torch"), ("torch", True, "torch"), ("triton", False, "triton")
    ):  # fmt: skip
        monkeypatch.setattr("fastflower.models.layers.TRITON_WINS", frozenset({"Fast GPU"} if wins else ()))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Fast GPU")
        assert choose_norm(choice, torch.device("cuda")) == expected  # type: ignore[arg-type]


def test_every_kind_of_gpu_that_auto_names_has_been_measured() -> None:
    lines = [line for file in RESULTS.glob("gpu_check-*.jsonl") for line in file.read_text().splitlines()]
    assert {json.loads(line)["machine"]["gpu"] for line in lines} >= TRITON_WINS


def test_a_missing_triton_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="package triton"):
        choose_norm("triton", torch.device("cuda"))


def test_a_run_moves_between_implementations(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained on the kernels, evaluated and resumed on torch's operators, and back."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    run = tmp_path / "run"
    result = fastflower(*train_arguments(small, run), "--train.epochs", 1, "--model.norm", "triton")
    assert result.code == 0, result.err
    assert "norm in plain torch instead of our Triton kernels" in result.out
    metrics = json.loads(fastflower("eval", run, "--json").out)
    for epochs, norm in ((2, "torch"), (3, "triton")):
        result = fastflower("train", "--resume", run, "--train.epochs", epochs, "--model.norm", norm)
        assert result.code == 0, result.err
        assert "model.norm" in result.out
    saved = load_checkpoint(run / "checkpoints" / "last.pt")
    assert saved["model"]["bn1.num_batches_tracked"] == saved["step"] == 18
    assert metrics["n"] == 20
    outputs = []
    for norm in ("torch", "triton"):
        network = create_model("resnet18", 3, norm=norm).eval()  # type: ignore[arg-type]
        network.load_state_dict(saved["model"], strict=True)
        outputs.append(network(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))))
    assert relative(outputs[1], outputs[0]) < 1e-4
