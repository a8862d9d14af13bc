"""An exponential moving average of a network's weights."""

from __future__ import annotations

import copy

import torch


class Ema:
    """A second network whose weights and BatchNorm statistics follow the first one's slowly (Polyak averaging)."""

    def __init__(self, network: torch.nn.Module, decay: float) -> None:
        """Start from `network` as it is; `decay` is what stays of the average in a step."""
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        self._decay = decay
        pairs = list(zip(self.network.state_dict().values(), network.state_dict().values(), strict=True))
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Take in the weights after `steps` steps.

        The decay is at most (1 + steps) / (10 + steps), so that the random start is soon forgotten (as TensorFlow's
        ExponentialMovingAverage has it).
        """
        decay = min(self._decay, (1 + steps) / (10 + steps))
        averages, values = zip(*self._averaged, strict=True)
        torch._foreach_lerp_(averages, values, 1 - decay)
        for average, value in self._copied:
            average.copy_(value)
