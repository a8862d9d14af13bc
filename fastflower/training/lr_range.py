"""What a learning-rate range test tries, and what it finds."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from fastflower.errors import UserError

SMOOTHING = 0.9  # share of the earlier losses in the smoothed one: ten steps, about
EXPLODED = 4  # times the lowest smoothed loss: the test ends
BELOW_LOWEST = 10  # the suggestion is so many times lower than the rate of the lowest loss
LEAST_STEPS = 20


@dataclass(frozen=True)
class Range:
    """Rates that are tried, each in one step and each larger than the one before by the same factor."""

    low: float = 1e-5
    high: float = 10.0
    steps: int = 200

    def __post_init__(self) -> None:
        """Raise UserError unless it is a range."""
        if not 0 < self.low < self.high < math.inf:
            raise UserError(f"--low {self.low:g} and --high {self.high:g}: give the lower rate first, above 0.")
        if self.steps < LEAST_STEPS:
            raise UserError(f"--steps is {self.steps}: give at least {LEAST_STEPS}, of which a curve can be made.")

    def rate(self, step: int) -> float:
        """That of a step, from 0."""
        return float(self.low * (self.high / self.low) ** (step / (self.steps - 1)))


@dataclass(frozen=True)
class RangeTest:
    """What a range test has found."""

    lr: list[float] = field(default_factory=list)  # of each step, that of the backbone
    loss: list[float] = field(default_factory=list)  # of each step before it was taken, over its batch
    exploded: bool = False  # whether it ended early

    @property
    def smoothed(self) -> list[float]:
        """Mean of each loss and those before it, which weigh less and less."""
        mean, means = 0.0, []
        for number, loss in enumerate(self.loss, start=1):
            mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
            means.append(mean / (1 - SMOOTHING**number))
        return means

    @property
    def lowest(self) -> int | None:
        """The step with the lowest smoothed loss; None where no loss was lower than that of the first steps."""
        smoothed = self.smoothed
        place = min(range(len(smoothed)), key=smoothed.__getitem__, default=0)
        return place if place >= LEAST_STEPS // 2 else None

    @property
    def suggestion(self) -> float | None:
        """A rate for train.lr (its highest, with cosine and onecycle): a tenth of that with the lowest loss."""
        return None if self.lowest is None else float(f"{self.lr[self.lowest] / BELOW_LOWEST:.2g}")

    def to_plain(self) -> dict[str, Any]:
        """What is written as JSON."""
        return {**asdict(self), "smoothed": self.smoothed, "suggestion": self.suggestion}


def conclusion(test: RangeTest) -> str:
    """What the test says of train.lr."""
    if test.lowest is None:
        what = "The loss only rose: give a lower --low." if test.exploded else "No rate has lowered the loss."
        return f"{what} There is nothing to suggest."
    ended = f", and exploded at {test.lr[-1]:.2g}" if test.exploded else ""
    return (
        f"The loss was lowest at lr {test.lr[test.lowest]:.2g}{ended}: try --train.lr {test.suggestion:g}, a tenth of "
        "it; with a warm-up more may do."
    )
