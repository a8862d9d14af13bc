"""Large JPEG pictures that are decoded smaller: nearly the pixels of whole ones, in the same places."""

from __future__ import annotations

import functools
import subprocess
import sys
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.ExifTags import Base

from fastflower.arrays import Floats
from fastflower.config import DataConfig
from fastflower.data import scaled as module
from fastflower.data import view as view_module
from fastflower.data.batches import choose_engine, evaluation_batches, training_batches, whole_pictures
from fastflower.data.cache import open_cache
from fastflower.data.decoding import shapes_of
from fastflower.data.geometry import Frame, frames
from fastflower.data.loader import Loader, Loading
from fastflower.data.records import Records
from fastflower.data.resample import Region, resample
from fastflower.data.sampler import training_requests
from fastflower.data.scaled import Scaled, factors, scaled
from fastflower.data.sources.kaggle import load_split
from fastflower.data.sources.tfrecord import write_tfrecord
from fastflower.data.view import Engine, Normalization, View
from fastflower.errors import UserError
from fastflower.runtime.distributed import Ranks
from tests.conftest import ROOT, example

CPU = torch.device("cpu")
PLAIN = Normalization((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))  # leaves 0..255
ORDERS: tuple[Literal["little", "big"], ...] = ("little", "big")
DATA = DataConfig(crop=32, scale=(40, 64), val_resize=40)


@functools.cache
def photograph(width: int, height: int, seed: int, turned: int = 1, mode: str = "RGB", **options: Any) -> bytes:
    """A picture of soft shapes, with fine noise upon them, as a JPEG file."""
    rng = np.random.default_rng(seed)
    few = Image.fromarray(rng.integers(0, 256, (9, 13, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(few) + rng.normal(0, 5, (height, width, 1))
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)
    exif, buffer = picture.getexif(), BytesIO()
    exif[Base.Orientation] = turned
    picture.save(buffer, "JPEG", exif=exif, **{"quality": 90} | options)
    return buffer.getvalue()


def pictures() -> list[bytes]:
    """Of odd sizes, turned in all ways, with chroma and scans of all kinds; those at a half, a quarter, an eighth."""
    rng, made = np.random.default_rng(0), []
    kinds: list[dict[str, Any]] = [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"mode": "L"}]
    for number in range(24):
        kind = kinds[number % len(kinds)]
        width, height = rng.integers(*[(1030, 1200), (300, 380), (560, 700)][number % 3], 2).tolist()
        made.append(photograph(width, height, number, number % 8 + 1, **kind))
    return made


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Records:
    """Records of `pictures`, all of which count as large."""
    monkeypatch.setattr(module, "LARGE", 1)
    write_tfrecord(tmp_path / "train" / "a.tfrec", [example(i, 0, image) for i, image in enumerate(pictures())])
    return load_split(tmp_path, "train")


def loading(decode: Any = "scaled", ranks: Ranks | None = None) -> Loading:
    return Loading(PLAIN, Engine(decode=decode), CPU, ranks or Ranks())


def all_batches(records: Records, decode: Any = "scaled", batch: int = 4, decoded: Any = (None, None)) -> list[Floats]:
    """One epoch of training, in the order of its positions, validation and whole pictures, each picture by itself."""
    train = training_batches(DATA, records, loading(decode), batch_size=batch, seed=0, decoded=decoded[0])
    val = evaluation_batches(DATA, records, loading(decode), batch_size=batch, decoded=decoded[1])
    whole = whole_pictures(DATA, records, shapes_of(records), loading(decode), batch_size=batch)
    made = [batch.images.numpy() for batch in train.epoch(3)] + [batch.images.numpy() for batch in val.once()]
    by_record: dict[int, Floats] = {}
    for pictures in whole.once():
        by_record |= dict(zip(pictures.indices.tolist(), pictures.images.numpy(), strict=True))
    return [image for images in made for image in images] + [by_record[i] for i in range(len(records))]


def test_pixels_are_near_those_of_whole_pictures(large: Records) -> None:
    """A level or less on average, of each."""
    chosen = factors(shapes_of(large), DATA.scale[1])
    assert set(chosen.tolist()) == {2, 4, 8}
    for one, other in zip(all_batches(large), all_batches(large, "region"), strict=True):
        assert one.shape == other.shape
        assert np.abs(one - other).mean() < 1
        assert np.abs(one - other).max() < 8


@pytest.mark.parametrize("turned", range(1, 9))
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_no_pixel_is_out_of_place(turned: int, factor: int) -> None:
    """A ramp of levels keeps its slope and its ends, whatever is left over beyond the last block and pixel."""
    for size in [(253, 401), (256, 391), (391, 250), (385, 254)]:
        across, down = np.linspace(0, 255, size[1]), np.linspace(0, 255, size[0])[:, None]
        stored = np.stack(np.broadcast_arrays(across, down, 128.0), 2).round().astype(np.uint8)
        picture, buffer = Image.fromarray(stored), BytesIO()
        exif = picture.getexif()
        exif[Base.Orientation] = turned
        picture.save(buffer, "JPEG", exif=exif, quality=98, subsampling=0)
        encoded = np.frombuffer(buffer.getvalue(), np.uint8)
        way = scaled(encoded, size, factor)
        assert way
        whole = Image.open(BytesIO(buffer.getvalue()))
        upright = Region(np.asarray(_upright(whole)), (0, 0), way.shape)
        view = View(16, "random")
        for place in ([0.0, 0.0], [1.0, 1.0], [0.3, 0.8]):
            shorter = np.array([250 // factor // 2], np.int32)
            (frame,) = frames(np.array([way.shape]), shorter, np.array([place], np.float32), view)
            wanted = _resampled(upright, frame)
            for pixels in (way.decode(encoded), way.decode(encoded, frame)):
                difference = _resampled(way.region(pixels), frame) - wanted
                inner = difference[1:-1, 1:-1]  # at its border a picture repeats what is there
                assert np.abs(inner).max() <= 2
                assert np.abs(inner.mean(axis=(0, 1))).max() < 0.5


def _upright(picture: Image.Image) -> Image.Image:
    from PIL import ImageOps

    return ImageOps.exif_transpose(picture)


def _resampled(region: Region, frame: Frame) -> Floats:
    out = np.empty((frame.rows, frame.columns, 3), np.float32)
    resample(region, frame, False, np.zeros(3, np.float32), np.ones(3, np.float32), out)
    return out.astype(np.float64)


def test_on_photographs_the_stated_tolerance_holds(flowers5: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 512 pixels, which are sharper than large ones: on average 1.3 levels, and 20 at most."""
    monkeypatch.setattr(module, "LARGE", 1)
    records = load_split(flowers5, "val", sizes=(512,))
    for largest, factor in ((170, 2), (85, 4), (42, 8)):
        assert factors(np.array([[512, 512]]), largest).tolist() == [factor]
        data = replace(DATA, crop=42, scale=(largest, largest), val_resize=largest)
        made = [
            next(evaluation_batches(data, records, loading(decode), batch_size=50).once()).images.numpy()
            for decode in ("scaled", "whole")
        ]
        assert np.abs(made[0] - made[1]).mean() < 1.3
        assert np.abs(made[0] - made[1]).max() <= 20


def test_batches_depend_neither_on_their_size_nor_on_pieces_ranks_and_cache(
    large: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = all_batches(large)
    splits = [(large, DATA.scale[1]), (large, DATA.val_resize)]
    kept = open_cache("ram", splits, Engine(decode="scaled"), Ranks(), lambda _: None, lambda _: lambda *_: None)
    assert kept[0]
    assert kept[1]
    assert kept[0].pixels.nbytes < sum(3 * h * w for h, w in shapes_of(large).tolist()) / 3.5
    _same(all_batches(large, decoded=kept), wanted)
    monkeypatch.setattr(view_module, "PIECE", 30_000)
    _same(all_batches(large, batch=8), wanted)
    shares = [
        list(training_batches(DATA, large, loading(ranks=Ranks(rank, 2)), batch_size=4, seed=0).epoch(3))
        for rank in range(2)
    ]
    halves = [image for pair in zip(*shares, strict=True) for half in pair for image in half.images.numpy()]
    _same(halves, wanted[: len(halves)])


def _same(images: list[Floats], wanted: list[Floats]) -> None:
    for one, other in zip(images, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


def test_rows_after_the_crop_are_left_out_without_a_trace() -> None:
    """To the bit, of whatever rows; and even where they are damaged, or cannot be left out."""
    rng = np.random.default_rng(0)
    left_out = 0
    for number, encoded in enumerate(pictures()):
        data = np.frombuffer(encoded, np.uint8)
        with Image.open(BytesIO(encoded)) as picture:
            size = (picture.height, picture.width)
        way = scaled(data, size, (4, 8, 4)[number % 3])
        assert way
        assert (way.height_at is None) == (number % 5 == 3)  # a progressive file
        everything = way.decode(data)
        assert everything.shape == (*way.decoded_shape, 3)
        for _ in range(4):
            shorter = rng.integers(33, min(size) // way.factor, 1).astype(np.int32)
            place = rng.random((1, 2)).astype(np.float32)
            (frame,) = frames(np.array([way.shape]), shorter, place, View(32, "random"))
            part = way.decode(data, frame)
            left_out += part.size < everything.size
            np.testing.assert_array_equal(
                _resampled(way.region(part), frame), _resampled(way.region(everything), frame)
            )
    assert left_out > 20


def test_damage_after_the_crop_is_read_as_in_the_whole_picture() -> None:
    encoded = photograph(700, 700, 0)
    broken = encoded[: len(encoded) * 2 // 3] + b"\xff\xc4\x00\x04\xff\xff" + encoded[len(encoded) * 2 // 3 + 6 :]
    data = np.frombuffer(broken, np.uint8)
    way = scaled(data, (700, 700), 4)
    assert way
    (frame,) = frames(
        np.array([[700, 700]]), np.array([60], np.int32), np.zeros((1, 2), np.float32), View(16, "random")
    )
    try:
        whole = way.decode(data)
    except ValueError:
        with pytest.raises(ValueError, match="."):
            way.decode(data, frame)
    else:
        np.testing.assert_array_equal(
            _resampled(way.region(way.decode(data, frame)), frame), _resampled(way.region(whole), frame)
        )


@pytest.mark.parametrize(
    ("shape", "largest", "factor"),
    [
        ((3024, 4032), 480, 4),  # the usual photograph and settings
        ((4032, 3024), 480, 4),
        ((3024, 4032), 256, 4),
        ((3024, 4032), 252, 8),
        ((3024, 4032), 253, 4),
        ((3024, 4032), 1008, 2),
        ((3024, 4032), 1009, 1),
        ((3024, 4032), None, 1),
        ((1024, 1024), 64, 8),
        ((1023, 1024), 64, 1),  # not large
        ((0, 0), 64, 1),
        ((200, 60000), 64, 2),
    ],
)
def test_how_much_smaller(shape: tuple[int, int], largest: int | None, factor: int) -> None:
    assert factors(np.array([shape]), largest).tolist() == [factor]


def test_other_files_are_decoded_as_they_are() -> None:
    good = photograph(64, 48, 0)
    assert scaled(np.frombuffer(good, np.uint8), (48, 64), 2) == Scaled(48, 64, 1, good.index(b"\xff\xc0") + 5, 2)
    picture = Image.open(BytesIO(good))
    for mode, kind in (("RGB", "PNG"), ("RGB", "WEBP"), ("RGB", "BMP"), ("CMYK", "JPEG")):
        buffer = BytesIO()
        picture.convert(mode).save(buffer, kind)
        assert scaled(np.frombuffer(buffer.getvalue(), np.uint8), (48, 64), 2) is None
    frame = good.index(b"\xff\xc0")
    lossless = good[: frame + 1] + b"\xc3" + good[frame + 2 :]
    deep = good[: frame + 4] + b"\x0c" + good[frame + 5 :]
    for data in (lossless, deep, good[:frame], good[: frame + 6], good[:2], b"", b"\xff\xd8\xff", b"GIF89a"):
        assert scaled(np.frombuffer(data, np.uint8), (48, 64), 2) is None
    assert scaled(np.frombuffer(good, np.uint8), (64, 48), 2) is None  # not the picture that the header was of


@pytest.mark.parametrize(
    ("subsampling", "factor", "taken"),
    [(2, 8, 8), (2, 2, 2), (0, 4, 4), (1, 8, 4), (1, 4, 2), (1, 2, None)],  # 4:2:0, 4:4:4 and 4:2:2
)
def test_color_that_is_stored_at_half_the_width_alone_keeps_what_is_needed(
    subsampling: int, factor: int, taken: int | None
) -> None:
    """Where it is also at half the height it is decoded at twice the size, and needs no such care."""
    data = np.frombuffer(photograph(640, 480, 0, subsampling=subsampling), np.uint8)
    way = scaled(data, (480, 640), factor)
    assert (way and way.factor) == taken


def test_any_bytes_are_some_answer() -> None:
    rng, good = np.random.default_rng(0), np.frombuffer(photograph(64, 48, 0, 6), np.uint8)
    for _ in range(300):
        data = good.copy()
        places = rng.integers(2, 700, rng.integers(1, 6))
        data[places] = rng.integers(0, 256, len(places))
        way = scaled(data[: rng.integers(0, len(data))], (48, 64), 2)
        assert way is None or 1 <= way.orientation <= 8


def _exif(
    orientation: int, order: Literal["little", "big"] = "little", *, mark: int = 42, entries: int | None = None
) -> bytes:
    """A segment of EXIF with two entries, the second of which is the orientation."""

    def number(value: int, size: int) -> bytes:
        return value.to_bytes(size, order)

    other = number(0x0100, 2) + number(4, 2) + number(1, 4) + number(7, 4)
    entry = number(0x0112, 2) + number(3, 2) + number(1, 4) + number(orientation, 2) + number(0, 2)
    start = (b"II" if order == "little" else b"MM") + number(mark, 2) + number(8, 4)
    block = b"Exif\0\0" + start + number(2 if entries is None else entries, 2) + other + entry
    return b"\xff\xe1" + (len(block) + 2).to_bytes(2) + block


@pytest.mark.parametrize(
    ("segments", "orientation"),
    [
        *[(_exif(turned, order), turned) for turned in range(1, 9) for order in ORDERS],
        (_exif(0), 1),
        (_exif(9), 1),
        (_exif(6, mark=43), 1),
        (_exif(6, entries=1), 1),
        (_exif(6, entries=90), 1),
        (b"\xff\xff\xff" + _exif(6), 6),
        (b"\xff\xe1\x00\x08http:/" + _exif(3), 3),
        (_exif(8) + b"\xff\xe1\x00\x0aExif\0\0II", 8),
        (b"", 1),
    ],
)
def test_orientation_is_the_decoders(segments: bytes, orientation: int, tmp_path: Path) -> None:
    """Ours is what is expected, and what the pixels of DALI show."""
    plain, buffer = Image.new("RGB", (48, 32)), BytesIO()
    plain.paste((255, 0, 0), (0, 0, 24, 16))
    plain.paste((0, 255, 0), (24, 0, 48, 16))
    plain.save(buffer, "JPEG", quality=95, subsampling=0)
    encoded = buffer.getvalue()[:2] + segments + buffer.getvalue()[2:]
    way = scaled(np.frombuffer(encoded, np.uint8), (32, 48), 2)
    assert way
    assert way.orientation == orientation
    write_tfrecord(tmp_path / "val" / "a.tfrec", [example(0, 0, encoded)])
    (kept,) = open_cache(
        "ram", [(load_split(tmp_path, "val"), None)], Engine(), Ranks(), lambda _: None, lambda _: lambda *_: None
    )
    assert kept
    whole = np.asarray(kept.picture(0))
    small = way.decode(np.frombuffer(encoded, np.uint8))
    assert whole.shape[:2] == way.shape
    assert np.abs(whole[::2, ::2].astype(int) - small)[1:-1, 1:-1].mean() < 12


def test_a_picture_that_cannot_be_decoded_is_named_after_the_good_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LARGE", 1)
    images = pictures()[:8]
    place = images[5].index(b"\xff\xc4")
    images[5] = images[5][: place + 4] + b"\xff" * 30 + images[5][place + 34 :]
    write_tfrecord(tmp_path / "val" / "a.tfrec", [example(i, 0, image) for i, image in enumerate(images)])
    seen: list[int] = []
    with pytest.raises(UserError, match=r"record 5 \(id 000005\) cannot be decoded"):
        for batch in evaluation_batches(DATA, load_split(tmp_path, "val"), loading(), batch_size=2).once():
            seen += batch.indices.tolist()
    assert seen == [0, 1, 2, 3]


def test_an_iteration_may_be_left_in_the_middle_of_a_batch(large: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view_module, "PIECE", 1)
    made = Loader(large, View(32, "random", 64), 8, loading())
    requests = functools.partial(training_requests, 24, seed=0, epoch=0, scale=(40, 64), global_batch=8)
    wanted = [batch.images for batch in made.batches(requests())]
    for _ in range(3):
        left = made.batches(requests())
        torch.testing.assert_close(next(left).images, wanted[0], rtol=0, atol=0)
        left.close()
    for batch, images in zip(made.batches(requests()), wanted, strict=True):
        assert torch.equal(batch.images, images)


def test_on_a_cpu_it_is_the_default_and_on_a_gpu_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_engine(DataConfig(), CPU, Ranks()).decode == "scaled"
    assert choose_engine(DataConfig(decode="region"), CPU, Ranks()).decode == "region"
    monkeypatch.setattr("nvidia.dali.backend.GetCUDADeviceCount", lambda: 1)
    gpu = torch.device("cuda", 0)
    assert choose_engine(DataConfig(), gpu, Ranks()).decode == "whole"
    assert choose_engine(DataConfig(decoder="cpu"), gpu, Ranks()).decode == "scaled"
    with pytest.raises(UserError, match="data.decode scaled is for a CPU"):
        choose_engine(DataConfig(decode="scaled"), gpu, Ranks())


@pytest.mark.parametrize("decode", ["scaled", "region"])
def test_memory_does_not_grow_with_the_batch(decode: str, tmp_path: Path) -> None:
    """Forty pictures of 6 megapixels, 18 MB each and 720 MB together, take at most 400 MB more than two of them do."""
    write_tfrecord(tmp_path / "train" / "a.tfrec", [example(i, 0, photograph(3000, 2000, 0)) for i in range(40)])
    peaks = []
    for batch in (2, 40):
        code = f"""
import resource, torch
from pathlib import Path
from tests.data.test_scaled import DATA, loading, load_split, training_batches
records = load_split(Path({str(tmp_path)!r}), "train")
made = training_batches(DATA, records, loading({decode!r}), batch_size={batch}, seed=0)
for batch in made.epoch(0):
    pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
        done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
        peaks.append(int(done.stdout) / 1000)
    assert peaks[1] < peaks[0] + 400
