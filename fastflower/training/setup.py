"""From a configuration to the objects that train and evaluate work with."""

from __future__ import annotations

from dataclasses import replace

import torch

from fastflower.config import Config, TrainConfig
from fastflower.data.batches import TrainingBatches, open_batches
from fastflower.data.dataset import Dataset, summary, with_folders
from fastflower.data.view import Normalization
from fastflower.errors import UserError
from fastflower.models import find_network
from fastflower.models.layers import uses_kernels
from fastflower.runtime.device import choose_precision
from fastflower.runtime.distributed import Ranks
from fastflower.runtime.entries import Checkpoint
from fastflower.runtime.progress import Display
from fastflower.training.largest_batch import with_batch_size
from fastflower.training.loss import Criterion, power_weights
from fastflower.training.network import build_network
from fastflower.training.pretrained import load_pretrained, open_pretrained
from fastflower.training.provenance import provenance_of
from fastflower.training.recipe import SMALLEST_BATCH, batch_size
from fastflower.training.state import Setup, State, new_state

FEW_STEPS = 5  # in an epoch, where a smaller batch would make more


def prepare(
    config: Config, device: torch.device, ranks: Ranks, display: Display, resumed: Checkpoint | None = None
) -> tuple[Setup, State]:
    """Index the data, measure it where needed, build the network: all that a run needs before its first step.

    Args:
        config: the settings.
        device: where the network runs.
        ranks: the processes.
        display: where progress is shown.
        resumed: the checkpoint that will be restored, which makes pretrained weights needless; its normalization stays.

    Raises:
        UserError: bad data, settings that do not fit it or this machine, or pretrained weights that cannot be had.
    """
    config = replace(config, data=with_folders(config.data, ranks, display))
    with ranks.main_first():
        pretrained = None if resumed else open_pretrained(config.model, display.say)
    inherited = pretrained.normalization if pretrained else None
    if resumed:
        inherited = Normalization.of(resumed["normalization"])
    precision = choose_precision(config.amp, config.amp_dtype, device)
    if precision.note:
        display.say(precision.note)
    config = with_batch_size(config, device, precision, ranks, display)
    size, seed = config.train.pictures, config.seed
    batches = open_batches(
        config.data,
        device,
        ranks,
        display,
        batch_size=size,
        seed=seed,
        inherited=inherited,
        keyed=resumed["train_records"].get("keyed", False) if resumed else None,
    )
    require_two_values(config, batches.train)
    if batches.train.global_batch < size:
        display.say(
            f"The training split is smaller than a batch of {size}: a batch is {batches.train.global_batch} pictures."
        )
    classes = len(batches.dataset.classes)
    network = build_network(config.model, classes, seed=config.seed, device=device, ranks=ranks)
    if pretrained:
        load_pretrained(network, pretrained)
        display.say(f"Starting from {pretrained.source}, with a new last layer.")
    state = new_state(network, config, device, precision)
    setup = Setup(
        config=config,
        device=device,
        precision=precision,
        ranks=ranks,
        criterion=_build_criterion(config.train, batches.dataset, device),
        train=batches.train,
        val=batches.val,
        provenance=provenance_of(batches.dataset, batches.normalization, ranks, display, keyed=batches.train.keyed),
    )
    _introduce(setup, network, batches.dataset, display)
    return setup, state


def require_two_values(config: Config, train: TrainingBatches) -> None:
    """Raise UserError where BatchNorm would see, at the end of the network, a single value of a channel."""
    pieces, processes = config.train.accumulate, train.loader.loading.ranks.world_size
    smallest = max(1, train.loader.batch // pieces) * (processes if config.model.sync_norm else 1)
    model = find_network(config.model.name)
    if smallest > 1 or config.data.crop > model.stride or not model.batch_norm:
        return
    short = train.global_batch < config.train.pictures
    causes = {
        f"a training split of {len(train.loader.records)}": short,
        f"train.batch_size {config.train.batch_size}": not short,
        f"{processes} processes": processes > 1,
        f"train.accumulate {pieces}": pieces > 1,
    }
    mends = {
        "lower train.accumulate": min(pieces, train.loader.batch) > 1,
        "start fewer processes": processes > 1,
        "raise train.batch_size": not short,
        f"raise data.crop above {model.stride}": True,
    }
    cause = ", ".join(text for text, holds in causes.items() if holds)
    mend = " or ".join(text for text, holds in mends.items() if holds)
    raise UserError(
        f"{cause}: the network would see one picture at a time, of which its last BatchNorm has a single value at "
        f"data.crop {config.data.crop}; {mend}."
    )


def _build_criterion(train: TrainConfig, dataset: Dataset, device: torch.device) -> Criterion:
    named = {"none": 0.0, "balanced": 1.0}
    power = named[train.class_weights] if isinstance(train.class_weights, str) else train.class_weights
    if not power:
        return Criterion(train.label_smoothing)
    weights = power_weights(dataset.train.labels, len(dataset.classes), power)
    return Criterion(train.label_smoothing, weights.to(device))


def _introduce(setup: Setup, network: torch.nn.Module, dataset: Dataset, display: Display) -> None:
    config = setup.config
    for sentence in summary(dataset, config.data):
        display.say(sentence)
    compiled = ", compiled" if setup.compiles else ""
    where = "by" if setup.device.type == "cuda" else "in plain torch instead of"
    kernels = f", norm {where} our Triton kernels" if uses_kernels(network) else ""
    processes = f", {setup.ranks.world_size} processes" if setup.ranks.world_size > 1 else ""
    display.say(
        f"{config.model.name}, {len(dataset.classes)} classes, {setup.precision} on {setup.device}"
        f"{compiled}{kernels}{processes}"
    )
    steps, batch = setup.train.steps, setup.train.global_batch
    few = ""
    if steps < FEW_STEPS and batch > SMALLEST_BATCH * setup.ranks.world_size:
        few = (
            ", which are few: each epoch moves the weights little, and BatchNorm's running statistics follow late; "
            f"lower train.batch_size (--train.batch_size {batch_size(len(dataset.train), setup.ranks.world_size)})"
        )
    display.say(f"{steps} {'step' if steps == 1 else 'steps'} an epoch, of {batch} pictures each{few}.")
    if config.train.ema:
        display.say("The moving average of the weights validates and decides what is best.")
