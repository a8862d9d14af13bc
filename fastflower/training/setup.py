"""From a configuration to the objects that train and evaluate work with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from fastflower.config import Config, DataConfig, ModelConfig
from fastflower.data.batches import (
    EvaluationBatches,
    TrainingBatches,
    choose_engine,
    choose_lighting,
    choose_normalization,
    evaluation_batches,
    training_batches,
)
from fastflower.data.cache import open_cache
from fastflower.data.dataset import Dataset, builtin_root, ensure_builtin, look_over, open_dataset
from fastflower.data.identity import identity, names_digest
from fastflower.data.loader import Loading
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
    network = build_network(config, len(loaders.dataset.classes), device, ranks)
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
        saved_with={
            "classes": loaders.dataset.classes,
            "normalization": {name: list(value) for name, value in asdict(loaders.normalization).items()},
        }
        | _identities(loaders.dataset, ranks, display),
    )
    _introduce(setup, loaders.dataset, display)
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
        dataset = open_dataset(config.data, config.seed, read)
        for note in look_over(dataset, read):
            display.say(note)
        engine = choose_engine(config.data, device, ranks)
        normalization = choose_normalization(config.data, dataset.train, engine, inherited)
        lighting = choose_lighting(config.data, dataset.train, engine)
    splits = [records for records in (dataset.train, dataset.val) if records]
    decoded = open_cache(config.data.cache, splits, engine, ranks, display.say, display.follow)
    loading = Loading(normalization, engine, device, ranks)
    train = training_batches(
        config.data,
        dataset.train,
        loading,
        batch_size=batch_size,
        seed=config.seed,
        kept=dataset.kept,
        lighting=lighting,
        decoded=decoded[0],
    )
    _require_two_values(config, train)
    val = None
    if dataset.val:
        val = evaluation_batches(config.data, dataset.val, loading, batch_size=batch_size, decoded=decoded[1])
    return Loaders(dataset, normalization, train, val)


def _require_two_values(config: Config, train: TrainingBatches) -> None:
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


def _build_criterion(config: Config, dataset: Dataset, device: torch.device) -> Criterion:
    weights = None
    if config.train.class_weights == "balanced":
        weights = balanced_weights(dataset.train.labels, len(dataset.classes)).to(device)
    return Criterion(config.train.label_smoothing, weights)


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
