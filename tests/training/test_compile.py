"""Compiled runs: the same figures as eager ones, statistics updated once a step, a bounded number of graphs."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fastflower.runtime.checkpoint import load_checkpoint
from fastflower.runtime.progress import Display
from fastflower.runtime.run_folder import RunFolder
from fastflower.training.profile import Profiler
from tests.conftest import fastflower, train_arguments, write_dataset
from tests.training.test_run import rows

pytestmark = pytest.mark.usefixtures("tiny_net")


@pytest.fixture
def short_batches(tmp_path: Path) -> Path:
    """Sizes that leave a short batch in training (dropped) and in validation (filled up)."""
    return write_dataset(tmp_path / "data", {"train": 50, "val": 21})


def assert_as_eager(data: Path, tmp_path: Path) -> None:
    for name, choice in (("eager", "off"), ("compiled", "on")):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        run = tmp_path / name
        result = fastflower(*train_arguments(data, run), "--train.epochs", "3", "--train.compile", choice)
        assert result.code == 0, result.err
        assert (", compiled" in result.out) == (choice == "on")
    # one graph to train and one to validate, over three epochs with short batches
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    eager, compiled = (load_checkpoint(tmp_path / name / "checkpoints/last.pt") for name in ("eager", "compiled"))
    assert compiled["model"]["bn1.num_batches_tracked"] == compiled["step"] == 18
    assert list(compiled["model"]) == list(eager["model"])
    for name, tensor in eager["model"].items():
        torch.testing.assert_close(compiled["model"][name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    for a, b in zip(rows(tmp_path / "eager"), rows(tmp_path / "compiled"), strict=True):
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-3)


def test_traced_runs_equal_eager_ones(short_batches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the compiler but its code generation, which takes half a minute."""
    original = torch.compile

    def traced(network: torch.nn.Module, *, mode: str, dynamic: bool) -> Any:
        return original(network, backend="aot_eager", dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", traced)
    assert_as_eager(short_batches, tmp_path)


@pytest.mark.parametrize("sizes", [(2,), (2, 3, 4, 5, 6, 7, 8)], ids=["one shape", "another in each step"])
def test_a_profile_says_what_is_compiled_again(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    shown = StringIO()
    function = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    with Display(Console(file=shown, width=200), shown=True) as display:
        profiler = Profiler(RunFolder(tmp_path), display, compiles=True)
        for step in range(9):
            function(torch.ones(sizes[min(step, len(sizes) - 1)]))
            profiler.step()
        profiler.close()
    again = 4 if len(sizes) > 1 else 0
    assert f"compiled {again} functions and recorded 0 CUDA graphs anew in these 4 steps" in shown.getvalue()


@pytest.mark.slow
def test_compiled_runs_equal_eager_ones(short_batches: Path, tmp_path: Path) -> None:
    assert_as_eager(short_batches, tmp_path)
