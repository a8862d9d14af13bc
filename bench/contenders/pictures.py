"""Records as a torch Dataset, for the workers of a DataLoader. They import this file, so it imports neither DALI nor
torchvision, which they get with what they are handed.
"""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import Any

import PIL.Image
import torch
from torch.utils.data import Dataset

from fastflower.arrays import Bytes
from fastflower.data.records import Records, read_image

Resize = Callable[[Any, list[int]], Any]  # a picture to this shorter side


class Pictures(Dataset[tuple[Any, int]]):
    """Records with a random shorter side, then what `transform` makes of them, and their labels."""

    def __init__(
        self,
        records: Records,
        scale: tuple[int, int],
        decode: Callable[[Bytes], Any],
        resize: Resize,
        transform: Callable[[Any], Any],
    ) -> None:
        self.records, self.scale = records, scale
        self.decode, self.resize, self.transform = decode, resize, transform

    def __getitem__(self, index: int) -> tuple[Any, int]:
        picture = self.decode(read_image(self.records, index))
        shorter = int(torch.randint(self.scale[0], self.scale[1] + 1, ()))
        return self.transform(self.resize(picture, [shorter])), int(self.records.labels[index])


def decode_by_pil(encoded: Bytes) -> PIL.Image.Image:
    """An RGB picture of encoded bytes [length]."""
    return PIL.Image.open(BytesIO(encoded.tobytes())).convert("RGB")


def decode_by_torchvision(encoded: Bytes) -> torch.Tensor:
    """RGB uint8 [3, H, W] of encoded bytes [length]: libjpeg-turbo's work for a JPEG."""
    from torchvision import io

    bytes_ = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    picture: torch.Tensor = io.decode_image(bytes_, io.ImageReadMode.RGB)
    return picture
