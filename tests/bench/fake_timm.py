"""What the throughput benchmark takes from timm, which is not installed here.

It lies in a file of its own since worker processes import it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


class ToNumpy:
    """A picture to uint8 [3, H, W]."""

    def __call__(self, picture: Any) -> np.ndarray:
        return np.asarray(picture).transpose(2, 0, 1)


def fast_collate(batch: list[tuple[np.ndarray, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of [N, 3, H, W] uint8, and its labels."""
    return torch.from_numpy(np.stack([picture for picture, _ in batch])), torch.tensor([label for _, label in batch])


class PrefetchLoader:
    """Normalizes on the device, one batch behind the loader."""

    def __init__(self, loader: Any, *, mean: Any, std: Any, device: torch.device) -> None:
        self.loader, self.device = loader, device
        self.mean, self.std = (torch.tensor(values).view(1, 3, 1, 1) * 255 for values in (mean, std))

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        held = None
        for images, labels in self.loader:
            if held:
                yield held
            held = images.to(self.device).float().sub_(self.mean).div_(self.std), labels
        assert held
        yield held
