"""The learning rate over a run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fastflower.training.optimizer import LR_SCALE

if TYPE_CHECKING:
    from fastflower.config import TrainConfig

# One-cycle's ends, as torch.optim.lr_scheduler.OneCycleLR has them: starts at peak/25, ends at start/10,000.
ONECYCLE_START, ONECYCLE_END = 1 / 25, 1 / 250_000


def learning_rate(train: TrainConfig, epochs_done: float) -> float:
    """The rate of step, cosine and onecycle after `epochs_done` epochs (fractions allowed).

    Step: times factor after each of the epochs in milestones. Cosine: linear from 0 in the warm-up, then half a cosine
    to 0 (Loshchilov and Hutter 2017). Onecycle: half a cosine up from peak/25 in the warm-up, half a cosine down after
    it (Smith and Topin 2018; momentum stays as it is).
    """
    lr, warmup, total = train.peak_lr, train.warmup_epochs, float(train.epochs)
    if train.schedule == "step":
        return lr * train.factor ** sum(epochs_done >= milestone for milestone in train.milestones)
    if epochs_done < warmup:
        progress = epochs_done / warmup
        return lr * progress if train.schedule == "cosine" else _half_cosine(lr * ONECYCLE_START, lr, progress)
    progress = min((epochs_done - warmup) / (total - warmup), 1.0)
    return _half_cosine(lr, 0.0 if train.schedule == "cosine" else lr * ONECYCLE_END, progress)


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


class Schedule:
    """Sets the optimizer's learning rates before each step (step, cosine, onecycle) or after each epoch (plateau).

    Plateau is torch's ReduceLROnPlateau on the validation loss: an epoch improves if it is lower than the best by more
    than a relative 1e-4; after more than `patience` epochs without that, the rate is multiplied by `factor`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, train: TrainConfig) -> None:
        self._optimizer, self._train = optimizer, train
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

    def before_step(self, epochs_done: float) -> None:
        """Set the rate of the step that begins after `epochs_done` epochs."""
        if not self._plateau:
            rate = learning_rate(self._train, epochs_done)
            for group in self._optimizer.param_groups:
                group["lr"] = rate * group[LR_SCALE]

    def after_epoch(self, val_loss: float) -> None:
        """Let plateau see the epoch's validation loss, which must be the same on every rank."""
        if self._plateau:
            self._plateau.step(val_loss)

    def state_dict(self) -> dict[str, Any]:
        """Plateau's memory; the curves have none."""
        if not self._plateau:
            return {}
        return {name: getattr(self._plateau, name) for name in ("best", "num_bad_epochs", "last_epoch")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore plateau's memory; patience and factor are those of the configuration, which may have changed."""
        if self._plateau:
            for name, value in state.items():
                setattr(self._plateau, name, value)
