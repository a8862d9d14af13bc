"""A layer's contenders, checked against float64 and timed in turns; what is written of them, and what is wrong."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.batch_norm.layers import DTYPES, Data, Forward, Problem
from bench.batch_norm.peers import Contender
from bench.harness.missing import MissingError
from bench.harness.timing import elapsed_ms, take_turns

MAX_COPIES = 32  # of the data; a layer that needs more is so small that calls, not bytes, take its time
UNTIMED = 2  # repeats of each contender before those that count
GOAL, LARGE_BYTES = 0.85, 40e6  # of a copy's rate, forward and backward, on activations above so many bytes


class Measured(NamedTuple):
    """A contender at a layer."""

    errors: dict[str, float]  # relative L2 error of the output and of each gradient
    times: list[tuple[float, float]]  # of each repeat, milliseconds of a forward and of a backward pass
    copies: int  # of the data that a repeat went through


def measure(problem: Problem, contenders: Sequence[Contender], repeats: int, cache: int) -> dict[str, Measured | str]:
    """What was measured, by contender, or why it is missing; `cache` bytes are not to help.

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
        with contender.during(), warnings.catch_warnings():
            if len(times[contender]) < UNTIMED:
                warnings.simplefilter("ignore")  # of what is compiled and allocated, the host is late
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


def reaches_goal(row: Mapping[str, Any]) -> bool | None:
    """Whether a row's rates reach the goal in both directions; None where there is none for so small an activation."""
    if "missing" in row or math.prod(row["shape"]) * DTYPES[row["dtype"]].itemsize <= LARGE_BYTES:
        return None
    return bool(min(row[direction]["share"] for direction in ("forward", "backward")) >= GOAL)


def verdict(rows: Sequence[Mapping[str, Any]], contender: str = "ours") -> str:
    """How many of a contender's layers reach the goal, in a sentence."""
    reached = [goal for row in rows if row["contender"] == contender and (goal := reaches_goal(row)) is not None]
    large = f"above {LARGE_BYTES / 1e6:.0f} MB"
    if not reached:
        return f"No activation {large} was measured, for which the goal of {GOAL:.0%} of a copy is."
    return f"{contender}: {sum(reached)} of {len(reached)} layers {large} reach the goal of {GOAL:.0%} of a copy."


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
