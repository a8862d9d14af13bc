"""Stages of whole training steps on synthetic pictures: images a second beside torchvision's, and CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from bench.contenders.networks import CLASSES, Work, one_pass, torchvisions
from bench.gpu.results import KERNELS, TORCHS, TRAINING
from bench.gpu.roofline import least_seconds, work_of_step
from bench.gpu.task import FailedError, Outcome, Task
from bench.harness.compute import copy_gb_per_s, matmul_flops_per_s
from bench.harness.missing import MissingError
from bench.harness.timing import Contender, Make, measure
from fastflower.models import Norm, create_model
from fastflower.runtime.device import Precision
from fastflower.runtime.distributed import Ranks
from fastflower.training.optimizer import with_momentum

Makers = dict[str, tuple[dict[str, Any], Make]]  # by what is measured: what its rows say more, and how it is made

AUTOTUNE = "max-autotune-no-cudagraphs"
GRAPHS = "reduce-overhead"
RESERVE_S = 10  # to time what was compiled
DEEPER = 2.7  # how much longer resnet50 compiles than resnet18, by their layers


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    batch: int
    steps: int = 10
    warmup: int = 3
    repeats: int = 3


def plan_of(task: Task, batch: int) -> Plan:
    """The measurement of a stage."""
    return Plan(2, steps=2, warmup=1, repeats=1) if task.tiny else Plan(batch)


def work_on(task: Task) -> Work:
    """Training steps in bf16 on pictures of 224 pixels, by SGD with momentum as `fastflower train` has it."""

    def sgd(network: nn.Module) -> torch.optim.Optimizer:
        return with_momentum(
            torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, fused=True)
        )

    size, dtype = (32, None) if task.tiny else (224, torch.bfloat16)
    return Work(size, task.device, Precision(dtype), sgd)


def network(name: str, norm: Norm) -> nn.Module:
    """Ours."""
    return create_model(name, CLASSES, norm=norm)


class Turns:
    """Compiles one contender after another as long as there is time for it, and says whose turn it is."""

    def __init__(self, task: Task) -> None:
        self.task, self.longest_s, self.name, self.began_left = task, 0.0, "", task.left_s

    def told(self, name: str, timed: int) -> None:
        """For `measure`."""
        self.longest_s = max(self.longest_s, self.began_left - self.task.left_s)
        self.name, self.began_left = name, self.task.left_s
        self.task.say(f"{name} ({timed} turns timed)")

    def in_time(self, make: Make) -> Make:
        """The same; MissingError where less time is left than the longest turn has taken."""

        def build(batch: int) -> Contender:
            if self.task.left_s < self.longest_s + RESERVE_S:
                raise MissingError("no time was left to compile it")
            return make(batch)

        return build


def step(task: Task, build: Callable[[], nn.Module], *, ours: bool, mode: str = "default") -> Make:
    """A training step, compiled where this is no trial."""
    role = "ours" if ours else "peer"
    work = work_on(task)
    return lambda batch: one_pass(work, role, build, "step", not task.tiny, batch, mode)  # type: ignore[arg-type]


def images_per_s(task: Task, name: str, makers: Makers, batch: int, turns: Turns) -> list[dict[str, Any]]:
    """Rows of training steps of one network, in turns, with what they are shares of; `makers` have more to say."""
    work, plan = work_on(task), plan_of(task, batch)
    dtype = work.precision.dtype or torch.float32
    ceiling, copy = matmul_flops_per_s(dtype, task.device), copy_gb_per_s(task.device)
    timed = {label: turns.in_time(make) for label, (_, make) in makers.items()}
    rows = []
    for row in measure(timed, plan, task.device, Ranks(), ceiling, turns.told):
        told = {"kind": TRAINING, "network": name, "size": work.size, "dtype": str(work.precision)}
        if "missing" not in row:
            layers = work_of_step(name, row["batch"], work.size, dtype, CLASSES)
            least_ms = 1000 * least_seconds(layers, ceiling, 1e9 * copy)
            told |= {"copy_gb_per_s": copy, "roofline_ms": least_ms, "roofline": least_ms / row["ms_per_step"]}
        rows.append(task.row(**told, **makers[row["name"]][0], **row))
    return rows


def throughput(task: Task, name: str) -> Outcome:
    """Our network by torch's operators and by the kernels, and torchvision's, all compiled."""
    makers: Makers = {
        "fastflower": ({"norm": TORCHS}, step(task, partial(network, name, TORCHS), ours=True)),
        "fastflower, kernels": ({"norm": KERNELS}, step(task, partial(network, name, KERNELS), ours=True)),
        "torchvision": ({"norm": None}, step(task, partial(torchvisions, name), ours=False)),
    }
    return outcome(images_per_s(task, name, makers, 256, Turns(task)), name)


resnet18 = partial(throughput, name="resnet18")
resnet34 = partial(throughput, name="resnet34")
resnet50 = partial(throughput, name="resnet50")


def autotuned(task: Task) -> Outcome:
    """Torchvision's by the compiler's longest search, beside ours: the best of it counts."""

    def makers(name: str) -> Makers:
        longest = {"norm": None, "mode": AUTOTUNE}
        peer = step(task, partial(torchvisions, name), ours=False, mode=AUTOTUNE)
        ours = partial(network, name, TORCHS)
        return {
            "fastflower": ({"norm": TORCHS}, step(task, ours, ours=True)),
            f"torchvision, {AUTOTUNE}": (longest, peer),
            f"fastflower, {AUTOTUNE}": (longest, step(task, ours, ours=True, mode=AUTOTUNE)),
        }

    return outcome(on_two_networks(task, makers, 256), "torchvision and ours, autotuned")


def graphs(task: Task) -> Outcome:
    """CUDA graphs on batches of 32, which launches bound."""

    def makers(name: str) -> Makers:
        ours = partial(network, name, TORCHS)
        return {
            mode: ({"norm": None, "mode": mode}, step(task, ours, ours=True, mode=mode)) for mode in ("default", GRAPHS)
        }

    rows = on_two_networks(task, makers, 32)
    require_steady(rows)
    return outcome(rows, "batch 32")


def on_two_networks(task: Task, makers: Callable[[str], Makers], batch: int) -> list[dict[str, Any]]:
    """Rows of `images_per_s` of resnet18 and of resnet50, which is compiled where its time is left."""
    rows, turns = list[dict[str, Any]](), Turns(task)
    for name in ("resnet18", "resnet50")[: 1 if task.tiny else 2]:
        rows += images_per_s(task, name, makers(name), batch, turns)
        turns.longest_s *= DEEPER
    return rows


def require_steady(rows: list[dict[str, Any]]) -> None:
    """FailedError where something was compiled or recorded again while the clock ran: each step would pay for it."""
    counts = ("compiled_anew", "graphs_recorded_anew")
    again = [f"{row['network']}, {row['name']}: {key} {row[key]}" for row in rows for key in counts if row.get(key)]
    if again:
        raise FailedError(f"the steps are not all alike: {'; '.join(again)}")


def outcome(rows: list[dict[str, Any]], what: str) -> Outcome:
    """The figures of rows; MissingError where none was measured."""
    measured = [row for row in rows if "missing" not in row]
    if not measured:
        raise MissingError("; ".join(f"{row['name']}: {row['missing']}" for row in rows))
    names = len({row["network"] for row in rows}) > 1
    parts = [
        f"{row['network'] + ', ' if names else ''}{row['name']} {row['images_per_s']:.0f} images/s "
        f"({row['mfu']:.0%} of products, {row['roofline']:.0%} of the roofline)"
        for row in measured
    ]
    parts += [f"{row['network']}, {row['name']}: {row['missing']}" for row in rows if "missing" in row]
    one = measured[0]
    quote = (
        f"training steps, {what}, {one['size']} pixels, batch {one['batch']}, {one['dtype']}, compiled: "
        f"{'; '.join(parts)}."
    )
    return Outcome("; ".join(parts), (quote,))
