"""The statistics of a split's pixels: against numpy on all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from pathlib import Path
from threading import Barrier
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch._subclasses.fake_tensor import FakeTensorMode

from fastflower.config import DataConfig
from fastflower.data import stats
from fastflower.data.batches import choose_lighting
from fastflower.data.decoding import decoded_batches
from fastflower.data.records import read_image
from fastflower.data.sources.kaggle import load_split
from fastflower.data.sources.tfrecord import write_tfrecord
from fastflower.data.stats import PixelStatistics, pixel_statistics, sums_of, sums_on_device
from fastflower.data.view import Engine
from fastflower.errors import UserError
from fastflower.runtime.distributed import Ranks
from tests.conftest import READABLE, example, jpeg

T = TypeVar("T")


def png(pixels: np.ndarray) -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def statistics(folder: Path, images: Sequence[bytes]) -> PixelStatistics:
    write_tfrecord(folder / "train" / "a.tfrec", [example(i, 0, data) for i, data in enumerate(images)])
    return pixel_statistics(load_split(folder, "train"), Engine())


def noise(height: int, width: int, low: int, high: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, (height, width, 3)).astype(np.uint8)


def flat(level: int, height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), level, np.uint8)


def correlated() -> list[np.ndarray]:
    """Red and green rise together and blue falls, in pictures of several shapes."""
    pictures = [noise(20 + i, 70 - i, 0, 100, i) for i in range(70)]  # more than a batch
    for i, picture in enumerate(pictures):
        picture += np.array([1, 1, 0], np.uint8) * np.uint8(i) + np.array([0, 0, 1], np.uint8) * np.uint8(100 - i)
    return pictures


@pytest.mark.parametrize(
    "pictures",
    [
        pytest.param(correlated(), id="correlated channels"),
        pytest.param([flat(0, 60, 60), flat(255, 30, 30)], id="large black and small white"),
        # a mean 600 times the deviation: in single precision nothing of it would be left
        pytest.param([flat(254, 300, 300)] * 3 + [noise(300, 300, 253, 256, 1)], id="mean far above the deviation"),
        pytest.param([noise(1, 1, 0, 99, 2), noise(1, 1, 100, 256, 3)], id="two pixels"),
    ],
)
def test_statistics_are_numpys_on_all_pixels(tmp_path: Path, pictures: list[np.ndarray]) -> None:
    measured = statistics(tmp_path, [png(picture) for picture in pictures])
    everything = np.concatenate([picture.reshape(-1, 3) for picture in pictures]) / 255
    np.testing.assert_allclose(measured.normalization.mean, everything.mean(0), rtol=1e-12)
    np.testing.assert_allclose(measured.normalization.std, everything.std(0), rtol=1e-10)
    np.testing.assert_allclose(measured.covariance, np.cov(everything.T, bias=True), rtol=1e-9, atol=1e-15)


def test_a_black_and_a_white_picture_have_a_deviation_of_one_half(tmp_path: Path) -> None:
    """A mean of the pictures' own deviations would be 0."""
    measured = statistics(tmp_path, [png(flat(0, 40, 40)), png(flat(255, 40, 40))])
    assert measured.normalization.std == (0.5, 0.5, 0.5)


@pytest.mark.filterwarnings("ignore:Palette images")  # by PIL
@pytest.mark.parametrize("name", READABLE)
def test_odd_files_count_as_their_rgb_pixels(odd_images: Path, tmp_path: Path, name: str) -> None:
    data, dots = (odd_images / name).read_bytes(), np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8)
    measured = statistics(tmp_path, [data, png(dots)])  # the dots give a deviation to a single pixel too
    picture = ImageOps.exif_transpose(Image.open(BytesIO(data))).convert("RGB")
    everything = np.concatenate([np.asarray(picture).reshape(-1, 3), dots[0]]) / 255
    np.testing.assert_allclose(measured.normalization.mean, everything.mean(0), atol=0.5 / 255)
    np.testing.assert_allclose(measured.covariance, np.cov(everything.T, bias=True), atol=2e-3)


def test_statistics_are_cached_and_name_a_bad_picture(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = load_split(small, "train")
    first = pixel_statistics(records, Engine())
    with monkeypatch.context() as patch:
        patch.setattr("fastflower.data.stats._measure", lambda *_: pytest.fail("measured again"))
        again = pixel_statistics(records, Engine())
        assert again.normalization == first.normalization
        np.testing.assert_array_equal(again.covariance, first.covariance, strict=True)
        with pytest.raises(pytest.fail.Exception, match="measured again"):
            pixel_statistics(records, Engine("gpu", 0))  # whose decoder is another
        patch.setattr("fastflower.data.stats.code_digest", lambda *_: "another")
        with pytest.raises(pytest.fail.Exception, match="measured again"):
            pixel_statistics(records, Engine())
    write_tfrecord(small / "tfrecords-jpeg-40x40" / "bad" / "a.tfrec", [example(0, 0), example(1, 0, b"no picture")])
    with pytest.raises(UserError, match="record 1 .* cannot be decoded"):
        pixel_statistics(load_split(small, "bad"), Engine())


def test_a_channel_that_never_varies_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"give data\.mean and data\.std"):
        statistics(tmp_path, [png(flat(7, 4, 4))])


def test_lighting_moves_along_the_principal_components_by_their_eigenvalues(tmp_path: Path) -> None:
    covariance = statistics(tmp_path, [png(picture) for picture in correlated()]).covariance
    measured = partial(pixel_statistics, load_split(tmp_path, "train"), Engine())
    lighting = choose_lighting(DataConfig(lighting=0.1, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2)), measured)
    assert lighting is not None
    np.testing.assert_allclose(lighting @ lighting.T, 0.01 * covariance @ covariance, rtol=1e-9)
    products = lighting.T @ lighting
    np.testing.assert_allclose(products - np.diag(np.diag(products)), 0, atol=1e-12)  # at right angles
    assert (lighting[np.abs(lighting).argmax(0), np.arange(3)] > 0).all()
    assert choose_lighting(DataConfig(), measured) is None


def exact(pixels: np.ndarray) -> list[int]:
    """What `sums_of` gives, in Python's whole numbers."""
    channels = [np.bincount(pixels[:, channel], minlength=256).tolist() for channel in range(3)]
    sums = [sum(level * count for level, count in enumerate(counts)) for counts in channels]
    pairs = [pixels[:, i].astype(object) * pixels[:, j] for i in range(3) for j in range(i, 3)]
    return [*sums, *(int(products.sum()) for products in pairs)]


@given(
    shapes=st.lists(st.tuples(st.integers(1, 400), st.integers(1, 200)), min_size=1, max_size=4),
    levels=st.sampled_from([(0, 256), (255, 256), (254, 256), (0, 1), (100, 180)]),
    at_once=st.sampled_from([1000, 65537, stats.AT_ONCE]),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=40)
def test_sums_are_whole_numbers(
    shapes: list[tuple[int, int]], levels: tuple[int, int], at_once: int, seed: int
) -> None:
    """On a CPU picture by picture, on a GPU many at once: the same."""
    pictures = [noise(*shape, *levels, seed + i) for i, shape in enumerate(shapes)]
    expected = exact(np.concatenate([picture.reshape(-1, 3) for picture in pictures]))
    assert sum(sums_of(picture.reshape(-1, 3)) for picture in pictures).tolist() == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stats, "AT_ONCE", at_once)
        sums = sums_on_device([torch.from_numpy(picture) for picture in pictures])
    assert sums.dtype == torch.int64
    assert sums.tolist() == expected


def test_a_white_picture_larger_than_a_block_overflows_nothing() -> None:
    white = flat(255, 3000, 1500).reshape(-1, 3)
    assert sums_of(white).tolist() == [255 * len(white)] * 3 + [255 * 255 * len(white)] * 6


def test_nothing_on_a_gpu_is_waited_for() -> None:
    """A tensor without values has none that could be read."""
    with FakeTensorMode():
        pictures = [torch.empty(size, 50, 3, dtype=torch.uint8, device="cuda") for size in (20, 200_000)]
        sums = sums_on_device(pictures)
        assert (sums.device.type, sums.dtype, sums.shape) == ("cuda", torch.int64, (9,))
        with pytest.raises(RuntimeError):
            sums.tolist()


@pytest.mark.gpu
def test_a_gpu_finds_the_same(tmp_path: Path) -> None:
    """Of PNG files, which every decoder reads alike, to the bit; of JPEG files within a level."""
    on_gpu = Engine("gpu", 0, threads=4, hw_decoder_load=1.0)
    write_tfrecord(tmp_path / "train/a.tfrec", [example(i, 0, png(data)) for i, data in enumerate(correlated())])
    records = load_split(tmp_path, "train")
    gpu, cpu = pixel_statistics(records, on_gpu), pixel_statistics(records, Engine())
    assert gpu.normalization == cpu.normalization
    np.testing.assert_array_equal(gpu.covariance, cpu.covariance)
    write_tfrecord(tmp_path / "val/a.tfrec", [example(i, 0, jpeg(80 + i, 120, i)) for i in range(70)])
    records = load_split(tmp_path, "val")
    gpu, cpu = pixel_statistics(records, on_gpu), pixel_statistics(records, Engine())
    np.testing.assert_allclose(gpu.normalization.mean, cpu.normalization.mean, atol=0.5 / 255)


def as_ranks(count: int, work: Callable[[Ranks], T]) -> list[T]:
    """What so many ranks come to, which are threads here."""
    values: list[Any] = [None] * count
    barrier = Barrier(count)

    class Threads(Ranks):
        def gather(self, value: Any) -> list[Any]:
            values[self.rank] = value
            barrier.wait()
            everyones = list(values)
            barrier.wait()
            return everyones

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda rank: work(Threads(rank, count)), range(count)))


@pytest.mark.parametrize("engine", [Engine(), Engine(threads=3)])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 90])  # more than there are pictures
def test_ranks_share_the_pictures_and_find_the_same_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, engine: Engine
) -> None:
    alone = statistics(tmp_path, [png(picture) for picture in correlated()])
    records = load_split(tmp_path, "train")
    monkeypatch.setenv("FASTFLOWER_CACHE", str(tmp_path / "another"))
    shown: list[tuple[int, int, int]] = []

    def measure(ranks: Ranks) -> PixelStatistics:
        return pixel_statistics(records, engine, ranks, lambda done, total: shown.append((ranks.rank, done, total)))

    for _ in range(2):  # the second time from the main rank's cache
        for result in as_ranks(count, measure):
            assert result.normalization == alone.normalization
            np.testing.assert_array_equal(result.covariance, alone.covariance, strict=True)
    assert len(shown) == len(records)
    for rank in range(count):
        share = len(range(rank, len(records), count))
        assert [place for place in shown if place[0] == rank] == [(rank, i + 1, share) for i in range(share)]


def test_a_bad_record_on_one_rank_is_its_sentence_on_all(tmp_path: Path) -> None:
    images = [png(picture) for picture in correlated()]
    images[5] = images[5][:-20]
    write_tfrecord(tmp_path / "train" / "a.tfrec", [example(i, 0, data) for i, data in enumerate(images)])
    records = load_split(tmp_path, "train")

    def fail(ranks: Ranks) -> str:
        with pytest.raises(UserError) as caught:
            pixel_statistics(records, Engine(), ranks)
        return str(caught.value)

    (sentence,) = set(as_ranks(3, fail))
    assert "record 5 (id 000005) cannot be decoded" in sentence


def test_no_hardware_decoder_takes_part_whose_share_the_place_in_a_batch_decides(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = []

    def decoded(records: Any, indices: Any, engine: Engine, finish: Any) -> Any:
        engines.append(engine)
        return decoded_batches(records, indices, engine, finish)

    monkeypatch.setattr("fastflower.data.stats.decoded_batches", decoded)
    pixel_statistics(load_split(small, "train"), Engine(threads=3, hw_decoder_load=0.9))
    assert engines == [Engine(threads=3, hw_decoder_load=0.0)]


def test_photographs(flowers5: Path) -> None:
    records = load_split(flowers5, "train", sizes=[192])
    measured = pixel_statistics(records, Engine())
    pixels = [np.asarray(Image.open(BytesIO(read_image(records, i).tobytes()))) for i in range(len(records))]
    everything = np.concatenate([picture.reshape(-1, 3) for picture in pixels]) / 255
    np.testing.assert_allclose(measured.covariance, np.cov(everything.T, bias=True), rtol=1e-3)
