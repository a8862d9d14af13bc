"""Pictures of kinds that DALI does not read, by Pillow: decoded once more each time that they are read, and handed on
as bytes that DALI reads, so that all that follows is one path.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import numpy as np
import PIL
from PIL import Image, features

from fastflower.arrays import Bytes

Kind = Literal["GIF", "AVIF", "HEIC", "JPEG 2000"]
_FORMATS = ("GIF", "AVIF", "HEIF", "JPEG2000", "TIFF", "WEBP")  # Pillow's names; it tries no other decoder
_DALIS_FORMATS = ("JPEG", "MPO", "PNG", "BMP", "PPM")
_HEIC_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1"}
_ORIENTATION = 0x0112  # EXIF's tag, and what undoes its values
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Of TIFF: where strips or tiles of the first picture begin, and how long they are
_PLACES = ((273, 279), (324, 325))


warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters of damage is said as an error


class UnreadableError(Exception):
    """A picture cannot be read; its text says why, "" where there is nothing more to say."""


@dataclass(frozen=True)
class Upright:
    """A decoded picture."""

    picture: Image.Image  # RGB, upright
    size: tuple[int, int]  # width and height as stored, upright; the picture may be smaller
    is_plain_jpeg: bool  # the encoded bytes are a JPEG that needs not be turned


def kind_of(encoded: Bytes) -> Kind | None:
    """Which kind that is never DALI's encoded bytes ([length] uint8) begin as; None for any other."""
    start = bytes(encoded[:64])
    if start.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if start.startswith((b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n")):
        return "JPEG 2000"
    if start[4:8] == b"ftyp":
        length = min(int.from_bytes(start[:4]), len(start))
        brands = {start[8:12], *(start[i : i + 4] for i in range(16, length - 3, 4))}
        if brands & {b"avif", b"avis"}:
            return "AVIF"
        if brands & _HEIC_BRANDS:
            return "HEIC"
    return None


def why_not(encoded: Bytes) -> str | None:
    """Why the header of encoded bytes cannot be read by Pillow, "" where it cannot say; None where it can be."""
    try:
        size_of(encoded)
    except UnreadableError as error:
        return str(error)
    return None


def size_of(encoded: Bytes) -> tuple[int, int]:
    """Height and width of a picture by its header, not turned by EXIF.

    Raises:
        UnreadableError: Pillow cannot read it.
    """
    with _opened(encoded) as picture:
        return picture.height, picture.width


def to_pixmap(encoded: Bytes) -> Bytes:
    """The first picture in encoded bytes, upright by EXIF, as the bytes of a PPM file (RGB), [length] uint8.

    Alpha is dropped, and 16 bits are rounded to 8, as DALI does it.

    Raises:
        UnreadableError: Pillow cannot read it.
    """
    with _opened(encoded) as picture:
        orientation = _orientation(picture)
        picture.load()
        upright = picture.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else picture
        pixels = rgb(upright)
    header = b"P6\n%d %d\n255\n" % (pixels.shape[1], pixels.shape[0])
    return np.concatenate([np.frombuffer(header, np.uint8), pixels.reshape(-1)])


def upright(encoded: Bytes, *, at_least: int) -> Upright:
    """The first picture in encoded bytes of any kind, upright by EXIF, RGB.

    A JPEG whose sides are many times `at_least` pixels is decoded at 1/2, 1/4 or 1/8 of them, but no smaller than that.

    Raises:
        UnreadableError: Pillow cannot read it.
    """
    with _opened(encoded, (*_FORMATS, *_DALIS_FORMATS)) as picture:
        size, orientation = picture.size, _orientation(picture)
        picture.draft("RGB", (_scaled(size, at_least)))
        picture.load()
        plain = picture.format in ("JPEG", "MPO") and orientation == 1
        if orientation in _UPRIGHT:
            pixels = rgb(picture.transpose(_UPRIGHT[orientation]))
            size = size[::-1] if orientation >= 5 else size
        else:
            pixels = rgb(picture)
    return Upright(Image.fromarray(pixels), size, plain)


def _scaled(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    width, height = (max(1, side * shorter // min(size)) for side in size)
    return width, height


def is_lzma(encoded: Bytes) -> bool:
    """Whether a TIFF file is compressed by LZMA, of which DALI reads the header alone."""
    try:
        with _opened(encoded) as picture:
            return picture.info.get("compression") == "lzma"
    except UnreadableError:
        return False


def tiff_end(encoded: Bytes) -> int:
    """Where the pixels of a TIFF file's first picture end at the least, 0 where Pillow cannot read it at all."""
    try:
        with _opened(encoded) as picture:
            tags = getattr(picture, "tag_v2", {})
            ends = [np.add(tags[start], tags.get(length, 0)).max() for start, length in _PLACES if start in tags]
            return int(max(ends, default=sys.maxsize))
    except UnreadableError:
        return 0


@functools.cache
def versions() -> str:
    """Names what reads the pictures here, for answers that are kept."""
    heif = importlib.import_module("pillow_heif").__version__ if _has_heif() else ""
    return f"{PIL.__version__} {features.check('avif')} {heif}"


@functools.cache
def _has_heif() -> bool:
    if importlib.util.find_spec("pillow_heif") is None:
        return False
    importlib.import_module("pillow_heif").register_heif_opener()
    return True


@contextmanager
def _opened(encoded: Bytes, formats: tuple[str, ...] = _FORMATS) -> Iterator[Image.Image]:
    """The picture, of which the header is read; whatever Pillow says of it in there is an error of ours."""
    kind = kind_of(encoded)
    if kind == "HEIC" and not _has_heif():
        raise UnreadableError("it is HEIC, which needs another package: pip install pillow-heif")
    if kind == "AVIF" and not features.check("avif"):
        raise UnreadableError("it is AVIF, which this Pillow does not read: pip install 'pillow>=11.3'")
    try:
        with Image.open(BytesIO(encoded.data), formats=_available(formats)) as picture:
            yield picture
    except UnreadableError:
        raise
    except (Image.DecompressionBombError, MemoryError) as error:
        reason = str(error).split(",")[0] or "it does not fit into memory"
        raise UnreadableError(f"it is too large: {reason}") from error
    except Exception as error:  # on damaged bytes decoders raise anything
        raise UnreadableError("") from error


def _available(formats: tuple[str, ...]) -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in formats if name in Image.OPEN)


def _orientation(picture: Image.Image) -> int:
    """By EXIF; 1, upright, where that cannot be read."""
    try:
        return int(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # as of any damaged picture; its pixels may be whole
        return 1


def rgb(picture: Image.Image) -> Bytes:
    """A picture's pixels as DALI decodes them: [H, W, 3] uint8, without alpha, and 16 bits rounded to 8.

    Raises:
        UnreadableError: they are of another kind.
    """
    if picture.mode.startswith("I;16"):
        gray = (np.asarray(picture).astype(np.int64) + 128) // 257
        return np.repeat(gray.astype(np.uint8)[:, :, None], 3, axis=2)
    if picture.mode in ("I", "F"):
        raise UnreadableError("its pixels have 32 bits")
    return np.asarray(picture.convert("RGB"))
