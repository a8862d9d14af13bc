"""Records one after another in a file, each with its length and checksums, as TFRecord files have them.

TensorBoard's files of events are made of the same frames. Source: TensorFlow's documentation of TFRecord.
"""

from __future__ import annotations

import struct

import google_crc32c


def frame(payload: bytes) -> bytes:
    """The bytes with their length (uint64), its CRC and theirs (uint32 each), all little-endian."""
    length = struct.pack("<Q", len(payload))
    return b"".join((length, struct.pack("<I", masked_crc(length)), payload, struct.pack("<I", masked_crc(payload))))


def masked_crc(data: bytes) -> int:
    """CRC32C, rotated and shifted as these files store it."""
    crc: int = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
