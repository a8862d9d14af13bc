"""Records decoded one after another: to measure them, to keep them, or to look at a few."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.backend import TensorListGPU
from nvidia.dali.pipeline import DataNode

from fastflower.data.decoding import first_undecodable, read_picture
from fastflower.data.pipeline import decode
from fastflower.data.records import Records
from fastflower.data.view import Engine
from fastflower.errors import UserError

BATCH = 32  # pictures that are decoded at once, and held until the next batch


def decoded_pictures(
    records: Records, indices: np.ndarray, engine: Engine, finish: Callable[[DataNode], DataNode]
) -> Iterator[tuple[int, np.ndarray | torch.Tensor]]:
    """The records at `indices` ([n] int64), in that order.

    Args:
        records: of a split.
        indices: which.
        engine: where they are decoded.
        finish: the rest of the DALI graph, from decoded pictures, uint8 RGB [H, W, 3] in the engine's memory, on.

    Yields:
        A record's number and what `finish` makes of it, in host memory or on the GPU; valid until the next batch.

    Raises:
        UserError: a record cannot be read or decoded; names file and record.
    """
    batches = [indices[start : start + BATCH] for start in range(0, len(indices), BATCH)]
    encoded = ([read_picture(records, int(index)) for index in batch] for batch in batches)
    failures: list[UserError] = []

    def source() -> list[np.ndarray]:
        try:
            return next(encoded)
        except UserError as error:
            failures.append(error)  # it would cross DALI's native code: end the data and raise it after
            raise StopIteration from error

    @pipeline_def(batch_size=BATCH, num_threads=engine.threads, device_id=engine.device_id)
    def definition() -> DataNode:
        return finish(decode(fn.external_source(source=source, batch=True), engine))

    pipeline = definition()
    for batch in batches:
        try:
            (found,) = pipeline.run()
        except StopIteration:
            raise failures[0] from None
        except RuntimeError as error:
            raise first_undecodable(records, batch) or error from error
        on_gpu = isinstance(found, TensorListGPU)
        for i, index in enumerate(batch.tolist()):
            yield index, torch.from_dlpack(found[i]) if on_gpu else np.asarray(found[i])
        if on_gpu:  # DALI uses the memory of its pictures again when we drop them
            torch.cuda.synchronize(engine.device_id)


def thumbnails(records: Records, indices: Sequence[int] | np.ndarray, side: int, engine: Engine) -> list[np.ndarray]:
    """The records at `indices` in that order, each uint8 RGB [h, w, 3] with its longer side resized to `side` pixels.

    Raises:
        UserError: a record cannot be read or decoded; names file and record.
    """

    def small(pictures: DataNode) -> DataNode:
        resized: DataNode = fn.resize(
            pictures,
            size=(side, side),
            mode="not_larger",
            subpixel_scale=False,  # all of the picture, where its shorter side would not be a whole number
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )
        return resized.cpu()

    chosen = np.asarray(indices, np.int64)
    return [np.array(picture) for _, picture in decoded_pictures(records, chosen, engine, small)]
