"""The built-in data: synthetic flowers, drawn, in the layout of Kaggle's "Petals to the Metal".

Every picture is a pure function of (seed, split, index): a larger set begins with the pictures of a smaller one.
"""

from __future__ import annotations

import colorsys
import json
import itertools
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from fastflower.data.tfrecord import write_tfrecord
from fastflower.errors import UserError
from fastflower.files import atomic_write

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
    Kind("synthetic windmill jasmine", 8, 0.30, 1.2, colors=("white", "yellow", "blue"), center=0.16, round_leaves=True),
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
    """Write the data set to `root`, which appears only when it is complete.

    It holds tfrecords-jpeg-SxS/{train,val,test}/NN-SxS-COUNT.tfrec for each size S, and class_names.json. Classes are
    balanced and shuffled. A picture depends on (seed, split, index) only: other counts and sizes leave it as it is, and
    the same arguments give the same bytes (with the same numpy and Pillow). Several processes may write the same set
    at once; the first to finish puts it in place.

    Args:
        root: a folder that does not exist or is empty.
        sizes: pixels, sides of the square pictures; an id is the same picture at every size.
        train: number of pictures; so are `val` and `test` (whose records have no class).
        seed: not negative.
        progress: called with (pictures written, of how many) after each one, every size counting.

    Raises:
        UserError: `root` is not empty or cannot be made, or an argument is out of range.
    """
    root = root.resolve()  # renaming needs a name, which "." has not
    counts = dict(zip(SPLITS, (train, val, test), strict=True))
    _check(root, sizes, counts, seed)
    done, total = itertools.count(1), len(sizes) * sum(counts.values())

    def examples(split: str, indices: range, size: int) -> Iterator[dict[str, bytes | int]]:
        for index in indices:
            yield _example(seed, split, index, size)
            if progress:
                progress(next(done), total)

    building = root.parent / f".{root.name}.{uuid.uuid4().hex}"
    try:
        building.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{root} cannot be made ({error.strerror}): choose a folder that can be written.") from error
    try:
        with atomic_write(building / "class_names.json") as file:
            file.write(json.dumps([kind.name for kind in KINDS], indent=2).encode() + b"\n")
        for size, (split, count) in itertools.product(sizes, counts.items()):
            folder = building / f"tfrecords-jpeg-{size}x{size}" / split
            folder.mkdir(parents=True)
            for number, start in enumerate(range(0, count, PICTURES_PER_FILE)):
                indices = range(start, min(start + PICTURES_PER_FILE, count))
                path = folder / f"{number:02d}-{size}x{size}-{len(indices)}.tfrec"
                write_tfrecord(path, examples(split, indices, size))
        _put_in_place(building, root)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _check(root: Path, sizes: Sequence[int], counts: dict[str, int], seed: int) -> None:
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        raise UserError(f"{root} exists and is not an empty folder: name a new one or remove it.")
    if not sizes or len(set(sizes)) < len(sizes) or min(sizes) < 16:
        raise UserError(f"sizes {list(sizes)}: give one or more different sizes of at least 16 pixels.")
    for split, count in counts.items():
        if count < 0:
            raise UserError(f"{split} {count}: give a number of pictures that is not negative.")
    if seed < 0:
        raise UserError(f"seed {seed}: give a number that is not negative.")


def _put_in_place(building: Path, root: Path) -> None:
    """Rename, which replaces nothing but an empty folder; another process may have been faster with the same set."""

    def contents(folder: Path) -> set[tuple[Path, int]]:
        return {(path.relative_to(folder), path.stat().st_size) for path in folder.rglob("*") if path.is_file()}

    try:
        building.rename(root)
    except OSError as error:
        if not root.is_dir() or contents(root) != contents(building):
            raise UserError(f"{root} cannot be put in place ({error.strerror}): name a new folder.") from error


def _example(seed: int, split: str, index: int, size: int) -> dict[str, bytes | int]:
    """The features of one record."""
    block, place = divmod(index, len(KINDS))
    stream = (seed, SPLITS.index(split))
    # Every block of twelve has each class once, so that any count is balanced.
    label = int(np.random.default_rng((*stream, block, 1)).permutation(len(KINDS))[place])
    picture = draw_flower(np.random.default_rng((*stream, index)), label, size)
    buffer = BytesIO()
    picture.save(buffer, "JPEG", quality=JPEG_QUALITY)
    name = hashlib.blake2b(f"{seed} {split} {index}".encode(), digest_size=8).hexdigest()
    example: dict[str, bytes | int] = {"id": name.encode(), "image": buffer.getvalue()}
    return example if split == "test" else example | {"class": label}


def draw_flower(rng: np.random.Generator, label: int, size: int) -> Image.Image:
    """An RGB picture of size x size pixels of a flower of KINDS[label].

    All that chance decides is drawn before `size` matters (but for the grain), so that generators in the same state
    give the same picture at any size.
    """
    kind = KINDS[label]
    picture = _background(rng, size).resize((size * SUPERSAMPLING,) * 2, Image.Resampling.BICUBIC)
    canvas = Canvas(picture)
    at, radius = rng.uniform(0.36, 0.64, 2), rng.uniform(0.2, 0.36)
    if rng.random() < 0.25:
        direction = rng.uniform(0, 2 * np.pi)
        away = radius * rng.uniform(1.3, 1.8) * np.array([np.cos(direction), np.sin(direction)])
        _plant(canvas, rng, kind, at + away, radius * rng.uniform(0.6, 0.9))
    _plant(canvas, rng, kind, at, radius)
    _blades(canvas, rng, rng.integers(0, 3))
    picture = picture.resize((size, size), Image.Resampling.BOX)
    picture = picture.filter(ImageFilter.GaussianBlur(size * 0.012 * rng.random() ** 2))
    return _expose(picture, rng)


class Canvas:
    """Draws in pictures' coordinates: x to the right and y down, both 0..1; colors are RGB or RGBA in 0..1."""

    def __init__(self, picture: Image.Image) -> None:
        self._draw = ImageDraw.Draw(picture, "RGBA")  # RGBA: paint that lets the ground through
        self._side = picture.width

    def polygon(self, points: np.ndarray, color: np.ndarray) -> None:
        """Fill; points is [n, 2]."""
        self._draw.polygon((points * self._side).ravel().tolist(), _ink(color))

    def line(self, points: np.ndarray, color: np.ndarray, width: float) -> None:
        """Join points [n, 2] by a line `width` wide."""
        self._draw.line((points * self._side).ravel().tolist(), _ink(color), max(1, round(width * self._side)), "curve")


def _ink(color: np.ndarray) -> tuple[int, ...]:
    return tuple((np.clip(color, 0, 1) * 255).astype(int).tolist())


def _jitter(rng: np.random.Generator, color: Sequence[float] | np.ndarray, amount: float) -> np.ndarray:
    """A color like `color`: lighter or darker, and a little of another hue."""
    return np.clip(np.asarray(color) * (1 + amount * rng.standard_normal()) + amount / 2 * rng.standard_normal(3), 0, 1)


def _background(rng: np.random.Generator, size: int) -> Image.Image:
    """Out-of-focus ground with stones, grass and other flowers."""
    grounds = np.array([(0.16, 0.30, 0.10), (0.30, 0.38, 0.16), (0.33, 0.25, 0.17), (0.42, 0.44, 0.42), (0.10, 0.14, 0.10)])
    tone = rng.dirichlet(np.full(len(grounds), 0.6)) @ grounds
    patches = tone * (1 + 0.35 * rng.standard_normal((5, 5, 1))) + 0.04 * rng.standard_normal((5, 5, 3))
    picture = Image.fromarray((np.clip(patches, 0, 1) * 255).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    canvas = Canvas(picture)
    for _ in range(rng.integers(0, 4)):
        stone = _circle(10) * rng.uniform(0.04, 0.14, 2) + rng.random(2)
        canvas.polygon(stone, _jitter(rng, (0.5, 0.48, 0.45), 0.2))
    _blades(canvas, rng, rng.integers(3, 9))
    for _ in range(rng.integers(0, 4)):
        kind = KINDS[rng.integers(len(KINDS))]
        _flower(canvas, rng, kind, rng.random(2), rng.uniform(0.08, 0.2))
    return picture.filter(ImageFilter.GaussianBlur(size * rng.uniform(0.015, 0.05)))


def _blades(canvas: Canvas, rng: np.random.Generator, count: int) -> None:
    """Blades of grass that grow from somewhere below the picture's middle."""
    for _ in range(count):
        foot, tip = rng.uniform((-0.1, 0.7), (1.1, 1.3)), rng.uniform((-0.2, 0.0), (1.2, 0.8))
        bend = rng.uniform(-0.15, 0.15)
        points = LANCE.points(8) * (1, rng.uniform(0.3, 0.9))
        points[:, 1] += bend * np.sin(np.pi * points[:, 0])
        along = tip - foot
        canvas.polygon(foot + points @ np.array([along, (-along[1], along[0])]), _jitter(rng, (0.30, 0.45, 0.16), 0.25))


def _plant(canvas: Canvas, rng: np.random.Generator, kind: Kind, at: np.ndarray, radius: float) -> None:
    """Stem, leaves and flower, in focus."""
    green = _jitter(rng, (0.26, 0.44, 0.18), 0.15)
    root = at + (rng.uniform(-0.3, 0.3), 1.0)
    canvas.line(np.stack([at, (at + root) / 2 + (rng.uniform(-0.1, 0.1), 0), root]), green * 0.8, radius * 0.1)
    for turn in rng.uniform(0, 2 * np.pi, rng.integers(2, 5)):
        leaf, rib = kind.leaf.points(), np.array([[0, 0], [0.9, 0]])
        along = radius * rng.uniform(1.1, 1.7) * np.array([np.cos(turn), np.sin(turn)])
        axes = np.array([along, (-along[1], along[0])])
        shade = green * rng.uniform(0.75, 1.25)
        canvas.polygon(at + leaf @ axes, shade)
        canvas.line(at + rib @ axes, shade * 1.25, radius * 0.03)
    _flower(canvas, rng, kind, at, radius)


def _flower(canvas: Canvas, rng: np.random.Generator, kind: Kind, at: np.ndarray, radius: float) -> None:
    """Petals by layers, from the outermost, and the center; tilted in space and seen in perspective."""
    view = _view(rng)

    def project(points: np.ndarray) -> np.ndarray:
        """[..., 3] in petal lengths to [..., 2] in the picture."""
        turned = points @ view
        return at + radius * turned[..., :2] / (1.6 - 0.6 * turned[..., 2:]) * 1.6

    color = _jitter(rng, COLORS[kind.colors[rng.integers(len(kind.colors))]], 0.08)
    accent = _jitter(rng, COLORS["ycrmvw"[rng.integers(6)]], 0.08)
    light = rng.uniform(0, 2 * np.pi)
    width = rng.uniform(0.88, 1.12)
    for layer in range(kind.layers):
        length = 0.72**layer
        cup = kind.cup + 0.35 * layer + rng.uniform(-0.1, 0.1)
        turns = (np.arange(kind.petals) + layer / 2 + 0.1 * rng.standard_normal(kind.petals)) * 2 * np.pi / kind.petals
        lengths = length * (1 + 0.05 * rng.standard_normal(kind.petals))
        _petals(canvas, kind, project, turns, lengths, width, cup, light, color, accent)
    _center(canvas, rng, kind, project, accent, color)


def _view(rng: np.random.Generator) -> np.ndarray:
    """[3, 3]: turn in the flower's plane, tilt by up to 55 degrees, turn in the picture's plane."""
    spin, tilt, lean = rng.uniform(0, 2 * np.pi), np.radians(55) * rng.random() ** 1.3, rng.uniform(0, 2 * np.pi)
    return _turn(spin) @ _turn(tilt)[[2, 0, 1]][:, [2, 0, 1]] @ _turn(lean)


def _turn(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([(c, s, 0), (-s, c, 0), (0, 0, 1)])


def _circle(n: int) -> np.ndarray:
    """[n, 2] points of the unit circle."""
    angles = np.arange(n) * (2 * np.pi / n)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _petals(canvas, kind, project, turns, lengths, width, cup, light, color, accent) -> None:
    edge = kind.outline.points()
    n = len(edge)
    flat = [edge, edge * 0.8 + (0.02, 0), edge * (0.5, 0.55)]
    template = np.concatenate(flat) * (1, width)
    marks = []
    if kind.marking == "stripes":
        marks = [np.array([(0.1, 0), (0.5, s * kind.outline.width * 0.2), (0.85, s * kind.outline.width * 0.24)]) for s in (-1, 0, 1)]
    elif kind.marking == "spots":
        dots = [(0.35, 0.0), (0.5, 0.12), (0.5, -0.12), (0.65, 0.05), (0.75, -0.1), (0.8, 0.1)]
        marks = [np.array(dot) + _circle(5) * 0.045 for dot in dots]
    if marks:
        template = np.concatenate([template, *marks])
    c, s = np.cos(turns)[:, None], np.sin(turns)[:, None]
    x, y = template.T * lengths[:, None, None] if False else (template[:, 0] * lengths[:, None], template[:, 1] * lengths[:, None])
    points = np.stack([c * x - s * y, s * x + c * y, cup * np.hypot(x, y) ** 2], axis=-1)
    points = project(points)
    dark, rim = color * 0.62, (accent if kind.marking == "edge" else color)
    heart = accent if kind.marking == "eye" else color * 0.8
    for petal, turn in zip(points, turns):
        shade = 1 + 0.14 * np.cos(turn - light)
        outer, inner, foot = petal[:n], petal[n : 2 * n], petal[2 * n : 3 * n]
        canvas.polygon(outer, rim * shade)
        canvas._draw.line((outer * canvas._side).ravel().tolist(), _ink(dark), max(1, round(canvas._side / 190)))
        canvas.polygon(inner, np.append(color * shade * 1.06, 1))
        canvas.polygon(foot, np.append(heart * shade, 0.85 if kind.marking == "eye" else 0.6))
        rest = petal[3 * n :]
        if kind.marking == "stripes":
            for mark in rest.reshape(3, 3, 2):
                canvas.line(mark, np.append(accent * 0.6, 0.8), 0.008)
        elif kind.marking == "spots":
            for mark in rest.reshape(6, 5, 2):
                canvas.polygon(mark, accent * 0.4)


def _center(canvas, rng, kind, project, accent, color) -> None:
    def flat(points, height=0.05):
        return project(np.column_stack([points, np.full(len(points), height)]))
    r = kind.center * rng.uniform(0.88, 1.12)
    gold = _jitter(rng, [(0.93, 0.75, 0.2), (0.35, 0.22, 0.12), (0.7, 0.72, 0.3)][rng.integers(3)], 0.1)
    if kind.texture == "stamens":
        canvas.polygon(flat(_circle(10) * r * 0.7), gold * 0.7)
        for tip in _circle(6):
            canvas.line(flat(np.array([(0, 0), tip * r * 2.4]), 0.2), gold * 0.8, 0.008)
            canvas.polygon(flat(tip * r * 2.4 + _circle(6) * 0.06, 0.2), gold)
    elif kind.texture == "star":
        star = _circle(10) * np.where(np.arange(10) % 2, 1.0, 0.4)[:, None]
        canvas.polygon(flat(star * r * 1.7), gold)
    elif kind.texture == "trumpet":
        wave = _circle(24) * (1 + 0.08 * np.cos(np.arange(24) * 2 * np.pi / 3))[:, None]
        canvas.polygon(flat(wave * r, 0.35), gold)
        canvas.polygon(flat(wave * r * 0.85, 0.3), gold * 0.8)
        canvas.polygon(flat(_circle(14) * r * 0.55, 0.1), gold * 0.4)
    else:
        canvas.polygon(flat(_circle(16) * r), gold * 0.75)
        canvas.polygon(flat(_circle(16) * r * 0.7 , 0.1), gold)
        if kind.texture == "seeds":
            k = np.arange(1, 26)
            seeds = (r * np.sqrt(k / 26))[:, None] * np.stack([np.cos(k * 2.4), np.sin(k * 2.4)], axis=1)
            spots = flat((seeds[:, None] + _circle(4) * 0.03 ).reshape(-1, 2), 0.08).reshape(25, 4, 2)
            for i, spot in enumerate(spots):
                canvas.polygon(spot, gold * (0.5 if i % 2 else 1.3))


def _expose(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Light from a side, exposure, color cast and grain."""
    size = picture.width
    direction, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.35)
    ramp = np.linspace(-strength, strength, size)
    gain = np.exp(0.18 * rng.standard_normal()) * (1 + 0.06 * rng.standard_normal(3))
    light = 1 + np.cos(direction) * ramp[None, :, None] + np.sin(direction) * ramp[:, None, None]
    grain = rng.uniform(0, 8) * rng.standard_normal((size, size, 3), np.float32)
    return Image.fromarray(np.clip(np.asarray(picture) * (light * gain) + grain, 0, 255).astype(np.uint8))
