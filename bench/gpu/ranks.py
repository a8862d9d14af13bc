"""A stage of two processes, one on each of two GPUs: they must learn the same, and how much the exchange costs.

torchrun --nproc_per_node 2 -m bench.gpu.ranks cuda
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from bench.contenders.networks import CLASSES
from bench.gpu.networks import plan_of
from bench.gpu.steps import Recipe, pictures, prepare, small_network
from bench.gpu.task import FailedError, Outcome, Task
from bench.harness.missing import MissingError
from bench.harness.timing import Contender, measure
from fastflower.files import to_json
from fastflower.kernels.batch_norm import bn_relu
from fastflower.models import create_model
from fastflower.runtime.distributed import Ranks, processes
from fastflower.training.step import training_network, training_step

RANKS = 2


def two(task: Task) -> Outcome:
    """Start the processes and judge what they found."""
    if not task.tiny and torch.cuda.device_count() < RANKS:
        raise MissingError(f"needs {RANKS} GPUs, and there is {torch.cuda.device_count()}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)]
    result = subprocess.run([*command, "-m", "bench.gpu.ranks", task.kind], capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    if result.returncode or not found:
        said = [line for line in result.stderr.splitlines() if "Error" in line] or ["no reason was given"]
        raise FailedError(f"the processes ended with code {result.returncode}: {said[0].strip()}")
    row = task.row(**found[-1])
    if not row["same_weights"]:
        raise FailedError("after some steps the processes have different weights")
    if not row["sync_error"] < 1e-4:
        raise FailedError(f"statistics over both are off by {row['sync_error']:.1e}, relatively")
    together, alone = row["together_ms"], row["alone_ms"]
    figure = f"a step takes {together:.1f} ms in two processes and {alone:.1f} ms alone, batch {row['batch']} each"
    return Outcome(f"same weights; {figure}", (f"{row['network']}, not compiled: {figure}.",))


def main(kind: str) -> None:
    """One of the processes; the first prints what they found."""
    task: Any = Task(kind, rows=None, deadline=float("inf"))  # type: ignore[arg-type]
    from fastflower.runtime.launcher import local_rank

    device = torch.device(kind, local_rank()) if kind == "cuda" else torch.device("cpu")
    with processes(device) as ranks:
        found = {
            "same_weights": same_weights(device, ranks),
            "sync_error": sync_error(device, ranks),
            **costs(task, device, ranks),
        }
        if ranks.is_main:
            print(to_json(found), flush=True)


def same_weights(device: torch.device, ranks: Ranks) -> bool:
    """Whether all have the same weights after a few steps, each on pictures of its own, on the kernels."""
    setup, state = prepare(small_network("triton"), Recipe(), None, 8 * ranks.world_size, device, ranks)
    network, batch = training_network(setup, state), pictures(8, device)
    batch.images += ranks.rank
    for _ in range(5):
        training_step(setup, state, network, batch)
    sums = ranks.gather([float(parameter.double().abs().sum()) for parameter in state.network.parameters()])
    return all(one == sums[0] for one in sums)


def sync_error(device: torch.device, ranks: Ranks) -> float:
    """Relative error of a BatchNorm over the pictures of all, beside one process on all of them; the largest."""
    torch.manual_seed(0)
    whole = torch.randn(4 * ranks.world_size, 64, 14, 14).mul_(
        torch.arange(1, 1 + 4 * ranks.world_size).view(-1, 1, 1, 1)
    )
    norm = nn.BatchNorm2d(64).to(device)
    x = whole.to(device).contiguous(memory_format=torch.channels_last)
    mine = x.chunk(ranks.world_size)[ranks.rank].contiguous(memory_format=torch.channels_last)
    wanted = torch.relu(nn.functional.batch_norm(x.double(), None, None, training=True, eps=norm.eps))
    output = bn_relu(mine, norm, sync=True)
    assert isinstance(output, torch.Tensor)
    share = wanted.chunk(ranks.world_size)[ranks.rank]
    return max(ranks.gather(float((output.double() - share).norm() / share.norm())))


def costs(task: Task, device: torch.device, ranks: Ranks) -> dict[str, Any]:
    """Milliseconds of a step together and alone."""
    name, batch, side = ("resnet18", 4, 32) if task.tiny else ("resnet50", 64, 224)
    dtype = None if task.tiny else torch.bfloat16

    def steps(these: Ranks, batch: int) -> Contender:
        setup, state = prepare(create_model(name, CLASSES), Recipe(), dtype, batch * these.world_size, device, these)
        network, held = training_network(setup, state), pictures(batch, device, side)

        def start(steps: int) -> Iterator[torch.Tensor]:
            for _ in range(steps):
                training_step(setup, state, network, held)
                yield held.images

        return Contender(start)

    makers = {"together": partial(steps, ranks), "alone": partial(steps, Ranks())}
    rows = measure(makers, plan_of(task, batch), device, ranks, told=lambda name, timed: None)
    return {"network": name, "batch": rows[0]["batch"]} | {f"{row['name']}_ms": row["ms_per_step"] for row in rows}


if __name__ == "__main__":
    main(sys.argv[1])
