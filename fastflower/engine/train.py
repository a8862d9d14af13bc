"""Training: the loop from batches to checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from fastflower.config import Config, to_plain
from fastflower.data.dataset import EvaluationBatches, TrainingBatches
from fastflower.engine.checkpoint import first_non_finite, save_checkpoint, save_weights
from fastflower.engine.distributed import Interrupted, Ranks, Signals
from fastflower.engine.evaluate import evaluate
from fastflower.engine.meters import Evaluation, TrainingSums
from fastflower.engine.precision import Precision
from fastflower.engine.progress import Display, Figures
from fastflower.engine.run import RunFolder, RunLog
from fastflower.engine.schedule import Schedule
from fastflower.errors import UserError

T = TypeVar("T")


@dataclass
class State:
    """All that changes while training, and what a checkpoint therefore holds."""

    network: torch.nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler
    sums: TrainingSums
    epoch: int = 0  # the epoch in progress, from 0
    position: int = 0  # pictures of its order that are done, over all ranks
    step: int = 0  # optimizer steps since the start
    best: float = float("inf")  # lowest validation loss

    def to_dict(self, ranks: Ranks) -> dict[str, Any]:
        """For `save_checkpoint`; every rank must ask."""
        return {
            "model": {name: tensor.cpu() for name, tensor in self.network.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": {"cpu": torch.get_rng_state(), "cuda": _cuda_rng_states()},
            "sums": self.sums.state(ranks),
            "epoch": self.epoch,
            "position": self.position,
            "step": self.step,
            "best": self.best,
        }

    def load(self, saved: dict[str, Any], ranks: Ranks, *, lr: float | None) -> None:
        """Go on from a checkpoint; `lr` replaces its learning rate where that was changed for the resumed run."""
        self.network.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        self.scaler.load_state_dict(saved["scaler"])
        self.sums.load_state(saved["sums"], ranks)
        torch.set_rng_state(saved["rng"]["cpu"])
        if len(saved["rng"]["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(saved["rng"]["cuda"])
        self.epoch, self.position, self.step = saved["epoch"], saved["position"], saved["step"]
        self.best = saved["best"]
        if lr is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = lr


def _cuda_rng_states() -> list[torch.Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def new_state(network: torch.nn.Module, config: Config, device: torch.device, precision: Precision) -> State:
    """The state before the first step: SGD with momentum on every parameter, loss scaling where fp16 needs it."""
    train = config.train
    optimizer = torch.optim.SGD(
        network.parameters(), lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay, fused=True
    )
    return State(
        network=network,
        optimizer=optimizer,
        schedule=Schedule(optimizer, train),
        scaler=torch.amp.GradScaler(device.type, enabled=precision.dtype == torch.float16),
        sums=TrainingSums(device),
    )


@dataclass(frozen=True)
class Setup:
    """What stays the same while training."""

    config: Config
    device: torch.device
    precision: Precision
    ranks: Ranks
    train: TrainingBatches
    val: EvaluationBatches
    saved_with: dict[str, Any]  # what checkpoints hold beside the state: class names, normalization, records


def train(setup: Setup, state: State, folder: RunFolder, display: Display) -> int | None:
    """Train until the configured number of epochs is done or a signal comes.

    After each epoch: validate, let the schedule see the loss, log, save. A signal saves at the next step.

    Returns:
        None when all epochs are done, else the number of the signal.

    Raises:
        UserError: a record is bad, the loss or a weight is not finite, or a file cannot be written. Checkpoints that
            were written before stay as they are.
    """
    torch.backends.cudnn.benchmark = True  # shapes do not change, so trying algorithms once pays
    training_network, network = _wrap(state.network, setup)
    log = RunLog(folder, state.epoch) if setup.ranks.is_main else None
    with Signals() as signals:
        try:
            while state.epoch < setup.config.train.epochs:
                watch = Stopwatch()
                trained = _train_epoch(setup, state, training_network, signals, display, watch)
                evaluation = _validate(setup, state, network, signals, display, watch)
                row = _row(state, trained, evaluation, watch)
                improved = evaluation.loss < state.best
                state.best = min(state.best, evaluation.loss)
                state.schedule.after_epoch(evaluation.loss)
                state.epoch, state.position, state.sums = state.epoch + 1, 0, TrainingSums(setup.device)
                _save(setup, state, folder, improved=improved, log=log, row=row)
                display.row(row)
            return None
        except Interrupted:
            _refuse_bad_loss(setup, state)
            _save(setup, state, folder)
            return max(setup.ranks.gather(signals.received or 0))
        finally:
            if log:
                log.close()


def _wrap(network: torch.nn.Module, setup: Setup) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The network as training and as validation call it: behind DDP where there are ranks, compiled where asked for.

    DDP goes inside torch.compile, which then splits the graph so that gradients travel while others are computed.
    """
    train = setup.config.train
    training_network = network
    if setup.ranks.world_size > 1:
        device_ids = [setup.device.index] if setup.device.type == "cuda" else None
        training_network = DistributedDataParallel(network, device_ids=device_ids, gradient_as_bucket_view=True)
    if not compiles(setup):
        return training_network, network
    # one shape each: training drops the short batch and validation fills it up
    wrapped = (torch.compile(net, mode=train.compile_mode, dynamic=False) for net in (training_network, network))
    return cast(tuple[torch.nn.Module, torch.nn.Module], tuple(wrapped))


def compiles(setup: Setup) -> bool:
    """Whether the network is compiled: as configured, or on a GPU only."""
    choice = setup.config.train.compile
    return setup.device.type == "cuda" if choice is None else choice


def _train_epoch(
    setup: Setup, state: State, network: torch.nn.Module, signals: Signals, display: Display, watch: Stopwatch
) -> tuple[float, float]:
    """Train the rest of the epoch in progress, from `state.position`; mean loss and accuracy of the whole epoch."""
    data, device = setup.train, setup.device
    epoch = _epoch_of(setup, state)
    display.task(f"{epoch} train", data.steps, state.position // data.global_batch)
    network.train()
    for batch in setup.ranks.lockstep(watch.waiting_for(data.epoch(state.epoch, state.position)), signals):
        state.schedule.before_step(state.epoch + (state.position / data.global_batch + 0.5) / data.steps)
        with setup.precision.autocast(device):
            logits = network(batch.images if setup.precision.dtype else batch.images.float())
        loss = F.cross_entropy(logits.float(), batch.labels)
        state.optimizer.zero_grad(set_to_none=True)
        state.scaler.scale(loss).backward()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.sums.add(loss.detach(), logits.detach(), batch.labels, state.step, state.schedule.lr)
        state.step += 1
        state.position += data.global_batch
        watch.pictures += data.global_batch
        display.advance()
        if state.step % setup.config.train.log_every == 0:
            _refuse_bad_loss(setup, state)
            step = state.position // data.global_batch
            display.figures(epoch, step, data.steps, figures=_figures(setup, state, watch))
    _refuse_bad_loss(setup, state)  # also waits for the device, so that the epoch's time is the device's
    watch.training_s = watch.elapsed_s
    return state.sums.means(setup.ranks)


def _validate(
    setup: Setup, state: State, network: torch.nn.Module, signals: Signals, display: Display, watch: Stopwatch
) -> Evaluation:
    setup.ranks.broadcast_buffers(state.network)  # DDP does it before each step, so the last step's are still apart
    display.task(f"{_epoch_of(setup, state)} validate", setup.val.steps)
    evaluation = evaluate(
        network,
        display.counted(watch.waiting_for(setup.val.once())),
        classes=len(setup.saved_with["classes"]),
        device=setup.device,
        precision=setup.precision,
        ranks=setup.ranks,
        signals=signals,
        pad_to=setup.val.loader.batch if compiles(setup) else None,
    )
    if not math.isfinite(evaluation.loss):
        raise UserError(
            f"the validation loss of epoch {state.epoch + 1} is {evaluation.loss}; nothing of it was saved. "
            "Resume from the last checkpoint with a lower train.lr."
        )
    return evaluation


def _epoch_of(setup: Setup, state: State) -> str:
    return f"epoch {state.epoch + 1}/{setup.config.train.epochs}"


def _refuse_bad_loss(setup: Setup, state: State) -> None:
    """Raise UserError on every rank if the loss of any was not finite."""
    found = [bad for bad in setup.ranks.gather(state.sums.first_bad()) if bad]
    if found:
        step, lr = min(found)
        raise UserError(
            f"the loss was not finite for the first time at step {step} (epoch {state.epoch + 1}, lr {lr:g}); nothing "
            "of it was saved. Resume from the last checkpoint, or start again, with a lower train.lr."
        )


def _figures(setup: Setup, state: State, watch: Stopwatch) -> Figures:
    data = setup.train
    rate = watch.pictures / watch.elapsed_s
    to_do = (setup.config.train.epochs - state.epoch) * data.steps * data.global_batch - state.position
    loss, _ = state.sums.means()
    return Figures(loss, state.schedule.lr, rate, watch.waited_s / watch.elapsed_s, to_do / rate)


def _row(state: State, trained: tuple[float, float], evaluation: Evaluation, watch: Stopwatch) -> dict[str, float]:
    """What metrics.jsonl holds of an epoch."""
    return {
        "epoch": state.epoch,
        "step": state.step,
        "lr": state.schedule.lr,
        "train_loss": trained[0],
        "train_accuracy": trained[1],
        "val_loss": evaluation.loss,
        "val_accuracy": evaluation.accuracy,
        "val_top5": evaluation.top5,
        "val_macro_f1": evaluation.macro_f1,
        "images_per_s": watch.pictures / watch.training_s,
        "epoch_s": watch.elapsed_s,
        "data_wait": watch.waited_s / watch.elapsed_s,
    }


def _save(
    setup: Setup,
    state: State,
    folder: RunFolder,
    *,
    improved: bool = False,
    log: RunLog | None = None,
    row: dict[str, float] | None = None,
) -> None:
    """Write the log's row, best (where improved) and last, in this order: a run goes on from last."""
    saved = state.to_dict(setup.ranks) | setup.saved_with | {"config": to_plain(setup.config)}
    with setup.ranks.together():
        if name := first_non_finite({"model": saved["model"], "optimizer": saved["optimizer"]["state"]}):
            raise UserError(
                f"{name} is not finite at step {state.step} (epoch {state.epoch + 1}, lr {state.schedule.lr:g}); "
                "it was not saved. Resume from the last checkpoint, or start again, with a lower train.lr."
            )
        if not setup.ranks.is_main:
            return
        try:
            if log and row:
                log.write(row)
            if improved:
                save_checkpoint(folder.best, saved)
                metadata = {"architecture": asdict(setup.config.model)} | setup.saved_with
                save_weights(folder.best_weights, saved["model"], metadata)
            save_checkpoint(folder.last, saved)
        except OSError as error:
            raise UserError(
                f"{folder.path} cannot be written ({error.strerror}); what was saved before is whole. "
                f"Make room and go on with --resume {folder.path}."
            ) from error


class Stopwatch:
    """Time of an epoch, and how much of it was spent waiting for batches."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.waited_s = 0.0
        self.training_s = 0.0
        self.pictures = 0

    @property
    def elapsed_s(self) -> float:
        """Seconds since the epoch began."""
        return time.perf_counter() - self._start

    def waiting_for(self, items: Iterator[T]) -> Iterator[T]:
        """The same items; the time until each comes counts as waiting."""
        while True:
            asked = time.perf_counter()
            item = next(items, None)
            self.waited_s += time.perf_counter() - asked
            if item is None:
                return
            yield item
