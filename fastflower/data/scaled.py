"""Large JPEG pictures at a half, a quarter or an eighth of their size, where they are to become smaller still.

libjpeg-turbo makes these, by simplejpeg, of the lower frequencies of each block: faster, and in a fraction of the
memory. A factor of at least REMAINS is left to the antialiased resize, so that pixels stay near those that the whole
picture gives; docs/data.md says how near. What comes in the file after the crop is not read: a copy says that it ends
there, with the same pixels up to its end.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import numpy as np
import simplejpeg

from fastflower.arrays import Bytes, Ints
from fastflower.data.geometry import Frame
from fastflower.data.resample import Region

LARGE = 2**20  # pixels: smaller pictures are decoded fast as they are
REMAINS = 1.5
BLOCKS = 32  # rows: the most that are encoded together, so that what comes after them changes nothing
FACTORS = (8, 4, 2)  # those for which libjpeg-turbo has fast code

# Of JPEG files: their first bytes, and markers of their segments.
_START = b"\xff\xd8"
_PROGRESSIVE = 0xC2
_FRAMES = {0xC0, 0xC1, _PROGRESSIVE}  # the others of them are baseline and extended
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
    height_at: int | None  # where the file says its height, if it may say less: rows are then decoded one after another
    factor: int  # of how many rows and columns of the picture a pixel is made

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the upright picture."""
        return self._upright(self.height, self.width)

    @property
    def decoded_shape(self) -> tuple[int, int]:
        """Height and width of all that can be decoded, upright."""
        return self._upright(-(-self.height // self.factor), -(-self.width // self.factor))

    def _upright(self, height: int, width: int) -> tuple[int, int]:
        return (width, height) if self.orientation in _TRANSPOSED else (height, width)

    @property
    def _turned(self) -> tuple[bool, bool]:
        """Whether rows and columns of the upright picture are in the other order than in the file."""
        return self.orientation in _ROWS_TURNED, self.orientation in _COLUMNS_TURNED

    def decode(self, encoded: Bytes, frame: Frame | None = None) -> Bytes:
        """The picture as RGB [h, w, 3], upright; with a frame, what lies in the file after it may be missing.

        Args:
            encoded: its bytes, [length].
            frame: what will be kept of it.

        Raises:
            ValueError: it cannot be decoded.
        """
        rows = self._rows(frame) if frame and self.height_at else self.height
        if self.height_at and rows < self.height:
            shorter = encoded.copy()
            shorter[self.height_at : self.height_at + 2] = divmod(rows, 256)
            with contextlib.suppress(ValueError):  # what comes after may be damaged
                return self._decode(shorter, rows)
        return self._decode(encoded, self.height)

    def _decode(self, encoded: Bytes, height: int) -> Bytes:
        rows, columns = -(-height // self.factor), -(-self.width // self.factor)
        pixels = simplejpeg.decode_jpeg(encoded, min_height=rows, min_width=columns, strict=False)  # as DALI does
        if pixels.shape != (rows, columns, 3):
            raise ValueError(f"{pixels.shape[1]}×{pixels.shape[0]} pixels instead of {columns}×{rows}")
        if self.orientation in _TRANSPOSED:
            pixels = pixels.transpose(1, 0, 2)
        by_row, by_column = (-1 if turned else 1 for turned in self._turned)
        return np.ascontiguousarray(pixels[::by_row, ::by_column])

    def _rows(self, frame: Frame) -> int:
        """How many rows of the file a frame needs, and some more, in whole blocks."""
        axis = 1 if self.orientation in _TRANSPOSED else 0  # of the upright picture, along which they lie
        size, start, kept = ((frame.height, frame.top, frame.rows), (frame.width, frame.left, frame.columns))[axis]
        scale = self.height / size
        reach = scale + 2 * self.factor  # of the filter
        begin, end = int(start * scale - reach), int((start + kept) * scale + reach)
        last = self.height - begin if self._turned[axis] else end
        return min((last // BLOCKS + 1) * BLOCKS, self.height)

    def region(self, pixels: Bytes) -> Region:
        """What `decode` gave, as it lies in the picture.

        The last row and column of the file may be made of fewer of the picture's, and of what the file has beyond its
        border. They are the first ones where the picture is turned, and so are those that are missing.
        """
        corner, overhang = [0, 0], [0.0, 0.0]
        for axis in (0, 1):
            if self._turned[axis]:
                corner[axis] = self.decoded_shape[axis] - pixels.shape[axis]
                overhang[axis] = self.decoded_shape[axis] - self.shape[axis] / self.factor
        return Region(pixels, (corner[0], corner[1]), self.shape, self.factor, (overhang[0], overhang[1]))


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
    header = _header(encoded, *shape)
    if not header:
        return None
    orientation, height_at, uneven = header
    factor = next((smaller for smaller in FACTORS if smaller * uneven <= factor), 1)
    return Scaled(*shape, orientation, height_at, factor) if factor > 1 else None


def _header(encoded: Bytes, height: int, width: int) -> tuple[int, int | None, float] | None:
    """Of a JPEG picture of this size, gray or of three colors, 8 bits each; None of others.

    Returns:
        `orientation` and `height_at`, and by how much color is stored smaller along one side than along the other,
        which libjpeg-turbo then decodes at the smaller size.
    """
    orientation, height_at, uneven, place = 1, None, 1.0, 2
    colors = is_progressive = None
    if encoded[:2].tobytes() != _START:
        return None
    while place + 4 <= len(encoded) and encoded[place] == _FILL:
        marker = int(encoded[place + 1])
        if marker == _FILL:
            place += 1
            continue
        end = place + 2 + int.from_bytes(encoded[place + 2 : place + 4])
        content = encoded[place + 4 : end].tobytes()
        if marker == _SCAN:
            if not height_at:
                return None
            in_order = not is_progressive and int.from_bytes(content[:1]) == colors  # all colors of a row in one scan
            return orientation, height_at if in_order else None, uneven
        if marker in _FRAMES:
            depth, rows, columns, colors = (int.from_bytes(content[a:b]) for a, b in ((0, 1), (1, 3), (3, 5), (5, 6)))
            if (depth, rows, columns) != (8, height, width) or colors not in (1, 3):
                return None
            height_at, is_progressive = place + 5, marker == _PROGRESSIVE
            ratios = [(sampling >> 4) / max(sampling & 15, 1) for sampling in content[7 : 7 + 3 * colors : 3]]
            uneven = max(ratios, default=1.0) / (min(ratios, default=1.0) or 1.0)
        elif marker in _OTHER_FRAMES:
            return None
        elif marker == _APP1 and content.startswith(_EXIF):
            orientation = _orientation_of(content[len(_EXIF) :]) or orientation
        place = end
    return None


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
