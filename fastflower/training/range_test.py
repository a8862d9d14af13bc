"""The learning-rate range test: at which rates a network learns, and from which on it does not."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

from rich.console import Console

from fastflower.config import Config, resolve
from fastflower.data.loader import Batch
from fastflower.layers import Layers
from fastflower.runtime.device import choose_device
from fastflower.runtime.distributed import processes
from fastflower.runtime.launcher import local_rank
from fastflower.runtime.progress import Display
from fastflower.runtime.repeatable import repeatable
from fastflower.runtime.signals import Signals
from fastflower.training.fit import settings_of
from fastflower.training.lr_range import EXPLODED, LEAST_STEPS, Range, RangeTest
from fastflower.training.metrics import TrainingSums
from fastflower.training.optimizer import LR_SCALE
from fastflower.training.setup import prepare
from fastflower.training.state import Setup, State
from fastflower.training.step import training_network, training_step


def range_test(layers: Layers, rates: Range, console: Console) -> RangeTest:
    """Train a new network for some steps, each at a higher rate than the one before (Smith 2017); nothing is kept.

    Network, batches, precision and steps are those of training, with all layers learning.

    Raises:
        UserError: see `fastflower.training.fit.settings_of` and `fastflower.training.setup.prepare`; or a record is
            bad.
        Stopped: a signal came.
    """
    config = resolve(layers.typed())
    device = choose_device(config.device, local_rank())
    with (
        processes(device) as ranks,
        repeatable(config.train.deterministic, device),
        Display(console, shown=ranks.is_main) as display,
        Signals() as signals,
    ):
        config = settings_of(layers, device, ranks, console)
        train = replace(config.train, freeze_epochs=0, ema=0.0, lr=rates.low, head_lr=_head_lr(config, rates.low))
        config = replace(config, train=replace(train, schedule="plateau"))  # which sets no rates within an epoch
        setup, state = prepare(config, device, ranks, display)
        return climb(setup, state, rates, signals, display)


def climb(setup: Setup, state: State, rates: Range, signals: Signals, display: Display) -> RangeTest:
    """The test itself; see `range_test`. All ranks find the same."""
    network = training_network(setup, state)
    lrs: list[float] = []
    losses: list[float] = []
    display.task("range test", rates.steps)
    batches = itertools.islice(_batches(setup, state), rates.steps)
    for step, batch in enumerate(display.counted(setup.ranks.lockstep(batches, signals))):
        for group in state.optimizer.param_groups:
            group["lr"] = rates.rate(step) * group[LR_SCALE]
        state.sums = TrainingSums(setup.device)
        training_step(setup, state, network, batch)
        loss, _ = state.sums.means(setup.ranks)
        if not math.isfinite(loss):
            return RangeTest(lrs, losses, exploded=True)
        lrs.append(rates.rate(step))
        losses.append(loss)
        smoothed = RangeTest(lrs, losses).smoothed
        if step >= LEAST_STEPS and smoothed[-1] > EXPLODED * min(smoothed):
            return RangeTest(lrs, losses, exploded=True)
    return RangeTest(lrs, losses)


def _batches(setup: Setup, state: State) -> Iterator[Batch]:
    """Those of one epoch after another, as training has them."""
    for epoch in itertools.count():
        state.epoch, state.position = epoch, 0
        with contextlib.closing(setup.train.epoch(epoch)) as batches:
            yield from batches


def _head_lr(config: Config, lr: float) -> float | None:
    """The last layer's rate, as many times that of the others as it is in training."""
    train = config.train
    return train.head_lr and lr * train.head_lr / train.peak_lr
