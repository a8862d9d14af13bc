"""Training: the loop from batches to checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from fastflower.data.loader import Batch
from fastflower.runtime.progress import Display, StepMetrics
from fastflower.runtime.run_folder import RunFolder, RunLog
from fastflower.runtime.signals import Signals
from fastflower.training.explosion import explosion
from fastflower.training.hours import Foresight, is_time_over
from fastflower.training.metrics import Evaluation, TrainingSums
from fastflower.training.optimizer import freeze
from fastflower.training.passes import Passes, why_ended
from fastflower.training.profile import Profiler
from fastflower.training.saving import DivergenceError, refuse_bad_loss, save, saving
from fastflower.training.schedule import HOUR_S, Moment
from fastflower.training.state import Setup, State
from fastflower.training.step import compiled, evaluate_in, is_frozen, training_network, training_step
from fastflower.training.stopwatch import Stopwatch


def train(setup: Setup, state: State, folder: RunFolder, display: Display) -> None:
    """Train until the configured epochs or steps are done, nothing improves any more, or a signal comes.

    After each epoch: validate, let the schedule see the loss, log, save. A signal saves at the next step, and so does a
    record that cannot be read or decoded, in training or validation.

    Raises:
        Stopped: a signal came, and all steps until then are saved.
        UserError: a record is bad, the loss or a weight is not finite, or a file cannot be written. Checkpoints that
            were written before stay as they are.
    """
    config = setup.config.train
    torch.backends.cudnn.benchmark = not config.deterministic  # shapes do not change, so trying algorithms once pays
    network, validated = training_network(setup, state), compiled(setup, state.validated)
    with setup.ranks.together(), folder.writing():
        log = RunLog(folder, state.epoch) if setup.ranks.is_main else None
    profiler = Profiler(folder, display, compiles=setup.compiles) if config.profile and setup.ranks.is_main else None
    warned = False
    with Signals() as signals, Passes(setup, state) as passes:
        try:
            while not (end := why_ended(setup, state)):
                if state.epoch == config.freeze_epochs > 0:
                    network = training_network(setup, state)
                watch = Stopwatch()
                with saving(setup, state, folder):
                    _train_epoch(setup, state, network, passes.training(), signals, display, watch, profiler)
                    setup.ranks.agree(state.clock)
                    if setup.train.left(state.position) and not is_time_over(setup, state):
                        continue  # out of steps
                    trained_s = state.clock.agreed_s
                    training = state.sums.means(setup.ranks)
                    validation = _validate(setup, state, validated, passes.validation(), signals, display, watch)
                row = _row(state, training, validation, watch)
                warning = explosion(setup, state, validation.loss) if validation and not warned else None
                improved = state.see(validation, config.best)
                if validation:
                    state.schedule.after_epoch(validation.loss)
                state.epoch, state.position, state.sums = state.epoch + 1, 0, TrainingSums(setup.device)
                _note_closing(setup, state, trained_s)
                save(setup, state, folder, improved=improved, log=log, row=row)
                _note_closing(setup, state, trained_s)
                display.row(row)
                if warning:
                    display.say(warning)
                    warned = True
            if state.position:
                save(setup, state, folder)
            if state.epoch != config.epochs:
                display.say(end)
        finally:
            if profiler:
                profiler.close()


def _train_epoch(
    setup: Setup,
    state: State,
    network: torch.nn.Module,
    batches: Iterator[Batch],
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
    foresight = Foresight(setup, state)
    for batch in setup.ranks.lockstep(watch.waiting_for(batches), signals, state.clock):
        if state.position and is_time_over(setup, state):
            break
        foresight.step()
        epochs_done = state.epoch + (state.position + data.global_batch / 2) / pictures
        state.schedule.before_step(Moment(epochs_done, state.clock.agreed_s), state.closing_s)
        training_step(setup, state, network, batch)
        watch.pictures += data.global_batch
        display.advance()
        if profiler:
            profiler.step()
        if state.step % setup.config.train.log_every == 0:
            refuse_bad_loss(setup, state)
            display.step(epoch, state.position // data.global_batch, steps, _step_metrics(setup, state, watch))
        if state.step == setup.config.train.max_steps:
            break
    refuse_bad_loss(setup, state)  # also waits for the device, so that the epoch's time is the device's
    watch.training_s = watch.elapsed_s


def _validate(
    setup: Setup,
    state: State,
    network: torch.nn.Module,
    batches: Iterator[Batch],
    signals: Signals,
    display: Display,
    watch: Stopwatch,
) -> Evaluation | None:
    """The metrics of the validation split, where there is one."""
    for module in dict.fromkeys((state.network, state.validated)):  # in the same order on every rank
        setup.ranks.broadcast_buffers(module)  # which each rank has of its own pictures
    if not setup.val:
        return None
    display.task(f"{_epoch_of(setup, state)} validate", setup.val.steps)
    evaluation = evaluate_in(setup, network, display.counted(watch.waiting_for(batches)), signals)
    if not math.isfinite(evaluation.loss):
        # the last checkpoint is no help where it holds these very weights
        earlier = "the last checkpoint" if watch.pictures else "checkpoints/best.pt"
        raise DivergenceError(
            f"the validation loss of epoch {state.epoch + 1} is {evaluation.loss}; nothing of it was saved. "
            f"Resume from {earlier}, or start again, with a lower train.lr."
        )
    return evaluation


def _note_closing(setup: Setup, state: State, trained_s: float) -> None:
    """See how long it has been since the epoch's last step, at which the clock showed `trained_s`."""
    setup.ranks.agree(state.clock)
    state.closing_s = max(state.closing_s, state.clock.agreed_s - trained_s)


def _epoch_of(setup: Setup, state: State) -> str:
    epochs = setup.config.train.epochs
    return f"epoch {state.epoch + 1}" + (f"/{epochs}" if epochs else "")


def _step_metrics(setup: Setup, state: State, watch: Stopwatch) -> StepMetrics:
    loss, _ = state.sums.means()
    rate = watch.pictures / watch.elapsed_s
    eta_s = min(_steps_left(setup, state) * setup.train.global_batch / rate, _time_left_s(setup, state))
    return StepMetrics(loss, rate, watch.waited_s / watch.elapsed_s, eta_s)


def _steps_left(setup: Setup, state: State) -> float:
    data, config = setup.train, setup.config.train
    epochs = config.epochs or math.inf
    steps = (epochs - state.epoch - 1) * data.steps + data.left(state.position)
    return steps if config.max_steps is None else min(steps, config.max_steps - state.step)


def _time_left_s(setup: Setup, state: State) -> float:
    hours = setup.config.train.hours
    return math.inf if hours is None else max(HOUR_S * hours - state.clock.agreed_s, 0.0)


def _row(
    state: State, training: tuple[float, float], validation: Evaluation | None, watch: Stopwatch
) -> dict[str, float | None]:
    """What metrics.jsonl holds of an epoch: loss and accuracy of training, and all metrics of validation."""
    loss, accuracy = training
    return {
        "epoch": state.epoch + 1,
        "step": state.step,
        "lr": state.schedule.lr,
        "train_loss": loss,
        "train_accuracy": accuracy,
        "val_loss": validation.loss if validation else None,
        "val_accuracy": validation.accuracy if validation else None,
        "val_top5": validation.top5 if validation else None,
        "val_macro_f1": validation.macro_f1 if validation else None,
        "images_per_s": watch.pictures / watch.training_s if watch.pictures else None,  # None: stopped in validation
        "epoch_s": watch.elapsed_s,
        "data_wait": watch.waited_s / watch.elapsed_s,
    }
