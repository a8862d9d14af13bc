"""Mean, standard deviation and covariance of a split's pixels, by streaming; cached."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass

import numpy as np
from nvidia.dali import fn, pipeline_def
from nvidia.dali.pipeline import DataNode

from fastflower.data import pipeline
from fastflower.data.loader import first_undecodable, read_picture
from fastflower.data.pipeline import Engine, Normalization, decode
from fastflower.data.records import Records, fingerprint
from fastflower.errors import UserError
from fastflower.files import atomic_write, cache_dir, code_digest

BATCH = 64


@dataclass(frozen=True)
class PixelStatistics:
    """Of R, G and B in [0, 1] over all pixels."""

    normalization: Normalization
    covariance: np.ndarray  # [3, 3] float64


def pixel_statistics(records: Records, engine: Engine) -> PixelStatistics:
    """Mean, standard deviation and covariance over all pixels of all records, of values in [0, 1].

    A large picture counts more than a small one, and the deviation is that of the pixels, not a mean of the pictures'
    deviations. The result is kept in the user's cache folder for the same files.

    Raises:
        UserError: a record cannot be decoded; names file and record. Or a channel never varies.
    """
    cached = cache_dir() / "statistics" / f"{fingerprint(records, code_digest(__file__, pipeline.__file__))}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        known = json.loads(cached.read_text())
        return PixelStatistics(
            Normalization(tuple(known["mean"]), tuple(known["std"])), np.array(known["covariance"], np.float64)
        )
    found = _measure(records, engine)
    mean, std = found.normalization.mean, found.normalization.std
    with contextlib.suppress(OSError), atomic_write(cached) as file:
        file.write(json.dumps({"mean": mean, "std": std, "covariance": found.covariance.tolist()}).encode())
    return found


def _measure(records: Records, engine: Engine) -> PixelStatistics:
    chunks = iter(np.split(np.arange(len(records)), range(BATCH, len(records), BATCH)))
    in_work: list[np.ndarray] = []
    failures: list[UserError] = []

    def source() -> list[np.ndarray]:
        in_work.append(next(chunks))
        try:
            return [read_picture(records, index) for index in in_work[-1]]
        except UserError as error:
            failures.append(error)  # it would cross DALI's native code: end the data and raise it after
            raise StopIteration from error

    @pipeline_def(batch_size=BATCH, num_threads=engine.threads, device_id=engine.device_id)
    def planes() -> DataNode:
        return fn.transpose(decode(fn.external_source(source=source, batch=True), engine), perm=[2, 0, 1]).cpu()

    # Whole numbers, and so exact: those of a picture fit into a double's 53 bits, their sums into Python's integers.
    pixels, sums, products = 0, np.zeros(3, object), np.zeros((3, 3), object)
    passes = planes()
    try:
        while True:
            (pictures,) = passes.run()
            for picture in pictures:
                channels = np.asarray(picture).reshape(3, -1).astype(np.float64)
                pixels += channels.shape[1]
                sums += channels.sum(axis=1).astype(np.int64)
                products += (channels @ channels.T).astype(np.int64)
    except StopIteration:
        pass
    except RuntimeError as error:
        if sentence := first_undecodable(records, np.concatenate(in_work)):
            raise sentence from error
        raise
    if failures:
        raise failures[0]
    mean = (sums / (255 * pixels)).astype(np.float64)
    covariance = ((pixels * products - np.outer(sums, sums)) / (255 * pixels) ** 2).astype(np.float64)
    std = np.sqrt(np.diag(covariance))
    if not (std > 0).all():
        raise UserError(
            "the pictures have a channel without any variation, so normalization would divide by zero: "
            "give data.mean and data.std."
        )
    return PixelStatistics(Normalization(tuple(mean.tolist()), tuple(std.tolist())), covariance)
