"""Mean and standard deviation of a split's pixels, by streaming; cached."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from pathlib import Path

import numpy as np
from nvidia.dali import fn, pipeline_def
from nvidia.dali.pipeline import DataNode

from fastflower.data import pipeline
from fastflower.data.loader import first_undecodable
from fastflower.data.pipeline import Engine, Normalization, decode
from fastflower.data.records import Records, read_image
from fastflower.errors import UserError
from fastflower.files import atomic_write, cache_dir, code_digest

BATCH = 64


def pixel_statistics(records: Records, engine: Engine) -> Normalization:
    """Mean and standard deviation over all pixels of all records, per channel, of values in [0, 1].

    A large picture counts more than a small one, and the deviation is that of the pixels, not a mean of the pictures'
    deviations. The result is kept in the user's cache folder for the same files.

    Raises:
        UserError: a record cannot be decoded; names file and record.
    """
    cached = cache_dir() / "statistics" / f"{_fingerprint(records)}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        known = json.loads(cached.read_text())
        return Normalization(tuple(known["mean"]), tuple(known["std"]))
    found = _measure(records, engine)
    with contextlib.suppress(OSError), atomic_write(cached) as file:
        file.write(json.dumps({"mean": found.mean, "std": found.std}).encode())
    return found


def _measure(records: Records, engine: Engine) -> Normalization:
    chunks = iter(np.split(np.arange(len(records)), range(BATCH, len(records), BATCH)))
    in_work: list[np.ndarray] = []

    def source() -> list[np.ndarray]:
        in_work.append(next(chunks))
        return [read_image(records, index) for index in in_work[-1]]

    @pipeline_def(batch_size=BATCH, num_threads=engine.threads, device_id=engine.device_id)
    def moments() -> tuple[DataNode, ...]:
        pictures = decode(fn.external_source(source=source, batch=True), engine)
        mean, square = fn.reductions.mean(pictures, axes=[0, 1]), fn.reductions.mean_square(pictures, axes=[0, 1])
        return mean.cpu(), square.cpu(), pictures.shape()

    sums = np.zeros((2, 3))
    pixels = 0
    passes = moments()
    try:
        while True:
            mean, square, shape = (output.as_array().astype(np.float64) for output in passes.run())
            area = shape[:, :1] * shape[:, 1:2]
            sums += [(mean * area).sum(axis=0), (square * area).sum(axis=0)]
            pixels += area.sum()
    except StopIteration:
        pass
    except RuntimeError as error:
        if sentence := first_undecodable(records, np.concatenate(in_work)):
            raise sentence from error
        raise
    mean = sums[0] / pixels
    std = np.sqrt(np.maximum(sums[1] / pixels - mean**2, 0))
    if not (std > 0).all():
        raise UserError(
            "the pictures have a channel without any variation, so normalization would divide by zero: "
            "give data.mean and data.std."
        )
    return Normalization(tuple((mean / 255).tolist()), tuple((std / 255).tolist()))


def _fingerprint(records: Records) -> str:
    digest = hashlib.sha256(code_digest(__file__, pipeline.__file__).encode())
    resolve = functools.cache(Path.resolve)  # a picture's folder holds many
    for path, stamp in zip(records.files, records.stamps, strict=True):
        digest.update(os.fsencode(f"{resolve(path.parent)}\0{path.name}\0{stamp}\0"))
    digest.update(records.file.tobytes() + records.offset.tobytes())
    return digest.hexdigest()[:32]
