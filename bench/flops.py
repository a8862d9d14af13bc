"""What the networks cost, beside torchvision's counted the same way and beside published figures.

    python bench/flops.py --out bench/results/flops.jsonl
    python bench/flops.py --models resnet50 resnet50-v1 --size 448

Parameters and multiply-adds (MACs; FLOPs are 2 x MACs) of one forward pass of one image, for 1000 classes, of
convolutions and matrix products alone: see fastflower.flops. Nothing is run, so that any machine gives the same.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where `bench` lies

import torch
from rich.console import Console
from rich.table import Table

from bench.harness.common import append, circumstances, start
from fastflower.errors import UserError
from fastflower.flops import NUM_CLASSES, count, title, variants

# 10^9 multiply-adds at 224 pixels: "Deep Residual Learning", table 1, figure 3 and section 4.1; and, of the variants
# that are not in it, what torchvision's documentation says of its weights.
PAPER, TORCHVISION = "ResNet paper", "torchvision"
PUBLISHED = {
    "plain18": (1.8, PAPER),
    "plain34": (3.6, PAPER),
    "resnet18": (1.8, PAPER),
    "resnet34": (3.6, PAPER),
    "resnet50": (4.09, TORCHVISION),
    "resnet50-v1": (3.8, PAPER),
    "resnet101": (7.80, TORCHVISION),
    "resnet101-v1": (7.6, PAPER),
    "resnet152": (11.51, TORCHVISION),
    "resnet152-v1": (11.3, PAPER),
    "vgg16": (15.3, PAPER),
    "vgg19": (19.6, PAPER),
    "alexnet": (0.714, TORCHVISION),
}


@dataclass(frozen=True)
class Command:
    """Settings of a run."""

    models: tuple[str, ...] = field(default_factory=variants)
    """Networks to count."""
    size: int = 224
    """Side of the image (pixels); published figures are of 224."""
    out: Path | None = None
    """File to append one JSON line a network to."""


def run(command: Command, console: Console) -> int:
    """Count and print, and write what --out asks for; the exit code. Raises UserError for unsuitable settings."""
    try:
        import torchvision
    except ImportError as error:
        raise UserError("torchvision, to compare with, is not installed: pip install torchvision.") from error
    rows = [compare(name, command.size, torchvision.models) for name in command.models]
    if command.out:
        around = circumstances(command, torch.device("cpu"), {"torchvision": torchvision.__version__})
        append(command.out, ({**row, **around} for row in rows))
    console.print(costs_table(rows))
    return 0


def compare(name: str, size: int, peers: Any) -> dict[str, Any]:
    """The cost of a network and of its namesake among `peers`, torchvision.models, and what is published."""
    cost = asdict(count(name, size))
    del cost["layers"]
    theirs = None
    if name in peers.list_models(peers):
        with torch.device("meta"):
            theirs = count(peers.get_model(name, num_classes=NUM_CLASSES), size)
    published, source = PUBLISHED.get(name, (None, None)) if size == 224 else (None, None)
    return {
        **cost,
        "torchvision_params": theirs and theirs.params,
        "torchvision_macs": theirs and theirs.macs,
        "published_gmacs": published,
        "published_by": source,
        "ratio": published and cost["macs"] / 1e9 / published,
    }


def costs_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A line for each network; the ratio is of our MACs to the published ones."""
    grid = Table(
        "model",
        caption="Parameters in millions, the rest in 10^9. torchvision: MACs of its network of that name, counted the "
        "same way. Published: MACs by the ResNet paper, * by torchvision's documentation.",
        show_edge=False,
    )
    for heading in ("params", "MACs", "FLOPs", "torchvision", "published", "ratio"):
        grid.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        theirs, published = row["torchvision_macs"], row["published_gmacs"]
        grid.add_row(
            title(row["model"]),
            f"{row['params'] / 1e6:.2f}",
            f"{row['macs'] / 1e9:.2f}",
            f"{row['flops'] / 1e9:.2f}",
            f"{theirs / 1e9:.2f}" if theirs else "",
            f"{published:.2f}{'*' if row['published_by'] == TORCHVISION else ' '}" if published else "",
            f"{row['ratio']:.3f}" if published else "",
        )
    return grid


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit code, 2 for a user's mistake."""
    return start(Command, run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
