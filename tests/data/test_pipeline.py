"""The DALI graph: pixels against PIL and torchvision, on real photographs where they are at hand."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image, ImageOps

from fastflower.arrays import Bytes, Floats
from fastflower.data.loader import normalize
from fastflower.data.pipeline import build_pipeline, inputs
from fastflower.data.records import read_image
from fastflower.data.sampler import Request
from fastflower.data.sources.kaggle import load_split
from fastflower.data.view import IMAGENET, Engine, Normalization, View
from tests.conftest import READABLE, jpeg

WHOLE = Engine(prefetch=1, decode="whole")
both = pytest.mark.parametrize("engine", [WHOLE, Engine(prefetch=1, decode="region")], ids=["whole", "region"])


def run(
    encoded: list[bytes],
    view: View,
    shorter: int | list[int] | None = 256,
    crop_yx: Floats | None = None,
    mirror: list[int] | None = None,
    normalization: Normalization | None = None,
    engine: Engine = WHOLE,
) -> Bytes:
    """One batch through the CPU pipeline: [N, H, W, C]."""
    n = len(encoded)
    request = Request(
        np.arange(n),
        None if shorter is None else np.broadcast_to(np.asarray(shorter, np.int32), n).copy(),
        np.full((n, 2), 0.5, np.float32) if crop_yx is None else crop_yx.astype(np.float32),
        np.asarray(mirror or [0] * n, np.int32),
    )
    given = inputs([np.frombuffer(data, np.uint8) for data in encoded], request)
    (output,) = build_pipeline(lambda: given, view, engine, n, normalization).run()
    pictures: Bytes = output.as_array()
    return pictures


def expected(
    encoded: bytes, crop: int, shorter: int | None, place: tuple[float, float] | None = None, mirror: int = 0
) -> Bytes:
    """The same by PIL and torchvision: decode, turn upright, resize, crop, flip; [H, W, C]."""
    picture = ImageOps.exif_transpose(Image.open(BytesIO(encoded))).convert("RGB")
    if shorter is not None:
        picture = tv.resize(picture, [shorter], antialias=True)
    if place is None:
        picture = tv.center_crop(picture, [crop, crop])
    else:
        free = (picture.height - crop, picture.width - crop)
        top, left = (min(int(np.float32(u) * np.float32(f + 1)), f) for u, f in zip(place, free, strict=True))
        picture = tv.crop(picture, top, left, crop, crop)
    return np.asarray(ImageOps.mirror(picture) if mirror else picture)


def assert_same_pixels(actual: Bytes, wanted: Bytes, most: int = 1) -> None:
    difference = np.abs(actual.astype(int) - wanted.astype(int))
    assert difference.max() <= most, f"differs by {difference.max()} levels"
    assert difference.mean() < 0.25


def photographs(root: Path, count: int) -> list[bytes]:
    """Real photographs, every second one cut to an oblong of its own shape and stored losslessly."""
    records = load_split(root, "train", sizes=[331])
    rng = np.random.default_rng(3)
    encoded = []
    for index in range(count):
        data = read_image(records, index).tobytes()
        if index % 2:
            width, height = rng.integers(190, 331, 2)
            buffer = BytesIO()
            Image.open(BytesIO(data)).crop((0, 0, int(width), int(height))).save(buffer, "PNG")
            data = buffer.getvalue()
        encoded.append(data)
    return encoded


@both
def test_random_view_is_resize_then_crop_then_flip_on_photographs(flowers5: Path, engine: Engine) -> None:
    encoded = photographs(flowers5, 24)
    rng = np.random.default_rng(0)
    shorter, place, mirror = rng.integers(224, 481, 24), rng.random((24, 2)), rng.integers(0, 2, 24)
    actual = run(encoded, View(224, "random"), shorter.tolist(), place, mirror.tolist(), engine=engine)
    for i, data in enumerate(encoded):
        assert_same_pixels(actual[i], expected(data, 224, int(shorter[i]), tuple(place[i]), int(mirror[i])))


@both
def test_center_view_is_torchvisions_resize_and_center_crop_on_photographs(flowers5: Path, engine: Engine) -> None:
    encoded = photographs(flowers5, 24)
    actual = run(encoded, View(224), 256, engine=engine)
    for i, data in enumerate(encoded):
        assert_same_pixels(actual[i], expected(data, 224, 256))


@pytest.mark.parametrize("extra", range(9))
def test_center_crop_rounds_halves_as_torchvision_does(extra: int) -> None:
    data = jpeg(40 + extra, 40)
    assert_same_pixels(run([data], View(40), 40)[0], expected(data, 40, 40))


@both
@pytest.mark.parametrize(("width", "height"), [(40, 60), (97, 61), (300, 17), (17, 300), (1, 1), (41, 40)])
@pytest.mark.parametrize("shorter", [32, 45])
def test_odd_shapes(width: int, height: int, shorter: int, engine: Engine) -> None:
    data = jpeg(width, height)
    place = np.array([[0.999, 0.3]])
    assert_same_pixels(run([data], View(32), shorter, engine=engine)[0], expected(data, 32, shorter))
    assert_same_pixels(
        run([data], View(32, "random"), shorter, place, engine=engine)[0], expected(data, 32, shorter, (0.999, 0.3))
    )


@both
def test_crop_reaches_both_edges_and_never_leaves_the_picture(engine: Engine) -> None:
    data = jpeg(64, 48)
    for u in (0.0, 1 - 2**-24, 1.0):
        place = np.full((1, 2), u)
        assert_same_pixels(run([data], View(32, "random"), 48, place, engine=engine)[0], expected(data, 32, 48, (u, u)))


@both
def test_without_resizing_the_stored_picture_is_cropped(engine: Engine) -> None:
    data = jpeg(75, 60)
    assert_same_pixels(run([data], View(56), None, engine=engine)[0], expected(data, 56, None), most=0)


@both
def test_without_resizing_a_picture_smaller_than_the_crop_is_enlarged_to_it(engine: Engine) -> None:
    data = jpeg(50, 30)
    assert_same_pixels(run([data], View(56), None, engine=engine)[0], expected(data, 56, 56))


@both
def test_shrinking_is_antialiased(engine: Engine) -> None:
    board = np.indices((512, 512)).sum(0) % 2 * 255
    buffer = BytesIO()
    Image.fromarray(np.repeat(board[..., None], 3, 2).astype(np.uint8)).save(buffer, "PNG")
    for view in (View(224), View(224, "random")):
        pixels = run([buffer.getvalue()], view, 256, engine=engine)[0, 4:-4, 4:-4]
        assert abs(pixels.mean() - 127.5) < 1
        assert pixels.std() < 4  # a filter that only picks pixels gives 127


@both
@pytest.mark.filterwarnings("ignore:Palette images")  # by PIL
@pytest.mark.parametrize("name", READABLE)
def test_odd_files_come_out_as_upright_rgb(odd_images: Path, name: str, engine: Engine) -> None:
    """In training and validation; test_stats.py has them in the statistics."""
    data, place = (odd_images / name).read_bytes(), (0.2, 0.7)
    assert_same_pixels(run([data], View(64), 80, engine=engine)[0], expected(data, 64, 80), most=2)
    stored = expected(data, 64, None if min(Image.open(BytesIO(data)).size) >= 64 else 64)
    assert_same_pixels(run([data], View(64), None, engine=engine)[0], stored, most=2)
    random = run([data], View(64, "random"), 80, np.array([place]), [1], engine=engine)[0]
    assert_same_pixels(random, expected(data, 64, 80, place, 1), most=2)


def test_normalizing_in_the_graph_equals_normalizing_after_it() -> None:
    encoded = [jpeg(60, 50, seed) for seed in range(4)]
    inside = torch.from_numpy(run(encoded, View(32), 40, normalization=IMAGENET))
    outside = torch.from_numpy(run(encoded, View(32), 40)).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(v) * 255 for v in (IMAGENET.mean, IMAGENET.std))
    wanted = normalize(outside, mean, std)
    assert inside.dtype == torch.float16
    # values are below 4 in size, where float16 steps are at most 2**-9 wide
    torch.testing.assert_close(inside.permute(0, 3, 1, 2).float(), wanted, rtol=2**-10, atol=2**-11)
