"""BatchNorm + ReLU (+ residual) alone: our kernels against torch's, torch.compile's and NVIDIA's.

    python bench/kernels.py
    python bench/kernels.py --layers None --repeats 30 --out bench/results/kernels.jsonl --plot docs/kernels.png
    python bench/kernels.py --tiles 32x64x4 64x64x8
    python bench/kernels.py --from bench/results/kernels.jsonl --plot kernels.svg

Layers are those of the real networks, channels-last with float32 parameters; equal ones are measured once. Every
contender is first checked against float64, then timed: the forward pass as it runs in training, recording what the
backward pass needs, and the backward pass alone, on the graphs that the timed forward passes left (each is used once).
Contenders take turns, repeat by repeat. On a GPU the time is the device's: the host launches a whole repeat while the
device is kept busy. Each repeat goes through so many copies of the data that no cache holds them.

Rates are the bytes that our kernels have to move, over the time, for every contender: who moves more is slower. The
goal is 85 % of what a copy reaches in the same run, on activations above 40 MB, which no cache holds.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where `bench` lies

import torch
from rich.console import Console
from rich.progress import track

from bench.batch_norm import report
from bench.batch_norm.layers import DTYPES, Problem, find_layers
from bench.batch_norm.measure import judge, measure, report_row
from bench.batch_norm.peers import all_contenders
from bench.harness.common import append, circumstances, require_positive, start
from bench.harness.compute import cache_bytes, copy_gb_per_s
from bench.harness.words import arg
from fastflower.environment import package_versions
from fastflower.errors import UserError
from fastflower.runtime.device import choose_device


@dataclass(frozen=True)
class Command:
    """Settings of a run."""

    models: tuple[str, ...] = ("resnet50",)
    """Networks whose layers are measured."""
    batch: int = 256
    """Pictures in a batch."""
    size: int = 224
    """Side of the pictures (pixels)."""
    dtypes: tuple[Literal["bf16", "fp16", "fp32"], ...] = ("bf16", "fp16")
    """Types of the activations."""
    repeats: int = 10
    """How often each contender is timed."""
    layers: int | None = 6
    """Measure only so many layers, those that move most bytes; None = all."""
    tiles: tuple[str, ...] = ()
    """Measure ours also with these tiles, rows x channels x warps: 32x64x4 64x64x8."""
    out: Path | None = None
    """File to append one JSON line to for each contender at each layer."""
    plot: Path | None = None
    """Picture to draw, rate against size: .png, .svg or .pdf."""
    from_: Annotated[Path | None, arg(name="from")] = None
    """Measure nothing: show and draw the last run of this results file."""


@dataclass(frozen=True)
class CpuCommand(Command):
    """Settings of a run; where there is no GPU it is a small one."""

    models: tuple[str, ...] = ("resnet18",)
    batch: int = 2
    size: int = 64
    dtypes: tuple[Literal["bf16", "fp16", "fp32"], ...] = ("fp32",)
    repeats: int = 5
    layers: int | None = None


def versions(device: torch.device) -> dict[str, Any]:
    """Of what the contenders are made of, besides torch."""
    cudnn = torch.backends.cudnn.version() if device.type == "cuda" else None
    return package_versions("nvidia-cudnn-frontend") | {"cudnn": cudnn}


def run(command: Command, console: Console) -> int:
    """Measure, append to --out layer by layer, show and draw; 1 where a result of ours is wrong.

    Raises UserError for settings that measure nothing, or that the device or the data does not allow.
    """
    require_positive(command, "batch", "size", "layers", "repeats")
    if command.plot:
        report.require_plotting(command.plot)
    if command.from_:
        if command.out:
            raise UserError("--from measures nothing: leave --out out.")
        rows = report.last_run(command.from_)
        wrong: list[str] = []
    else:
        rows, wrong = measure_all(command, choose_device("auto"))
    report.show(rows, console)
    if command.plot:
        report.draw(rows, command.plot)
    if wrong:
        more = f" And {len(wrong) - 1} more." if len(wrong) > 1 else ""
        Console(stderr=True).print(f"error: {wrong[0]}{more}", markup=False, soft_wrap=True)
    return 1 if wrong else 0


def measure_all(command: Command, device: torch.device) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a run, which are also written to --out as they come; and a sentence for each wrong result."""
    if command.tiles and device.type != "cuda":
        raise UserError("--tiles needs a GPU: on a CPU Triton's kernels do not run.")
    contenders = all_contenders(command.tiles)
    networks = {model: find_layers(model, command.batch, command.size) for model in command.models}
    layers = list(dict.fromkeys(itertools.chain.from_iterable(networks.values())))
    if command.layers:
        weight = {
            layer: sum(n[layer] for n in networks.values()) * sum(layer.bytes_moved(torch.int8)) for layer in layers
        }
        layers = sorted(layers, key=weight.__getitem__, reverse=True)[: command.layers]
    if command.out:
        append(command.out, [])  # fails now rather than after the first layer
    cache = cache_bytes(device)
    around = circumstances(command, device, versions(device)) | {"copy_gb_per_s": copy_gb_per_s(device)}
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    todo = list(itertools.product(command.dtypes, layers))
    torch.manual_seed(0)
    for dtype, layer in track(todo, "measuring", console=Console(stderr=True), transient=True):
        problem = Problem(layer, DTYPES[dtype], device)
        try:
            results = measure(problem, contenders, command.repeats, cache)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{layer.kind} {list(layer.shape)} does not fit the GPU's memory: lower --batch."
            ) from error
        counts = {model: network[layer] for model, network in networks.items() if layer in network}
        where = {"kind": layer.kind, "shape": list(layer.shape), "layers": counts, "dtype": dtype}
        new = [
            {**where, "contender": name, **report_row(problem, result, around["copy_gb_per_s"]), **around}
            for name, result in results.items()
        ]
        wrong += judge(problem, contenders, results)
        rows += new
        if command.out:
            append(command.out, new)
    return rows, wrong


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit code: 2 for a user's mistake, 1 for a wrong result."""
    command = Command if choose_device("auto").type == "cuda" else CpuCommand
    return start(command, run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
