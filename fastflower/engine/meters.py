"""Sums over an epoch, kept on the device and read seldom."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from fastflower.engine.distributed import Ranks


class TrainingSums:
    """Loss, hits and pictures of the epoch so far, and the first step whose loss was not finite."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss sum, hits, pictures
        self._bad_step = torch.full((), -1, dtype=torch.int64, device=device)  # -1: none
        self._bad_lr = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, step: int, lr: float) -> None:
        """Count a step: mean loss [], logits [N, C], labels [N]. Does not wait for the device."""
        n = len(labels)
        hits = (logits.argmax(1) == labels).sum()
        # numbers are added as they are: a tensor made of them would be copied, for which the device is waited for
        self._sums[0] += loss.double() * n
        self._sums[1] += hits
        self._sums[2] += n
        fresh = (self._bad_step < 0) & ~torch.isfinite(loss)
        self._bad_step = torch.where(fresh, step, self._bad_step)
        self._bad_lr = torch.where(fresh, lr, self._bad_lr)

    def first_bad(self) -> tuple[int, float] | None:
        """The first step with a NaN or infinite loss and its learning rate, or None. Waits for the device."""
        step = int(self._bad_step)
        return (step, float(self._bad_lr)) if step >= 0 else None

    def state(self, ranks: Ranks) -> list[list[float]]:
        """Every rank's sums, for a checkpoint."""
        return ranks.gather(self._sums.tolist())

    def load_state(self, state: list[list[float]], ranks: Ranks) -> None:
        """Go on from a checkpoint; with another number of ranks the main one takes all."""
        if len(state) == ranks.world_size:
            mine = state[ranks.rank]
        else:
            mine = [sum(column) for column in zip(*state, strict=True)] if ranks.is_main else [0.0, 0.0, 0.0]
        self._sums.copy_(torch.tensor(mine, dtype=torch.float64))

    def means(self, ranks: Ranks | None = None) -> tuple[float, float]:
        """Mean loss and accuracy, of this rank or over the given ranks."""
        loss, hits, n = (ranks.sum(self._sums.clone()) if ranks else self._sums).tolist()
        return loss / n, hits / n


@dataclass(frozen=True)
class Evaluation:
    """Figures over all records of a split."""

    n: int
    loss: float  # mean cross entropy
    accuracy: float  # top-1, share
    top5: float  # share whose class is among the five likeliest (or all, where there are fewer)
    macro_f1: float  # mean over the classes that occur in labels or predictions


class EvaluationSums:
    """Exact figures over records that are spread over batches and ranks."""

    def __init__(self, classes: int, device: torch.device) -> None:
        # without validate_args an update does not wait for the device; the labels were checked when they were indexed
        self._metrics = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(classes, average="micro", validate_args=False),
                "top5": MulticlassAccuracy(classes, top_k=min(5, classes), average="micro", validate_args=False),
                "macro_f1": MulticlassF1Score(classes, average="macro", validate_args=False),
            }
        ).to(device)
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss sum, records

    def add(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Count a batch: logits [N, C], labels [N]."""
        loss = F.cross_entropy(logits.float(), labels, reduction="none").double().sum()
        self._sums[0] += loss
        self._sums[1] += len(labels)
        self._metrics.update(logits.float(), labels)

    def result(self, ranks: Ranks) -> Evaluation:
        """The figures over all ranks; every rank must ask."""
        loss, n = ranks.sum(self._sums.clone()).tolist()
        figures = {name: float(value) for name, value in self._metrics.compute().items()}
        return Evaluation(n=int(n), loss=loss / n, **figures)
