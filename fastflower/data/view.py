"""What batches look like and what makes them: geometry, normalization, and DALI's device and resources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from fastflower.runtime.entries import MeanAndStd


@dataclass(frozen=True)
class Normalization:
    """Per-channel mean and standard deviation of RGB values in [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def of(cls, plain: MeanAndStd) -> Normalization:
        """From what a checkpoint or its safetensors file says."""
        (r, g, b), (r_std, g_std, b_std) = plain["mean"], plain["std"]
        return cls((r, g, b), (r_std, g_std, b_std))

    def to_dict(self) -> MeanAndStd:
        """For a checkpoint."""
        return {"mean": list(self.mean), "std": list(self.std)}


# Of the ImageNet training set, as torchvision's pretrained models expect it.
IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class View:
    """The geometry of one kind of batch."""

    crop: int  # pixels, side of the square that the network sees
    place: Literal["random", "center", "whole"] = "center"  # whole: no crop, so that shapes differ within a batch
    largest: int | None = None  # pixels that a shorter side is resized to at most; None = it may be left as it is


# Of one process, where the settings name no number: more would find nothing to do, and DALI pins memory for each that
# works for a GPU. How they were chosen is in docs/performance.md.
MOST_THREADS = {"cpu": 32, "gpu": 16}


PIECE = 2**25  # bytes for each thread: two of them work on a photograph of 12 megapixels each, or on many small ones


@dataclass(frozen=True)
class Engine:
    """Where and how DALI works."""

    device: Literal["cpu", "gpu"] = "cpu"
    device_id: int | None = None  # the GPU's number; None on a CPU
    # what of a picture a crop is made of; scaled, on a CPU only: of large JPEGs all, but smaller, of others the region
    decode: Literal["region", "whole", "scaled"] = "region"
    threads: int = 2
    prefetch: int = 2  # batches that DALI keeps in work, and as many finished ones that wait for the consumer
    hw_decoder_load: float = 0.65  # share of the pictures for the hardware JPEG decoder, on GPUs that have one

    @property
    def piece(self) -> int:
        """Bytes, encoded and decoded, of the pictures that a CPU works on at once, unless one alone has more."""
        return self.threads * PIECE
