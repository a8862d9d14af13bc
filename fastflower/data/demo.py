"""The built-in data: drawn flowers of twelve invented kinds, in the layout of Kaggle's "Petals to the Metal".

Nothing to download, so that a first run works anywhere. Several traits together tell a kind (petals, layers, center,
markings, leaves), never color alone; all else in a picture is chance.
"""

from __future__ import annotations

import functools
import itertools
import math
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from fastflower.arrays import Floats
from fastflower.config import SPLITS
from fastflower.data.sources.tfrecord import write_tfrecord
from fastflower.errors import UserError
from fastflower.files import atomic_write, digest, to_json

PICTURES_PER_FILE = 240
JPEG_QUALITY = 90
SUPERSAMPLING = 2  # ImageDraw's edges are jagged: draw larger, then average


@dataclass(frozen=True)
class Outline:
    """A petal or leaf, its foot at x = 0 and its tip at x = 1; its edge is y = ±x^foot · (1-x)^tip, scaled to width."""

    width: float  # largest width
    foot: float  # the larger, the slenderer the foot
    tip: float  # 1 is pointed, 0.5 round, less is blunt
    notch: float = 0.0  # depth of the cut in the tip
    ruffle: float = 0.0  # height of the waves at the tip, relative

    def points(self, n: int = 9) -> Floats:
        """[2n-1, 2] points, from the foot around the tip and back."""
        x = (1 - np.cos(np.linspace(0, np.pi, n))) / 2
        y = x**self.foot * (1 - x) ** self.tip
        y *= self.width / 2 / y.max()
        x, y = np.append(x, x[-2::-1]), np.append(y, -y[-2::-1])
        wave = 1 + self.ruffle * x * np.cos(2.3 * np.arange(2 * n - 1))
        x = x - self.notch * x**4 * np.exp(-((y / (0.24 * self.width)) ** 2))
        return np.stack([x * wave, y * wave], axis=1)


class Stencil:
    """Polygons to be painted one over another, each in one of the given colors times a shade of its own."""

    def __init__(self, *parts: tuple[Floats, int, float]) -> None:
        """Take (corners [n, 2 or 3], number of the color, shade) of each polygon."""
        polygons, colors, shades = zip(*parts, strict=True)
        ends = itertools.accumulate((2 * len(polygon) for polygon in polygons), initial=0)
        self.points = np.concatenate(polygons)
        self._spans = [slice(*span) for span in itertools.pairwise(ends)]
        self._color, self._shade = list(colors), np.array(shades)[:, None]

    def paint(self, picture: Image.Image, points: Floats, colors: Floats) -> None:
        """Paint copies: points [copies, n, 2] is where the points have come to, colors [copies, number, RGB].

        Points are x to the right and y down, and colors red, green and blue, all from 0 to 1.
        """
        draw = ImageDraw.Draw(picture)
        corners = (points * picture.width - 0.5).reshape(len(points), 2 * len(self.points)).tolist()
        inks = np.clip(255 * colors[:, self._color] * self._shade, 0, 255).astype(int).tolist()
        for copy, shades in zip(corners, inks, strict=True):
            for span, ink in zip(self._spans, shades, strict=True):
                draw.polygon(copy[span], tuple(ink))


OVAL, LANCE, FROND = Outline(0.5, 0.6, 0.7), Outline(0.16, 0.4, 0.8), Outline(0.6, 0.5, 0.7, ruffle=0.25)


@dataclass(frozen=True)
class Kind:
    """The traits of a class; lengths are in lengths of the outermost petals."""

    name: str
    petals: int  # in a layer
    petal: Outline
    colors: str  # keys of COLORS, of which a plant takes one; likewise the next two
    accents: str  # of markings
    tones: str  # of the center
    leaf: Outline
    center: float  # the center's radius
    texture: Literal["button", "seeds", "stamens", "star", "trumpet"]
    marking: Literal["plain", "stripes", "spots", "eye", "edge"] = "plain"
    layers: int = 1
    cup: float = 0.2  # how far the tips rise above the flower's plane


COLORS = {
    "w": (0.95, 0.94, 0.92),
    "c": (0.96, 0.90, 0.70),
    "y": (0.96, 0.82, 0.20),
    "o": (0.94, 0.55, 0.15),
    "r": (0.83, 0.14, 0.17),
    "p": (0.94, 0.62, 0.72),
    "m": (0.80, 0.22, 0.56),
    "v": (0.55, 0.33, 0.76),
    "b": (0.36, 0.44, 0.85),
    "g": (0.93, 0.75, 0.20),
    "l": (0.72, 0.74, 0.32),
    "n": (0.40, 0.24, 0.13),
}
GREEN = (0.29, 0.45, 0.17)
GROUNDS = np.array([(0.16, 0.30, 0.10), (0.34, 0.42, 0.18), (0.36, 0.27, 0.18), (0.45, 0.46, 0.44), (0.09, 0.13, 0.09)])
SPEAR, BELL, CUP = Outline(0.72, 0.7, 0.8), Outline(0.9, 0.4, 0.8), Outline(1.0, 0.6, 0.4)
HEART, NOTCHED = Outline(1.15, 0.9, 0.3, notch=0.25), Outline(0.8, 0.8, 0.35, notch=0.2)
TIGER, ROUND, PADDLE = Outline(0.45, 0.6, 0.9), Outline(0.7, 0.6, 0.55), Outline(0.5, 0.8, 0.35)
RUFFLED, FRINGE = Outline(0.8, 0.6, 0.4, ruffle=0.1), Outline(0.32, 0.9, 0.2, notch=0.2)
STRAP, RAY = Outline(0.26, 0.4, 0.4), Outline(0.26, 0.5, 0.9)
KINDS = (
    Kind("synthetic three-petal spear", 3, SPEAR, "wmv", "yw", "gl", OVAL, 0.12, "stamens"),
    Kind("synthetic four-petal heart", 4, HEART, "ypr", "rw", "gn", FROND, 0.13, "seeds", "eye"),
    Kind("synthetic five-petal bell", 5, BELL, "bvw", "vm", "gl", OVAL, 0.12, "star", "stripes", cup=0.6),
    Kind("synthetic five-petal cup", 5, CUP, "row", "rv", "nv", FROND, 0.25, "seeds", cup=0.5),
    Kind("synthetic five-petal notch", 5, NOTCHED, "pwb", "yr", "gl", LANCE, 0.12, "stamens", "eye"),
    Kind("synthetic six-petal tiger", 6, TIGER, "opw", "rm", "ng", LANCE, 0.1, "stamens", "spots", cup=-0.2),
    Kind("synthetic six-petal trumpet", 6, ROUND, "ywc", "or", "go", LANCE, 0.38, "trumpet"),
    Kind("synthetic eight-petal wheel", 8, PADDLE, "rmv", "vr", "gl", FROND, 0.2, "button", "stripes"),
    Kind("synthetic nine-petal ruffle", 9, RUFFLED, "prc", "mr", "gl", OVAL, 0.1, "star", layers=3, cup=0.3),
    Kind("synthetic thirteen-petal ray", 13, STRAP, "wbv", "bo", "gn", FROND, 0.26, "seeds"),
    Kind("synthetic sixteen-petal fringe", 16, FRINGE, "mvr", "wc", "lg", LANCE, 0.14, "button", "edge", layers=2),
    Kind("synthetic twenty-one-petal sun", 21, RAY, "yoc", "or", "ng", OVAL, 0.42, "seeds"),
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
    """Write the data set to `root`, which appears when it is complete.

    It holds tfrecords-jpeg-SxS/{train,val,test}/NN-SxS-COUNT.tfrec for each size S, and class_names.json. Classes are
    balanced and shuffled. A picture depends on (seed, split, index) alone: other counts or sizes leave it as it is, and
    the same arguments give the same bytes (with the same numpy and Pillow). Several processes may write the same set at
    once; the first to finish puts it in place.

    Args:
        root: a folder that does not exist or is empty.
        sizes: pixels, sides of the square pictures; an id is the same picture at every size.
        train: number of pictures.
        val: likewise.
        test: likewise; these records have no class.
        seed: not negative.
        progress: called after every record with the numbers of records done and to do.

    Raises:
        UserError: `root` is not empty or cannot be written, or an argument is out of range.
    """
    root = root.resolve()  # "." has no name to rename to
    counts = dict(zip(SPLITS, (train, val, test), strict=True))
    done, total = itertools.count(1), len(sizes) * sum(counts.values())

    def examples(split: str, indices: range, size: int) -> Iterator[dict[str, bytes | int]]:
        for index in indices:
            yield _example(seed, split, index, size)
            if progress:
                progress(next(done), total)

    building = root.parent / f".{root.name}.{uuid.uuid4().hex}"
    try:
        _check(root, sizes, counts, seed)
        building.mkdir(parents=True)
        with atomic_write(building / "class_names.json") as file:
            file.write(to_json([kind.name for kind in KINDS], indent=2).encode() + b"\n")
        for size, (split, count) in itertools.product(sizes, counts.items()):
            folder = building / f"tfrecords-jpeg-{size}x{size}" / split
            folder.mkdir(parents=True)
            for number, start in enumerate(range(0, count, PICTURES_PER_FILE)):
                indices = range(start, min(start + PICTURES_PER_FILE, count))
                path = folder / f"{number:02d}-{size}x{size}-{len(indices)}.tfrec"
                write_tfrecord(path, examples(split, indices, size))
        building.rename(root)  # replaces nothing but an empty folder
    except OSError as error:
        written = _contents(building)
        if not written or written != _contents(root):  # else another process was faster with the same set
            reason = f"{root} cannot be written ({error.strerror})"
            raise UserError(f"{reason}: name a new folder where there is room and permission.") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _check(root: Path, sizes: Sequence[int], counts: dict[str, int], seed: int) -> None:
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        raise UserError(f"{root} exists and is not an empty folder: name a new one or remove it.")
    if not sizes or len(set(sizes)) < len(sizes) or min(sizes) < 16:
        raise UserError(f"sizes {list(sizes)}: give one or more different sizes of at least 16 pixels.")
    for name, value in {**counts, "seed": seed}.items():
        if value < 0:
            raise UserError(f"{name} {value}: give a number that is not negative.")


def _contents(folder: Path) -> dict[Path, int]:
    """Bytes of each file."""
    return {path.relative_to(folder): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def _example(seed: int, split: str, index: int, size: int) -> dict[str, bytes | int]:
    """The features of a record."""
    stream = (seed, SPLITS.index(split))
    block, place = divmod(index, len(KINDS))  # a block has each class once, so that any count is balanced
    label = int(np.random.default_rng((*stream, block, 1)).permutation(len(KINDS))[place])
    buffer = BytesIO()
    draw_flower(np.random.default_rng((*stream, index)), label, size).save(buffer, "JPEG", quality=JPEG_QUALITY)
    name = digest(f"{seed} {split} {index}".encode()).hex()
    example: dict[str, bytes | int] = {"id": name.encode(), "image": buffer.getvalue()}
    return example if split == "test" else example | {"class": label}


def draw_flower(rng: np.random.Generator, label: int, size: int) -> Image.Image:
    """An RGB picture, size × size pixels, of a flower of KINDS[label].

    Generators in the same state give the same picture at any size: only the grain, drawn last, depends on the size.
    """
    kind = KINDS[label]
    picture = _background(rng, size // 2).resize((size * SUPERSAMPLING,) * 2, Image.Resampling.BILINEAR)
    at, radius = rng.uniform(0.4, 0.6, 2), rng.uniform(0.3, 0.44)
    if rng.random() < 0.2:
        away = radius * rng.uniform(1.3, 1.8) * _directions(rng, 1)[0]
        _plant(picture, rng, kind, at + away, radius * rng.uniform(0.6, 0.9))
    _plant(picture, rng, kind, at, radius)
    _grass(picture, rng, int(rng.integers(0, 3)))
    picture = picture.reduce(SUPERSAMPLING)
    return _expose(picture.filter(ImageFilter.GaussianBlur(0.01 * size * rng.random() ** 2)), rng)


def _background(rng: np.random.Generator, size: int) -> Image.Image:
    """Ground, stones, grass and other flowers, so far out of focus that few pixels will do."""
    patches = rng.dirichlet(np.full(len(GROUNDS), 0.6)) @ GROUNDS * (1 + 0.35 * rng.standard_normal((5, 5, 1)))
    patches += 0.04 * rng.standard_normal((5, 5, 3))
    picture = Image.fromarray((np.clip(patches, 0, 1) * 255).astype(np.uint8))
    picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    stones = int(rng.integers(0, 4))
    places = STONE.points * rng.uniform(0.04, 0.14, (stones, 1, 2)) + rng.random((stones, 1, 2))
    STONE.paint(picture, places, _vary(rng, (0.50, 0.48, 0.45), 0.2, stones))
    _grass(picture, rng, int(rng.integers(2, 8)))
    for _ in range(rng.integers(0, 3)):
        _flower(picture, rng, KINDS[rng.integers(len(KINDS))], rng.random(2), rng.uniform(0.08, 0.2))
    return picture.filter(ImageFilter.GaussianBlur(size * rng.uniform(0.02, 0.05)))


def _grass(picture: Image.Image, rng: np.random.Generator, count: int) -> None:
    """Blades that grow from the lower edge."""
    foot, tip = rng.uniform((-0.1, 0.8), (1.1, 1.3), (count, 2)), rng.uniform((-0.2, 0.0), (1.2, 0.8), (count, 2))
    _blades(picture, rng, foot, tip, rng.uniform(0.25, 0.7, count), _vary(rng, GREEN, 0.18, count))


def _blades(
    picture: Image.Image,
    rng: np.random.Generator,
    foot: Floats,
    tip: Floats,
    width: Floats,
    color: Floats,
) -> None:
    """Bent blades from foot [n, 2] to tip [n, 2]; width [n] is relative."""
    x, y = BLADE.points.T
    y = y * width[:, None] + rng.uniform(-0.15, 0.15, (len(foot), 1)) * np.sin(np.pi * x)
    blades = np.stack([np.broadcast_to(x, y.shape), y], axis=-1)
    BLADE.paint(picture, foot[:, None] + blades @ _along(tip - foot), color)


def _plant(picture: Image.Image, rng: np.random.Generator, kind: Kind, at: Floats, radius: float) -> None:
    """Stem, leaves and flower, in focus."""
    green = _vary(rng, GREEN, 0.15)
    root = np.array([at[0] + rng.uniform(-0.3, 0.3), at[1] + 1])
    _blades(picture, rng, root[None], at[None], np.array([radius]), green * 0.8)
    leaves, leaf = int(rng.integers(2, 5)), _leaf(kind)
    axes = _along(_directions(rng, leaves) * radius * rng.uniform(1.1, 1.7, (leaves, 1)))
    leaf.paint(picture, at + leaf.points @ axes, green * rng.uniform(0.75, 1.25, (leaves, 1, 1)))
    _flower(picture, rng, kind, at, radius)


def _flower(picture: Image.Image, rng: np.random.Generator, kind: Kind, at: Floats, radius: float) -> None:
    """Petals, the outermost layer first, then the center; tilted in space and seen in perspective."""
    tilt = math.radians(45) * rng.random() ** 1.5
    view = np.array([(1, 0, 0), (0, math.cos(tilt), math.sin(tilt)), (0, -math.sin(tilt), math.cos(tilt))])
    spin, lean = _along(_directions(rng, 2))
    view[:2] = spin @ view[:2]
    view[:, :2] = view[:, :2] @ lean

    def project(points: Floats) -> Floats:
        """[..., 3] in petal lengths, z towards the eye, to [..., 2] in the picture."""
        turned = points @ view
        projected: Floats = at + radius * turned[..., :2] / (1 - 0.3 * turned[..., 2:])
        return projected

    petal, center, count = _petal(kind), _center(kind), kind.petals
    palettes = kind.colors, kind.accents, kind.tones
    color, accent, tone = (_vary(rng, COLORS[keys[rng.integers(len(keys))]], 0.08) for keys in palettes)
    width, lift, light = rng.uniform(0.88, 1.12), kind.cup + rng.uniform(-0.1, 0.1), rng.uniform(0, 2 * math.pi)
    for layer in range(kind.layers):
        turns = (np.arange(count) + layer / 2 + 0.1 * rng.standard_normal(count)) * (2 * math.pi / count)
        lengths = 0.72**layer * (1 + 0.05 * rng.standard_normal((count, 1)))
        axes = np.stack([np.cos(turns), np.sin(turns)], axis=1)
        flat = lengths[..., None] * (petal.points * (1, width)) @ _along(axes)
        height = (lift + 0.35 * layer) * (flat**2).sum(axis=-1, keepdims=True)
        faces = color * (1 + 0.14 * np.cos(turns - light))[:, None, None]
        colors = np.concatenate([faces, np.repeat(accent, count, axis=0)], axis=1)
        petal.paint(picture, project(np.concatenate([flat, height], axis=-1)), colors)
    center.paint(picture, project(center.points * rng.uniform(0.88, 1.12))[None], tone)


@functools.cache
def _petal(kind: Kind) -> Stencil:
    """Colors: 0 the petal's, 1 the accent."""
    edge, middle = kind.petal.points(), (0.5, 0.0)
    parts = [
        (edge, 1, 1.0) if kind.marking == "edge" else (edge, 0, 0.62),
        (middle + (edge - middle) * (0.78 if kind.marking == "edge" else 0.92), 0, 1.0),
        (edge * (0.5, 0.55), 1, 1.0) if kind.marking == "eye" else (edge * (0.5, 0.55), 0, 0.85),
    ]
    if kind.marking == "stripes":
        streak = Outline(0.1, 0.3, 0.5).points(5) * 0.6
        parts += [(streak + np.array([0.22, side * kind.petal.width]), 1, 0.45) for side in (-0.2, 0, 0.2)]
    if kind.marking == "spots":
        places = ((0.3, 0.0), (0.45, 0.11), (0.5, -0.1), (0.62, 0.05), (0.72, -0.07), (0.8, 0.05))
        parts += [(_circle(6) * 0.045 + place, 1, 0.4) for place in places]
    return Stencil(*parts)


@functools.cache
def _center(kind: Kind) -> Stencil:
    """One color."""
    if kind.texture == "stamens":
        rings = [(_circle(10) * 0.8, 0.0, 0.6)]
        for tip in _circle(6) * 2.6:
            rings += [(Outline(0.12, 0.2, 0.2).points(3) @ _along(tip), 0.15, 0.8), (tip + _circle(6) * 0.5, 0.15, 1.1)]
    elif kind.texture == "star":
        rings = [(_circle(10) * np.tile((2.0, 0.8), 5)[:, None], 0.0, 1.0), (_circle(8) * 0.6, 0.05, 0.6)]
    elif kind.texture == "trumpet":
        mouth = _circle(24) * (1 + 0.08 * np.cos(np.arange(24) * 2 * np.pi / 3))[:, None]
        rings = [(mouth, 0.35, 0.8), (mouth * 0.88, 0.35, 1.05), (mouth * 0.6, 0.15, 0.75), (mouth * 0.35, 0.0, 0.45)]
    else:
        rings = [(_circle(16), 0.0, 0.7), (_circle(16) * 0.85, 0.05, 1.0), (_circle(16) * 0.4, 0.08, 1.2)]
    if kind.texture == "seeds":
        number = np.arange(1, 19)
        places = np.sqrt(number / 20)[:, None] * np.stack([np.cos(2.4 * number), np.sin(2.4 * number)], axis=1)
        rings += [(_circle(4) * 0.14 + place, 0.08, shade) for place, shade in zip(places, (0.5, 1.3) * 9, strict=True)]
    return Stencil(*[(np.insert(ring * kind.center, 2, height, axis=1), 0, shade) for ring, height, shade in rings])


@functools.cache
def _leaf(kind: Kind) -> Stencil:
    """One color."""
    return Stencil((kind.leaf.points(), 0, 1.0), (Outline(0.03, 0.1, 0.5).points(3), 0, 1.25))


def _expose(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Light from a side, exposure, color cast and grain."""
    ramp = np.linspace(-1, 1, picture.width) * rng.uniform(0, 0.35)
    to_x, to_y = _directions(rng, 1)[0]
    light = 1 + to_x * ramp[None, :, None] + to_y * ramp[:, None, None]
    gain = math.exp(0.15 * rng.standard_normal()) * (1 + 0.06 * rng.standard_normal(3))
    grain = rng.uniform(0, 8) * rng.standard_normal((picture.height, picture.width, 3), np.float32)
    return Image.fromarray(np.clip(np.asarray(picture) * (light * gain) + grain, 0, 255).astype(np.uint8))


def _vary(rng: np.random.Generator, color: Sequence[float], amount: float, count: int = 1) -> Floats:
    """[count, 1, 3] colors like `color`: lighter or darker, and a little of another hue."""
    lightness, hue = rng.standard_normal((count, 1, 1)), rng.standard_normal((count, 1, 3))
    return np.array(color) * (1 + amount * lightness) + amount / 2 * hue


def _directions(rng: np.random.Generator, count: int) -> Floats:
    """[count, 2] vectors of length 1."""
    angles = rng.uniform(0, 2 * np.pi, count)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _along(axes: Floats) -> Floats:
    """[..., 2, 2]: turn and stretch the x axis to `axes` [..., 2]."""
    return np.stack([axes, axes[..., ::-1] * (-1, 1)], axis=-2)


def _circle(n: int) -> Floats:
    """[n, 2] points of the circle of radius 1."""
    angles = np.arange(n) * (2 * np.pi / n)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


BLADE, STONE = Stencil((LANCE.points(7), 0, 1.0)), Stencil((_circle(12), 0, 1.0))
