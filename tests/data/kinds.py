"""Pictures of each kind that photographs come in, as tests encode them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """A picture that compresses badly, so that its bytes are nearly all of pixels."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)


def encode(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def wide(kind: str) -> bytes:
    """Gray of 16 bits."""
    gray = np.random.default_rng(0).integers(0, 65536, (31, 44), np.uint16)
    return encode(Image.fromarray(gray), kind)


def made(kind: str, mode: str = "RGB", **options: Any) -> Callable[[], bytes]:
    return lambda: encode(noise(44, 31, mode), kind, **options)


MORE = [noise(44, 31, seed=1)]
KINDS: dict[str, Callable[[], bytes]] = {
    "JPEG": made("JPEG"),
    "progressive JPEG": made("JPEG", progressive=True),
    "CMYK JPEG": made("JPEG", "CMYK"),
    "MPO": made("MPO", save_all=True, append_images=MORE),
    "PNG": made("PNG"),
    "palette PNG": made("PNG", "P"),
    "WebP": made("WEBP"),
    "lossless WebP": made("WEBP", lossless=True),
    "BMP": made("BMP"),
    "palette BMP": made("BMP", "P"),
    "PPM": made("PPM"),
    "PGM": made("PPM", "L"),
    "PBM": made("PPM", "1"),
    "TIFF": made("TIFF"),
    "LZW TIFF": made("TIFF", compression="tiff_lzw"),
    "LZMA TIFF": made("TIFF", compression="lzma"),
    "black and white TIFF": made("TIFF", "1"),
    "GIF": made("GIF", "P"),
    "gray GIF": made("GIF", "L"),
    "moving GIF": made("GIF", "P", save_all=True, append_images=[noise(44, 31, "P", seed=1)]),
    "transparent GIF": made("GIF", "P", transparency=3),
    "AVIF": made("AVIF"),
    "AVIF with alpha": made("AVIF", "RGBA"),
    "JPEG 2000": made("JPEG2000"),
    "gray JPEG 2000": made("JPEG2000", "L"),
    "JPEG 2000 with alpha": made("JPEG2000", "RGBA"),
    "16-bit JPEG 2000": partial(wide, "JPEG2000"),
    "bare JPEG 2000": made("JPEG2000", no_jp2=True),
}
CONVERTED = {name for name in KINDS if any(kind in name for kind in ("GIF", "AVIF", "JPEG 2000"))} | {
    *("LZMA TIFF", "black and white TIFF"),
}
