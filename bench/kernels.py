"""BatchNorm + ReLU (+ residual) alone: our kernels against torch's, torch.compile's and NVIDIA's.

    python bench/kernels.py --models resnet50 --batch 256 --out bench/results/kernels.jsonl --plot kernels.png
    python bench/kernels.py --tiles 32x64x4 64x64x8
    python bench/kernels.py --from bench/results/kernels.jsonl --plot kernels.svg

Layers are those of the real networks, channels-last with float32 parameters; equal ones are measured once. Every
contender is first checked against float64, then timed: the forward pass as it runs in training, recording what the
backward pass needs, and the backward pass alone, on the graphs that the timed forward passes left (each is used once).
Contenders take turns, repeat by repeat. On a GPU the time is the device's: the host launches a whole repeat while the
device is kept busy. Each repeat goes through so many copies of the data that no cache holds them.

Rates are the bytes that our kernels have to move, over the time, for every contender: who moves more is slower.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where `bench` lies

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from tyro.conf import arg

from bench.batch_norm import report
from bench.batch_norm.layers import DTYPES, Data, Forward, Problem, find_layers
from bench.batch_norm.peers import Contender, all_contenders
from bench.harness.common import MissingError, append, circumstances, require_positive, start
from bench.harness.timing import elapsed_ms, take_turns
from fastflower.environment import package_versions
from fastflower.errors import UserError
from fastflower.runtime.device import choose_device

MAX_COPIES = 32  # of the data; a layer that needs more is so small that calls, not bytes, take its time
UNTIMED = 2  # repeats of each contender before those that count


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
    repeats: int = 30
    """How often each contender is timed."""
    layers: int | None = None
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


class Measured(NamedTuple):
    """A contender at a layer."""

    errors: dict[str, float]  # relative L2 error of the output and of each gradient
    times: list[tuple[float, float]]  # of each repeat, milliseconds of a forward and of a backward pass
    copies: int  # of the data that a repeat went through


def measure(problem: Problem, contenders: Sequence[Contender], repeats: int, cache: int) -> dict[str, Measured | str]:
    """What was found by contender, or why it is missing; `cache` bytes are not to help.

    Raises torch.OutOfMemoryError where the GPU's memory does not hold one copy of the data.
    """
    data = problem.data()
    problem.avoid_corner(data)
    missing: dict[str, str] = {}
    errors: dict[Contender, dict[str, float]] = {}
    ready: dict[Contender, Forward] = {}
    for contender in contenders:
        try:
            with contender.during():
                forward = contender.build(problem, data)
                errors[contender] = problem.errors(data, forward)
            ready[contender] = forward
        except MissingError as reason:
            missing[contender.name] = str(reason)
        except Exception as error:
            if contender.required:
                raise
            missing[contender.name] = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    inputs = sum(tensor.nbytes for tensor in (data.x, data.residual, *data.dys) if tensor is not None)
    copies = min(MAX_COPIES, max(2, math.ceil(3 * cache / inputs)))
    while True:
        try:
            pool = [data, *(problem.data() for _ in range(copies - 1))]
            times = time_in_turns(problem, ready, pool, repeats)
            break
        except torch.OutOfMemoryError:
            if copies == 1:
                raise
        pool = []
        copies //= 2
    return {
        contender.name: missing.get(contender.name) or Measured(errors[contender], times[contender], copies)
        for contender in contenders
    }


def time_in_turns(
    problem: Problem, ready: dict[Contender, Forward], pool: Sequence[Data], repeats: int
) -> dict[Contender, list[tuple[float, float]]]:
    """Milliseconds of a forward and of a backward pass, on average over the pool, for each repeat that counts."""
    times: dict[Contender, list[tuple[float, float]]] = {contender: [] for contender in ready}

    def turn(contender: Contender, forward: Forward) -> int:
        with contender.during():
            times[contender].append(time_repeat(problem, forward, pool))
        return len(times[contender]) - UNTIMED

    take_turns({contender: partial(turn, contender, forward) for contender, forward in ready.items()}, repeats)
    return {contender: of_contender[UNTIMED:] for contender, of_contender in times.items()}


def time_repeat(problem: Problem, forward: Forward, pool: Sequence[Data]) -> tuple[float, float]:
    """All forward passes, then all backward passes."""
    # all results are kept to the end: none takes the memory of another, which a cache may still hold
    outputs: list[tuple[Tensor, ...]] = []
    gradients: list[dict[str, Tensor]] = []
    forward_ms = elapsed_ms(lambda: outputs.extend(map(forward, pool)), problem.device, len(pool))
    backward_ms = elapsed_ms(lambda: gradients.extend(map(problem.backward, pool, outputs)), problem.device, len(pool))
    return forward_ms / len(pool), backward_ms / len(pool)


def cache_bytes(device: torch.device) -> int:
    """Size of the GPU's L2 cache, or of a CPU core's last."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((1024 * int(path.read_text().strip().removesuffix("K")) for path in sizes), default=2**25)


def copy_gb_per_s(device: torch.device, cache: int) -> float:
    """What a plain copy reads and writes in a second; the buffers are three times the cache."""
    source, target = (torch.zeros(3 * cache, dtype=torch.uint8, device=device) for _ in range(2))
    calls = 10

    def work() -> None:
        for _ in range(calls):
            target.copy_(source)

    times = [elapsed_ms(work, device, calls) for _ in range(6)]
    return 2 * source.nbytes * calls / np.median(times[1:]).item() / 1e6


def report_row(problem: Problem, result: Measured | str, copy: float) -> dict[str, Any]:
    """What is written about one contender at one layer."""
    if isinstance(result, str):
        return {"missing": result}
    row: dict[str, Any] = {"errors": result.errors, "copies": result.copies}
    directions = zip(*result.times, strict=True)
    moved = problem.layer.bytes_moved(problem.dtype)
    for name, times, bytes_ in zip(("forward", "backward"), directions, moved, strict=True):
        p20, median, p80 = np.quantile(times, (0.2, 0.5, 0.8)).tolist()
        rate = bytes_ / median / 1e6
        row[name] = {"ms": median, "p20": p20, "p80": p80, "bytes": bytes_, "gb_per_s": rate, "share": rate / copy}
    return row


def judge(problem: Problem, contenders: Sequence[Contender], results: Mapping[str, Measured | str]) -> Iterator[str]:
    """A sentence for each error of ours that is neither small nor near eager's."""
    by_eager = results["eager"]
    assert isinstance(by_eager, Measured)
    for contender in contenders:
        result = results[contender.name]
        if not contender.judged or isinstance(result, str):
            continue
        for name, error in result.errors.items():
            limit = max(1.25 * by_eager.errors[name], 4 * torch.finfo(problem.dtype).eps)
            if not error <= limit:  # NaN is wrong too
                yield (
                    f"{name} of {contender.name} has a relative error of {error:.1e}, more than {limit:.1e}, at "
                    f"{problem.layer.kind} {list(problem.layer.shape)} {problem.dtype}."
                )


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
    around = circumstances(command, device, versions(device)) | {"copy_gb_per_s": copy_gb_per_s(device, cache)}
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
