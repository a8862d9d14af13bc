"""Whether two tables of records are the same: by ids and classes, and by the bytes of their pictures.

Whatever is kept for some records (a checkpoint, predictions, folds) goes by this, so that it is never used for others.
"""

from __future__ import annotations

import os

from fastflower.data.contents import content_digests
from fastflower.data.records import Progress, Records
from fastflower.files import digest
from fastflower.runtime.entries import Identity


def identity(records: Records, progress: Progress | None = None) -> Identity:
    """The identity of records, for which each is read once (see `fastflower.data.contents.contents_of`).

    Args:
        records: of a split.
        progress: takes records read and to read.

    Raises:
        UserError: a record cannot be read.
    """
    content = digest(content_digests(records, progress).tobytes())
    return {"count": len(records), "names": names_digest(records), "content": content.hex()}


def names_digest(records: Records) -> str:
    """The digest of their ids and classes, in their order, for which none is read."""
    ids = os.fsencode("\0".join(records.ids.tolist()))
    return digest(ids, records.labels.tobytes()).hex()
