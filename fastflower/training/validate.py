"""A network's outputs on a split, and metrics of them: every record counts once, whatever ranks and batch size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from fastflower.runtime.device import Precision
from fastflower.runtime.distributed import Ranks
from fastflower.runtime.signals import Signals
from fastflower.training.metrics import Evaluation, EvaluationSums

if TYPE_CHECKING:
    from fastflower.data.loader import Batch


@torch.no_grad()
def evaluate(
    network: torch.nn.Module,
    batches: Iterable[Batch],
    *,
    classes: int,
    device: torch.device,
    precision: Precision,
    ranks: Ranks,
    signals: Signals,
    pad_to: int | None = None,
) -> Evaluation:
    """Loss, top-1, top-5 and macro F1 of `network` over this rank's batches and those of the others.

    Args:
        network: gives logits [N, classes] for images [N, 3, S, S].
        batches: this rank's.
        classes: how many there are.
        device: where the network and the batches are.
        precision: of the forward pass.
        ranks: over which the metrics are taken.
        signals: asked before each batch.
        pad_to: a short batch is filled up to this many pictures, whose outputs are cut off again: a compiled network
            then sees one shape and compiles once.

    Raises:
        Stopped: a rank got a signal.
        UserError: a record of some rank cannot be read or decoded.
    """
    network.eval()
    sums = EvaluationSums(classes, device)
    batches = ranks.lockstep(batches, signals)
    for batch, logits in outputs(network, batches, device=device, precision=precision, pad_to=pad_to):
        sums.add(logits, batch.labels)
    return sums.result(ranks)


def outputs(
    network: Callable[[torch.Tensor], torch.Tensor],
    batches: Iterable[Batch],
    *,
    device: torch.device,
    precision: Precision,
    pad_to: int | None = None,
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Each batch with what `network` says of it, [N, classes]; see `evaluate`."""
    for batch in batches:
        images, n = batch.images, len(batch.labels)
        if pad_to and n < pad_to:
            images = torch.nn.functional.pad(images, (0, 0, 0, 0, 0, 0, 0, pad_to - n))
            images = images.contiguous(memory_format=torch.channels_last)
        with precision.autocast(device):
            logits = network(images if precision.dtype else images.float())
        yield batch, logits[:n]
