"""The built-in data: synthetic flowers, drawn, in the layout of Kaggle's "Petals to the Metal".

Every picture is a pure function of (seed, split, index): a larger set begins with the pictures of a smaller one.
"""

from __future__ import annotations

import colorsys
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from fastflower.data.tfrecord import write_tfrecord
from fastflower.errors import UserError

PICTURES_A_FILE = 400
SPLITS = ("train", "val", "test")
CANVAS = 160  # pixels, or twice the largest stored size where that is more

# Hue range (share of the circle), saturation and value of what petals may be colored with.
COLORS = {
    "red": ((0.96, 1.02), (0.7, 1.0), (0.6, 0.95)),
    "orange": ((0.04, 0.09), (0.7, 1.0), (0.8, 1.0)),
    "yellow": ((0.12, 0.17), (0.6, 1.0), (0.8, 1.0)),
    "white": ((0.0, 1.0), (0.0, 0.12), (0.85, 1.0)),
    "pink": ((0.87, 0.96), (0.25, 0.6), (0.8, 1.0)),
    "purple": ((0.75, 0.84), (0.4, 0.8), (0.5, 0.9)),
    "blue": ((0.58, 0.68), (0.4, 0.8), (0.6, 0.95)),
}
Color = tuple[int, int, int]


@dataclass(frozen=True)
class Kind:
    """What all flowers of a class have in common."""

    name: str
    petals: int
    width: float  # of a petal, as a share of its length
    tip: float  # exponent of the outline: below 1 blunt, above 1 pointed
    notch: float = 0.0  # depth of a cut in the tip, share of the length
    ruffle: float = 0.0  # depth of waves along the edge, share of the width
    layers: int = 1
    center: float = 0.2  # radius, share of the flower's
    stripes: int = 0  # lines along each petal
    spots: bool = False
    round_leaves: bool = False
    colors: tuple[str, ...] = ("red",)


# Colors overlap, so that none gives its class away; neighbors differ by few traits.
KINDS = (
    Kind("synthetic three-petal trillium", 3, 0.62, 1.2, colors=("white", "pink", "purple"), center=0.14),
    Kind("synthetic cross-flower", 4, 0.70, 0.7, notch=0.10, colors=("yellow", "white", "purple"), center=0.16),
    Kind("synthetic five-petal bell", 5, 0.60, 0.7, colors=("blue", "purple", "pink"), center=0.18, round_leaves=True),
    Kind("synthetic heart-petal primrose", 5, 0.72, 0.6, notch=0.22, colors=("yellow", "pink", "red"), center=0.18),
    Kind("synthetic star lily", 6, 0.36, 1.5, spots=True, colors=("orange", "pink", "white"), center=0.12),
    Kind("synthetic striped crocus", 6, 0.52, 1.0, stripes=3, colors=("purple", "white", "blue"), center=0.15),
    Kind("synthetic ruffled poppy", 6, 0.95, 0.6, ruffle=0.25, colors=("red", "orange", "pink"), center=0.26),
    Kind(
        "synthetic windmill jasmine", 8, 0.30, 1.2, colors=("white", "yellow", "blue"), center=0.16, round_leaves=True
    ),
    Kind("synthetic button coneflower", 13, 0.24, 0.7, colors=("pink", "purple", "orange"), center=0.42),
    Kind("synthetic moon daisy", 18, 0.20, 0.7, colors=("white", "yellow", "pink"), center=0.28),
    Kind("synthetic double dahlia", 10, 0.34, 1.2, layers=3, colors=("red", "yellow", "purple"), center=0.10),
    Kind("synthetic thread aster", 21, 0.11, 1.5, colors=("blue", "purple", "red"), center=0.24),
)


def write_demo(
    root: Path,
    *,
    sizes: Sequence[int] = (64,),
    train: int = 2400,
    val: int = 480,
    test: int = 480,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Draw a data set of synthetic flowers; `root` appears when it is complete.

    Args:
        root: folder to make: tfrecords-jpeg-SxS/{train,val,test}/NN-SxS-COUNT.tfrec and class_names.json.
        sizes: stored sizes in pixels; an id is the same picture at each.
        train: pictures in the split; likewise `val` and `test`, whose records have no class.
        val: see `train`.
        test: see `train`.
        seed: of the drawing.
        progress: called with the number of pictures done and to do.

    Raises:
        UserError: `root` exists and is not empty, or a number is not positive.
        OSError: the folder cannot be written.
    """
    counts = dict(zip(SPLITS, (train, val, test), strict=True))
    if not sizes or min(*sizes, *counts.values()) < 1:
        raise UserError("sizes and numbers of pictures must be at least 1.")
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{root} exists already: give a folder that is empty or not there yet.")
    root.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=root.parent, prefix=f".{root.name}."))
    try:
        done = 0
        for split, count in counts.items():
            for file, first in enumerate(range(0, count, PICTURES_A_FILE)):
                indices = range(first, min(first + PICTURES_A_FILE, count))
                examples: dict[int, list[dict[str, bytes | int]]] = {size: [] for size in sizes}
                for index in indices:
                    for size, example in _examples(seed, split, index, sizes):
                        examples[size].append(example)
                    done += 1
                    if progress:
                        progress(done, sum(counts.values()))
                for size in sizes:
                    name = f"{file:02}-{size}x{size}-{len(indices)}.tfrec"
                    write_tfrecord(partial / f"tfrecords-jpeg-{size}x{size}" / split / name, examples[size])
        names = json.dumps([kind.name for kind in KINDS], indent=1)
        (partial / "class_names.json").write_text(names + "\n", encoding="utf-8")
        partial.chmod(0o755)
        try:
            os.replace(partial, root)
        except OSError:
            if not (root / "class_names.json").is_file():  # else another process was faster, with the same pictures
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _examples(seed: int, split: str, index: int, sizes: Sequence[int]) -> Iterator[tuple[int, dict[str, bytes | int]]]:
    """The records of one picture, one a size."""
    number = SPLITS.index(split)
    label = label_of(seed, split, index)
    rng = np.random.default_rng([seed, number, index])
    picture = draw_flower(rng, label, max(CANVAS, 2 * max(sizes)))
    quality = int(rng.integers(80, 96))
    for size in sizes:
        buffer = BytesIO()
        picture.resize((size, size), Image.Resampling.BOX).save(buffer, "JPEG", quality=quality)
        example: dict[str, bytes | int] = {"id": f"{split}-{index:06}".encode(), "image": buffer.getvalue()}
        if split != "test":
            example["class"] = label
        yield size, example


def label_of(seed: int, split: str, index: int) -> int:
    """The class of a picture: each run of len(KINDS) pictures has every class once, in random order."""
    block, place = divmod(index, len(KINDS))
    rng = np.random.default_rng([seed, SPLITS.index(split), block, 1])
    return int(rng.permutation(len(KINDS))[place])


def draw_flower(rng: np.random.Generator, label: int, size: int) -> Image.Image:
    """A flower of class `label` as an RGB picture of `size` pixels a side, with all that makes it hard to tell."""
    picture = _background(rng, size)
    kind = KINDS[label]
    radius = size * rng.uniform(0.22, 0.44)
    middle = size * rng.uniform(0.34, 0.66, 2)
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(1, 5)):
        _leaf(draw, rng, middle, radius * rng.uniform(0.9, 1.6), kind.round_leaves)
    _flower(draw, rng, kind, middle, radius)
    if rng.random() < 0.4:  # something in front
        angle = rng.uniform(0, 2 * math.pi)
        offset = radius * rng.uniform(0.8, 1.2) * np.array([math.cos(angle), math.sin(angle)])
        _leaf(draw, rng, middle + offset, radius * rng.uniform(0.6, 1.1), bool(rng.random() < 0.5))
    return _light(rng, picture)


def _background(rng: np.random.Generator, size: int) -> Image.Image:
    """Soil, grass, stones and other flowers, out of focus."""
    base = _hsv(rng, (0.08, 0.42), (0.15, 0.6), (0.15, 0.6))
    picture = Image.new("RGB", (size, size), base)
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(4, 14)):  # stones and patches of light
        x, y = rng.uniform(0, size, 2)
        a, b = size * rng.uniform(0.04, 0.3, 2)
        draw.ellipse((x - a, y - b, x + a, y + b), fill=_hsv(rng, (0.0, 0.6), (0.0, 0.5), (0.1, 0.8)))
    for _ in range(rng.integers(0, 25)):  # grass
        x, y = rng.uniform(0, size, 2)
        end = (x + size * rng.uniform(-0.2, 0.2), y - size * rng.uniform(0.1, 0.5))
        draw.line((x, y, *end), fill=_hsv(rng, (0.2, 0.4), (0.3, 0.9), (0.2, 0.8)), width=max(1, size // 80))
    for _ in range(rng.integers(0, 4)):
        other = KINDS[rng.integers(len(KINDS))]
        _flower(draw, rng, other, rng.uniform(0, size, 2), size * rng.uniform(0.06, 0.14))
    return picture.filter(ImageFilter.GaussianBlur(size * rng.uniform(0.006, 0.03)))


def _flower(draw: ImageDraw.ImageDraw, rng: np.random.Generator, kind: Kind, middle: np.ndarray, radius: float) -> None:
    color = _hsv(rng, *COLORS[kind.colors[rng.integers(len(kind.colors))]])
    tilt = _tilt(rng)
    turn = rng.uniform(0, 2 * math.pi)
    for layer in range(kind.layers):
        scale = radius * (1 - 0.28 * layer)
        for i in range(kind.petals):
            angle = turn + 2 * math.pi * (i + 0.5 * layer) / kind.petals + rng.normal(0, 0.25 / kind.petals)
            if rng.random() < 0.04:
                continue  # a petal has fallen
            length, shade = scale * rng.uniform(0.88, 1.08), rng.uniform(0.82, 1.1) * (1 - 0.08 * layer)
            _petal(draw, rng, kind, middle, angle, length, tilt, _shade(color, shade))
    _center(draw, rng, middle, radius * kind.center * rng.uniform(0.85, 1.15), tilt)


def _petal(
    draw: ImageDraw.ImageDraw,
    rng: np.random.Generator,
    kind: Kind,
    middle: np.ndarray,
    angle: float,
    length: float,
    tilt: np.ndarray,
    color: Color,
) -> None:
    def place(points: np.ndarray) -> list[tuple[float, float]]:
        return _to_canvas(_turn(points * length, angle), middle, tilt)

    outline = _outline(kind)
    draw.polygon(place(outline), fill=color, outline=_shade(color, 0.65))
    draw.polygon(place(outline * [0.62, 0.55]), fill=_shade(color, 0.86))
    dark = _shade(color, 0.5)
    line_width = max(1, round(length / 30))
    for stripe in range(kind.stripes):
        side = (stripe - (kind.stripes - 1) / 2) * kind.width * 0.28
        draw.line(place(np.array([[0.2, side * 0.4], [0.8, side]])), fill=dark, width=line_width)
    if kind.spots:
        for t, side in rng.uniform((0.3, -0.12), (0.8, 0.12), (5, 2)):
            x, y = place(np.array([[t, side]]))[0]
            r = length * 0.045
            draw.ellipse((x - r, y - r, x + r, y + r), fill=dark)


def _outline(kind: Kind) -> np.ndarray:
    """[n, 2] corners of a petal of length 1 that points along x."""
    t = np.linspace(0, 1, 15)
    half = kind.width / 2 * np.sin(math.pi * t ** (0.75 / min(kind.tip, 1))) ** kind.tip
    half *= 1 + kind.ruffle * np.sin(t * 9 * math.pi)
    x = t.copy()
    tip = [[1 - kind.notch, 0.0]] if kind.notch else []
    if kind.notch:  # two lobes beside the cut
        half[-1] = kind.width * 0.18
    return np.array([*zip(x, half, strict=True), *tip, *zip(x[::-1], -half[::-1], strict=True)])


def _center(
    draw: ImageDraw.ImageDraw, rng: np.random.Generator, middle: np.ndarray, r: float, tilt: np.ndarray
) -> None:
    circle = np.linspace(0, 2 * math.pi, 20, endpoint=False)
    ring = np.stack([np.cos(circle), np.sin(circle)], axis=1) * r
    color = _hsv(rng, (0.05, 0.17), (0.5, 1.0), (0.25, 0.95))
    draw.polygon(_to_canvas(ring, middle, tilt), fill=color, outline=_shade(color, 0.6))
    for x, y in _to_canvas(ring[::2] * rng.uniform(0.3, 0.8, (10, 1)), middle, tilt):  # stamens
        s = max(1.0, r * 0.1)
        draw.ellipse((x - s, y - s, x + s, y + s), fill=_shade(color, rng.uniform(0.5, 1.5)))


def _leaf(draw: ImageDraw.ImageDraw, rng: np.random.Generator, start: np.ndarray, length: float, rounded: bool) -> None:
    t = np.linspace(0, 1, 10)
    half = (0.3 if rounded else 0.12) * np.sin(math.pi * t) ** (0.7 if rounded else 1.2)
    points = np.concatenate([np.stack([t, half], 1), np.stack([t, -half], 1)[::-1]]) * length
    color = _hsv(rng, (0.22, 0.42), (0.3, 0.9), (0.2, 0.65))
    placed = _to_canvas(_turn(points, rng.uniform(0, 2 * math.pi)), start, np.eye(2))
    draw.polygon(placed, fill=color, outline=_shade(color, 0.7))
    draw.line([placed[0], placed[9]], fill=_shade(color, 1.25))


def _light(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    """A gradient of light, exposure, a color cast, blur and noise."""
    size = picture.width
    blurred = picture.filter(ImageFilter.GaussianBlur(size * rng.uniform(0.0, 0.008)))
    pixels = np.asarray(blurred, np.float32)
    angle, strength = rng.uniform(0, 2 * math.pi), rng.uniform(0.0, 0.5)
    ramp = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    light = 1 + strength * (math.cos(angle) * ramp[None, :] + math.sin(angle) * ramp[:, None])
    gain = rng.uniform(0.65, 1.3) * rng.uniform(0.9, 1.1, 3)
    noise = rng.standard_normal((size, size, 1), np.float32) * rng.uniform(2, 14)
    lit = pixels * light[..., None] * gain.astype(np.float32) + noise
    return Image.fromarray(np.clip(lit, 0, 255).astype(np.uint8))


def _tilt(rng: np.random.Generator) -> np.ndarray:
    """[2, 2]: a flat flower seen from a direction that is not quite its front."""
    axis, squeeze = rng.uniform(0, math.pi), rng.uniform(0.55, 1.0)
    turn = np.array([[math.cos(axis), -math.sin(axis)], [math.sin(axis), math.cos(axis)]])
    return turn @ np.diag([1.0, squeeze]) @ turn.T


def _turn(points: np.ndarray, angle: float) -> np.ndarray:
    cos, sin = math.cos(angle), math.sin(angle)
    return points @ np.array([[cos, sin], [-sin, cos]])


def _to_canvas(points: np.ndarray, middle: np.ndarray, tilt: np.ndarray) -> list[tuple[float, float]]:
    return [(x, y) for x, y in (points @ tilt.T + middle).tolist()]


def _hsv(rng: np.random.Generator, hue: Sequence[float], saturation: Sequence[float], value: Sequence[float]) -> Color:
    h, s, v = (rng.uniform(low, high) for low, high in (hue, saturation, value))
    return _to_color(255 * channel for channel in colorsys.hsv_to_rgb(h % 1.0, s, v))


def _shade(color: Color, factor: float) -> Color:
    return _to_color(channel * factor for channel in color)


def _to_color(channels: Iterator[float] | Sequence[float]) -> Color:
    r, g, b = (int(min(255, max(0, channel))) for channel in channels)
    return r, g, b
