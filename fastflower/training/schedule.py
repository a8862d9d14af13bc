"""The learning rate over a run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fastflower.training.optimizer import LR_SCALE

if TYPE_CHECKING:
    from fastflower.config import TrainConfig

# One-cycle's ends, as torch.optim.lr_scheduler.OneCycleLR has them: starts at peak/25, ends at start/10,000.
ONECYCLE_START, ONECYCLE_END = 1 / 25, 1 / 250_000


# With train.hours, which says nothing of epochs: the warm-up's largest share of the time, where epochs are long.
LONGEST_WARMUP = 1 / 4
HOUR_S = 3600
PLATEAU = ("best", "num_bad_epochs", "last_epoch")  # what torch's remembers


@dataclass(frozen=True)
class Moment:
    """How far a run has come."""

    epochs: float  # that are done, fractions allowed
    spent_s: float = 0.0  # seconds of all its sessions


START = Moment(0.0)


def share_over(train: TrainConfig, now: Moment, closing_s: float = 0.0, since: Moment = START) -> float:
    """Share of the run's training that is over: of its epochs or of its time, whichever comes first.

    Args:
        train: the settings; without train.hours the time is unlimited.
        now: how far the run has come.
        closing_s: seconds of train.hours that what follows the last step takes, such as validation.
        since: counts what follows this moment.
    """
    shares = [0.0]
    if train.epochs:
        shares.append(_share(now.epochs - since.epochs, train.epochs - since.epochs))
    if train.hours:
        shares.append(_share(now.spent_s - since.spent_s, HOUR_S * train.hours - closing_s - since.spent_s))
    return min(max(shares), 1.0)


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 1.0


def learning_rate(train: TrainConfig, now: Moment, warm: Moment | None = None, closing_s: float = 0.0) -> float:
    """The rate of step, cosine and onecycle.

    Step: times factor after each of the epochs in milestones. Cosine: linear from 0 in the warm-up, then half a cosine
    to 0 (Loshchilov and Hutter 2017). Onecycle: half a cosine up from peak/25 in the warm-up, half a cosine down after
    it (Smith and Topin 2018; momentum stays as it is). A curve never goes back while a run comes further.

    Args:
        train: the settings.
        now: how far the run has come.
        warm: with train.hours, when the warm-up ended, if it has.
        closing_s: as of `share_over`; it must not become less in a run.
    """
    lr = train.peak_lr
    if train.schedule == "step":
        return lr * train.factor ** sum(now.epochs >= milestone for milestone in train.milestones)
    if not warm and (progress := warmed_up(train, now, closing_s)) < 1:
        return lr * progress if train.schedule == "cosine" else _half_cosine(lr * ONECYCLE_START, lr, progress)
    progress = share_over(train, now, closing_s, since=warm or end_of_warmup(train, now))
    return _half_cosine(lr, 0.0 if train.schedule == "cosine" else lr * ONECYCLE_END, progress)


def warmed_up(train: TrainConfig, now: Moment, closing_s: float = 0.0) -> float:
    """Share of the warm-up of cosine and onecycle that is over; 1 or more after it.

    With train.hours it may be shorter than warmup_epochs: it takes at most the share of the run that it has of
    train.epochs, or LONGEST_WARMUP, whichever is longer.
    """
    by_epochs = now.epochs / train.warmup_epochs if train.warmup_epochs else 1.0
    if not train.hours:
        return by_epochs
    longest = max(LONGEST_WARMUP, train.warmup_epochs / train.epochs if train.epochs else 0.0)
    return max(by_epochs, share_over(train, now, closing_s) / longest)


def end_of_warmup(train: TrainConfig, now: Moment) -> Moment:
    """When the warm-up ended, if it has by now and was not seen to: after its epochs, which took their share of the
    time, or now, by its time.
    """
    if now.epochs < train.warmup_epochs:
        return now
    return Moment(train.warmup_epochs, now.spent_s * train.warmup_epochs / now.epochs if now.epochs else 0.0)


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


class Schedule:
    """Sets the optimizer's learning rates before each step (step, cosine, onecycle) or after each epoch (plateau).

    Plateau is torch's ReduceLROnPlateau on the validation loss: an epoch improves if it is lower than the best by more
    than a relative 1e-4; after more than `patience` epochs without that, the rate is multiplied by `factor`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, train: TrainConfig) -> None:
        self._optimizer, self._train = optimizer, train
        self._warm: Moment | None = None  # with train.hours, when the warm-up ended
        self._plateau = (
            ReduceLROnPlateau(optimizer, factor=train.factor, patience=train.patience)
            if train.schedule == "plateau"
            else None
        )

    @property
    def lr(self) -> float:
        """The backbone's rate in the next step, or in the last one taken where it follows a curve."""
        rate: float = self._optimizer.param_groups[0]["lr"]
        return rate

    def before_step(self, now: Moment, closing_s: float = 0.0) -> None:
        """Set the rate of the step that begins now; see `learning_rate`."""
        if self._plateau:
            return
        if self._train.hours and not self._warm and warmed_up(self._train, now, closing_s) >= 1:
            self._warm = end_of_warmup(self._train, now)
        rate = learning_rate(self._train, now, self._warm, closing_s)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group[LR_SCALE]

    def is_warm(self, now: Moment) -> bool:
        """Whether the rate has been as high as it gets, before now: after the warm-up, where there is one."""
        return self._train.schedule in ("plateau", "step") or bool(self._warm) or warmed_up(self._train, now) > 1

    def after_epoch(self, val_loss: float) -> None:
        """Let plateau see the epoch's validation loss, which must be the same on every rank."""
        if self._plateau:
            self._plateau.step(val_loss)

    def state_dict(self) -> dict[str, Any]:
        """Plateau's memory; of a curve, with train.hours, when the warm-up ended."""
        if self._plateau:
            return {name: getattr(self._plateau, name) for name in PLATEAU}
        return asdict(self._warm) if self._warm else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it; patience and factor are those of the configuration, which may have changed."""
        if self._plateau:
            for name in state.keys() & set(PLATEAU):
                setattr(self._plateau, name, state[name])
        elif state.keys() == {field.name for field in fields(Moment)}:
            self._warm = Moment(**state)
