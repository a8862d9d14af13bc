"""What a GPU sends to the others in a training step, counted from the network's parameters and statistics.

    python bench/traffic.py
    python bench/traffic.py --models resnet34 resnet101 --gpus 2 16

In float32, by ring algorithms: of n GPUs each sends 2 (n - 1) / n of what all add up, n - 1 times what each gives to
all, and once what one gives to all. Nothing is run, so that any machine gives the same; what is counted is what two
processes exchange (tests/bench/test_traffic.py).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where `bench` lies

import torch
from rich.console import Console
from torch import nn

from bench.harness.common import start
from fastflower.errors import UserError
from fastflower.models import NETWORKS, create_model

CLASSES = 104  # as many as the Kaggle flowers have
FLOAT = 4  # bytes


@dataclass(frozen=True)
class Traffic:
    """Bytes that each process gives."""

    gradients: int  # added up in each step
    buffers: int  # BatchNorm's statistics, which the main process gives to all, before validation
    moments: int  # of model.sync_norm in each forward pass, which each gives to all
    sums: int  # of model.sync_norm in each backward pass, added up
    messages: int  # of `moments` in a forward pass, and as many of `sums` in a backward pass

    def gradients_sent(self, n: int) -> float:
        """What a GPU of `n` sends of them in a step, bytes."""
        return 2 * (n - 1) / n * self.gradients

    def statistics_sent(self, n: int) -> float:
        """What a GPU of `n` sends in a step with model.sync_norm beside its gradients, bytes."""
        return (n - 1) * self.moments + 2 * (n - 1) / n * self.sums


def traffic(network: nn.Module) -> Traffic:
    """Of a network whose BatchNorm, if it has any, is by our kernels where it is of all processes' pictures."""
    norms = {name: module for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)}
    channels = {name: module.num_features for name, module in norms.items()}
    # a downsample's norm goes with its block's last one, and has the sum of the gradient in common with it
    common = [count for name, count in channels.items() if ".downsample." in name]
    return Traffic(
        gradients=FLOAT * sum(parameter.numel() for parameter in network.parameters()),
        buffers=sum(buffer.nbytes for buffer in network.buffers()),
        moments=FLOAT * 3 * sum(channels.values()),
        sums=FLOAT * (2 * sum(channels.values()) - sum(common)),
        messages=len(channels) - len(common),
    )


@dataclass(frozen=True)
class Command:
    """Settings of the table."""

    models: tuple[str, ...] = ("resnet18", "resnet50")
    """Networks, of 104 classes."""
    gpus: tuple[int, ...] = (8, 64, 512)
    """How many exchange."""


def table(models: Sequence[str], gpus: Sequence[int]) -> str:
    """Markdown, in 10^6 bytes."""
    counts = {name: _counted(name) for name in models}
    lines = [
        f"| MB that each GPU sends | {' | '.join(counts)} |",
        f"|---|{'---|' * len(counts)}",
    ]
    for n in gpus:
        sent = " | ".join(f"{count.gradients_sent(n) / 1e6:.1f}" for count in counts.values())
        lines.append(f"| a step, {n} GPUs: gradients | {sent} |")
    for n in gpus:
        sent = " | ".join(f"{count.statistics_sent(n) / 1e6:.2f}" for count in counts.values())
        lines.append(f"| with `--model.sync-norm`, {n} GPUs: also | {sent} |")
    sent = " | ".join(f"{count.buffers / 1e6:.2f}" for count in counts.values())
    lines.append(f"| a validation, and no step: BatchNorm's statistics | {sent} |")
    return "\n".join(lines)


def _counted(name: str) -> Traffic:
    if name not in NETWORKS:
        raise UserError(f"there is no network {name}: give some of {', '.join(NETWORKS)}.")
    with torch.device("meta"):
        return traffic(create_model(name, CLASSES))


def run(command: Command, console: Console) -> int:
    """Print the table; the exit code. Raises UserError for unsuitable settings."""
    for n in command.gpus:
        if n < 1:
            raise UserError(f"--gpus {n}: give at least 1.")
    console.print(table(command.models, command.gpus), soft_wrap=True, markup=False)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit code, 2 for a user's mistake."""
    return start(Command, run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
