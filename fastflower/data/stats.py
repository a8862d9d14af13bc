"""Mean, standard deviation and covariance of a split's pixels, by streaming, shared by all processes; cached."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from nvidia import dali

from fastflower.arrays import Bytes, Floats, Ints
from fastflower.data import decoding
from fastflower.data.compiled import compiled
from fastflower.data.decoding import decoded_batches
from fastflower.data.records import Progress, Records, fingerprint
from fastflower.data.view import Engine, Normalization
from fastflower.errors import UserError
from fastflower.files import atomic_write, cache_dir, code_digest, to_json
from fastflower.runtime.distributed import Ranks

PAIRS = ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))  # of channels, whose products are summed
AT_ONCE = 2**22  # pixels that a GPU works on at once, as int64: about 0.3 GB


@dataclass(frozen=True)
class PixelStatistics:
    """Of R, G and B in [0, 1] over all pixels."""

    normalization: Normalization
    covariance: Floats  # [3, 3]


def pixel_statistics(
    records: Records, engine: Engine, ranks: Ranks | None = None, progress: Progress | None = None
) -> PixelStatistics:
    """Mean, standard deviation and covariance over all pixels of all records, of values in [0, 1].

    A large picture counts more than a small one, and the deviation is that of the pixels, not a mean of the pictures'
    deviations. The result is kept in the user's cache folder for the same files.

    Every rank must call it: each measures its share of the records, where the main one has no result in its cache. All
    get the same, to the bit, however many they are.

    Args:
        records: of a split.
        engine: where they are decoded, and added up.
        ranks: the processes; None = this one alone.
        progress: takes pictures measured and to measure of this process.

    Raises:
        UserError: a record of any rank cannot be decoded; names file and record. Or a channel never varies.
    """
    ranks = ranks or Ranks()
    # decoders differ by a level, with their version and on a GPU
    code = code_digest(__file__, decoding.__file__) + dali.__version__ + engine.device
    cached = cache_dir() / "statistics" / f"{fingerprint(records, code)}.json"
    kept = ranks.gather(_read(cached) if ranks.is_main else None)[0]
    if kept:
        return kept
    statistics = _measure(records, engine, ranks, progress)
    if ranks.is_main:
        mean, std = statistics.normalization.mean, statistics.normalization.std
        with contextlib.suppress(OSError), atomic_write(cached) as file:
            file.write(to_json({"mean": mean, "std": std, "covariance": statistics.covariance.tolist()}).encode())
    return statistics


def _read(cached: Path) -> PixelStatistics | None:
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        kept = json.loads(cached.read_text())
        normalization = Normalization(tuple(kept["mean"]), tuple(kept["std"]))
        return PixelStatistics(normalization, np.array(kept["covariance"], np.float64))
    return None


def _measure(records: Records, engine: Engine, ranks: Ranks, progress: Progress | None) -> PixelStatistics:
    own = np.arange(ranks.rank, len(records), ranks.world_size)
    with ranks.together():
        share = _totals(records, own, engine, progress)
    # Whole numbers, and so exact: Python's integers hold them all.
    pixels, *totals = (sum(numbers) for numbers in zip(*ranks.gather(share), strict=True))
    sums, products = np.array(totals[:3], object), np.zeros((3, 3), object)
    for (i, j), product in zip(PAIRS, totals[3:], strict=True):
        products[i, j] = products[j, i] = product
    mean = (sums / (255 * pixels)).astype(np.float64)
    covariance = ((pixels * products - np.outer(sums, sums)) / (255 * pixels) ** 2).astype(np.float64)
    std = np.sqrt(np.diag(covariance))
    if not (std > 0).all():
        raise UserError(
            "the pictures have a channel without any variation, so normalization would divide by zero: "
            "give data.mean and data.std."
        )
    return PixelStatistics(Normalization(tuple(mean.tolist()), tuple(std.tolist())), covariance)


def _totals(records: Records, indices: Ints, engine: Engine, progress: Progress | None) -> list[int]:
    """Of the pictures at `indices`: how many pixels they have, and the sums of them (see `sums_of`)."""
    # which of a GPU's decoders takes a picture would depend on its place in a batch, and so on the number of ranks
    engine = replace(engine, hw_decoder_load=0.0)
    pixels, done = 0, 0
    sums: Ints | torch.Tensor = np.zeros(9, np.int64)
    if engine.device == "gpu":
        sums = torch.zeros(9, dtype=torch.int64, device=f"cuda:{engine.device_id}")
    with ThreadPoolExecutor(engine.threads, "statistics") as threads:
        for batch, pictures in decoded_batches(records, indices, engine, lambda decoded: decoded):
            pixels += sum(picture.shape[0] * picture.shape[1] for picture in pictures)
            if isinstance(sums, torch.Tensor):
                sums += sums_on_device(pictures)  # which nothing here waits for
            else:
                sums += sum(threads.map(sums_of, (picture.reshape(-1, 3) for picture in pictures)))
            for _ in batch:
                done += 1
                if progress:
                    progress(done, len(indices))
    return [pixels, *sums.tolist()]


@compiled()
def sums_of(pixels):  # type: ignore[no-untyped-def]
    """Sums of R, G and B, and of their products RR, RG, RB, GG, GB and BB: int64 [9] of uint8 [n, 3].

    They fit for 140 million million pixels.
    """
    sums = np.zeros(9, np.int64)
    for start in range(0, len(pixels), 65536):  # the products of so many add up to less than 2**32
        r1 = g1 = b1 = rr = rg = rb = gg = gb = bb = np.uint32(0)
        for i in range(start, min(start + 65536, len(pixels))):
            r, g, b = np.uint32(pixels[i, 0]), np.uint32(pixels[i, 1]), np.uint32(pixels[i, 2])
            r1, g1, b1 = r1 + r, g1 + g, b1 + b
            rr, rg, rb, gg, gb, bb = rr + r * r, rg + r * g, rb + r * b, gg + g * g, gb + g * b, bb + b * b
        sums += np.array([r1, g1, b1, rr, rg, rb, gg, gb, bb], np.int64)
    return sums


def sums_on_device(pictures: Sequence[Bytes | torch.Tensor]) -> torch.Tensor:
    """The same of pictures, uint8 [h, w, 3] each, on whatever device they are."""
    pixels = torch.cat([torch.as_tensor(picture).reshape(-1, 3) for picture in pictures])
    sums = torch.zeros(9, dtype=torch.int64, device=pixels.device)
    for some in pixels.split(AT_ONCE):
        channels = some.T.to(torch.int64)
        products = [(channels[i] * channels[j]).sum() for i, j in PAIRS]
        sums += torch.stack([*channels.sum(dim=1).unbind(), *products])
    return sums
