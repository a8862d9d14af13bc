"""Training and a dry run, from settings to a run: what the command line calls."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from fastflower.config import Config, resolve
from fastflower.data.splits import has_split
from fastflower.environment import environment
from fastflower.errors import UserError
from fastflower.files import as_word
from fastflower.layers import Layers
from fastflower.runtime.checkpoint import load_checkpoint
from fastflower.runtime.clock import Clock
from fastflower.runtime.device import choose_device
from fastflower.runtime.distributed import Ranks, processes
from fastflower.runtime.launcher import local_rank
from fastflower.runtime.lock import own_folder
from fastflower.runtime.progress import Display, clock
from fastflower.runtime.repeatable import repeatable
from fastflower.runtime.run_folder import RunFolder, read_rows
from fastflower.runtime.signals import Stopped
from fastflower.tables import TITLES, written
from fastflower.training.dry_run import rehearse
from fastflower.training.fit import settings_of
from fastflower.training.loop import train
from fastflower.training.passes import why_ended
from fastflower.training.resume import restore
from fastflower.training.saving import settle
from fastflower.training.setup import prepare
from fastflower.training.state import Setup, State


def settings_alone(layers: Layers, console: Console) -> Config:
    """The settings that training from `layers` by one process would have; see `settings_of`."""
    config = resolve(layers.typed())
    device = choose_device(config.device, local_rank())
    with repeatable(config.train.deterministic, device):
        return settings_of(layers, device, Ranks(), console)


def dry_run(layers: Layers, console: Console) -> None:
    """Build all that training from `layers` needs, and try it in two steps.

    Raises:
        UserError: see `settings_of`, `prepare` and `fastflower.training.dry_run.rehearse`.
    """
    config = resolve(layers.typed())
    device = choose_device(config.device, local_rank())
    with (
        processes(device) as ranks,
        repeatable(config.train.deterministic, device),
        Display(console, shown=ranks.is_main) as display,
    ):
        config = settings_of(layers, device, ranks, console)
        rehearse(*prepare(config, device, ranks, display), display)


def train_run(
    layers: Layers, *, name: str, run: Path | None, checkpoint: Path | None, overwrite: bool, console: Console
) -> Path:
    """Train from a configuration into a run folder; new, or going on from a checkpoint.

    Args:
        layers: the settings, with a resumed run's already in them.
        name: of a new folder under runs/.
        run: the folder, or None for a new one (or the checkpoint's).
        checkpoint: where to go on from; None starts anew.
        overwrite: clear a run that is already in `run`.
        console: where progress is shown.

    Returns:
        The run folder.

    Raises:
        UserError: see `settings_of`, `train_into` and `own_folder`; or `run` already holds a run, or something else.
        Stopped: a signal came, and all steps until then are saved.
    """
    config = resolve(layers.typed())
    device = choose_device(config.device, local_rank())
    given = checkpoint.parents[1] if checkpoint else run
    with (
        processes(device) as ranks,
        repeatable(config.train.deterministic, device),
        own_folder(given, name, ranks) as folder,
    ):
        with ranks.together():
            if ranks.is_main and not checkpoint:
                folder.require_own()
            if ranks.is_main and folder.exists and not (checkpoint or overwrite):
                content = "a run" if folder.checkpoint else "a run, but none of its checkpoints"
                resume = f"--resume {as_word(folder.path)}, " if folder.checkpoint else ""
                raise UserError(f"{folder.path} already holds {content}: give {resume}--overwrite or another --run.")
        config = settings_of(layers, device, ranks, console)
        try:
            train_into(folder, config, checkpoint, device, ranks, console)
        except Stopped:
            Display(console, shown=ranks.is_main).say(f"Go on with: fastflower train --resume {as_word(folder.path)}")
            raise
        return folder.path


def train_into(
    folder: RunFolder, config: Config, checkpoint: Path | None, device: torch.device, ranks: Ranks, console: Console
) -> None:
    """Train in these processes, into a folder that is theirs (`own_folder`); see `train_run`.

    Raises:
        UserError: see `prepare`, `fastflower.training.resume.restore` and `fastflower.training.loop.train`; or the
            folder cannot be written.
        Stopped: a signal came, and all steps until then are saved.
    """
    time_spent = Clock()
    display = Display(console, shown=ranks.is_main)
    saved = load_checkpoint(checkpoint) if checkpoint else None
    with display:
        setup, state = prepare(config, device, ranks, display, saved)
    state.clock = time_spent
    note = restore(state, setup, folder, checkpoint, saved, display) if checkpoint and saved else None
    end = why_ended(setup, state)
    with ranks.together(), folder.writing():
        if ranks.is_main:
            folder.clear_temporaries()
            if checkpoint and saved:
                settle(folder, checkpoint, saved, goes_on=not end)
            else:
                folder.clear()
            if not end:
                folder.write_config(setup.config, note)
                folder.write_environment(environment(device) | {"world_size": ranks.world_size, "step": state.step})
    display.say(f"Run folder: {folder.path}")
    if end:
        display.say(end)
        return
    try:
        with display:
            train(setup, state, folder, display)
    except Stopped as signal:
        display.say(f"Stopped by {signal} and saved.")
        raise
    for sentence in _outcome(setup, state, folder):
        display.say(sentence)


def _outcome(setup: Setup, state: State, folder: RunFolder) -> tuple[str, str]:
    """What a run has come to, and what may follow."""
    figure, spent, run = setup.config.train.best, f"{clock(state.clock.agreed_s)} in all", as_word(folder.path)
    if state.best_epoch < 0:
        follows = f"Go on with: fastflower train --resume {run} --train.max-steps none"  # which ended it
        return f"Done. Stopped before an epoch's end, {spent}.", follows
    if state.best is None:
        epochs = f"{state.epoch} {'epoch' if state.epoch == 1 else 'epochs'}"
        pictures = "" if has_split(setup.config.data, "test") else " NEWPICTURES --out names.csv"
        return f"Done. Trained for {epochs}, {spent}.", f"Next: fastflower predict {run}{pictures}"
    rows = read_rows(folder.metrics) if setup.ranks.is_main else []
    best = next((row for row in rows if row["epoch"] == state.best_epoch + 1), {f"val_{figure}": state.best})
    names = (figure, *({"accuracy"} - {figure}))
    figures = ", ".join(f"{TITLES[name]} {written(name, best.get(f'val_{name}'))}" for name in names)
    return (
        f"Done. Best validation {figures}, in epoch {state.best_epoch + 1} of {state.epoch}; {spent}.",
        f"Next: fastflower eval {run}",
    )
