"""From a configuration to the objects that train and evaluate work with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastflower.config import Config, DataConfig
from fastflower.data.cache import open_cache
from fastflower.data.dataset import (
    Dataset,
    EvaluationBatches,
    TrainingBatches,
    builtin_root,
    choose_engine,
    choose_lighting,
    choose_normalization,
    ensure_builtin,
    evaluation_batches,
    look_over,
    open_dataset,
    training_batches,
)
from fastflower.data.view import Normalization
from fastflower.errors import UserError
from fastflower.models import find_network
from fastflower.models.layers import uses_kernels
from fastflower.runtime.device import choose_precision
from fastflower.runtime.distributed import Ranks
from fastflower.runtime.progress import Display
from fastflower.training.loss import Criterion, balanced_weights
from fastflower.training.network import build_network
from fastflower.training.pretrained import load_pretrained, open_pretrained
from fastflower.training.provenance import provenance_of
from fastflower.training.state import Setup, State, new_state


@dataclass(frozen=True)
class Loaders:
    """Both splits as this process reads them."""

    dataset: Dataset
    normalization: Normalization
    train: TrainingBatches
    val: EvaluationBatches | None  # None in a final fit


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
    config = with_data(config, ranks, display)
    with ranks.main_first():
        pretrained = None if resumed else open_pretrained(config.model, display.say)
    inherited = (
        Normalization.of(resumed["normalization"]) if resumed else pretrained.normalization if pretrained else None
    )
    loaders = build_loaders(config, device, ranks, display, inherited)
    precision = choose_precision(config.amp, config.amp_dtype, device)
    if precision.note:
        display.say(precision.note)
    if loaders.train.global_batch < config.train.batch_size:
        display.say(
            f"The training split is smaller than a batch of {config.train.batch_size}: "
            f"a batch is {loaders.train.global_batch} pictures."
        )
    classes = len(loaders.dataset.classes)
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
        criterion=_build_criterion(config, loaders.dataset, device),
        train=loaders.train,
        val=loaders.val,
        provenance=provenance_of(loaders.dataset, loaders.normalization, ranks, display),
    )
    _introduce(setup, network, loaders.dataset, display)
    return setup, state


def with_data(config: Config, ranks: Ranks, display: Display) -> Config:
    """The configuration with absolute data folders: those named, or the synthetic flowers, drawn where needed.

    Raises:
        UserError: the cache folder cannot be written.
    """
    data = config.data
    if data.root is None:
        display.say("No data.root given: training on the built-in synthetic flowers.")
        with ranks.main_first():
            if not builtin_root().is_dir():
                display.say(f"Drawing them, once, into {builtin_root()}")
            data = replace(data, root=(ensure_builtin(display.follow("draw synthetic flowers")),))
    return replace(config, data=absolute(data))


def absolute(data: DataConfig) -> DataConfig:
    """The same folders and files from wherever the run is resumed or evaluated."""
    return replace(
        data, root=data.root and tuple(root.absolute() for root in data.root), skip=data.skip and data.skip.absolute()
    )


def build_loaders(
    config: Config, device: torch.device, ranks: Ranks, display: Display, inherited: Normalization | None = None
) -> Loaders:
    """Index the configured data, measure its pixels where needed, and make this process's loaders.

    Args:
        config: with data folders (`with_data`).
        device: where batches are handed out.
        ranks: the processes.
        display: where progress is shown.
        inherited: normalization where the settings give none; None measures the training split.

    Raises:
        UserError: bad data, or settings that do not fit it or this machine.
    """
    batch_size = config.train.batch_size
    ranks.share_of(batch_size)
    with ranks.main_first():
        read = display.follow("read pictures")
        dataset, notes = look_over(open_dataset(config.data, config.seed, read), read)
        for note in notes:
            display.say(note)
        engine = choose_engine(config.data, device, ranks)
        normalization = choose_normalization(config.data, dataset.train, engine, inherited)
        lighting = choose_lighting(config.data, dataset.train, engine)
    splits = [records for records in (dataset.train, dataset.val) if records]
    decoded = open_cache(config.data.cache, splits, engine, ranks, display.say, display.follow)
    common = (normalization, engine, device, ranks)
    train = training_batches(
        config.data,
        dataset.train,
        *common,
        batch_size=batch_size,
        seed=config.seed,
        kept=dataset.kept,
        lighting=lighting,
        decoded=decoded[0],
    )
    _require_two_values(config, train)
    val = None
    if dataset.val:
        val = evaluation_batches(config.data, dataset.val, *common, batch_size=batch_size, decoded=decoded[1])
    return Loaders(dataset, normalization, train, val)


def _require_two_values(config: Config, train: TrainingBatches) -> None:
    """Raise UserError where BatchNorm would see, at the end of the network, a single value of a channel."""
    pieces, processes = config.train.accumulate, train.ranks.world_size
    smallest = max(1, train.loader.batch // pieces) * (processes if config.model.sync_norm else 1)
    model = find_network(config.model.name)
    if smallest > 1 or config.data.crop > model.stride or not model.batch_norm:
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
        f"raise data.crop above {model.stride}": True,
    }
    cause = ", ".join(text for text, holds in causes.items() if holds)
    mend = " or ".join(text for text, holds in mends.items() if holds)
    raise UserError(
        f"{cause}: the network would see one picture at a time, of which its last BatchNorm has a single value at "
        f"data.crop {config.data.crop}; {mend}."
    )


def _build_criterion(config: Config, dataset: Dataset, device: torch.device) -> Criterion:
    weights = None
    if config.train.class_weights == "balanced":
        weights = balanced_weights(dataset.train.labels, len(dataset.classes)).to(device)
    return Criterion(config.train.label_smoothing, weights)


def _introduce(setup: Setup, network: torch.nn.Module, dataset: Dataset, display: Display) -> None:
    config = setup.config
    for name, records in (("train", dataset.train), ("val", dataset.val)):
        if records is None:
            continue
        sizes = ", ".join(f"{size}x{size}" for size in records.sizes)
        stored = f" ({sizes})" if sizes else ""
        display.say(f"{name:>5}: {records.pictures} pictures, {len(records)} records{stored}")
    if config.data.folds:
        display.say(f"Fold {config.data.fold} of 0 to {config.data.folds - 1} validates, the others train.")
    if config.data.skip:
        display.say(f"Left out {dataset.left_out} records that {config.data.skip} lists.")
    compiled = ", compiled" if setup.compiles else ""
    where = "by" if setup.device.type == "cuda" else "in plain torch instead of"
    kernels = f", norm {where} our Triton kernels" if uses_kernels(network) else ""
    processes = f", {setup.ranks.world_size} processes" if setup.ranks.world_size > 1 else ""
    display.say(
        f"{config.model.name}, {len(dataset.classes)} classes, {setup.precision} on {setup.device}"
        f"{compiled}{kernels}{processes}"
    )
    if config.train.ema:
        display.say("The moving average of the weights validates and decides what is best.")
