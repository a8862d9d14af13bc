"""The product's own loops, from records to weights or outputs: what `fastflower train` and its validation do."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from rich.console import Console

from bench.contenders.loaders import Work, reads_ahead
from bench.harness.timing import Contender
from fastflower.config import Config
from fastflower.data.batches import EvaluationBatches, TrainingBatches, open_batches
from fastflower.errors import UserError
from fastflower.flops import count
from fastflower.runtime.device import Precision
from fastflower.runtime.distributed import Ranks
from fastflower.runtime.progress import Display
from fastflower.runtime.signals import Signals
from fastflower.training.metrics import Evaluation
from fastflower.training.schedule import Moment
from fastflower.training.setup import prepare
from fastflower.training.state import Setup, State
from fastflower.training.step import compiled, evaluate_in, training_network, training_step
from fastflower.training.stopwatch import Stopwatch
from fastflower.training.validate import outputs


@dataclass(frozen=True)
class Place:
    """Where and how a measurement runs."""

    device: torch.device
    ranks: Ranks
    precision: Precision


def prepared(config: Config, place: Place, batch: int) -> tuple[Setup, State]:
    """All that a loop needs, with `batch` pictures a process."""
    config = replace(config, train=replace(config.train, batch_size=batch * place.ranks.world_size))
    return prepare(config, place.device, place.ranks, silent())


def silent() -> Display:
    """A display that shows nothing, since each contender is prepared for itself."""
    return Display(Console(quiet=True), shown=False)


def training(config: Config, place: Place, batch: int) -> Contender:
    """Training steps on batches of the loader; behind DDP where there are processes."""
    return training_of(*prepared(config, place, batch), batch)


def training_of(setup: Setup, state: State, batch: int) -> Contender:
    """The same, of what is prepared already, so that what was trained can be validated."""
    _require(setup.train, batch, "training")
    network = training_network(setup, state)
    watch = Stopwatch()

    def start(steps: int) -> Iterator[torch.Tensor]:
        batches = itertools.chain.from_iterable(setup.train.epoch(epoch) for epoch in itertools.count())
        for images_and_labels in setup.ranks.lockstep(watch.waiting_for(batches), Signals()):
            state.schedule.before_step(Moment(state.position / setup.train.global_batch / setup.train.steps))
            training_step(setup, state, network, images_and_labels)
            yield images_and_labels.images

    ahead = reads_ahead(setup.train.loader)
    return Contender(start, ahead=ahead, watch=watch, macs=macs(setup, state), passes=3, compiled=setup.compiles)


def macs(setup: Setup, state: State) -> int:
    """Multiply-adds of a forward pass of one picture."""
    return count(state.network, setup.config.data.crop).macs


def validated(setup: Setup, state: State) -> Evaluation | None:
    """The figures of the validation split, as after an epoch; None where there is none."""
    if setup.val is None:
        return None
    setup.ranks.broadcast_buffers(state.validated)
    return evaluate_in(setup, state.validated, setup.val.once(), Signals())


def training_alone(config: Config, place: Place, batch: int) -> Contender:
    """The same steps on a batch that is there, without other processes: what remains is communication and loading."""
    setup, state = prepared(config, place, batch)
    _require(setup.train, batch, "training")
    setup = replace(setup, ranks=Ranks())
    network = training_network(setup, state)
    held = next(setup.train.epoch(0))

    def start(steps: int) -> Iterator[torch.Tensor]:
        for _ in range(steps):
            training_step(setup, state, network, held)
            yield held.images

    return Contender(start, macs=macs(setup, state), passes=3, compiled=setup.compiles)


def evaluation(config: Config, place: Place, batch: int) -> Contender:
    """Outputs for batches of the validation split's loader; a pass's last batch may be short."""
    setup, state = prepared(config, place, batch)
    if setup.val is None:
        raise UserError("data.train_on train+val leaves no validation split to evaluate: give another --run.")
    _require(setup.val, batch, "validation")
    network = compiled(setup, state.validated).eval()
    watch, val = Stopwatch(), setup.val

    def start(steps: int) -> Iterator[torch.Tensor]:
        batches = itertools.chain.from_iterable(val.once() for _ in itertools.count())
        together = place.ranks.lockstep(watch.waiting_for(batches), Signals())
        pad_to = batch if setup.compiles else None
        passes = outputs(network, together, device=setup.device, precision=setup.precision, pad_to=pad_to)
        while True:
            with torch.no_grad():
                images_and_labels, _ = next(passes)
            yield images_and_labels.images

    ahead = reads_ahead(val.loader)
    return Contender(start, ahead=ahead, watch=watch, macs=macs(setup, state), compiled=setup.compiles)


def _require(batches: TrainingBatches | EvaluationBatches, batch: int, split: str) -> None:
    """UserError where the split is smaller than a batch."""
    if batches.loader.batch < batch:
        n, processes = len(batches.loader.records), batches.loader.loading.ranks.world_size
        raise UserError(
            f"the {split} split has {n} records, fewer than --batch {batch} for each of {processes} processes: "
            "lower it."
        )


def loader_work(config: Config, place: Place) -> Work:
    """What the loader of training does, for measuring it alone."""
    batch_size, seed = config.train.pictures, config.seed
    batches = open_batches(config.data, place.device, place.ranks, silent(), batch_size=batch_size, seed=seed)
    loader = batches.train.loader
    return Work(loader.records, config.data, loader.loading.engine, place.device, place.ranks, decoded=loader.decoded)
