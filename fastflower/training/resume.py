"""Going on from a checkpoint: what may have changed, what then begins anew, and what is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fastflower.data.sampler import moved_position
from fastflower.errors import UserError
from fastflower.models import architecture
from fastflower.runtime.checkpoint import load_checkpoint, require_fit
from fastflower.runtime.entries import Checkpoint
from fastflower.runtime.progress import Display
from fastflower.runtime.run_folder import RunFolder, changes, read_rows
from fastflower.tables import written
from fastflower.training.optimizer import require_fitting_state
from fastflower.training.state import Setup, State, is_better, makes_best


def restore(
    state: State, setup: Setup, folder: RunFolder, checkpoint: Path, saved: Checkpoint, display: Display
) -> str:
    """Go on from a checkpoint that `load_checkpoint` read; the note to record beside the configuration.

    Raises:
        UserError: the network, the optimizer, the classes or the records are not those of the checkpoint.
    """
    history = (read_rows(folder.metrics), _kept_best(folder)) if setup.ranks.is_main else ([], None)
    rows, best = setup.ranks.gather(history)[0]
    _refuse_another(saved, setup, checkpoint)
    changed = changes(saved["config"], setup.config)
    adapted, sentences = adapt(saved, setup, rows, best)
    for weights in (saved["model"], saved["ema"]):
        if weights is not None:
            require_fit(state.network, weights, checkpoint)
    require_fitting_state(state.optimizer, saved["optimizer"], checkpoint)
    state.load(adapted, setup.ranks, setup.config)
    where = f"epoch {state.epoch + 1}, step {state.step}"
    display.say(f"Resuming {checkpoint} at {where}" + (f"; changed: {', '.join(changed)}" if changed else ""))
    for sentence in sentences:
        display.say(sentence)
    return f"resumed at {where}" + (f": {', '.join(changed)}" if changed else "")


def adapt(
    saved: Checkpoint, setup: Setup, rows: Sequence[Mapping[str, Any]], best: tuple[int, int] | None
) -> tuple[Checkpoint, list[str]]:
    """What the present data and settings make of a checkpoint, and a sentence for each thing that is not as it was.

    Args:
        saved: the checkpoint.
        setup: data and settings to go on with.
        rows: of the run's metrics.jsonl (`read_rows`).
        best: the epoch, from 0, that the run's best checkpoint is of, and its step; None where there is none.
    """
    sentences: list[str] = []
    saved = _follow_best(saved, best, sentences)
    saved = _follow_records(saved, setup, sentences)
    saved = _follow_validation(saved, setup, sentences)
    saved = _follow_figure(saved, setup, rows, sentences)
    return saved, sentences


def _kept_best(folder: RunFolder) -> tuple[int, int] | None:
    with contextlib.suppress(UserError):  # damaged or not there
        best = load_checkpoint(folder.best)
        return best["epoch"] - 1, best["step"]
    return None


def _refuse_another(saved: Checkpoint, setup: Setup, checkpoint: Path) -> None:
    """Raise UserError where what was trained cannot be trained on."""
    config, before = setup.config, saved["config"]
    model, its = asdict(config.model), before["model"]
    if architecture(its) != architecture(model) or its["zero_init_gamma"] != model["zero_init_gamma"]:
        raise UserError(f"{checkpoint} holds another network ({its}): a resumed run keeps its model settings.")
    old, now = saved["train_records"], setup.provenance.train_records
    noted = "whole" in old  # an earlier version noted only the records that trained
    same_train = old["whole"] == now["whole"] if noted else old["names"] == now["names"]
    skip = "" if noted else "data.skip, "
    for what, same in (("classes", saved["classes"] == setup.provenance.classes), ("training records", same_train)):
        if not same:
            raise UserError(
                f"{checkpoint} was trained on other {what} than this would be: keep its data.root, data.sizes, "
                f"data.val_share, data.folds, data.fold, data.train_on, {skip}and seed."
            )
    if before["train"]["optimizer"] != config.train.optimizer:
        raise UserError(
            f"{checkpoint} was trained by {before['train']['optimizer']}: a resumed run keeps its train.optimizer."
        )


def _follow_best(saved: Checkpoint, best: tuple[int, int] | None, sentences: list[str]) -> Checkpoint:
    """Without what is best, where neither the best checkpoint nor this one is of that epoch: it was removed, or is of a
    later epoch than an older checkpoint that is gone on from.
    """
    epoch = saved["best_epoch"]
    if epoch < 0 or makes_best(saved) or (best and best[0] == epoch and best[1] <= saved["step"]):
        return saved
    sentences.append(f"The best checkpoint is not of epoch {epoch + 1}, which was the best: what is best begins anew.")
    return _anew(saved)


def _follow_records(saved: Checkpoint, setup: Setup, sentences: list[str]) -> Checkpoint:
    """Where the epoch in progress goes on, if other records are left out than before or its order is another one."""
    config, before = setup.config, saved["config"]
    old, now = saved["train_records"], setup.provenance.train_records
    if old.get("content") and old["names"] == now["names"] and old["content"] != now["content"]:
        sentences.append("The training records have other bytes than before, under the same names.")
    position, epoch = saved["position"], saved["epoch"]
    same_order = (before["seed"], before["data"]["sampling"]) == (config.seed, config.data.sampling)
    if same_order and "left_out" in old:
        if old["left_out"] == now["left_out"]:
            return saved
        sentences.append(f"Trains on {now['count']} records; there were {old['count']} before.")
        kept = ~np.isin(np.arange(len(setup.train.kept)), old["left_out"])
        train = setup.train
        moved = moved_position(position, kept, train.kept, seed=config.seed, epoch=epoch, keyed=train.keyed)
        return {**saved, "position": moved}
    if not position or not setup.train.left(position):
        return saved
    sentences.append(f"Epoch {epoch + 1} begins anew, since its records come in another order than before.")
    return {**saved, "position": 0, "sums": []}


def _follow_validation(saved: Checkpoint, setup: Setup, sentences: list[str]) -> Checkpoint:
    """Without what earlier epochs' figures decided, if they are not comparable with those to come."""
    data, before = setup.config.data, saved["config"]["data"]
    old, now = saved["val_records"], setup.provenance.val_records
    # an earlier version may not have noted them, and a later one may have noted more of them
    same_records = not old or (now is not None and now.items() <= old.items())
    same_view = (before["crop"], before["val_resize"]) == (data.crop, data.val_resize)
    if same_records and same_view:
        return saved
    if saved["best_epoch"] >= 0:
        what = "is of another data.crop or data.val_resize" if not same_view else "is on other records"
        sentences.append(f"Validation {what} than before: what is best, train.early_stop and plateau begin anew.")
    plateau = saved["config"]["train"]["schedule"] == "plateau"  # a curve has not seen it
    schedule = {} if plateau else saved["schedule"]
    return {**_anew(saved), "schedule": schedule, "comparable_from": saved["epoch"]}


def _follow_figure(
    saved: Checkpoint, setup: Setup, rows: Sequence[Mapping[str, Any]], sentences: list[str]
) -> Checkpoint:
    """What later epochs have to beat, if another figure decides than before: the kept best's, by metrics.jsonl."""
    figure, epoch = setup.config.train.best, saved["best_epoch"]
    if saved["config"]["train"]["best"] == figure or epoch < 0 or not setup.val:
        return saved
    name = f"val_{figure}"
    values = {row["epoch"] - 1: row[name] for row in rows if row.get(name) is not None}
    comparable = range(saved["comparable_from"], saved["epoch"])
    if epoch not in comparable or any(number not in values for number in comparable):
        sentences.append("metrics.jsonl lacks epochs: what is best by another train.best begins anew.")
        return _anew(saved)
    sentences.append(
        f"The best checkpoint is of epoch {epoch + 1}, whose validation {figure} is {written(figure, values[epoch])}."
    )
    improved = comparable[0]
    for number in comparable:
        if is_better(values[number], values[improved], figure):
            improved = number
    return {**saved, "best": values[epoch], "improved_epoch": improved}


def _anew(saved: Checkpoint) -> Checkpoint:
    return {**saved, "best": None, "best_epoch": -1, "improved_epoch": saved["epoch"] - 1}
