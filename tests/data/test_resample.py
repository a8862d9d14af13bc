"""Resampling on a CPU against the DALI graph, PIL and torchvision."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter, ImageOps

from fastflower.arrays import Bytes, Floats, Ints
from fastflower.data.geometry import Frame, frames
from fastflower.data.pipeline import Decoder, build_pipeline, inputs
from fastflower.data.records import read_image
from fastflower.data.resample import Region, Resampler, resample
from fastflower.data.sampler import Request
from fastflower.data.sources.kaggle import load_split
from fastflower.data.view import IMAGENET, Engine, Normalization, View
from tests.conftest import READABLE, jpeg


@pytest.fixture(scope="module")
def threads() -> Iterator[Executor]:
    with ThreadPoolExecutor(2) as made:
        yield made


def random_request(n: int, low: int, high: int, seed: int) -> Request:
    rng = np.random.default_rng(seed)
    shorter = rng.integers(low, high + 1, n).astype(np.int32)
    return Request(np.arange(n), shorter, rng.random((n, 2)).astype(np.float32), rng.integers(0, 2, n).astype(np.int32))


def arrays(encoded: list[bytes]) -> list[Bytes]:
    return [np.frombuffer(data, np.uint8) for data in encoded]


def by_dali(encoded: list[bytes], request: Request, view: View) -> list[Bytes]:
    given = inputs(arrays(encoded), request)
    (pictures,) = build_pipeline(lambda: given, view, Engine(prefetch=1, decode="whole"), len(encoded)).run()
    return [np.array(pictures[i]) for i in range(len(encoded))]


def decode(encoded: list[bytes], request: Request, view: View) -> list[Region]:
    given = inputs(arrays(encoded), request)
    decoder = Decoder(view, Engine(), len(encoded))
    decoder.begin(given)
    outputs = decoder.take()
    pixels, corners, shapes = ([np.array(output[i]) for i in range(len(encoded))] for output in outputs)
    places = zip(corners, shapes, strict=True)
    return [Region(pixels[i], tuple(corner), tuple(shape)) for i, (corner, shape) in enumerate(places)]


def whole(encoded: list[bytes]) -> list[Region]:
    pictures = [region.pixels for region in decode(encoded, random_request(len(encoded), 9, 9, 0), View(9, "whole"))]
    return [Region(picture, (0, 0), picture.shape[:2]) for picture in pictures]


def resampled(
    regions: list[Region], request: Request, view: View, threads: Executor, normalization: Normalization | None = None
) -> list[Bytes]:
    pictures: dict[int, Bytes] = {}
    making = Resampler(view, normalization).begin(request)
    shapes = np.array([region.shape for region in regions])
    for task in making.add(np.arange(len(regions)), shapes, lambda i, _: regions[i], threads):
        task.result()
    for images, alike in making.finish():
        pictures |= dict(zip(alike.tolist(), images, strict=True))
    return [pictures[i] for i in range(len(regions))]


def resize(
    picture: Bytes, kept: Frame, *, flip: bool = False, corner: tuple[int, int] = (0, 0), rows: int | None = None
) -> Bytes:
    """Of a picture whose parts above and left of `corner` are not there, nor those from `rows` on."""
    out = np.empty((kept.rows, kept.columns, 3), np.uint8)
    region = np.ascontiguousarray(picture[corner[0] : rows, corner[1] :])
    place = Region(region, corner, picture.shape[:2])
    resample(place, kept, flip, np.zeros(3, np.float32), np.ones(3, np.float32), out)
    return out


def assert_same(pictures: list[Bytes], wanted: list[Bytes]) -> None:
    for one, other in zip(pictures, wanted, strict=True):
        assert one.shape == other.shape
        difference = np.abs(one.astype(int) - other.astype(int))
        assert difference.max() <= 1
        assert difference.mean() < 0.1


@pytest.mark.parametrize("place", ["random", "center", "whole"])
@pytest.mark.parametrize("resize", [True, False])
def test_pixels_are_dalis_to_a_level(place: str, resize: bool, threads: Executor) -> None:
    shapes = [(60, 60), (61, 90), (90, 61), (33, 120), (200, 150), (40, 41), (32, 32), (25, 70)]
    encoded = [jpeg(width, height, seed) for seed, (height, width) in enumerate(shapes)]
    view = View(32, place)  # type: ignore[arg-type]
    for seed in range(6):
        request = random_request(len(encoded), 32, 130, seed)
        request = request if resize else replace(request, shorter=None)
        assert_same(resampled(decode(encoded, request, view), request, view, threads), by_dali(encoded, request, view))


@pytest.mark.parametrize("place", ["random", "center", "whole"])
def test_a_region_is_decoded_and_resampled_as_in_the_whole_picture(
    place: str, threads: Executor, flowers5: Path, odd_images: Path
) -> None:
    """To the bit, whatever the file's format and its rows and columns of blocks are."""
    records = load_split(flowers5, "val", sizes="all")
    encoded = [read_image(records, i).tobytes() for i in range(0, len(records), 3)]
    encoded += [(odd_images / name).read_bytes() for name in READABLE]
    pictures = whole(encoded)
    for seed, (low, high) in enumerate([(64, 70), (120, 300), (400, 900)]):
        view = View(64, place)  # type: ignore[arg-type]
        request = random_request(len(encoded), low, high, seed)
        regions = decode(encoded, request, view)
        for region, picture in zip(regions, pictures, strict=True):
            (top, left), (height, width, _) = region.corner, region.pixels.shape
            assert region.shape == picture.shape
            np.testing.assert_array_equal(region.pixels, picture.pixels[top : top + height, left : left + width])
        of_regions, of_pictures = (resampled(source, request, view, threads) for source in (regions, pictures))
        for one, other in zip(of_regions, of_pictures, strict=True):
            np.testing.assert_array_equal(one, other)
        if place != "whole" and low > 70:
            assert sum(r.pixels.size for r in regions) < 0.5 * sum(p.pixels.size for p in pictures)


def test_a_region_holds_what_the_filter_reaches_at_every_place() -> None:
    """Of odd sizes too; a region that is too small would be read beyond its end."""
    encoded = [jpeg(41, 97), jpeg(64, 30), jpeg(33, 33)]
    view = View(20, "random")
    n = len(encoded)
    for shorter in range(20, 90, 7):
        for share in (0.0, 0.3, 0.5, 0.9999, 1.0):
            crop_yx = np.full((n, 2), share, np.float32)
            sides = np.full(n, shorter, np.int32)
            request = Request(np.arange(n), sides, crop_yx, np.zeros(n, np.int32))
            for region in decode(encoded, request, view):
                (kept,) = frames(np.array([region.shape]), sides[:1], crop_yx[:1], view)
                for axis, (start, count) in enumerate(((kept.top, kept.rows), (kept.left, kept.columns))):
                    scale = region.shape[axis] / kept[axis]
                    reach = max(scale, 1.0)
                    low = np.floor((start + 0.5) * scale - reach + 0.5)
                    high = np.floor((start + count - 0.5) * scale + reach + 0.5)
                    begin = region.corner[axis]
                    assert begin <= max(low, 0)
                    assert begin + region.pixels.shape[axis] >= min(high, region.shape[axis])


def test_a_region_that_is_too_small_is_refused() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8)
    kept = Frame(60, 60, 20, 20, 30, 30)
    wanted = resize(picture, kept)
    np.testing.assert_array_equal(resize(picture, kept, corner=(29, 28)), wanted)
    for corner in ((31, 28), (28, 31)):
        with pytest.raises(ValueError, match="lacks pixels"):
            resize(picture, kept, corner=corner)
    with pytest.raises(ValueError, match="lacks pixels"):
        resize(picture, kept, rows=40)


def test_all_kinds_of_pictures(odd_images: Path, threads: Executor) -> None:
    encoded = [(odd_images / name).read_bytes() for name in READABLE]
    for view in (View(48, "random"), View(48, "center"), View(48, "whole")):
        request = random_request(len(encoded), 48, 100, 0)
        assert_same(resampled(decode(encoded, request, view), request, view, threads), by_dali(encoded, request, view))


def test_normalizing_is_the_plain_formula_to_the_bit(threads: Executor) -> None:
    encoded = [jpeg(60, 50, seed) for seed in range(20)]
    request = random_request(len(encoded), 36, 80, 0)
    shift = np.random.default_rng(0).normal(0, 0.1, (len(encoded), 3)).astype(np.float32)
    mean, std = (np.float32(255) * np.array(values, np.float32) for values in (IMAGENET.mean, IMAGENET.std))
    view = View(32, "random")
    regions = decode(encoded, request, view)
    levels = resampled(regions, request, view, threads)
    for shifts in (None, shift):
        normalized = resampled(regions, replace(request, shift=shifts), view, threads, IMAGENET)
        for i, (one, pixels) in enumerate(zip(normalized, levels, strict=True)):
            assert one.dtype == np.float32
            middle = mean if shifts is None else mean - np.float32(255) * shifts[i]
            np.testing.assert_array_equal(one, (pixels.astype(np.float32) - middle) / std)
    for one, pixels in zip(resampled(regions, replace(request, shift=shift), view, threads), levels, strict=True):
        np.testing.assert_array_equal(one, pixels)


def filter_matrix(size: int, resized: int) -> Floats:
    """[resized, size] float64: the triangle filter, widened where it shrinks; beyond the border is what is there."""
    scale = size / resized
    support = max(scale, 1)
    centers = (np.arange(resized)[:, None] + 0.5) * scale
    places = np.arange(-int(support) - 2, size + int(support) + 2)
    weights = np.maximum(1 - np.abs(places + 0.5 - centers) / support, 0)
    matrix = np.zeros((resized, size))
    for place, column in zip(places.tolist(), weights.T, strict=True):
        matrix[:, min(max(place, 0), size - 1)] += column
    normalized: Floats = matrix / matrix.sum(1, keepdims=True)
    return normalized


SIZES = [(1, 1), (1, 2), (2, 1), (2, 7), (3, 3), (5, 1), (7, 64), (9, 8), (16, 5), (31, 90), (64, 3), (90, 31)]


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("columns", SIZES)
def test_levels_are_those_of_the_filter_rounded(rows: tuple[int, int], columns: tuple[int, int]) -> None:
    """Shapes of which vectors of several values leave a rest, and that become larger, smaller, or both."""
    (height, new_height), (width, new_width) = rows, columns
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    exact = np.einsum("yh,xw,hwc->yxc", filter_matrix(height, new_height), filter_matrix(width, new_width), picture)
    levels = resize(picture, Frame(new_height, new_width, 0, 0, new_height, new_width))
    assert np.abs(levels - exact).max() <= 0.5001
    top, left = new_height // 3, new_width // 4
    kept = Frame(new_height, new_width, top, left, new_height - top, new_width - left)
    np.testing.assert_array_equal(resize(picture, kept, flip=True), levels[top:, left:][:, ::-1])


def by_pil(picture: Bytes, height: int, width: int) -> Ints:
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR)).astype(int)


def by_pil_with_border_repeated(picture: Bytes, height: int, width: int) -> Ints:
    """As if what is at the border went on beyond it: one pixel more on each side is resized, and dropped."""
    (rows, columns), n = picture.shape[:2], max(picture.shape) + 2
    repeated = Image.fromarray(np.pad(picture, ((n, n), (n, n), (0, 0)), mode="edge"))
    right, down = columns / width, rows / height
    box = (n - right, n - down, n + columns + right, n + rows + down)
    larger = np.asarray(repeated.resize((width + 2, height + 2), Image.Resampling.BILINEAR, box))
    return larger[1:-1, 1:-1].astype(int)


@given(
    shape=st.tuples(st.integers(8, 150), st.integers(8, 150)),
    resized=st.tuples(st.integers(4, 200), st.integers(4, 200)),
    blur=st.sampled_from([0, 1, 4]),
)
@settings(deadline=None, max_examples=150)
def test_levels_are_pils_but_for_the_border_of_what_shrinks(
    shape: tuple[int, int], resized: tuple[int, int], blur: int
) -> None:
    """There they are PIL's for a picture whose border is repeated, which takes an eighth of the weight of each axis."""
    noise = Image.fromarray(np.random.default_rng(sum(shape)).integers(0, 256, (*shape, 3), np.uint8))
    picture = np.asarray(ImageOps.autocontrast(noise.filter(ImageFilter.GaussianBlur(blur))))
    height, width = resized
    levels = resize(picture, Frame(height, width, 0, 0, height, width)).astype(int)
    difference = np.abs(levels - by_pil(picture, height, width))
    assert difference[1:-1, 1:-1].max() <= 1
    shrinks = [old > new for old, new in zip(shape, resized, strict=True)]
    if not shrinks[0]:
        assert difference[:, 1:-1].max() <= 1
    if not shrinks[1]:
        assert difference[1:-1].max() <= 1
    assert difference.max() <= 1 + 255 * (1 - (7 / 8) ** sum(shrinks))
    assert np.abs(levels - by_pil_with_border_repeated(picture, height, width)).max() <= 1


def drawn(width: int, height: int, seed: int) -> bytes:
    rng, total = np.random.default_rng(seed), np.zeros((height, width, 3))
    for side in (2, 4, 8, 16, 32, 64):
        coarse = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
        total += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    buffer = BytesIO()
    picture = ImageOps.autocontrast(Image.fromarray((total * 255 / total.max()).astype(np.uint8)))
    picture.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


@pytest.mark.parametrize("place", ["random", "center", "whole"])
def test_the_border_is_dalis_and_differs_from_pils(place: str, threads: Executor) -> None:
    """By some levels of pictures that have detail at all scales, as photographs do."""
    encoded = [drawn(130, 100, seed) for seed in range(12)]
    view = View(40, place)  # type: ignore[arg-type]
    request = replace(random_request(len(encoded), 40, 40, 0), mirror=np.zeros(len(encoded), np.int32))
    pictures = resampled(decode(encoded, request, view), request, view, threads)
    assert_same(pictures, by_dali(encoded, request, view))  # all pixels, also of the border
    differences = []
    for data, one, crop_yx in zip(encoded, pictures, request.crop_yx, strict=True):
        with Image.open(BytesIO(data)) as opened:
            original = np.asarray(opened)
        (kept,) = frames(np.array([(100, 130)]), np.full(1, 40, np.int32), crop_yx[None], view)
        wanted = by_pil(original, kept.height, kept.width)[kept.top :, kept.left :][: kept.rows, : kept.columns]
        differences.append(np.abs(one.astype(int) - wanted))
    assert max(difference[1:-1, 1:-1].max() for difference in differences) <= 1
    assert 1 < max(difference.max() for difference in differences) <= 16


@pytest.mark.parametrize("size", [20, 50, 64, 173, 400])
def test_a_part_of_a_resized_picture_is_that_of_the_whole(size: int) -> None:
    picture = np.random.default_rng(size).integers(0, 256, (90, 130, 3), np.uint8)
    height, width = size, size * 130 // 90
    whole = resize(picture, Frame(height, width, 0, 0, height, width))
    part = resize(picture, Frame(height, width, height // 4, width // 5, height // 2, width // 3), flip=True)
    kept = whole[height // 4 :, width // 5 :][: height // 2, : width // 3]
    np.testing.assert_array_equal(part, kept[:, ::-1])


def test_a_checkerboard_that_shrinks_turns_gray() -> None:
    board = np.indices((512, 512)).sum(0) % 2 * 255
    picture = np.repeat(board[..., None], 3, 2).astype(np.uint8)
    small = resize(picture, Frame(256, 256, 0, 0, 256, 256))
    assert np.abs(small.astype(int) - 127.5)[1:-1, 1:-1].max() <= 1


def test_constant_pictures_stay_constant() -> None:
    for value in (0, 1, 127, 254, 255):
        picture = np.full((37, 53, 3), value, np.uint8)
        for height, width in ((37, 53), (10, 14), (200, 286), (1, 1)):
            assert (resize(picture, Frame(height, width, 0, 0, height, width)) == value).all()


def test_a_picture_of_its_own_size_is_left_as_it_is() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (41, 57, 3), np.uint8)
    np.testing.assert_array_equal(resize(picture, Frame(41, 57, 0, 0, 41, 57)), picture)


def test_read_only_pictures_are_taken(threads: Executor) -> None:
    picture = np.asarray(ImageOps.exif_transpose(Image.new("RGB", (40, 40), (1, 2, 3))))
    picture.setflags(write=False)
    (image,) = resampled([Region(picture, (0, 0), (40, 40))], random_request(1, 40, 40, 0), View(32), threads)
    assert image[5, 5].tolist() == [1, 2, 3]
