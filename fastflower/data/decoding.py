"""Whether encoded pictures can be decoded, and the sentence for those that cannot."""

from __future__ import annotations

import numpy as np
from nvidia import nvimgcodec
from nvidia.dali import fn, pipeline_def
from nvidia.dali.pipeline import DataNode

from fastflower.data.pipeline import decode
from fastflower.data.records import Records, read_image
from fastflower.data.view import Engine
from fastflower.errors import UserError

END = b"\xff\xd9"  # of a JPEG file
NAMED = 5  # records in a sentence


def read_picture(records: Records, index: int) -> np.ndarray:
    """The encoded image of a record, [length] uint8, that has a picture's header and is not cut off.

    One without a header among others makes DALI 2.4 crash now and then, where it should report an error. One that is
    cut off would be found out only when a crop reaches what it lacks, epochs later.

    Raises:
        UserError: the record cannot be read or is no such picture; names file and record.
    """
    encoded = read_image(records, index)
    if not is_sound(encoded):
        raise undecodable((records, index))
    return encoded


def is_sound(encoded: np.ndarray) -> bool:
    """Whether encoded image bytes ([length] uint8) have a picture's header and are not cut off."""
    return has_header(encoded) and not is_cut_off(encoded)


def has_header(encoded: np.ndarray) -> bool:
    """Whether encoded image bytes ([length] uint8) begin as a picture that DALI's decoder library knows (6 µs)."""
    try:
        return nvimgcodec.CodeStream(encoded).width > 0  # which parses it
    except RuntimeError:
        return False


def is_cut_off(encoded: np.ndarray) -> bool:
    """Whether encoded image bytes ([length] uint8) of a JPEG, PNG or WebP file lack their end (1 µs for most).

    Other bytes may follow it. Of other kinds there is no telling before they are decoded.
    """
    start = bytes(encoded[:12])
    if start.startswith(b"RIFF"):
        return len(encoded) < 8 + int.from_bytes(start[4:8], "little")  # its size, without these eight
    if start.startswith(b"\x89PNG"):
        return b"IEND" not in bytes(encoded[-8:-4]) and b"IEND" not in encoded[:-4].tobytes()  # a checksum follows it
    return start.startswith(b"\xff\xd8") and bytes(encoded[-2:]) != END and END not in encoded.tobytes()


def undecodable(*bad: tuple[Records, int]) -> UserError:
    """The sentence for records that cannot be decoded: tables and numbers in them."""
    advice = "with data.skip, which takes what `fastflower data check ROOT --json` prints."
    places = [(records.describe(index), f"({records.length[index]} bytes)") for records, index in bad[:NAMED]]
    if len(bad) == 1:
        ((where, size),) = places
        return UserError(f"{where} cannot be decoded as a picture {size}: replace the record, or leave it out {advice}")
    named = "; ".join(" ".join(place) for place in places)
    more = f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
    return UserError(
        f"{len(bad)} records cannot be decoded as pictures: replace them, or leave them out {advice} They are: "
        f"{named}{more}."
    )


def decodable(encoded: np.ndarray) -> bool:
    """Whether the decoder can read encoded image bytes ([length] uint8)."""

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def one_picture() -> DataNode:
        return decode(fn.external_source(source=lambda: [encoded], batch=True), Engine())

    try:
        one_picture().run()
    except RuntimeError:
        return False
    return True


def first_undecodable(records: Records, indices: np.ndarray) -> UserError | None:
    """The sentence for the first of the records at `indices` ([m] int64) that the decoder cannot read."""
    for index in indices:
        if not decodable(read_image(records, index)):
            return undecodable((records, index))
    return None
