"""Training: the loop from batches to checkpoints."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastflower.config import to_plain
from fastflower.errors import UserError
from fastflower.runtime.checkpoint import first_non_finite, load_checkpoint, save_checkpoint, save_weights, weights_of
from fastflower.runtime.progress import Display, Figures
from fastflower.runtime.run_folder import RunFolder, RunLog
from fastflower.runtime.signals import Interrupted, Signals
from fastflower.training.metrics import Evaluation, TrainingSums
from fastflower.training.optimizer import freeze
from fastflower.training.profile import Profiler
from fastflower.training.state import Setup, State, makes_best
from fastflower.training.step import compiled, evaluate_in, is_frozen, training_network, training_step

T = TypeVar("T")


class DivergenceError(UserError):
    """The loss is not finite, so that the weights are not worth keeping."""


def train(setup: Setup, state: State, folder: RunFolder, display: Display) -> int | None:
    """Train until the configured epochs or steps are done, nothing improves any more, or a signal comes.

    After each epoch: validate, let the schedule see the loss, log, save. A signal saves at the next step, and so does a
    record that cannot be read or decoded, in training or validation.

    Returns:
        None when the run has come to its end, else the number of the signal.

    Raises:
        UserError: a record is bad, the loss or a weight is not finite, or a file cannot be written. Checkpoints that
            were written before stay as they are.
    """
    torch.backends.cudnn.benchmark = True  # shapes do not change, so trying algorithms once pays
    config = setup.config.train
    network, validated = training_network(setup, state), compiled(setup, state.validated)
    with setup.ranks.together(), folder.writing():
        log = RunLog(folder, state.epoch) if setup.ranks.is_main else None
    profiler = Profiler(folder, display) if config.profile and setup.ranks.is_main else None
    with Signals() as signals:
        try:
            while not (end := why_ended(setup, state)):
                if state.epoch == config.freeze_epochs > 0:
                    network = training_network(setup, state)
                watch = Stopwatch()
                with _saving(setup, state, folder):
                    _train_epoch(setup, state, network, signals, display, watch, profiler)
                    if setup.train.left(state.position):
                        continue  # out of steps
                    trained = state.sums.means(setup.ranks)
                    evaluation = _validate(setup, state, validated, signals, display, watch)
                row = _row(state, trained, evaluation, watch)
                improved = state.see(evaluation, config.best)
                if evaluation:
                    state.schedule.after_epoch(evaluation.loss)
                state.epoch, state.position, state.sums = state.epoch + 1, 0, TrainingSums(setup.device)
                _save(setup, state, folder, improved=improved, log=log, row=row)
                display.row(row)
            if state.position:
                _save(setup, state, folder)
            if state.epoch < config.epochs:
                display.say(end)
            return None
        except Interrupted as interrupted:
            return interrupted.number
        finally:
            if profiler:
                profiler.close()


def why_ended(setup: Setup, state: State) -> str | None:
    """Why nothing more is to be trained, and what would change that; None if something is."""
    config = setup.config.train
    if state.epoch >= config.epochs:
        return f"All {config.epochs} epochs are done; give a larger --train.epochs to go on."
    if config.early_stop and state.epoch - 1 - state.improved_epoch >= config.early_stop:
        return (
            f"No better validation {config.best} in {config.early_stop} epochs: stopped early; give a larger "
            "--train.early_stop, or None, to go on."
        )
    if config.max_steps is not None and state.step >= config.max_steps and setup.train.left(state.position):
        return (
            f"train.max_steps: stopped after {state.step} steps and saved; give a larger --train.max_steps, or None, "
            "to go on."
        )
    return None


@contextlib.contextmanager
def _saving(setup: Setup, state: State, folder: RunFolder) -> Iterator[None]:
    """Save what is trained of the epoch when a signal or a bad record ends it, which it does on all ranks together."""
    try:
        yield
    except DivergenceError:
        raise
    except Interrupted:
        _refuse_bad_loss(setup, state)
        _save(setup, state, folder)
        raise
    except UserError as error:
        if not state.position:
            raise  # nothing that an earlier save has not
        _refuse_bad_loss(setup, state)
        _save(setup, state, folder)
        raise UserError(
            f"{error} Epoch {_trained_epoch(state)} is saved up to step {state.step}: then go on with --resume "
            f"{folder.path}."
        ) from error


def _train_epoch(
    setup: Setup,
    state: State,
    network: torch.nn.Module,
    signals: Signals,
    display: Display,
    watch: Stopwatch,
    profiler: Profiler | None,
) -> None:
    """Train the rest of the epoch in progress, from `state.position`, as far as the steps allow."""
    data = setup.train
    epoch = _epoch_of(setup, state)
    freeze(state.network, frozen=is_frozen(setup, state))
    done = state.position // data.global_batch
    steps = done + data.left(state.position)
    pictures = state.position + data.left(state.position) * data.global_batch  # of the whole epoch
    display.task(f"{epoch} train", steps, done)
    for batch in setup.ranks.lockstep(watch.waiting_for(data.epoch(state.epoch, state.position)), signals):
        state.schedule.before_step(state.epoch + (state.position + data.global_batch / 2) / pictures)
        training_step(setup, state, network, batch)
        watch.pictures += data.global_batch
        display.advance()
        if profiler:
            profiler.step()
        if state.step % setup.config.train.log_every == 0:
            _refuse_bad_loss(setup, state)
            step = state.position // data.global_batch
            display.figures(epoch, step, steps, figures=_figures(setup, state, watch))
        if state.step == setup.config.train.max_steps:
            break
    _refuse_bad_loss(setup, state)  # also waits for the device, so that the epoch's time is the device's
    watch.training_s = watch.elapsed_s


def _validate(
    setup: Setup, state: State, network: torch.nn.Module, signals: Signals, display: Display, watch: Stopwatch
) -> Evaluation | None:
    """The figures of the validation split, where there is one."""
    for net in dict.fromkeys((state.network, state.validated)):  # in the same order on every rank
        setup.ranks.broadcast_buffers(net)  # DDP does it before each step, so the last step's are still apart
    if not setup.val:
        return None
    display.task(f"{_epoch_of(setup, state)} validate", setup.val.steps)
    evaluation = evaluate_in(setup, network, display.counted(watch.waiting_for(setup.val.once())), signals)
    if not math.isfinite(evaluation.loss):
        # the last checkpoint is no help where it holds these very weights
        earlier = "the last checkpoint" if watch.pictures else "checkpoints/best.pt"
        raise DivergenceError(
            f"the validation loss of epoch {state.epoch + 1} is {evaluation.loss}; nothing of it was saved. "
            f"Resume from {earlier}, or start again, with a lower train.lr."
        )
    return evaluation


def _epoch_of(setup: Setup, state: State) -> str:
    return f"epoch {state.epoch + 1}/{setup.config.train.epochs}"


def _trained_epoch(state: State) -> int:
    """The epoch, from 1, of the last step."""
    return state.epoch + 1 if state.position else state.epoch


def _refuse_bad_loss(setup: Setup, state: State) -> None:
    """Raise UserError on every rank if the loss of any was not finite."""
    found = [bad for bad in setup.ranks.gather(state.sums.first_bad()) if bad]
    if found:
        step, lr = min(found)
        raise DivergenceError(
            f"the loss was not finite for the first time at step {step} (epoch {state.epoch + 1}, lr {lr:g}); nothing "
            "of it was saved. Resume from the last checkpoint, or start again, with a lower train.lr."
        )


def _figures(setup: Setup, state: State, watch: Stopwatch) -> Figures:
    data, config = setup.train, setup.config.train
    rate = watch.pictures / watch.elapsed_s
    steps = (config.epochs - state.epoch - 1) * data.steps + data.left(state.position)
    if config.max_steps is not None:
        steps = min(steps, config.max_steps - state.step)
    loss, _ = state.sums.means()
    return Figures(loss, state.schedule.lr, rate, watch.waited_s / watch.elapsed_s, steps * data.global_batch / rate)


def _row(
    state: State, trained: tuple[float, float], evaluation: Evaluation | None, watch: Stopwatch
) -> dict[str, float | None]:
    """What metrics.jsonl holds of an epoch."""
    rate = watch.pictures / watch.training_s if watch.pictures else None  # after a stop in validation
    return {
        "epoch": state.epoch + 1,
        "step": state.step,
        "lr": state.schedule.lr,
        "train_loss": trained[0],
        "train_accuracy": trained[1],
        "val_loss": evaluation.loss if evaluation else None,
        "val_accuracy": evaluation.accuracy if evaluation else None,
        "val_top5": evaluation.top5 if evaluation else None,
        "val_macro_f1": evaluation.macro_f1 if evaluation else None,
        "images_per_s": rate,
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
    row: dict[str, float | None] | None = None,
) -> None:
    """Write the log's row, last and best (where improved), in this order.

    A run goes on from last: a kill before it is there takes the row back, and after it best is made from it.
    """
    saved = state.to_dict(setup.ranks) | setup.provenance.to_dict() | {"config": to_plain(setup.config)}
    with setup.ranks.together():
        weights = {"model": saved["model"], "ema": saved["ema"] or {}}
        if name := first_non_finite(weights | {"optimizer": saved["optimizer"]["state"]}):
            raise UserError(
                f"{name} is not finite at step {state.step} (epoch {_trained_epoch(state)}, lr {state.schedule.lr:g}); "
                "it was not saved. Resume from the last checkpoint, or start again, with a lower train.lr."
            )
        if not setup.ranks.is_main:
            return
        with folder.writing():
            if log and row:
                log.write(row)
            save_checkpoint(folder.last, saved)
            if improved:
                keep_best(folder, saved)


def settle(folder: RunFolder, checkpoint: Path, saved: Mapping[str, Any], *, goes_on: bool) -> None:
    """Make last of an older checkpoint that is gone on from, before anything of the later epochs is taken back; and
    best of a last that is of the best epoch, where best is of another one, as a kill between the two leaves it.
    """
    if not (folder.last.is_file() and checkpoint.samefile(folder.last)):
        if not goes_on:
            return
        save_checkpoint(folder.last, saved)
    if not makes_best(saved):
        return
    with contextlib.suppress(UserError):  # damaged or not there
        best = load_checkpoint(folder.best, resumed=True)
        if (best["step"], best["best"]) == (saved["step"], saved["best"]) and folder.best_weights.is_file():
            return
    keep_best(folder, saved)


def keep_best(folder: RunFolder, saved: Mapping[str, Any]) -> None:
    """Write best, all of a checkpoint and its weights alone; OSError where that fails."""
    metadata = {key: saved[key] for key in ("classes", "normalization", "train_records")}
    save_weights(folder.best_weights, weights_of(saved), {"architecture": saved["config"]["model"]} | metadata)
    save_checkpoint(folder.best, saved)


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
