"""From a configuration to the objects that train and evaluate work with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from fastflower.config import Config, ModelConfig, TrainConfig
from fastflower.data.batches import TrainingBatches, open_batches
from fastflower.data.dataset import Dataset, summary, with_folders
from fastflower.data.identity import identity, names_digest
from fastflower.data.view import Normalization
from fastflower.errors import UserError
from fastflower.models import CLASSICS, create_model
from fastflower.models.layers import choose_norm
from fastflower.runtime.device import choose_precision
from fastflower.runtime.distributed import Ranks
from fastflower.runtime.progress import Display
from fastflower.training.loss import Criterion, balanced_weights
from fastflower.training.pretrained import load_pretrained, open_pretrained
from fastflower.training.state import Setup, State, new_state

STRIDE = 32  # pixels of the image for one position of the residual and plain networks' last map


def prepare(
    config: Config, device: torch.device, ranks: Ranks, display: Display, resumed: Mapping[str, Any] | None = None
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
    size, seed = config.train.batch_size, config.seed
    batches = open_batches(config.data, device, ranks, display, batch_size=size, seed=seed, inherited=inherited)
    require_two_values(config, batches.train)
    precision = choose_precision(config.amp, config.amp_dtype, device)
    if precision.note:
        display.say(precision.note)
    if batches.train.global_batch < config.train.batch_size:
        display.say(
            f"The training split is smaller than a batch of {config.train.batch_size}: "
            f"a batch is {batches.train.global_batch} pictures."
        )
    network = build_network(config, len(batches.dataset.classes), device, ranks)
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
        saved_with={
            "classes": batches.dataset.classes,
            "normalization": {name: list(value) for name, value in asdict(batches.normalization).items()},
        }
        | _identities(batches.dataset, ranks, display),
    )
    _introduce(setup, batches.dataset, display)
    return setup, state


def require_two_values(config: Config, train: TrainingBatches) -> None:
    """Raise UserError where BatchNorm would see, at the end of the network, a single value of a channel."""
    pieces, processes = config.train.accumulate, train.loader.loading.ranks.world_size
    smallest = max(1, train.loader.batch // pieces) * (processes if config.model.sync_norm else 1)
    if smallest > 1 or config.data.crop > STRIDE or config.model.name in CLASSICS:
        return
    short = train.global_batch < config.train.batch_size
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
        f"raise data.crop above {STRIDE}": True,
    }
    cause = ", ".join(text for text, holds in causes.items() if holds)
    mend = " or ".join(text for text, holds in mends.items() if holds)
    raise UserError(
        f"{cause}: the network would see one picture at a time, of which its last BatchNorm has a single value at "
        f"data.crop {config.data.crop}; {mend}."
    )


def _build_criterion(train: TrainConfig, dataset: Dataset, device: torch.device) -> Criterion:
    weights = None
    if train.class_weights == "balanced":
        weights = balanced_weights(dataset.train.labels, len(dataset.classes)).to(device)
    return Criterion(train.label_smoothing, weights)


def _identities(dataset: Dataset, ranks: Ranks, display: Display) -> dict[str, Any]:
    """What a checkpoint says of the records: those that train, what of which was left out, and those that validate.

    Raises:
        UserError: a record cannot be read.
    """
    with ranks.main_first():
        train = asdict(identity(dataset.train, display.follow("read records for training")))
        val = asdict(identity(dataset.val, display.follow("read records for validation"))) if dataset.val else None
    whole = {"whole": names_digest(dataset.whole), "left_out": np.flatnonzero(~dataset.kept).tolist()}
    return {"train_records": train | whole, "val_records": val}


def _introduce(setup: Setup, dataset: Dataset, display: Display) -> None:
    config = setup.config
    for sentence in summary(dataset, config.data):
        display.say(sentence)
    compiled = ", compiled" if setup.compiles else ""
    norm = _norm_options(config.model, setup.device, setup.ranks)["norm"]
    where = "by" if setup.device.type == "cuda" else "in plain torch instead of"
    kernels = f", norm {where} our Triton kernels" if norm == "triton" else ""
    processes = f", {setup.ranks.world_size} processes" if setup.ranks.world_size > 1 else ""
    display.say(
        f"{config.model.name}, {len(dataset.classes)} classes, {setup.precision} on {setup.device}"
        f"{compiled}{kernels}{processes}"
    )
    if config.train.ema:
        display.say("The moving average of the weights validates and decides what is best.")


def build_network(config: Config, classes: int, device: torch.device, ranks: Ranks) -> torch.nn.Module:
    """The configured network with seeded weights, channels-last, on `device`."""
    model = config.model
    settings = asdict(model) | _norm_options(model, device, ranks)
    del settings["pretrained"]  # not the network's: `prepare` loads it, and a checkpoint replaces it
    torch.manual_seed(config.seed)
    network = create_model(num_classes=classes, **settings)
    return network.to(device).to(memory_format=torch.channels_last)


def _norm_options(model: ModelConfig, device: torch.device, ranks: Ranks) -> dict[str, Any]:
    """How BatchNorm is computed, as `create_model` takes it."""
    if model.name in CLASSICS:  # which have none: nothing is chosen for them, and what the user chose is refused
        return {"norm": "torch" if model.norm == "auto" else model.norm, "sync_norm": model.sync_norm}
    norm = choose_norm(model.norm, device, sync=model.sync_norm)
    return {"norm": norm, "sync_norm": model.sync_norm and ranks.world_size > 1}
