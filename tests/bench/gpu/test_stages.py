"""The stages tried on a CPU, with all packages and with torch's alone, and the figures that they compute."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench.batch_norm.layers import find_layers
from bench.contenders.networks import torchvisions
from bench.gpu import networks
from bench.gpu.idle import busy_and_whole
from bench.gpu.networks import Turns, network, require_steady
from bench.gpu.roofline import Work, least_seconds, work_of_step
from bench.gpu.runner import ROOT
from bench.gpu.stages import STAGES
from bench.gpu.steps import Recipe
from bench.gpu.task import FailedError, Outcome, Stage, Task
from bench.harness.missing import MissingError
from fastflower.config import Config, resolve
from fastflower.flops import count

# What stands in setup.py besides torch, and what torch brings: all that may be missing where only torch is.
OTHERS = (
    *("nvidia.dali", "nvidia.nvimgcodec", "matplotlib", "llvmlite", "numba", "rich", "tyro", "pydantic", "yaml", "PIL"),
    *(
        "pyarrow",
        "tensorboard",
        "safetensors",
        "google_crc32c",
        "torchvision",
        "timm",
        "pandas",
        "pytest",
        "hypothesis",
    ),
    *("tfrecord", "sklearn"),
)
HOOK = """
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec

def find(name, path=None, target=None):
    hidden = any(name == other or name.startswith(other + ".") for other in {others})
    return None if hidden else find_spec(name, path, target)

PathFinder.find_spec = find
"""
ALONE = [stage for stage in STAGES if not stage.needs]


@pytest.fixture
def torch_alone(tmp_path: Path) -> dict[str, str]:
    """An environment whose Pythons find torch and what it brings, and nothing else."""
    folder = tmp_path / "hook"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HOOK.format(others=OTHERS))
    return os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "CUDA_VISIBLE_DEVICES": ""}


def check(folder: Path, environment: dict[str, str], *options: str) -> tuple[int, dict[str, dict[str, Any]], str]:
    """The exit code, how each stage ended, and what was said."""
    out = folder / "out.jsonl"
    command = [sys.executable, "bench/gpu_check.py", "--device", "cpu", "--out", str(out), *options]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []
    ends = {row["stage"]: row for row in lines if "result" in row}
    return result.returncode, ends, result.stdout + result.stderr


def test_stages_that_say_so_need_torch_alone(torch_alone: dict[str, str]) -> None:
    modules = sorted({stage.function.partition(":")[0] for stage in ALONE} | {"bench.gpu.survey", "bench.gpu_check"})
    code = f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\n"
    code += f"assert not set(sys.modules) & set({OTHERS}), 'the hook hides nothing'"
    result = subprocess.run([sys.executable, "-c", code], env=torch_alone, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_where_torch_is_alone_the_rest_is_left_out(tmp_path: Path, torch_alone: dict[str, str]) -> None:
    code, ends, said = check(tmp_path, torch_alone, "--only", "exact", "pixels")
    assert code == 0, said
    assert {name: end["result"] for name, end in ends.items()} == {
        "exact": "passed", "pixels": "left out",
    }  # fmt: skip
    assert ends["pixels"]["figure"].startswith("needs nvidia.dali, nvidia.nvimgcodec, numba, ")
    assert ends["exact"]["versions"]["torch"] == torch.__version__
    assert ends["exact"]["machine"]["gpu"] is None
    assert "5 of 5 forms right to rounding" in said


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES, ids=[stage.name for stage in STAGES])
def test_each_stage_passes_on_a_cpu(stage: Stage, tmp_path: Path, torch_alone: dict[str, str]) -> None:
    """With no more than what it says that it needs."""
    everything = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    code, ends, said = check(tmp_path, everything if stage.needs else torch_alone, "--only", stage.name)
    assert code == 0, said
    assert {name: end["result"] for name, end in ends.items()} == {stage.name: "passed"}
    assert f"| {stage.name} | passed | " in (tmp_path / "out.md").read_text()


def test_settings_of_a_step_are_the_products_own() -> None:
    """By their names, in the class that checks them; its values too, but for the rate, which is found by `resolve`."""
    theirs, recipe = resolve(Config()).train, Recipe()
    for field in fields(Recipe):
        assert type(getattr(theirs, field.name)) in (type(getattr(recipe, field.name)), type(None)), field.name
        if field.name not in ("lr", "compile", "schedule", "momentum", "weight_decay"):
            assert getattr(theirs, field.name) == getattr(recipe, field.name), field.name
    assert recipe.peak_lr == recipe.lr


@pytest.mark.parametrize(
    ("spans", "busy", "whole"),
    [
        ([(0, 1)], 1, 1),
        ([(5, 6), (0, 2)], 3, 6),
        ([(0, 4), (1, 2), (3, 6)], 6, 6),
        ([(0, 10), (2, 3), (12, 13), (12, 15)], 13, 15),
    ],
)
def test_gaps_are_where_no_span_is(spans: list[tuple[float, float]], busy: float, whole: float) -> None:
    assert busy_and_whole(spans) == (busy, whole)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "plain18"])
def test_the_rooflines_products_are_those_that_torch_counts(name: str) -> None:
    """Forward and backward, on real tensors; the pictures' gradient is not computed."""
    works = work_of_step(name, 2, 64, torch.bfloat16, 104)
    real = network(name, "torch")
    with FlopCounterMode(display=False) as counter:
        real(torch.randn(2, 3, 64, 64)).sum().backward()
    assert sum(work.flops for work in works) == counter.get_total_flops()
    assert sum(work.flops for work in works) == pytest.approx(3 * 2 * 2 * count(real, 64).macs, rel=0.2)


def test_the_rooflines_bytes_by_hand() -> None:
    works = work_of_step("resnet18", 2, 64, torch.bfloat16, 104)
    first, *_ = works
    assert first.bytes == 2 * (2 * 3 * 64 * 64 + 64 * 3 * 7 * 7 + 2 * 64 * 32 * 32)
    norms = sum(
        number * sum(layer.bytes_moved(torch.bfloat16)) for layer, number in find_layers("resnet18", 2, 64).items()
    )
    assert sum(work.bytes for work in works if not work.flops) == norms
    linear = 2 * (2 * 512 + 512 * 104 + 2 * 104)
    assert [work.bytes for work in works if work.flops][-2:] == [linear, 2 * linear]


def test_each_layer_takes_the_longer_of_both() -> None:
    assert least_seconds([Work(10, 1), Work(0, 6), Work(4, 8)], flops_per_s=2, bytes_per_s=4) == 5 + 1.5 + 2


def test_what_there_is_no_time_to_compile_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [100.0]
    monkeypatch.setattr(Task, "left_s", property(lambda task: left[0]))
    turns = Turns(Task("cpu", tmp_path / "rows", 0))
    make = turns.in_time(lambda batch: batch)  # type: ignore[arg-type,return-value]
    turns.told("a", 0)
    assert make(3) == 3  # type: ignore[comparison-overlap]
    left[0] = 60  # it took 40 seconds
    turns.told("b", 1)
    assert make(3) == 3  # type: ignore[comparison-overlap]
    left[0] = 45
    with pytest.raises(MissingError, match="no time"):
        make(3)


@pytest.mark.parametrize("stage", [networks.graphs, networks.autotuned])
def test_a_deeper_network_is_not_begun_without_its_time(
    stage: Callable[[Task], Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is known from the first network: else the stage would be killed while it compiles, and lose its verdict."""
    left, began = [100.0], list[str]()

    def images_per_s(task: Task, name: str, makers: Any, batch: int, turns: Turns) -> list[dict[str, Any]]:
        make = turns.in_time(lambda batch: began.append(name))  # type: ignore[arg-type,return-value]
        turns.told(name, 0)
        with contextlib.suppress(MissingError):
            make(batch)
        left[0] -= 25  # compiling took that long
        turns.told(name, 1)
        return []

    monkeypatch.setattr(Task, "left_s", property(lambda task: left[0]))
    monkeypatch.setattr(networks, "images_per_s", images_per_s)
    with pytest.raises(MissingError):
        stage(Task("cuda", tmp_path / "rows", 0))
    assert began == ["resnet18"]


def test_what_is_recorded_again_fails() -> None:
    steady = {"network": "resnet18", "name": "default", "compiled_anew": 0, "graphs_recorded_anew": 0}
    require_steady([steady, {"network": "resnet18", "name": "torchvision", "missing": "why"}])
    with pytest.raises(FailedError, match="resnet18, reduce-overhead: graphs_recorded_anew 3$"):
        require_steady([steady, steady | {"name": "reduce-overhead", "graphs_recorded_anew": 3}])


def test_contenders_have_the_same_layers() -> None:
    ours, theirs = network("resnet18", "triton"), torchvisions("resnet18")
    assert [tuple(p.shape) for p in ours.parameters()] == [tuple(p.shape) for p in theirs.parameters()]
    assert isinstance(ours, nn.Module)
