"""When a run goes on and when it has ended."""

from __future__ import annotations

from fastflower.training.state import Setup, State


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
