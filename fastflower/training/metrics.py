"""Sums over an epoch, kept on the device and read seldom."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastflower.runtime.distributed import Ranks

TOP = 5  # the likeliest classes, of which one is to be the true one in "top-5"


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
    """Metrics over all records of a split."""

    n: int
    loss: float  # mean cross entropy
    accuracy: float  # top-1, share
    top5: float  # share whose class is among the five likeliest (or all, where there are fewer)
    macro_f1: float  # mean over the classes that occur in labels or predictions


@dataclass(frozen=True)
class ClassCounts:
    """Records counted by class, and what follows from that; all are [C] float64, in which counts are exact."""

    true: torch.Tensor  # records of the class
    predicted: torch.Tensor  # those that are taken for it
    hits: torch.Tensor  # those of both

    @property
    def precision(self) -> torch.Tensor:
        """Share of those taken for the class that are of it; 0 where none is."""
        return self.hits / self.predicted.clamp(min=1)

    @property
    def recall(self) -> torch.Tensor:
        """Share of the class that is taken for it; 0 where there is none."""
        return self.hits / self.true.clamp(min=1)

    @property
    def f1(self) -> torch.Tensor:
        """Harmonic mean of precision and recall; 0 where neither is defined."""
        return 2 * self.hits / (self.true + self.predicted).clamp(min=1)

    @property
    def occurs(self) -> torch.Tensor:
        """[C] bool: whether the class is in labels or predictions."""
        return self.true + self.predicted > 0

    @property
    def accuracy(self) -> torch.Tensor:
        """Top-1 of all records, []."""
        return self.hits.sum() / self.true.sum()

    @property
    def macro_f1(self) -> torch.Tensor:
        """Mean F1 of the classes that occur, []."""
        return self.f1[self.occurs].mean()


class EvaluationSums:
    """Exact metrics over records that are spread over batches and ranks: sums of losses, and counts."""

    def __init__(self, classes: int, device: torch.device) -> None:
        # counts are exact in float64 too, and so all travel between the ranks as one tensor
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)  # losses, top-5 hits
        # true, predicted, hits of `ClassCounts`; a whole confusion matrix would be [C, C]
        self._by_class = torch.zeros(3, classes, dtype=torch.float64, device=device)

    def add(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Count a batch: logits [N, C], labels [N]. Does not wait for the device.

        Of equally likely classes the first counts as the likelier. A logit that is not finite makes the loss NaN.
        """
        scores = logits.double()
        losses = F.cross_entropy(scores, labels, reduction="none")
        losses = torch.where(scores.isfinite().all(1), losses, torch.nan)
        own, classes = scores.gather(1, labels[:, None]), torch.arange(scores.shape[1], device=scores.device)
        likelier = (scores > own) | ((scores == own) & (classes < labels[:, None]))
        place = likelier.sum(1)  # of the true class among all, from 0
        self._sums[0] += losses.sum()
        self._sums[1] += (place < TOP).sum()
        true, predicted, hits = self._by_class
        counted = torch.ones_like(losses)
        true.scatter_add_(0, labels, counted)  # bincount would wait for the device
        predicted.scatter_add_(0, scores.argmax(1), counted)
        hits.scatter_add_(0, labels, (place == 0).double())

    def result(self, ranks: Ranks) -> Evaluation:
        """The metrics over the given ranks, each of which must ask."""
        total = ranks.sum(torch.cat([self._sums, self._by_class.flatten()])).cpu()
        (loss, top5), counts = total[:2], ClassCounts(*total[2:].view_as(self._by_class))
        n = counts.true.sum()
        return Evaluation(int(n), *map(float, (loss / n, counts.accuracy, top5 / n, counts.macro_f1)))
