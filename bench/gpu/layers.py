"""Stages of the kernels alone: right to rounding, and how fast beside others'."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch

from bench.batch_norm.layers import DTYPES, Kind, Layer, Problem, find_layers
from bench.batch_norm.measure import Measured, judge, measure, report_row, verdict
from bench.batch_norm.peers import Contender, all_contenders, eager, ours
from bench.gpu.task import FailedError, Outcome, Task, attempt
from bench.harness.compute import cache_bytes, copy_gb_per_s
from bench.harness.timing import LATE
from fastflower.environment import find_apex

KINDS: tuple[Kind, ...] = ("bn_relu", "bn_add_relu", "fork", "dual", "dual_fork")
# Types and channels: wide loads, narrow ones, and more channels than a tile has. Each kind of kernel is compiled anew.
EXACT = (("bf16", 64), ("fp16", 64), ("fp32", 17), ("bf16", 2048), ("fp32", 100))
MOST_LATE = 0.1  # of the times: of each, the median counts
MOST = 4  # layers whose rates are measured: those that move most bytes
CHECKED = (Contender("eager", eager, required=True), Contender("ours", ours, required=True, judged=True))


def exact(task: Task) -> Outcome:
    """Outputs and gradients of the kernels against float64, beside torch's own."""
    worst = {"eager": 0.0, "ours": 0.0}

    def check(dtype: str, channels: int, kind: Kind) -> None:
        torch.manual_seed(0)
        large = 4 if task.tiny else 56 if channels < 2048 else 7
        for shape in ((2 if task.tiny else 16, channels, large, large), (3, channels, 7, 9)):
            problem = Problem(Layer(kind, shape), DTYPES[dtype], task.device)
            data = problem.data()
            problem.avoid_corner(data)
            errors = {one.name: problem.errors(data, one.build(problem, data)) for one in CHECKED}
            in_eps = {name: max(of.values()) / torch.finfo(DTYPES[dtype]).eps for name, of in errors.items()}
            task.row(kind=kind, shape=shape, dtype=dtype, errors=errors)
            wrong = list(judge(problem, CHECKED, {name: Measured(of, [], 1) for name, of in errors.items()}))
            if wrong:
                raise FailedError(" ".join(wrong))
            worst.update({name: max(value, worst[name]) for name, value in in_eps.items()})

    cells = {
        f"{dtype}, {channels} channels, {kind}": partial(check, dtype, channels, kind)
        for dtype, channels in EXACT[: 1 if task.tiny else None]
        for kind in KINDS
    }
    done = attempt(task, cells)
    return Outcome(
        f"{done} of {len(cells)} forms right to rounding: relative errors to {worst['ours']:.2f} eps, torch's to "
        f"{worst['eager']:.2f}"
    )


def rates(task: Task) -> Outcome:
    """The layers of resnet50 that move most bytes, beside torch, torch.compile and, where installed, NVIDIA's."""
    found = find_layers("resnet18" if task.tiny else "resnet50", *((2, 32) if task.tiny else (256, 224)))
    heaviest = sorted(found, key=lambda layer: found[layer] * sum(layer.bytes_moved(torch.int8)), reverse=True)
    contenders = [one for one in all_contenders(()) if not (task.tiny and one.name == "compile")]
    dtypes = ["bf16"] + ["fp16"] * (find_apex() == "nvidia")  # which apex takes alone
    copy, rows, late = copy_gb_per_s(task.device), list[dict[str, Any]](), list[str]()
    repeats, timed = 2 if task.tiny else 10, 0

    def time(dtype: str, layer: Layer) -> None:
        nonlocal timed
        problem = Problem(layer, DTYPES[dtype], task.device)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results = measure(problem, contenders, repeats, cache_bytes(task.device))
        timed += sum(2 * len(result.times) for result in results.values() if isinstance(result, Measured))
        late.extend(str(one.message) for one in caught if LATE in str(one.message))
        for name, result in results.items():
            where = {"kind": layer.kind, "shape": list(layer.shape), "dtype": dtype, "contender": name}
            rows.append(task.row(**where, **report_row(problem, result, copy), copy_gb_per_s=copy))
        if wrong := list(judge(problem, contenders, results)):
            raise FailedError(" ".join(wrong))

    cells = {
        f"{dtype} {layer.kind} {list(layer.shape)}": partial(time, dtype, layer)
        for dtype in dtypes
        for layer in heaviest[: 2 if task.tiny else MOST]
    }
    torch.manual_seed(0)
    done = attempt(task, cells)
    shares = {
        name: [(row["forward"]["share"], row["backward"]["share"]) for row in rows if row["contender"] == name]
        for name in dict.fromkeys(row["contender"] for row in rows if "missing" not in row)
    }
    said = ", ".join(
        f"{name} {min(f for f, _ in of):.0%} forward and {min(b for _, b in of):.0%} backward"
        for name, of in shares.items()
    )
    least = f"least share of a copy ({copy:.0f} GB/s) on {done} layers: {said}"
    if len(late) > MOST_LATE * timed:
        raise FailedError(f"{LATE} in {len(late)} of {timed} times, which are therefore too long ({least})")
    return Outcome(f"{verdict(rows)} {least}", (f"BatchNorm + ReLU alone, {least}.", verdict(rows)))
