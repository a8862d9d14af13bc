"""Fixtures: small data sets made on the spot, and the real ones where they are at hand."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image, ImageFilter
from torch import nn

if not torch.cuda.is_available():  # then Triton's kernels are interpreted, which it decides when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
import triton  # noqa: F401

from fastflower.files import cache_dir

# Code that was compiled stays, unlike all else: each process of a test would compile it anew, for seconds.
os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_dir() / "numba"))

from fastflower import cli
from fastflower.data.sources.tfrecord import write_tfrecord
from fastflower.models import Norm
from fastflower.models.layers import BNReLU
from tests.poison import poisoned  # noqa: F401
from tests.processes import Result

torch.set_num_threads(1)  # the tests' networks are too small for more
settings.register_profile("the same each time", derandomize=True)
settings.load_profile("the same each time")

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("FASTFLOWER_SHARED_DATA", ROOT.parent / "shared" / "data"))
PLAIN = Path(__file__).with_name("train.yaml")  # names nothing: a run has the defaults, and is called train
# Of odd_images those that a decoder can read.
READABLE = [
    *("gray.jpg", "progressive.jpg", "cmyk.jpg", "subsampling_411.jpg", "png_bytes_named.jpg", "one_pixel.jpg"),
    *("exif_orientation_3.jpg", "exif_orientation_6.jpg", "exif_orientation_8.jpg", "panorama_1200x40.jpg"),
    *("big_3000x2250.jpg", "alpha.png", "palette.png"),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU are skipped where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has a cache folder of its own, and never the user's; and no weights of ImageNet."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("FASTFLOWER_CACHE", str(cache))
    monkeypatch.setenv("FASTFLOWER_WEIGHTS", str(cache / "no-weights"))  # or else a recipe would ask the network


@pytest.fixture(scope="session")
def flowers5() -> Path:
    """320 real photographs of 5 kinds at four sizes."""
    return _shared("flowers5")


@pytest.fixture(scope="session")
def flowers102() -> Path:
    """8,189 real photographs of 102 kinds at 64 pixels."""
    return _shared("flowers102")


@pytest.fixture(scope="session")
def odd_images() -> Path:
    """One file for each kind of trouble that real collections bring."""
    return _shared("odd_images")


@pytest.fixture(scope="session")
def seed_curves() -> Path:
    """TensorBoard events of the four runs that the project began with, in a folder each."""
    return _shared("seed_curves")


def _shared(name: str) -> Path:
    if not (SHARED / name).is_dir():
        pytest.skip(f"real data {name} is not at hand (FASTFLOWER_SHARED_DATA)")
    return SHARED / name


def jpeg(width: int, height: int, seed: int = 0, quality: int = 90) -> bytes:
    """A smooth random picture as JPEG bytes."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    buffer = BytesIO()
    Image.fromarray(noise).filter(ImageFilter.GaussianBlur(3)).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def example(index: int, label: int | None, image: bytes | None = None) -> dict[str, bytes | int]:
    """A record as the Kaggle set has them; its picture has the brightness of its class."""
    if image is None:
        buffer = BytesIO()
        rng = np.random.default_rng(index)
        pixels = rng.integers(0, 100, (40, 40, 3)) + (0 if label is None else 40 * (label % 4))
        Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG")
        image = buffer.getvalue()
    record: dict[str, bytes | int] = {"id": f"{index:06}".encode(), "image": image}
    return record if label is None else record | {"class": label}


def write_dataset(
    root: Path, counts: Mapping[str, int], *, classes: int = 3, size: int = 40, files: int = 2, first: int = 0
) -> Path:
    """A data set in the Kaggle layout; the splits' ids differ."""
    for split, count in counts.items():
        folder = root / f"tfrecords-jpeg-{size}x{size}" / split
        records = [example(first + i, None if split == "test" else i % classes) for i in range(count)]
        first += count
        share = -(-count // files)
        for file, start in enumerate(range(0, count, share)):
            part = records[start : start + share]
            write_tfrecord(folder / f"{file:02}-{size}x{size}-{len(part)}.tfrec", part)
    return root


def write_folders(root: Path, counts: Mapping[str, int], *, first: int = 0) -> Path:
    """Class folders: so many pictures in each folder below root, such as train/rose; as bright as the class's place."""
    names = sorted({Path(folder).name for folder in counts})
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(first, first + count):
            image = example(i, names.index(Path(folder).name))["image"]
            assert isinstance(image, bytes)
            (root / folder / f"{i:06}.jpg").write_bytes(image)
        first += count
    return root


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """48 + 20 tiny pictures of three classes."""
    return write_dataset(tmp_path / "small", {"train": 48, "val": 20})


def fastflower(*arguments: object) -> Result:
    """Run the command line in this process."""
    out, err = StringIO(), StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as stop,
    ):
        patch.setattr(sys, "argv", ["fastflower", *map(str, arguments)])
        cli.main()
    return Result(stop.value.code if isinstance(stop.value.code, int) else 0, out.getvalue(), err.getvalue())


def train_arguments(root: Path, run: Path | None) -> list[object]:
    """Training settings for the tiny pictures above, and defaults for the rest, which no recipe fits to them."""
    geometry = ["--data.crop", 32, "--data.scale", 36, 48, "--data.val_resize", 36]
    folder = ["--run", run] if run else []
    training = ["--model.name", "resnet18", "--train.batch_size", 8, "--train.lr", 0.02]
    return ["train", "--config", PLAIN, "--data.root", root, *folder, *geometry, *training]


def train_settings(root: Path, *, epochs: int) -> dict[str, Any]:
    """Settings for the same pictures, as Python is given them."""
    data = {"root": str(root), "crop": 32, "scale": [36, 48], "val_resize": 36}
    return {"data": data, "train": {"epochs": epochs, "batch_size": 8}}


class TinyNet(nn.Module):
    """A residual network of a few thousand weights, in place of the real ones where the loop is tested."""

    def __init__(self, name: str, num_classes: int, norm: Norm = "torch", sync_norm: bool = False, **_: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.bn1 = BNReLU(8, norm=norm, sync=sync_norm)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = BNReLU(8, norm=norm, sync=sync_norm)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] to [N, num_classes]."""
        logits: torch.Tensor = self.fc(self.features(x).mean((2, 3)))
        return logits

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] to [N, 8, ceil(H / 2), ceil(W / 2)]."""
        x = self.bn1(self.conv1(x))
        features: torch.Tensor = self.bn2(self.conv2(x), x)
        return features


@pytest.fixture
def tiny_net(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of this test train a TinyNet, whatever the configuration names."""
    monkeypatch.setattr("fastflower.training.network.create_model", TinyNet)


@contextlib.contextmanager
def shared_run(folder: Path, *options: object) -> Iterator[Path]:
    """A TinyNet's run on folder/data. Tests read both, or copy the run by `copy_run`; who writes there is found out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTFLOWER_CACHE", str(folder / "cache"))
        patch.setattr("fastflower.training.network.create_model", TinyNet)
        assert fastflower(*train_arguments(folder / "data", folder / "run"), *options).code == 0
    before = contents(folder)
    yield folder / "run"
    assert contents(folder) == before, "a test has written where all of them read"


def contents(folder: Path) -> dict[Path, str]:
    """A digest of each file below a folder."""
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def copy_run(run: Path, to: Path) -> Path:
    """A test's own copy of a run, whose data stay shared."""
    return Path(shutil.copytree(run, to))


@pytest.fixture(scope="session")
def shared_finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The run that `finished` is a copy of."""
    folder = tmp_path_factory.mktemp("finished")
    write_dataset(folder / "data", {"train": 48, "val": 20})
    with shared_run(folder, "--train.epochs", 2) as run:
        yield run


@pytest.fixture
def finished(shared_finished: Path, tmp_path: Path, tiny_net: None) -> Path:
    """A run of two epochs on pictures as `small` has them, for a test to change."""
    return copy_run(shared_finished, tmp_path / "finished")
