"""Resampling on a CPU against the DALI graph, PIL and torchvision."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from fastflower.data.pipeline import Engine, View, build_pipeline
from fastflower.data.resample import frame, resample, resample_batch
from fastflower.data.sampler import Request
from tests.conftest import READABLE, ROOT, jpeg


@pytest.fixture(scope="module")
def threads() -> Iterator[Executor]:
    with ThreadPoolExecutor(2) as made:
        yield made


def random_request(n: int, low: int, high: int, seed: int) -> Request:
    rng = np.random.default_rng(seed)
    shorter = rng.integers(low, high + 1, n).astype(np.int32)
    return Request(np.arange(n), shorter, rng.random((n, 2)).astype(np.float32), rng.integers(0, 2, n).astype(np.int32))


def by_dali(encoded: list[bytes], request: Request, view: View) -> list[np.ndarray]:
    inputs = (
        [np.frombuffer(data, np.uint8) for data in encoded], request.shorter, request.crop_yx, request.mirror
    )  # fmt: skip
    (found,) = build_pipeline(lambda: inputs, view, Engine(prefetch=1), len(encoded)).run()
    return [np.array(found[i]) for i in range(len(encoded))]


def ours(encoded: list[bytes], request: Request, view: View, threads: Executor) -> list[np.ndarray]:
    (decoded,) = build_pipeline(
        lambda: ([np.frombuffer(data, np.uint8) for data in encoded], request.shorter, request.crop_yx, request.mirror),
        None,
        Engine(prefetch=1),
        len(encoded),
    ).run()
    pictures = [np.asarray(decoded[i]) for i in range(len(encoded))]
    found: dict[int, np.ndarray] = {}
    for images, alike in resample_batch(pictures, request, view, threads):
        found |= dict(zip(alike.tolist(), images, strict=True))
    return [found[i] for i in range(len(encoded))]


def assert_same(found: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        difference = np.abs(one.astype(int) - other.astype(int))
        assert difference.max() <= 1
        assert difference.mean() < 0.1


@pytest.mark.parametrize("place", ["random", "center", "whole"])
@pytest.mark.parametrize("resize", [True, False])
def test_pixels_are_dalis_to_a_level(place: str, resize: bool, threads: Executor) -> None:
    shapes = [(60, 60), (61, 90), (90, 61), (33, 120), (200, 150), (40, 41), (32, 32), (25, 70)]
    encoded = [jpeg(width, height, seed) for seed, (height, width) in enumerate(shapes)]
    view = View(32, place, resize)  # type: ignore[arg-type]
    for seed in range(6):
        request = random_request(len(encoded), 32, 130, seed)
        assert_same(ours(encoded, request, view, threads), by_dali(encoded, request, view))


def test_all_kinds_of_pictures(odd_images: Path, threads: Executor) -> None:
    encoded = [(odd_images / name).read_bytes() for name in READABLE]
    for view in (View(48, "random"), View(48, "center"), View(48, "whole")):
        request = random_request(len(encoded), 48, 100, 0)
        assert_same(ours(encoded, request, view, threads), by_dali(encoded, request, view))


@pytest.mark.parametrize("size", [20, 50, 64, 173, 400])
def test_noise_is_resized_as_pil_does(size: int) -> None:
    """But for the outermost pixels, which are shrunk from what lies beyond the border too: there PIL has no pixels."""
    picture = np.random.default_rng(size).integers(0, 256, (90, 130, 3), np.uint8)
    height, width = size, size * 130 // 90
    wanted = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR)).astype(int)
    found = np.empty((height, width, 3), np.uint8)
    resample(picture, height, width, 0, 0, False, found)
    assert np.abs(found - wanted)[1:-1, 1:-1].max() <= 1
    part = np.empty((height // 2, width // 3, 3), np.uint8)
    resample(picture, height, width, height // 4, width // 5, True, part)
    kept = found[height // 4 :, width // 5 :][: height // 2, : width // 3]
    np.testing.assert_array_equal(part, kept[:, ::-1])


def test_a_checkerboard_that_shrinks_turns_gray() -> None:
    board = np.indices((512, 512)).sum(0) % 2 * 255
    picture = np.repeat(board[..., None], 3, 2).astype(np.uint8)
    small = np.empty((256, 256, 3), np.uint8)
    resample(picture, 256, 256, 0, 0, False, small)
    assert np.abs(small.astype(int) - 127.5)[1:-1, 1:-1].max() <= 1


def test_constant_pictures_stay_constant() -> None:
    for value in (0, 1, 127, 254, 255):
        picture = np.full((37, 53, 3), value, np.uint8)
        for height, width in ((37, 53), (10, 14), (200, 286), (1, 1)):
            out = np.empty((height, width, 3), np.uint8)
            resample(picture, height, width, 0, 0, False, out)
            assert (out == value).all()


def test_a_picture_of_its_own_size_is_left_as_it_is() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (41, 57, 3), np.uint8)
    out = np.empty_like(picture)
    resample(picture, 41, 57, 0, 0, False, out)
    np.testing.assert_array_equal(out, picture)


def test_the_center_is_torchvisions_and_random_crops_reach_every_place() -> None:
    assert frame((60, 91, 3), 45, np.array([0.5, 0.5], np.float32), View(32)) == (45, 68, 6, 18, 32, 32)
    shares = np.linspace(0, 1, 2000, dtype=np.float32)
    tops = {frame((40, 40, 3), 40, np.array([share, share]), View(32, "random")).top for share in shares}
    assert tops == set(range(9))


def test_read_only_pictures_are_taken(threads: Executor) -> None:
    picture = np.asarray(ImageOps.exif_transpose(Image.new("RGB", (40, 40), (1, 2, 3))))
    picture.setflags(write=False)
    ((images, alike),) = resample_batch([picture], random_request(1, 40, 40, 0), View(32), threads)
    assert alike.tolist() == [0]
    assert images[0, 5, 5].tolist() == [1, 2, 3]


def test_it_works_where_its_code_cannot_be_kept(tmp_path: Path) -> None:
    """Compiled anew in each process, where neither the package nor the home folder can be written."""
    code = "import numpy as np; from fastflower.data.resample import resample; a = np.zeros((4, 4, 3), np.uint8)"
    code += "; resample(a, 4, 4, 0, 0, False, a.copy())"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HOME": "/proc", "XDG_CACHE_HOME": "/proc"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
