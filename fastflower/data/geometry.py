"""The sizes that pictures are resized to, and the part of them that is kept: for all who crop.

`fastflower.data.pipeline` says the same in operators of DALI, equal to this for every picture.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import numpy as np

from fastflower.arrays import Int32s, Ints, Singles
from fastflower.data.view import View

Places = TypeVar("Places", int, Ints)


class Frame(NamedTuple):
    """A picture's size after resizing and the part of it that is kept; in pixels."""

    height: int
    width: int
    top: int
    left: int
    rows: int
    columns: int


def resized(shapes: Ints, shorter: int | Int32s | None, crop: int) -> Ints:
    """Heights and widths of pictures after resizing, [n, 2]; the longer side rounds as torchvision's Resize does.

    Args:
        shapes: their heights and widths, [n, 2].
        shorter: what their shorter sides become, of all or [n] of each; None = as they are, enlarged where they are
            smaller than `crop`.
        crop: side of the square that is cut out (pixels).
    """
    shortest = shapes.min(axis=1)
    target = np.maximum(shortest, crop) if shorter is None else np.broadcast_to(shorter, shortest.shape)
    resized: Ints = shapes * target[:, None].astype(np.int64) // shortest[:, None]
    return resized


def centered(free: Places) -> Places:
    """Where the middle begins, of `free` + 1 places: half of it, a half rounded to the even number, as torchvision."""
    return (free + free // 2 % 2) // 2


def frames(shapes: Ints, shorter: Int32s | None, crop_yx: Singles, view: View) -> list[Frame]:
    """What becomes of pictures of `shapes` ([n, 2], height and width); see `Request` for the other numbers."""
    sizes = resized(shapes, shorter, view.crop)
    if view.place == "whole":
        return [Frame(height, width, 0, 0, height, width) for height, width in sizes.tolist()]
    free = sizes - view.crop
    if view.place == "random":
        starts = np.minimum(np.floor(crop_yx * (free + 1).astype(np.float32)).astype(np.int64), free)
    else:
        starts = centered(free)
    places = np.hstack([sizes, starts]).tolist()
    return [Frame(height, width, top, left, view.crop, view.crop) for height, width, top, left in places]
