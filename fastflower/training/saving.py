"""What a run keeps of training, at a step's end: the last checkpoint, the best one, and never a broken one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from fastflower.errors import UserError
from fastflower.runtime.checkpoint import first_non_finite, load_checkpoint, save_checkpoint, save_weights, weights_of
from fastflower.runtime.entries import Checkpoint
from fastflower.runtime.run_folder import RunFolder, RunLog
from fastflower.runtime.signals import Stopped
from fastflower.training.state import Setup, State, makes_best


class DivergenceError(UserError):
    """The loss is not finite, so that the weights are not worth keeping."""


@contextlib.contextmanager
def saving(setup: Setup, state: State, folder: RunFolder) -> Iterator[None]:
    """Save what is trained of the epoch when a signal or a bad record ends it, which it does on all ranks together."""
    try:
        yield
    except DivergenceError:
        raise
    except Stopped:
        refuse_bad_loss(setup, state)
        save(setup, state, folder)
        raise
    except UserError as error:
        if not state.position:
            raise  # nothing that an earlier save has not
        refuse_bad_loss(setup, state)
        save(setup, state, folder)
        raise UserError(
            f"{error} Epoch {_trained_epoch(state)} is saved up to step {state.step}: then go on with --resume "
            f"{folder.path}."
        ) from error


def refuse_bad_loss(setup: Setup, state: State) -> None:
    """Raise UserError on every rank if the loss of any was not finite."""
    bad_steps = [bad for bad in setup.ranks.gather(state.sums.first_bad()) if bad]
    if bad_steps:
        step, lr = min(bad_steps)
        raise DivergenceError(
            f"the loss was not finite for the first time at step {step} (epoch {state.epoch + 1}, lr {lr:g}); nothing "
            "of it was saved. Resume from the last checkpoint, or start again, with a lower train.lr."
        )


def save(
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
    setup.ranks.agree(state.clock)
    saved = state.to_dict(setup)
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


def settle(folder: RunFolder, checkpoint: Path, saved: Checkpoint, *, goes_on: bool) -> None:
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
        best = load_checkpoint(folder.best)
        if (best["step"], best["best"]) == (saved["step"], saved["best"]) and folder.best_weights.is_file():
            return
    keep_best(folder, saved)


def keep_best(folder: RunFolder, saved: Checkpoint) -> None:
    """Write best, all of a checkpoint and its weights alone; OSError where that fails."""
    metadata = {
        "architecture": saved["config"]["model"],
        "classes": saved["classes"],
        "normalization": saved["normalization"],
        "train_records": saved["train_records"],
    }
    save_weights(folder.best_weights, weights_of(saved), metadata)
    save_checkpoint(folder.best, saved)


def _trained_epoch(state: State) -> int:
    """The epoch, from 1, of the last step."""
    return state.epoch + 1 if state.position else state.epoch
