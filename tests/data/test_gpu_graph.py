"""The DALI graph for a GPU without one: it is defined and serialized, and run on the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nvidia.dali import fn
from PIL import Image, ImageOps
from PIL.ExifTags import Base

from fastflower.arrays import Bytes
from fastflower.data import pipeline as graph
from fastflower.data.cache import Decoded, open_cache
from fastflower.data.loader import Batch, Loader, Loading
from fastflower.data.pipeline import build_pipeline, in_two, inputs
from fastflower.data.records import Records
from fastflower.data.sampler import Request, training_requests
from fastflower.data.sources.kaggle import load_split
from fastflower.data.sources.tfrecord import write_tfrecord
from fastflower.data.view import IMAGENET, Engine, Normalization, View
from fastflower.errors import UserError
from fastflower.runtime.distributed import Ranks
from tests.conftest import example, jpeg
from tests.data.on_the_cpu import run_on_the_cpu

Memory = Literal["cpu", "gpu"]
CPU = torch.device("cpu")
COUNT, BATCH = 22, 4


def combinations(test: Any) -> Any:
    """All that a graph is defined by."""
    test = pytest.mark.filterwarnings("ignore:The external source node")(test)  # not all have a use for all numbers
    test = pytest.mark.parametrize("decoded", [None, "cpu", "gpu"])(test)
    test = pytest.mark.parametrize("normalization", [None, IMAGENET], ids=["levels", "normalized"])(test)
    test = pytest.mark.parametrize("place", ["random", "center", "whole"])(test)
    return pytest.mark.parametrize("decode", ["region", "whole"])(test)


@pytest.fixture
def records(tmp_path: Path) -> Records:
    """Pictures of many shapes, wide ones and tall ones."""
    shapes = np.random.default_rng(0).integers(40, 90, (COUNT, 2)).tolist()
    images = [jpeg(width, height, seed) for seed, (width, height) in enumerate(shapes)]
    write_tfrecord(tmp_path / "train" / "a.tfrec", [example(i, i % 3, image) for i, image in enumerate(images)])
    return load_split(tmp_path, "train")


def on_the_gpu(records: Records) -> Decoded:
    """The pixels as `data.cache gpu` keeps them, in memory of torch."""
    (kept,) = open_cache("ram", [(records, None)], Engine(), Ranks(), lambda _: None, lambda _: lambda *_: None)
    assert kept
    assert isinstance(kept.pixels, np.ndarray)
    decoded = Decoded(kept.shapes, kept.starts, torch.from_numpy(kept.pixels))
    assert decoded.place == "gpu"
    return decoded


def loader(records: Records, decoded: Decoded | None, prefetch: int = 2, place: Any = "random") -> Loader:
    loading = Loading(IMAGENET, Engine("gpu", None, prefetch=prefetch), CPU)
    return Loader(records, View(32, place), BATCH, loading, decoded)


def epoch(loader: Loader, number: int) -> Iterator[Batch]:
    requests = training_requests(len(loader.records), seed=0, epoch=number, scale=(36, 48), global_batch=loader.batch)
    return loader.batches(requests)


def operators(
    view: View, engine: Engine, normalization: Normalization | None = IMAGENET, decoded: Memory | None = None
) -> list[tuple[str, str]]:
    """Names and devices in the graph, which is defined and serialized, and not run, so that it needs no GPU."""
    pipeline = graph._definition(
        lambda: None,
        view,
        engine,
        normalization,
        decoded,
        batch_size=4,
        num_threads=1,
        device_id=None,
        prefetch_queue_depth=2,
    )
    assert len(pipeline.serialize()) > 1000
    return [(type(instance._op).__name__, instance._op.device) for instance in pipeline._ops]


@combinations
def test_every_graph_is_defined_and_works_on_the_gpu(
    decode: Any, place: Any, normalization: Normalization | None, decoded: Memory | None
) -> None:
    made = operators(View(224, place), Engine("gpu", None, decode=decode), normalization, decoded)
    devices, names = set(made), {name for name, _ in made}
    region = decode == "region" and place != "whole"
    decoder = "ImageSlice" if region else "Image"
    assert [name for name, device in made if device == "mixed"] == ([] if decoded else [decoder])
    pixels = {"Resize", "CropMirrorNormalize", "Slice", "ImageSlice", "Image"}
    at_work = {operator for operator in devices if operator[0] in pixels and operator[1] != "mixed"}
    wanted = {("Resize", "gpu")}
    if normalization:
        wanted.add(("CropMirrorNormalize", "gpu"))
    if region and decoded:
        wanted.add(("Slice", decoded))  # what is in host memory is cut out before it is sent
    assert at_work == wanted
    assert ("PeekImageShape" in names) == (region and not decoded)
    assert (("ExternalSource", "gpu") in devices) == (decoded == "gpu")


@pytest.mark.filterwarnings("ignore:The external source node")
@pytest.mark.parametrize("load", [0, 0.25, 1])
@pytest.mark.parametrize("decode", ["region", "whole"])
def test_decoders_on_the_gpu_share_work_as_asked_and_make_chroma_as_those_of_a_cpu(
    decode: Any, load: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def noting(operator: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*given: Any, **options: Any) -> Any:
            asked.append(options)
            return operator(*given, **options)

        return noted

    for name in ("image", "image_slice"):
        monkeypatch.setattr(fn.decoders, name, noting(getattr(fn.decoders, name)))
    operators(View(224, "random"), Engine("gpu", None, decode=decode, hw_decoder_load=load))
    (options,) = asked
    wanted = {"device": "mixed", "hw_decoder_load": load, "jpeg_fancy_upsampling": True}
    assert {name: options[name] for name in wanted} == wanted


@pytest.mark.filterwarnings("ignore:The external source node")
def test_what_lies_in_host_memory_is_taken_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy would be made by the loader's thread, with Python's lock."""
    asked: list[bool] = []
    original = fn.external_source

    def noted(**options: Any) -> Any:
        asked.append(options.get("no_copy", False))
        return original(**options)

    monkeypatch.setattr(fn, "external_source", noted)
    resources = {"batch_size": 4, "num_threads": 1, "device_id": None}
    view = View(224, "random")
    graph.Decoder(view, Engine(), 4)
    assert set(asked) == {True}
    for decoded, wanted in ((None, [True]), ("cpu", [True]), ("gpu", [False, False])):
        asked.clear()
        graph._definition(lambda: None, view, Engine("gpu"), IMAGENET, decoded, **resources)
        assert asked == wanted, decoded


@pytest.mark.filterwarnings("ignore:The external source node")
def test_a_graph_is_the_same_for_both_devices_but_for_devices_and_normalization() -> None:
    for decode in ("region", "whole"):
        for place in ("random", "center", "whole"):
            view = View(224, place)
            on_gpu, on_cpu = (Engine(device, decode=decode) for device in ("gpu", "cpu"))
            wanted = [*operators(view, on_cpu, None), ("CropMirrorNormalize", "gpu")]
            assert [name for name, _ in operators(view, on_gpu)] == [name for name, _ in wanted]


def upright(width: int, height: int, orientation: int, seed: int) -> tuple[bytes, Bytes]:
    """A JPEG file that says how it is turned, and its pixels as they are meant, by PIL."""
    stored = Image.open(BytesIO(jpeg(width, height, seed)))
    exif = stored.getexif()
    exif[Base.Orientation] = orientation
    buffer = BytesIO()
    stored.save(buffer, "JPEG", quality=90, exif=exif)
    return buffer.getvalue(), np.asarray(ImageOps.exif_transpose(Image.open(buffer)))


def reference(pixels: Bytes, shorter: int, place: tuple[float, float], mirror: int, view: View) -> Bytes:
    """By PIL: resize, crop and flip."""
    height, width = pixels.shape[:2]
    rows, columns = (side * shorter // min(height, width) for side in (height, width))
    resized = Image.fromarray(pixels).resize((columns, rows), Image.Resampling.BILINEAR)
    if view.place == "whole":
        return np.asarray(resized)
    free = rows - view.crop, columns - view.crop
    top, left = (round(side / 2) for side in free)  # to the even number
    if view.place == "random":
        top, left = (
            min(int(np.float32(share) * np.float32(side + 1)), side) for share, side in zip(place, free, strict=True)
        )
    crop = resized.crop((left, top, left + view.crop, top + view.crop))
    return np.asarray(ImageOps.mirror(crop) if mirror else crop)


@combinations
def test_every_graph_makes_the_pictures_of_the_reference(
    decode: Any,
    place: Any,
    normalization: Normalization | None,
    decoded: Memory | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_on_the_cpu(monkeypatch)
    rng, n = np.random.default_rng(5), 40
    drawn = np.hstack([rng.integers(1, 90, (n, 2)), rng.integers(1, 9, (n, 1))]).tolist()
    pictures = [upright(width, height, turned, seed) for seed, (width, height, turned) in enumerate(drawn)]
    request = Request(
        np.arange(n),
        rng.integers(32, 70, n).astype(np.int32),
        rng.random((n, 2)).astype(np.float32),
        rng.integers(0, 2, n).astype(np.int32) * (place == "random"),
    )
    images: Any = {
        None: [np.frombuffer(encoded, np.uint8) for encoded, _ in pictures],
        "cpu": [pixels for _, pixels in pictures],
        "gpu": [torch.from_numpy(pixels.copy()) for _, pixels in pictures],
    }[decoded]
    view = View(32, place)
    given = inputs(images, request)
    engine = Engine("gpu", None, prefetch=1, decode=decode)
    (made,) = build_pipeline(lambda: given, view, engine, n, normalization, decoded=decoded).run()
    assert request.shorter is not None
    for i, (_, pixels) in enumerate(pictures):
        wanted = reference(pixels, int(request.shorter[i]), tuple(request.crop_yx[i]), request.mirror[i], view)
        levels = np.asarray(made[i]).astype(np.float64)
        if normalization:
            levels = 255 * (levels * normalization.std + normalization.mean)
        assert levels.shape == wanted.shape
        difference = np.abs(levels - wanted)
        assert difference.max() < (1.2 if normalization else 1.01), (i, difference.max())  # half a step of fp16 more
        assert difference.mean() < 0.3


@dataclass
class Part:
    """An epoch of a source: how many batches, and whether what comes after them is the end or a mistake."""

    batches: int
    mistake: bool


@given(
    st.lists(st.builds(Part, st.integers(0, 4), st.booleans()), min_size=1, max_size=5),
    st.lists(st.permutations([0, 1]), min_size=40, max_size=40),
)
def test_a_source_in_two_gives_both_halves_of_each_batch_and_ends_in_both(
    epochs: list[Part], orders: list[list[int]]
) -> None:
    """In whichever order they are asked, as DALI asks: the second one also where the first one has ended."""
    script = iter([batch for part in epochs for batch in [*range(part.batches), part]])
    asked = 0

    def source() -> Any:
        nonlocal asked
        asked += 1
        batch = next(script)
        if isinstance(batch, Part):
            raise StopIteration from (UserError("unreadable") if batch.mistake else None)
        return [batch], batch, batch, batch

    halves, order = in_two(source), iter(orders)
    for part in epochs:
        for batch in range(part.batches + 1):
            answers: list[Any] = [None, None]
            for half in next(order):
                try:
                    answers[half] = halves[half]()
                except StopIteration:
                    answers[half] = "end"
            assert answers == (["end", "end"] if batch == part.batches else [[batch], (batch, batch, batch)])
    assert asked == sum(part.batches + 1 for part in epochs)


@pytest.mark.parametrize("prefetch", [1, 2, 3, 4])
def test_pictures_decoded_before_make_the_same_batches_over_epochs_and_after_those_left_early(
    records: Records, prefetch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_on_the_cpu(monkeypatch)
    cached, anew = loader(records, on_the_gpu(records), prefetch), loader(records, None, prefetch)
    for number in range(6):
        steps = number % 4 if number < 4 else None  # 0: left before the first; None: to its end
        for one, other in itertools.islice(zip(epoch(cached, number), epoch(anew, number), strict=True), steps):
            assert one.indices.tolist() == other.indices.tolist()
            assert one.images.dtype == torch.float16
            assert torch.equal(one.images, other.images)
        whole = list(epoch(cached, number))
        assert [len(batch.labels) for batch in whole] == [BATCH] * (COUNT // BATCH)
        assert all(torch.equal(a.images, b.images) for a, b in zip(whole, epoch(anew, number), strict=True))


def test_an_epoch_that_a_mistake_ends_leaves_the_loader_usable(
    records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_on_the_cpu(monkeypatch)
    cached = loader(records, on_the_gpu(records), prefetch=3)
    wanted = [batch.images for batch in epoch(cached, 0)]
    third = next(itertools.islice(epoch(cached, 0), 3, None)).indices[0]
    picture = Decoded.picture

    def lost(decoded: Decoded, index: int) -> Any:
        if index == third:
            raise UserError("its memory is gone")
        return picture(decoded, index)

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(Decoded, "picture", lost)
            before: list[torch.Tensor] = []
            with pytest.raises(UserError, match="its memory is gone"):
                before.extend(batch.images for batch in epoch(cached, 0))
        after = [batch.images for batch in epoch(cached, 0)]
        assert len(after) == len(wanted)
        assert all(torch.equal(one, other) for one, other in zip(after, wanted, strict=True))
