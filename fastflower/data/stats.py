"""Mean, standard deviation and covariance of a split's pixels, by streaming; cached."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass

import numpy as np
from nvidia import dali
from nvidia.dali import fn
from nvidia.dali.pipeline import DataNode

from fastflower.arrays import Floats
from fastflower.data import decoding
from fastflower.data.decoding import decoded_pictures
from fastflower.data.records import Records, fingerprint
from fastflower.data.view import Engine, Normalization
from fastflower.errors import UserError
from fastflower.files import atomic_write, cache_dir, code_digest, to_json


@dataclass(frozen=True)
class PixelStatistics:
    """Of R, G and B in [0, 1] over all pixels."""

    normalization: Normalization
    covariance: Floats  # [3, 3]


def pixel_statistics(records: Records, engine: Engine) -> PixelStatistics:
    """Mean, standard deviation and covariance over all pixels of all records, of values in [0, 1].

    A large picture counts more than a small one, and the deviation is that of the pixels, not a mean of the pictures'
    deviations. The result is kept in the user's cache folder for the same files.

    Raises:
        UserError: a record cannot be decoded; names file and record. Or a channel never varies.
    """
    # decoders differ by a level, with their version and on a GPU
    code = code_digest(__file__, decoding.__file__) + dali.__version__ + engine.device
    cached = cache_dir() / "statistics" / f"{fingerprint(records, code)}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        kept = json.loads(cached.read_text())
        return PixelStatistics(
            Normalization(tuple(kept["mean"]), tuple(kept["std"])), np.array(kept["covariance"], np.float64)
        )
    statistics = _measure(records, engine)
    mean, std = statistics.normalization.mean, statistics.normalization.std
    with contextlib.suppress(OSError), atomic_write(cached) as file:
        file.write(to_json({"mean": mean, "std": std, "covariance": statistics.covariance.tolist()}).encode())
    return statistics


def _measure(records: Records, engine: Engine) -> PixelStatistics:
    def planes(decoded: DataNode) -> DataNode:
        return fn.transpose(decoded, perm=[2, 0, 1]).cpu()

    # Whole numbers, and so exact: those of a picture fit into a double's 53 bits, their sums into Python's integers.
    pixels, sums, products = 0, np.zeros(3, object), np.zeros((3, 3), object)
    for _, picture in decoded_pictures(records, np.arange(len(records)), engine, planes):
        channels = np.asarray(picture).reshape(3, -1).astype(np.float64)
        pixels += channels.shape[1]
        sums += channels.sum(axis=1).astype(np.int64)
        products += (channels @ channels.T).astype(np.int64)
    mean = (sums / (255 * pixels)).astype(np.float64)
    covariance = ((pixels * products - np.outer(sums, sums)) / (255 * pixels) ** 2).astype(np.float64)
    std = np.sqrt(np.diag(covariance))
    if not (std > 0).all():
        raise UserError(
            "the pictures have a channel without any variation, so normalization would divide by zero: "
            "give data.mean and data.std."
        )
    return PixelStatistics(Normalization(tuple(mean.tolist()), tuple(std.tolist())), covariance)
