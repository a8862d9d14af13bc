"""Large JPEG pictures at a half, a quarter or an eighth of their size, where they are to become smaller still.

libjpeg-turbo makes these, by simplejpeg, of the lower frequencies of each block: faster, and in a fraction of the
memory. At least REMAINS times is left to the antialiased resize, so that pixels stay near those that the whole picture
gives; docs/data.md says how near.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import simplejpeg

from fastflower.arrays import Bytes, Ints
from fastflower.data.resample import Region

LARGE = 2**20  # pixels: smaller pictures are decoded fast as they are
REMAINS = 2
FACTORS = (8, 4, 2)  # those for which libjpeg-turbo has fast code

# Of JPEG files: their first bytes, and markers of their segments.
_START = b"\xff\xd8"
_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended and progressive
_OTHER_FRAMES = {*range(0xC3, 0xD0)} - {0xC4, 0xCC}  # such as lossless; the two are tables
_SCAN, _APP1, _FILL = 0xDA, 0xE1, 0xFF

_EXIF = b"Exif\0\0"
_ORIENTATION = 0x0112  # its tag
# Which orientations are which.
_TRANSPOSED, _ROWS_TURNED, _COLUMNS_TURNED = {5, 6, 7, 8}, {3, 4, 7, 8}, {2, 3, 6, 7}


class Scaled(NamedTuple):
    """How a JPEG picture is decoded at a fraction of its size."""

    height: int  # rows as they are stored, before the picture is turned upright
    width: int
    orientation: int  # by EXIF, 1 to 8
    factor: int  # of how many rows and columns of the picture a pixel is made

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the upright picture."""
        return self._upright(self.height, self.width)

    @property
    def decoded_shape(self) -> tuple[int, int]:
        """Height and width of what is decoded, upright."""
        return self._upright(-(-self.height // self.factor), -(-self.width // self.factor))

    def _upright(self, height: int, width: int) -> tuple[int, int]:
        return (width, height) if self.orientation in _TRANSPOSED else (height, width)

    def decode(self, encoded: Bytes) -> Bytes:
        """The picture's encoded bytes ([length]) as RGB [h, w, 3] of `decoded_shape`.

        Raises:
            ValueError: it cannot be decoded.
        """
        rows, columns = -(-self.height // self.factor), -(-self.width // self.factor)
        pixels = simplejpeg.decode_jpeg(encoded, min_height=rows, min_width=columns, strict=False)  # as DALI does
        if pixels.shape != (rows, columns, 3):
            raise ValueError(f"{pixels.shape[1]}×{pixels.shape[0]} pixels instead of {columns}×{rows}")
        if self.orientation in _TRANSPOSED:
            pixels = pixels.transpose(1, 0, 2)
        pixels = pixels[:: -1 if self.orientation in _ROWS_TURNED else 1, :: -1 if self._mirrored else 1]
        return np.ascontiguousarray(pixels)

    @property
    def _mirrored(self) -> bool:
        return self.orientation in _COLUMNS_TURNED

    def region(self, pixels: Bytes) -> Region:
        """What `decode` gave, as it lies in the picture.

        The last row and column as they are stored may be made of fewer of the picture's, and of what the file has
        beyond its border. They are the first ones where the picture is turned.
        """
        beyond = [count - size / self.factor for count, size in zip(self.decoded_shape, self.shape, strict=True)]
        turned = (self.orientation in _ROWS_TURNED, self._mirrored)
        top, left = (share if first else 0.0 for share, first in zip(beyond, turned, strict=True))
        return Region(pixels, (0, 0), self.shape, self.factor, (top, left))


def factors(shapes: Ints, largest: int | None) -> Ints:
    """By how much each picture may be decoded smaller, if it is a JPEG that `scaled` takes: [n], 1, 2, 4 or 8.

    Args:
        shapes: their heights and widths, [n, 2]; 0 where they are not known.
        largest: what their shorter sides become at most (pixels); None = they are not resized.
    """
    chosen = np.ones(len(shapes), np.int64)
    if largest is not None:
        shorter, large = shapes.min(axis=1), shapes.prod(axis=1) >= LARGE
        for factor in sorted(FACTORS):
            chosen[large & (shorter >= REMAINS * factor * largest)] = factor
    return chosen


def scaled(encoded: Bytes, shape: tuple[int, int], factor: int) -> Scaled | None:
    """How encoded bytes ([length]) are decoded by a factor above 1; None if they must be decoded as they are.

    `shape` is height and width of the picture, as its header says.
    """
    orientation = _orientation(encoded, *shape)
    return Scaled(*shape, orientation, factor) if orientation else None


def _orientation(encoded: Bytes, height: int, width: int) -> int:
    """EXIF's orientation, 1 to 8, of a JPEG picture of this size in gray or three colors of 8 bits; 0 of any other."""
    orientation, fits, place = 1, False, 2
    if encoded[:2].tobytes() != _START:
        return 0
    while place + 4 <= len(encoded) and encoded[place] == _FILL:
        marker = int(encoded[place + 1])
        if marker == _FILL:
            place += 1
            continue
        if marker == _SCAN:
            return orientation if fits else 0
        end = place + 2 + int.from_bytes(encoded[place + 2 : place + 4])
        content = encoded[place + 4 : end].tobytes()
        if marker in _FRAMES:
            depth, rows, columns, colors = (int.from_bytes(content[a:b]) for a, b in ((0, 1), (1, 3), (3, 5), (5, 6)))
            fits = (depth, rows, columns) == (8, height, width) and colors in (1, 3)
        elif marker in _OTHER_FRAMES:
            return 0
        elif marker == _APP1 and content.startswith(_EXIF):
            orientation = _orientation_of(content[len(_EXIF) :]) or orientation
        place = end
    return 0


def _orientation_of(exif: bytes) -> int:
    """The orientation that an EXIF block says, 1 to 8; 0 where it says none, as DALI reads it."""

    def number(start: int, count: int) -> int:
        return int.from_bytes(exif[start : start + count], "little" if exif.startswith(b"II") else "big")

    first = number(4, 4) + 2
    end = first + 12 * number(first - 2, 2)
    if exif[:2] not in (b"II", b"MM") or number(2, 2) != 42 or end > len(exif):
        return 0
    for entry in range(first, end, 12):
        if number(entry, 2) == _ORIENTATION:
            return value if (value := number(entry + 8, 2)) <= 8 else 0
    return 0
