"""The largest batch that fits a GPU's memory, found by trying."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch

from fastflower.config import Config
from fastflower.data.dataset import open_dataset
from fastflower.data.loader import Batch
from fastflower.errors import UserError
from fastflower.runtime.device import Precision
from fastflower.runtime.distributed import Ranks
from fastflower.runtime.progress import Display
from fastflower.runtime.signals import Signals
from fastflower.training.loss import Criterion
from fastflower.training.network import build_network
from fastflower.training.provenance import Provenance
from fastflower.training.state import Setup, new_state
from fastflower.training.step import evaluate_in, training_step

AUTO_SHARE = 0.8  # of a GPU's memory, for auto: the rest is for pictures on their way and for what the driver takes
STEPS = 2  # of each size: in the first one the optimizer takes its memory, in the second one both are there
LEAST_STEPS = 10  # in an epoch: a larger batch would hardly train


def with_batch_size(
    config: Config, device: torch.device, precision: Precision, ranks: Ranks, display: Display
) -> Config:
    """The settings with a number for train.batch_size: where they ask for it, the largest that fits every rank's GPU.

    Real training steps on noise are tried, of a network that is not compiled and takes more memory than one that is;
    each size is the one before doubled, or half as much again. LEAST_STEPS remain in an epoch.

    Args:
        config: the settings, with folders (`with_folders`).
        device: where the network runs.
        precision: of the steps.
        ranks: the processes, each of which tries its share on its own GPU.
        display: where it is said.

    Raises:
        UserError: there is no GPU, not even the smallest batch fits, or data.cache takes memory that is not known yet.
    """
    asked, pieces = config.train.batch_size, config.train.accumulate
    if isinstance(asked, int):
        return config
    if device.type != "cuda":
        raise UserError(
            f"train.batch_size {asked} tries how much fits a GPU's memory, and this runs on the CPU, where too much is "
            "only noticed when the system ends the process: give a number, such as 64."
        )
    if config.data.cache in ("gpu", "auto"):
        raise UserError(
            f"train.batch_size {asked} and data.cache {config.data.cache} would each take the GPU's memory for itself: "
            "give a number, or data.cache ram or off."
        )
    with ranks.main_first():
        dataset = open_dataset(config.data, config.seed, display.follow("read pictures"))
    most = max(len(dataset.train) // ranks.world_size // LEAST_STEPS, pieces)
    share = AUTO_SHARE if asked == "auto" else asked
    sizes = list(itertools.takewhile(lambda size: size <= most, _sizes(pieces)))
    torch.cuda.set_per_process_memory_fraction(share, device)
    try:
        own = largest(sizes, lambda size: _fits(config, device, precision, size, len(dataset.classes)))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    found = -ranks.max(-own)
    if not found:
        raise UserError(
            f"train.batch_size {asked}: not even {pieces * ranks.world_size} pictures fit {share:.0%} of the memory of "
            f"{torch.cuda.get_device_name(device)}; take a smaller model.name or data.crop."
        )
    limit = f"{share:.0%} of the memory allows" if found < sizes[-1] else f"leaves {LEAST_STEPS} steps an epoch"
    display.say(f"train.batch_size {asked} → {found * ranks.world_size}: the largest of those tried that {limit}.")
    return replace(config, train=replace(config.train, batch_size=found * ranks.world_size))


def largest(sizes: list[int], fits: Callable[[int], bool]) -> int:
    """The last of the ascending sizes before the first one that does not fit; 0 if there is none."""
    return max(itertools.takewhile(fits, sizes), default=0)


def _sizes(unit: int) -> Iterator[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, ... times the unit, up to a million."""
    yield unit
    for exponent in range(1, 21):
        yield unit * 2**exponent
        yield unit * 3 * 2 ** (exponent - 1)


def _fits(config: Config, device: torch.device, precision: Precision, size: int, classes: int) -> bool:
    """Whether training steps and a validation with `size` pictures of this rank find room."""
    try:
        _try_steps(config, device, precision, size, classes)
    except torch.OutOfMemoryError:
        return False
    finally:
        gc.collect()  # what the failed step's frames held
        torch.cuda.empty_cache()
    return True


def _try_steps(config: Config, device: torch.device, precision: Precision, size: int, classes: int) -> None:
    train = replace(config.train, compile=False, batch_size=size)
    config, alone = replace(config, train=train), Ranks()
    network = build_network(config.model, classes, seed=config.seed, device=device, ranks=alone)
    state = new_state(network, config, device, precision)
    weights = torch.ones(classes, device=device) if train.class_weights == "balanced" else None
    setup = Setup(
        config=config,
        device=device,
        precision=precision,
        ranks=alone,
        criterion=Criterion(train.label_smoothing, weights),
        train=cast(Any, SimpleNamespace(global_batch=size)),
        val=None,
        provenance=cast(Provenance, SimpleNamespace(classes=[""] * classes)),
    )
    for _ in range(STEPS):
        training_step(setup, state, network, _noise(config, device, size))
    evaluate_in(setup, state.validated, [_noise(config, device, size)], Signals())
    torch.cuda.synchronize(device)


def _noise(config: Config, device: torch.device, size: int) -> Batch:
    """A batch as the loader makes them, in float32, of which none takes more."""
    side = config.data.crop
    images = torch.randn(size, 3, side, side, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    return Batch(images, torch.zeros(size, dtype=torch.int64, device=device), np.arange(size))
