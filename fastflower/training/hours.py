"""What train.hours leaves time for."""

from __future__ import annotations

from fastflower.training.schedule import HOUR_S
from fastflower.training.state import Setup, State

STEPS = 4  # that are timed, after the first one, which compiles


def is_time_over(setup: Setup, state: State) -> bool:
    """Whether nothing more is to be trained, so that validation and saving end within train.hours too.

    The first step is always taken.
    """
    hours = setup.config.train.hours
    return hours is not None and state.step > 0 and state.clock.agreed_s + state.closing_s >= HOUR_S * hours


class Foresight:
    """How long the first validation will take, as the first steps tell: a batch of it at most as long as a step.

    Of later ones `State.closing_s` knows what the earlier took. So an end in the first epoch leaves time for it.
    """

    def __init__(self, setup: Setup, state: State) -> None:
        """For the epoch in progress."""
        self._state = state
        batches = len(setup.val.loader.records) / setup.train.global_batch if setup.val else 0.0
        self._batches = batches if setup.config.train.hours and not state.closing_s else 0.0
        self._taken, self._began_s = 0, 0.0

    def step(self) -> None:
        """A step begins."""
        if not self._batches:
            return
        self._taken += 1
        if self._taken == 2:
            self._began_s = self._state.clock.agreed_s
        if self._taken == 2 + STEPS:
            self._state.closing_s = self._batches * (self._state.clock.agreed_s - self._began_s) / STEPS
            self._batches = 0.0
