"""A loss that explodes without being infinite: the run goes on, but it is worth knowing."""

from __future__ import annotations

import math

from fastflower.training.schedule import Moment
from fastflower.training.state import Setup, State

TIMES_GUESSING = 10  # the loss of one who is sure and wrong each time is above that; of one who guesses, ln(classes)
# BatchNorm's running statistics, by which validation normalizes, hold less than 5 % of their start (0.9 ** 30), which
# alone can make a deep network's loss as large.
SETTLED_STEPS = 30


def has_exploded(loss: float, classes: int) -> bool:
    """Whether a validation loss is far above that of guessing.

    It is the plain mean cross entropy (nats) over all records, whatever train.label_smoothing, train.class_weights,
    mixup and cutmix make of the training loss, so that guessing costs ln(classes) in any run.
    """
    return loss > TIMES_GUESSING * math.log(max(classes, 2))


def explosion(setup: Setup, state: State, val_loss: float) -> str | None:
    """What to say of the validation at the end of the epoch in progress; None if nothing, or it is too early to tell.

    It is so within the warm-up of cosine and onecycle, while the backbone is frozen, and before BatchNorm's running
    statistics have settled.
    """
    train, classes = setup.config.train, len(setup.provenance.classes)
    now = Moment(state.epoch + 1, state.clock.agreed_s)
    early = state.step < SETTLED_STEPS or state.epoch < train.freeze_epochs or not state.schedule.is_warm(now)
    if early or not has_exploded(val_loss, classes):
        return None
    return (
        f"The validation loss has exploded: {val_loss:,.1f} after epoch {state.epoch + 1}, where guessing among "
        f"{classes} classes would cost {math.log(max(classes, 2)):.2f}. Start again with a lower train.lr, such as "
        f"{train.peak_lr / 10:.2g} instead of {train.peak_lr:.2g} (now {state.schedule.lr:.2g}); fastflower lr "
        "suggests one."
    )
