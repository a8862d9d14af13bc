"""Ten crops, all positions at several scales: against torchvision and plain references, and as commands."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as tv
from PIL import Image, ImageOps
from torch import nn
from torch._dynamo.utils import counters

from fastflower.config import DataConfig
from fastflower.data.batches import whole_pictures
from fastflower.data.decoding import shapes_of
from fastflower.data.loader import Loading
from fastflower.data.view import Engine, Normalization
from fastflower.errors import UserError
from fastflower.evaluation.pictures import find_pictures, read_pictures
from fastflower.evaluation.views import Views, log_mean_probabilities, window_of
from fastflower.models import create_model
from tests.conftest import READABLE, TinyNet, copy_run, fastflower, jpeg, shared_run, train_arguments, write_folders
from tests.processes import in_ranks
from tests.training import tiny_worker

CPU = torch.device("cpu")

# Of the options of eval; the slow tier has each, the fast one the most that is made of a picture.
EACH_VIEW = [
    *(pytest.param(views, marks=pytest.mark.slow) for views in ((), ("--crops", 10))),
    ("--scales", "32,48"),
]


def network(name: str = "resnet18") -> nn.Module:
    torch.manual_seed(0)
    made = TinyNet(name, 5) if name == "tiny" else create_model(name, 5)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return made.eval().to(memory_format=torch.channels_last)


def pictures(n: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    noise = torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(seed))
    return noise.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("name", "crop"), [("resnet18", 64), ("resnet50", 96), ("plain18", 64), ("resnet18", 56)])
@torch.no_grad()
def test_all_positions_of_a_picture_of_the_training_size_is_the_ordinary_forward(name: str, crop: int) -> None:
    net = network(name)
    images = pictures(2, crop, crop)
    scores = Views(scales=(crop,)).scorer(net, crop)(images)
    wanted = (net(images).softmax(1) + net(images.flip(3)).softmax(1)) / 2
    torch.testing.assert_close(scores.exp(), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 101), (130, 97), (160, 96)])
@torch.no_grad()
def test_all_positions_average_every_window_of_the_map(height: int, width: int) -> None:
    net = network()
    images = pictures(2, height, width)
    window = window_of(net, 64)
    assert window == 2
    probabilities = []
    for picture in (images, images.flip(3)):
        features = net.features(picture)  # type: ignore[operator]
        for top in range(features.shape[2] - window + 1):
            for left in range(features.shape[3] - window + 1):
                pooled = features[:, :, top : top + window, left : left + window].mean((2, 3))
                probabilities.append(net.fc(pooled).softmax(1))  # type: ignore[operator]
    wanted = torch.stack(probabilities).mean(0)
    scores = Views(scales=(64,)).scorer(net, 64)(images)
    torch.testing.assert_close(scores.exp(), wanted, atol=1e-5, rtol=0)
    assert len(probabilities) == 2 * (math.ceil(height / 32) - 1) * (math.ceil(width / 32) - 1)


@pytest.mark.parametrize(("height", "width"), [(40, 40), (41, 47), (37, 64), (35, 33)])
@torch.no_grad()
def test_ten_crops_are_torchvisions(height: int, width: int) -> None:
    net = network("tiny")
    images = pictures(3, height, width)
    scores = Views(crops=10).scorer(net, 32)(images)
    wanted = torch.stack([net(crop).softmax(1) for crop in tv.TenCrop(32)(images)]).mean(0)
    torch.testing.assert_close(scores.exp(), wanted, atol=1e-6, rtol=0)


def test_views_that_would_degenerate_are_refused() -> None:
    data = DataConfig(crop=56, val_resize=56)
    for views, words in [
        (Views(10, (64,)), "two ways to test"),
        (Views(scales=(64, 48)), "--scales 48 is smaller than data.crop"),
        (Views(10), "of which there is one crop and not ten"),
    ]:
        with pytest.raises(UserError, match=words):
            views.check(data, "resnet18")
    Views(10).check(DataConfig(crop=56, val_resize=57), "vgg16")
    Views(scales=(56,)).check(data, "plain18")
    for name in ("vgg16", "vgg19", "alexnet"):
        with pytest.raises(UserError, match=f"global average pooling, which {name} does not: give --crops 10"):
            Views(scales=(224,)).check(DataConfig(), name)


def test_whole_pictures_of_all_kinds_come_once_upright_and_by_shape(odd_images: Path) -> None:
    records = read_pictures(find_pictures([odd_images / name for name in READABLE]))
    data = DataConfig(crop=32, val_resize=48, prefetch=1)
    plain = Normalization((0, 0, 0), (1 / 255, 1 / 255, 1 / 255))
    whole = whole_pictures(data, records, shapes_of(records), Loading(plain, Engine(), CPU), batch_size=8)
    seen: dict[int, torch.Tensor] = {}
    for batch in whole.once():
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert not set(seen) & set(batch.indices.tolist())
        seen |= dict(zip(batch.indices.tolist(), batch.images, strict=True))
    assert sorted(seen) == list(range(len(READABLE)))
    for index, image in seen.items():
        picture = Image.open(BytesIO((odd_images / READABLE[index]).read_bytes()))
        size = ImageOps.exif_transpose(picture).size
        assert tuple(image.shape[1:]) == tuple(side * 48 // min(size) for side in size[::-1]), READABLE[index]


def test_whole_pictures_are_resized_as_torchvision_does(tmp_path: Path) -> None:
    paths = []
    for seed, (width, height) in enumerate([(90, 60), (60, 90), (90, 60), (61, 75)]):
        paths.append(tmp_path / f"{seed}.jpg")
        paths[-1].write_bytes(jpeg(width, height, seed))
    records = read_pictures(find_pictures(paths))
    data = DataConfig(crop=32, val_resize=45, prefetch=1)
    plain = Normalization((0, 0, 0), (1 / 255, 1 / 255, 1 / 255))
    whole = whole_pictures(data, records, shapes_of(records), Loading(plain, Engine(), CPU), batch_size=8)
    for batch in whole.once():
        for index, image in zip(batch.indices, batch.images, strict=True):
            wanted = np.asarray(tv.functional.resize(Image.open(paths[index]), [45], antialias=True))
            resized = image.permute(1, 2, 0).numpy()
            assert resized.shape == wanted.shape
            assert np.abs(resized - wanted).max() <= 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 2, 3)])
def test_a_view_that_is_not_finite_is_not_averaged_away(value: float, shape: tuple[int, ...]) -> None:
    views = [torch.randn(shape) for _ in range(3)]
    sound = log_mean_probabilities(views)
    views[1][2, 4] = value
    mean = log_mean_probabilities(views)
    assert mean[2].isnan().all()
    others = [0, 1, 3]
    assert torch.equal(mean[others], sound[others])


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run on class folders whose validation pictures have several shapes."""
    folder = tmp_path_factory.mktemp("views")
    root = write_folders(folder / "data", {"train/rose": 12, "train/tulip": 12, "val/rose": 3, "val/tulip": 3})
    for number, path in enumerate(sorted((root / "val").glob("*/*.jpg"))):
        path.write_bytes(jpeg(40 + 7 * (number % 3), 44, number))
    with shared_run(folder, "--train.epochs", 1) as run:
        yield run


@pytest.fixture
def run(shared: Path, tmp_path: Path, tiny_net: None) -> Path:
    return copy_run(shared, tmp_path / "run")


def evaluated(run: Path, *options: object) -> dict[str, Any]:
    result = fastflower("eval", run, *options, "--json")
    assert result.code == 0, result.err
    return numbers(result.out)


def numbers(out: str) -> dict[str, Any]:
    """The figures that eval --json printed last."""
    return {key: value for key, value in json.loads(out.splitlines()[-1]).items() if key != "split"}


@pytest.mark.parametrize("views", EACH_VIEW)
def test_figures_do_not_depend_on_the_batch_or_the_compiler(run: Path, views: tuple[object, ...]) -> None:
    whole = evaluated(run, *views)
    assert whole["n"] == 6
    for other in (["--batch_size", 1], ["--batch_size", 4], ["--compile"]):
        changed = evaluated(run, *views, *other)
        assert changed == pytest.approx(whole, rel=1e-5), other
    assert whole["loss"] != evaluated(run, *(() if views else ("--crops", 10)))["loss"]


@pytest.mark.parametrize(
    ("views", "most"), [pytest.param(Views(10), 3, marks=pytest.mark.slow), (Views(scales=(32,)), 5)]
)
def test_compiling_is_bounded_whatever_shapes_come(views: Views, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many shapes few make a graph of their own: batches of one, squares, and sizes that a CPU treats otherwise."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    short = network()
    for number in range(1, 5):  # one block a stage
        setattr(short.get_submodule(f"layer{number}"), "1", nn.Identity())
    scorer = views.scorer(short, 32, compiled=True)
    rng = np.random.default_rng(0)
    shapes = [(int(rng.choice([1, 2, 5, 8])), *rng.integers(33, 120, 2).tolist()) for _ in range(16)]
    with torch.no_grad():
        for n, height, width in [(3, 40, 40), *shapes, (2, 65, 65)]:
            scorer(torch.randn(n, height, width, 3).permute(0, 3, 1, 2))  # a view, as the loader's pictures are
    assert 1 <= counters["stats"]["unique_graphs"] <= most
    assert not counters["graph_break"]


def test_ten_crops_of_stored_pictures_no_larger_than_the_crop_are_refused(run: Path) -> None:
    root = write_folders(run.parent / "tiny", {"train/rose": 9, "train/tulip": 9, "val/rose": 1, "val/tulip": 1})
    small = root / "val/rose/000018.jpg"
    small.write_bytes(jpeg(64, 32))
    other = run.parent / "as_is"
    arguments = [*train_arguments(root, other), "--data.val_resize", "None", "--train.epochs", 1]
    assert fastflower(*arguments).code == 0
    refused = fastflower("eval", other, "--crops", 10)
    assert refused.code == 2
    assert f"{small} is 64×32 pixels, of which there are no ten crops of 32" in refused.err
    small.write_bytes(jpeg(64, 33))
    assert evaluated(other, "--crops", 10)["n"] == 2


def test_bad_options_are_sentences(run: Path) -> None:
    for options, words in [
        (("--scales", "24"), "--scales 24 is smaller than data.crop"),
        (("--scales", "48", "--crops", 10), "two ways to test"),
        (("--scales", "48,40,48"), "names a size twice"),
        (("--batch_size", 0), "--batch_size is 0: it takes a whole number above 0"),
    ]:
        refused = fastflower("eval", run, *options)
        assert refused.code == 2
        assert words in refused.err
    assert fastflower("eval", run, "--scales", "a,b").code == 2


@pytest.mark.parametrize("views", EACH_VIEW)
def test_two_processes_give_one_processes_figures(run: Path, views: tuple[object, ...]) -> None:
    done = in_ranks(tiny_worker.main, "eval", run, *views, "--json")
    assert done.code == 0, done.err
    assert numbers(done.out) == pytest.approx(evaluated(run, *views), rel=1e-6)
