"""Layers that the networks share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class BNReLU(nn.BatchNorm2d):
    """Batch normalization, an optional residual added to it, and ReLU, as one module.

    Its arguments, parameters, buffers and state_dict are BatchNorm2d's.
    """

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """relu(batch_norm(input) + residual); input, residual and output are [N, C, H, W]."""
        normalized = super().forward(input)  # a new tensor, which no gradient needs: the rest may work in its memory
        return F.relu_(normalized if residual is None else normalized.add_(residual))
