"""One training step, an evaluation in between, and the network as both call it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import torch
from torch.nn.parallel import DistributedDataParallel

from fastflower.runtime.signals import Signals
from fastflower.training.loss import mix
from fastflower.training.metrics import Evaluation
from fastflower.training.optimizer import clear_gradients, freeze
from fastflower.training.validate import evaluate

if TYPE_CHECKING:
    from fastflower.data.loader import Batch
    from fastflower.training.state import Setup, State


def training_network(setup: Setup, state: State) -> torch.nn.Module:
    """The network as training steps call it: behind DDP where there are ranks, compiled where asked for.

    It is for the epoch in progress: the backbone is frozen in the first `freeze_epochs`. DDP goes inside torch.compile,
    which then splits the graph so that gradients travel while others are computed.
    """
    freeze(state.network, frozen=is_frozen(setup, state))
    network = state.network
    if setup.ranks.world_size > 1:
        device_ids = [setup.device.index] if setup.device.type == "cuda" else None
        network = DistributedDataParallel(network, device_ids=device_ids, gradient_as_bucket_view=True)
        # While BatchNorm trains nothing reads its running statistics, and while it is frozen they stay as they are. The
        # main rank's count, at validation and in checkpoints: it has them, and each validation sends them to all.
        network.broadcast_buffers = False  # set here, so that its first buffers are still those of the main rank
    return compiled(setup, network)


def compiled(setup: Setup, network: torch.nn.Module) -> torch.nn.Module:
    """The network behind torch.compile, where asked for.

    It is called with one shape: training drops the short batch and validation fills it up.
    """
    if not setup.compiles:
        return network
    return cast(torch.nn.Module, torch.compile(network, mode=setup.config.train.compile_mode, dynamic=False))


def is_frozen(setup: Setup, state: State) -> bool:
    """Whether only the head learns in the epoch in progress."""
    return state.epoch < setup.config.train.freeze_epochs


def training_step(setup: Setup, state: State, network: torch.nn.Module, batch: Batch) -> None:
    """Forward and backward pass of a batch, in pieces of equal size (to one picture) where asked for, and the
    optimizer's step.

    Nothing here waits for the device.
    """
    train = setup.config.train
    images, targets = mix(
        batch.images, batch.labels, train, seed=setup.config.seed, epoch=state.epoch, position=state.position
    )
    parts = min(train.accumulate, len(images))  # a rank's share may be smaller
    pieces = list(zip(images.tensor_split(parts), targets.split(parts), strict=True))
    clear_gradients(state.optimizer, in_place=parts > 1 and setup.in_cuda_graphs)
    for number, (piece, wanted) in enumerate(pieces, start=1):
        # gradients travel between ranks with the last piece
        waits = setup.ranks.world_size > 1 and number < len(pieces)
        with cast(DistributedDataParallel, network).no_sync() if waits else contextlib.nullcontext():
            with setup.precision.autocast(setup.device):
                logits = network(piece if setup.precision.dtype else piece.float())
            loss = setup.criterion(logits.float(), wanted)
            share = len(piece) / len(images)
            state.scaler.scale(loss if share == 1 else loss * share).backward()
        state.sums.add(loss.detach(), logits.detach(), wanted.labels, state.step, state.schedule.lr)
    if train.clip_grad:
        state.scaler.unscale_(state.optimizer)
        torch.nn.utils.clip_grad_norm_(state.network.parameters(), train.clip_grad)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.step += 1
    state.position += setup.train.global_batch
    if state.ema:
        state.ema.update(state.step)


def evaluate_in(setup: Setup, network: torch.nn.Module, batches: Iterable[Batch], signals: Signals) -> Evaluation:
    """The figures of `network` on batches of the validation split; see `fastflower.training.validate.evaluate`."""
    return evaluate(
        network,
        batches,
        classes=len(setup.provenance.classes),
        device=setup.device,
        precision=setup.precision,
        ranks=setup.ranks,
        signals=signals,
        pad_to=setup.val.loader.batch if setup.val and setup.compiles else None,
    )
