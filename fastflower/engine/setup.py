"""From a configuration to the objects that train and evaluate work with."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from fastflower.config import Config, Data, build, resolve
from fastflower.data.dataset import (
    Dataset,
    builtin_root,
    choose_engine,
    choose_lighting,
    choose_normalization,
    ensure_builtin,
    evaluation_batches,
    open_dataset,
    training_batches,
)
from fastflower.data.pipeline import Normalization
from fastflower.data.records import Records
from fastflower.data.sources import load_records
from fastflower.engine.checkpoint import load_checkpoint, weights_of
from fastflower.engine.distributed import Ranks, Signals, processes
from fastflower.engine.evaluate import evaluate
from fastflower.engine.loss import Criterion, balanced_weights
from fastflower.engine.meters import Evaluation
from fastflower.engine.precision import choose_device, choose_precision
from fastflower.engine.progress import Display
from fastflower.engine.rehearsal import rehearse
from fastflower.engine.run import RunFolder, changes, new_run
from fastflower.engine.state import Setup, State, new_state
from fastflower.engine.train import train
from fastflower.environment import environment
from fastflower.errors import UserError
from fastflower.models import create_model
from fastflower.models.layers import choose_norm
from fastflower.models.pretrained import load_pretrained, open_pretrained


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
    ranks.share_of(config.train.batch_size)
    with ranks.main_first():
        config, dataset = _open(config, display)
        engine = choose_engine(config.data, device, ranks)
        pretrained = None if resumed else open_pretrained(config.model, display.say)
        inherited = _normalization(resumed) if resumed else pretrained.normalization if pretrained else None
        normalization = choose_normalization(config.data, dataset.train, engine, inherited)
        lighting = choose_lighting(config.data, dataset.train, engine)
    precision = choose_precision(config.amp, config.amp_dtype, device)
    if precision.note:
        display.say(precision.note)
    batch_size = config.train.batch_size
    train = training_batches(
        config.data,
        dataset.train,
        normalization,
        engine,
        device,
        ranks,
        batch_size=batch_size,
        seed=config.seed,
        lighting=lighting,
    )
    val = None
    if dataset.val is not None:
        val = evaluation_batches(config.data, dataset.val, normalization, engine, device, ranks, batch_size=batch_size)
    if train.global_batch < batch_size:
        display.say(
            f"The training split is smaller than a batch of {batch_size}: a batch is {train.global_batch} pictures."
        )
    if train.loader.batch == 1 and config.data.crop <= 32:
        raise UserError(
            "one picture a process and data.crop of at most 32 pixels leave BatchNorm a single value: "
            "raise train.batch_size or data.crop."
        )
    network = build_network(config, len(dataset.classes), device, ranks)
    if pretrained:
        load_pretrained(network, pretrained)
        display.say(f"Starting from {pretrained.source}, with a new last layer.")
    state = new_state(network, config, device, precision)
    saved_with = {
        "classes": dataset.classes,
        "normalization": {"mean": list(normalization.mean), "std": list(normalization.std)},
        "train_records": {"count": len(dataset.train), "digest": _digest(dataset.train)},
    }
    weights = None
    if config.train.class_weights == "balanced":
        weights = balanced_weights(dataset.train.labels, len(dataset.classes)).to(device)
    criterion = Criterion(config.train.label_smoothing, weights)
    setup = Setup(config, device, precision, ranks, criterion, train, val, saved_with)
    _introduce(setup, dataset, display)
    return setup, state


def _open(config: Config, display: Display) -> tuple[Config, Dataset]:
    data = config.data
    if data.root is None:
        display.say("No data.root given: training on the built-in synthetic flowers.")
        if not builtin_root().is_dir():
            display.say(f"Drawing them, once, into {builtin_root()}")
        data = replace(data, root=(ensure_builtin(display.follow("draw synthetic flowers")),))
    config = replace(config, data=_absolute(data))
    return config, open_dataset(config.data, config.seed)


def _absolute(data: Data) -> Data:
    """The same folders and files from wherever the run is resumed or evaluated."""
    return replace(
        data, root=data.root and tuple(root.absolute() for root in data.root), skip=data.skip and data.skip.absolute()
    )


def _digest(records: Records) -> str:
    """Tells apart what is trained on, and in which order, wherever it is stored."""
    ids = os.fsencode("\0".join(records.ids.tolist()))
    return hashlib.blake2b(ids + records.labels.tobytes(), digest_size=8).hexdigest()


def _introduce(setup: Setup, dataset: Dataset, display: Display) -> None:
    config = setup.config
    for name, records in (("train", dataset.train), ("val", dataset.val)):
        if records is None:
            continue
        sizes = ", ".join(f"{size}x{size}" for size in records.sizes)
        stored = f" ({sizes})" if sizes else ""
        display.say(f"{name:>5}: {records.pictures} pictures, {len(records)} records{stored}")
    if config.data.skip:
        display.say(f"Left out {dataset.left_out} records that {config.data.skip} lists.")
    compiled = ", compiled" if setup.compiles else ""
    norm = choose_norm(config.model.norm, setup.device, sync=config.model.sync_norm)
    kernels = ", norm by Triton kernels" if norm == "triton" and setup.device.type == "cuda" else ""
    processes = f", {setup.ranks.world_size} processes" if setup.ranks.world_size > 1 else ""
    display.say(
        f"{config.model.name}, {len(dataset.classes)} classes, {setup.precision} on {setup.device}"
        f"{compiled}{kernels}{processes}"
    )


def build_network(config: Config, classes: int, device: torch.device, ranks: Ranks) -> torch.nn.Module:
    """The configured network with seeded weights, channels-last, on `device`."""
    model = config.model
    settings = asdict(model) | {
        "norm": choose_norm(model.norm, device, sync=model.sync_norm),
        "sync_norm": model.sync_norm and ranks.world_size > 1,
    }
    del settings["pretrained"]  # not the network's: `prepare` loads it, and a checkpoint replaces it
    torch.manual_seed(config.seed)
    network = create_model(num_classes=classes, **settings)
    return network.to(device).to(memory_format=torch.channels_last)


def restore(state: State, setup: Setup, checkpoint: Path, saved: dict[str, Any], display: Display) -> str:
    """Go on from a checkpoint that `load_checkpoint` read; the note to record beside the configuration.

    Raises:
        UserError: the network, the classes or the records are not those of the checkpoint.
    """
    config, before = setup.config, saved["config"]
    if _architecture(before["model"]) != _architecture(asdict(config.model)):
        raise UserError(
            f"{checkpoint} holds another network ({before['model']}): a resumed run keeps its model settings."
        )
    for what, key in (("classes", "classes"), ("training records", "train_records")):
        if saved[key] != setup.saved_with[key]:
            raise UserError(
                f"{checkpoint} was trained on other {what} than this would be: keep its data.root, data.val_share, "
                "data.train_on, data.skip and seed."
            )
    if before["train"]["optimizer"] != config.train.optimizer:
        raise UserError(
            f"{checkpoint} was trained by {before['train']['optimizer']}: a resumed run keeps its train.optimizer."
        )
    state.load(saved, setup.ranks, config)
    changed = changes(before, config)
    where = f"epoch {state.epoch + 1}, step {state.step}"
    display.say(f"Resuming {checkpoint} at {where}" + (f"; changed: {', '.join(changed)}" if changed else ""))
    return f"resumed at {where}" + (f": {', '.join(changed)}" if changed else "")


def _architecture(model: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide what the weights are, and not where they came from or how they are computed with."""
    return {key: value for key, value in model.items() if key not in ("pretrained", "norm", "sync_norm")}


def _normalization(saved: Mapping[str, Any]) -> Normalization:
    """What a checkpoint's network was trained with."""
    return Normalization(tuple(saved["normalization"]["mean"]), tuple(saved["normalization"]["std"]))


def dry_run(config: Config, console: Console) -> None:
    """Build all that training from `config` needs, and try it in two steps.

    Raises:
        UserError: see `prepare` and `fastflower.engine.rehearsal.rehearse`.
    """
    config = resolve(config)
    device = choose_device(config.device, _local_rank())
    with processes(device) as ranks, Display(console, shown=ranks.is_main) as display:
        rehearse(*prepare(config, device, ranks, display), display)


def train_run(
    config: Config, *, name: str, run: Path | None, checkpoint: Path | None, overwrite: bool, console: Console
) -> int | None:
    """Train from a configuration into a run folder; new, or going on from a checkpoint.

    Args:
        config: the settings, with a resumed run's already in them.
        name: of a new folder under runs/.
        run: the folder, or None for a new one (or the checkpoint's).
        checkpoint: where to go on from; None starts anew.
        overwrite: clear a run that is already in `run`.
        console: where progress is shown.

    Returns:
        None when all epochs are done, else the number of the signal that ended it.

    Raises:
        UserError: see `prepare`, `restore` and `fastflower.engine.train.train`; or `run` already holds a run.
    """
    config = resolve(config)
    device = choose_device(config.device, _local_rank())
    with processes(device) as ranks:
        display = Display(console, shown=ranks.is_main)
        with ranks.main_first():
            folder = _choose_folder(name, run, checkpoint, overwrite)
        folder = ranks.gather(folder)[0]  # a new folder is named by the main rank's clock
        saved = load_checkpoint(checkpoint) if checkpoint else None
        with display:
            setup, state = prepare(config, device, ranks, display, saved)
        note = restore(state, setup, checkpoint, saved, display) if checkpoint and saved else None
        if ranks.is_main:
            if not checkpoint:
                folder.clear()
            folder.write_config(setup.config, note)
            folder.write_environment(environment(device) | {"world_size": ranks.world_size, "step": state.step})
        display.say(f"Run folder: {folder.path}")
        if state.epoch >= config.train.epochs:
            display.say(f"All {config.train.epochs} epochs are done; give a larger --train.epochs to go on.")
            return None
        with display:
            received = train(setup, state, folder, display)
        if received:
            display.say(
                f"Stopped by {signal.Signals(received).name} and saved. "
                f"Go on with: fastflower train --resume {folder.path}"
            )
        else:
            display.say(f"Done. {_best(state, config)}: {folder.best}")
        return received


def _best(state: State, config: Config) -> str:
    """What there is to say about the best checkpoint."""
    if state.best is None:
        return "Last epoch"
    return f"Best validation {config.train.best.replace('_', ' ')} {state.best:.4f}"


def _choose_folder(name: str, run: Path | None, checkpoint: Path | None, overwrite: bool) -> RunFolder:
    if checkpoint:
        return RunFolder(run or checkpoint.parents[1])
    folder = RunFolder(run) if run else new_run(name)
    if folder.exists and not overwrite:
        raise UserError(
            f"{folder.path} already holds a run: give --resume {folder.path}, --overwrite or another --run."
        )
    return folder


def evaluate_run(
    run: Path,
    roots: tuple[Path, ...] | None,
    split: str,
    device_setting: Literal["run", "auto", "cpu", "cuda"],
    console: Console,
) -> Evaluation:
    """Figures of a run's best checkpoint (or of the checkpoint file `run`) on a labelled split.

    Precision and batch are those of the run, so that the validation figures that it logged come out again; so are the
    seed and data.val_share, where they divide a folder, and data.skip, unless `roots` names other folders than the run.

    Raises:
        UserError: no such run, or the data does not fit it.
        Interrupted: a signal came.
    """
    path = run if run.is_file() else RunFolder(run).best
    if not path.is_file():
        raise UserError(f"{run} has no {path}: give a run folder that has finished an epoch, or a checkpoint file.")
    saved = load_checkpoint(path)
    config = build(saved["config"], str(path))
    data, classes = config.data, saved["classes"]
    if roots is not None:
        known = set(data.root or ())
        data = _absolute(replace(data, root=roots))
        if not known.issuperset(data.root or ()):
            data = replace(data, skip=None)
    choice = config.device if device_setting == "run" else device_setting
    device = choose_device(choice, _local_rank())
    with (
        processes(device) as ranks,
        Signals() as signals,
        Display(console, shown=ranks.is_main) as display,
    ):
        with ranks.main_first():
            records = load_records(data, split, classes, config.seed)
            records.require_classes(len(classes))
        engine = choose_engine(data, device, ranks)
        batch_size = config.train.batch_size
        batches = evaluation_batches(data, records, _normalization(saved), engine, device, ranks, batch_size=batch_size)
        network = build_network(config, len(classes), device, ranks)
        network.load_state_dict(weights_of(saved))
        display.task("evaluate", batches.steps)
        return evaluate(
            network,
            display.counted(batches.once()),
            classes=len(classes),
            device=device,
            precision=choose_precision(config.amp, config.amp_dtype, device),
            ranks=ranks,
            signals=signals,
        )


def _local_rank() -> int:
    """Which of this machine's processes this is, as torchrun says."""
    return int(os.environ.get("LOCAL_RANK", 0))
