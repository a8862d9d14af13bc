"""A few pictures of a split, small, to look at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import DataNode

from fastflower.data.loader import first_undecodable, read_picture
from fastflower.data.pipeline import Engine, decode
from fastflower.data.records import Records

BATCH = 8  # decoded pictures may be large, and are held until they are resized


def thumbnails(records: Records, indices: Sequence[int] | np.ndarray, side: int, engine: Engine) -> list[np.ndarray]:
    """The records at `indices` in that order, each uint8 RGB [h, w, 3] with its longer side resized to `side` pixels.

    Raises:
        UserError: a record cannot be read or decoded; names file and record.
    """
    encoded = [read_picture(records, int(index)) for index in indices]
    batches = [encoded[start : start + BATCH] for start in range(0, len(encoded), BATCH)]

    @pipeline_def(batch_size=BATCH, num_threads=engine.threads, device_id=engine.device_id, prefetch_queue_depth=1)
    def small() -> DataNode:
        pictures = decode(fn.external_source(source=batches, batch=True), engine)
        return fn.resize(
            pictures,
            size=(side, side),
            mode="not_larger",
            subpixel_scale=False,  # all of the picture, where its shorter side would not be a whole number
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )

    pipeline = small()
    try:
        return [np.array(picture) for _ in batches for picture in pipeline.run()[0].as_cpu()]
    except RuntimeError as error:
        if sentence := first_undecodable(records, np.asarray(indices)):
            raise sentence from error
        raise
