"""A run's passes over its splits, one after another: the next one begins while the present one's last batches are used.

So neither the network nor the loader waits for the other between training and validation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import TracebackType

from fastflower.data.loader import Batch, Iteration
from fastflower.training.hours import is_time_over
from fastflower.training.state import Setup, State


class Passes:
    """The batches of the epoch in progress; those that are still being made are given up where the block ends."""

    def __init__(self, setup: Setup, state: State) -> None:
        self._setup, self._state = setup, state
        self._present: Iteration | None = None
        self._coming: Iteration | None = None
        engine = setup.train.loader.loading.engine
        self._on_their_way = 2 * engine.prefetch  # batches in work and those that wait: then the loader needs no more

    def __enter__(self) -> Passes:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        for iteration in (self._coming, self._present):
            if iteration:
                iteration.close()

    def training(self) -> Iterator[Batch]:
        """The rest of the epoch in progress."""
        state, data, validation = self._state, self._setup.train, self._setup.val
        epoch, position = state.epoch, state.position
        steps = data.left(position)
        most = self._setup.config.train.max_steps
        following = validation.once if validation else self._next_epoch(state.step + steps)
        if most is not None and state.step + steps > most:
            following = None  # the run ends before the epoch does
        return self._one(lambda: data.epoch(epoch, position), steps, following)

    def validation(self) -> Iterator[Batch]:
        """Validation after the epoch in progress; empty where nothing validates."""
        validation = self._setup.val
        if not validation:
            return iter(())
        return self._one(validation.once, validation.steps, self._next_epoch(self._state.step))

    def _next_epoch(self, step: int) -> Callable[[], Iteration] | None:
        """What begins it, if it comes even where this one, which ends after `step` steps, improves nothing."""
        later = replace(self._state, epoch=self._state.epoch + 1, position=0, step=step)
        return None if why_ended(self._setup, later) else lambda: self._setup.train.epoch(later.epoch)

    def _one(
        self, begin: Callable[[], Iteration], steps: int, following: Callable[[], Iteration] | None
    ) -> Iterator[Batch]:
        """A pass of so many steps, begun by now or not, before whose end the following one begins."""
        self._present, self._coming = self._coming or begin(), None
        with contextlib.closing(self._present) as batches:
            for step, batch in enumerate(batches, start=1):
                if following and not self._coming and steps - step < self._on_their_way:
                    self._coming = following()
                yield batch


def why_ended(setup: Setup, state: State) -> str | None:
    """Why nothing more is to be trained, and what would change that; None if something is."""
    config = setup.config.train
    if config.epochs is not None and state.epoch >= config.epochs:
        return f"All {config.epochs} epochs are done; give a larger --train.epochs to go on."
    if is_time_over(setup, state) and not state.position:  # else an epoch waits for its validation
        return f"The time of train.hours, {config.hours:g}, is over; give a larger --train.hours to go on."
    if config.early_stop and state.epoch - 1 - state.improved_epoch >= config.early_stop:
        return (
            f"No better validation {config.best} in {config.early_stop} epochs: stopped early; give a larger "
            "--train.early-stop, or none, to go on."
        )
    if config.max_steps is not None and state.step >= config.max_steps and setup.train.left(state.position):
        return (
            f"train.max_steps: stopped after {state.step} steps and saved; give a larger --train.max-steps, or none, "
            "to go on."
        )
    return None
