"""Stages that need DALI: what this machine has, the loader's pixels and images a second, training from end to end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageFilter

from bench.contenders import launches, loaders
from bench.contenders.loops import Place, training, training_alone
from bench.gpu.networks import DEEPER, Plan, Turns, plan_of
from bench.gpu.task import FailedError, Outcome, Task, attempt
from bench.harness.compute import matmul_flops_per_s
from bench.harness.timing import Make, measure
from fastflower.config import Config, DataConfig, ModelConfig, TrainConfig, resolve
from fastflower.data.batches import choose_engine
from fastflower.data.cache import Decoded, open_cache
from fastflower.data.loader import Batch, Loader, Loading
from fastflower.data.records import Records
from fastflower.data.sampler import training_requests
from fastflower.data.sources.tfrecord import write_tfrecord
from fastflower.data.splits import load_pictures
from fastflower.data.view import IMAGENET, Engine, View
from fastflower.doctor import examine, is_ready
from fastflower.runtime.device import Precision
from fastflower.runtime.distributed import Ranks

Kind = Literal["JPEG", "PNG"]
STORED = 512  # pixels, side of the pictures that are drawn
DISTINCT, REPEATED = 64, 48  # pictures that are drawn, and how often each is among the records
CLASSES = 12
RATE = 10_000.0  # images/s that the loader is also held to beside launches
MOST_LEVELS, MOST_MEAN = 1, 1.0  # that pixels differ by: of PNG at most, of JPEG (decoders round apart) on average
# What the loader's rate is measured by, each beside the defaults.
CHOICES: dict[str, dict[str, Any]] = {
    "defaults": {},
    **{f"hw_decoder_load {share}": {"hw_decoder_load": share} for share in (0.0, 0.65, 0.9, 1.0)},
    **{f"{threads} threads": {"threads": threads} for threads in (4, 8, 16, 32)},
    **{f"cache {place}": {"cache": place} for place in ("gpu", "ram")},
    **{f"decode {what}": {"decode": what} for what in ("region", "whole")},
    "decoder cpu": {"decoder": "cpu"},
}
TINY_CHOICES = ("defaults", "cache ram")


def doctor(task: Task) -> Outcome:
    """What `fastflower doctor` finds."""
    findings = examine()
    for finding in findings:
        task.row(item=finding.item, value=finding.value, mend=finding.mend)
    if not is_ready(findings):
        lacking = [finding for finding in findings if finding.essential and not finding.value]
        raise FailedError("missing: " + ", ".join(f"{finding.item} ({finding.mend})" for finding in lacking))
    values = {finding.item: finding.value or "missing" for finding in findings}
    told = ("hardware JPEG decoder", "with --amp", "torch.compile", "decoding", "BatchNorm + ReLU")
    return Outcome("; ".join(f"{item}: {values[item]}" for item in told))


@contextmanager
def drawn(kind: Kind, distinct: int, repeated: int, *, side: int = STORED) -> Iterator[Path]:
    """A data folder of random smooth pictures, `distinct` ones that come `repeated` times each; a sixth validates."""
    random = np.random.default_rng(0)
    encoded = []
    for _ in range(distinct):
        noise = Image.fromarray(random.integers(0, 256, (side // 4, side // 4, 3), np.uint8)).resize((side, side))
        buffer = BytesIO()
        noise.filter(ImageFilter.GaussianBlur(1)).save(buffer, kind, **({"quality": 90} if kind == "JPEG" else {}))
        encoded.append(buffer.getvalue())
    with TemporaryDirectory() as folder:
        for split, times in (("train", repeated), ("val", max(1, repeated // 6))):
            n = distinct * times
            records: list[dict[str, bytes | int]] = [
                {"id": f"{split}{i:06}".encode(), "image": encoded[i % distinct], "class": i % distinct % CLASSES}
                for i in range(n)
            ]
            place = Path(folder, f"tfrecords-jpeg-{side}x{side}", split)
            write_tfrecord(place / f"00-{side}x{side}-{n}.tfrec", records)
        yield Path(folder)


def pixels(task: Task) -> Outcome:
    """Pixels on the GPU beside the CPU's by the same geometry, while the GPU is behind, and from decoded pictures."""
    crop, batch, side = (32, 8, 64) if task.tiny else (224, 32, STORED)
    scale, said = (crop, 2 * crop), list[str]()

    def batches(
        records: Records, engine: Engine, device: torch.device, decoded: Decoded | None = None
    ) -> Iterator[Batch]:
        loader = Loader(records, View(crop, "random"), batch, Loading(None, engine, device), decoded)
        return loader.batches(training_requests(len(records), seed=0, epoch=0, scale=scale, global_batch=batch))

    def same(kind: Kind, what: Literal["region", "whole"]) -> None:
        with drawn(kind, 2 * batch, 1, side=side) as root:
            records = load_pictures(DataConfig(root=(root,)), ["train"], seed=0)
            here = batches(records, Engine(threads=4), torch.device("cpu"))
            there = batches(records, engine_of(task, DataConfig(decode=what)), task.device)
            pairs = [(mine.images.cpu().int(), other.images.int()) for mine, other in zip(there, here, strict=True)]
        apart = torch.cat([(mine - other).abs().flatten() for mine, other in pairs]).double()
        mean, most, within = apart.mean().item(), int(apart.max()), (apart <= MOST_LEVELS).double().mean().item()
        task.row(pictures=kind, decode=what, mean=mean, most=most, within_a_level=within)
        said.append(f"{kind}, {what}: {mean:.2f} levels apart on average, {most} at most, {within:.2%} within one")
        if (most > MOST_LEVELS) if kind == "PNG" else (mean > MOST_MEAN):
            raise FailedError(said[-1])

    def behind() -> None:
        with drawn("JPEG", 4 * batch, 1, side=side) as root:
            records = load_pictures(DataConfig(root=(root,)), ["train"], seed=0)
            engine = engine_of(task, DataConfig())
            wanted = []
            for one in batches(records, engine, task.device):
                synchronize(task)
                wanted.append(one.images.clone())
            slow = torch.randn(256 if task.tiny else 4096, 256 if task.tiny else 4096, device=task.device)
            late = []
            for one in batches(records, engine, task.device):
                for _ in range(2 if task.tiny else 20):
                    slow = (slow @ slow).clamp_(-1, 1)
                late.append(one.images.clone())
            if not all(torch.equal(mine, other) for mine, other in zip(late, wanted, strict=True)):
                raise FailedError("a batch changes before the GPU has read it")
        said.append("batches stay while the GPU is behind")

    def cached(place: Literal["gpu", "ram"]) -> None:
        with drawn("JPEG", 2 * batch, 1, side=side) as root:
            records = load_pictures(DataConfig(root=(root,)), ["train"], seed=0)
            engine = engine_of(task, DataConfig(hw_decoder_load=0))  # with it, which decoder takes a picture varies
            decoded = kept(place, records, engine)
            both = (batches(records, engine, task.device, these) for these in (None, decoded))
            if not all(torch.equal(mine.images, other.images) for mine, other in zip(*both, strict=True)):
                raise FailedError("pictures decoded before give other batches")
        said.append(f"cache {place} the same")

    kinds: tuple[Kind, ...] = ("PNG", "JPEG")
    cells: dict[str, Callable[[], None]] = {
        f"{kind}, {what}": partial(same, kind, what) for kind in kinds for what in ("region", "whole")
    }
    cells |= {"streams": behind, "cache ram": partial(cached, "ram")}
    if not task.tiny:
        cells |= {"cache gpu": partial(cached, "gpu")}
    attempt(task, cells)
    return Outcome("; ".join(said))


def engine_of(task: Task, data: DataConfig) -> Engine:
    """As training chooses it."""
    return choose_engine(data, task.device, Ranks())


def kept(place: Literal["gpu", "ram"], records: Records, engine: Engine) -> Decoded:
    """The pixels of all records in memory."""
    (decoded,) = open_cache(place, [(records, None)], engine, Ranks(), lambda _: None, lambda _: lambda *_: None)
    if decoded is None:
        raise FailedError("the decoded pictures do not fit into memory")
    return decoded


def synchronize(task: Task) -> None:
    """Wait for the GPU."""
    if not task.tiny:
        torch.cuda.synchronize()


def rates(task: Task) -> Outcome:
    """Images a second of the loader by its settings."""
    side, scale, crop = (64, (32, 48), 32) if task.tiny else (STORED, (256, 480), 224)
    with drawn("JPEG", DISTINCT, 1 if task.tiny else REPEATED, side=side) as root:
        base = DataConfig(root=(root,), crop=crop, scale=scale)
        records = load_pictures(base, ["train"], seed=0)
        turns = Turns(task)

        def maker(settings: Mapping[str, Any]) -> Make:
            data = replace(base, **settings)
            engine = engine_of(task, data)

            def make(batch: int) -> Any:
                decoded = kept(data.cache, records, engine) if data.cache in ("gpu", "ram") else None
                return loaders.ours(loaders.Work(records, data, engine, task.device, Ranks(), decoded=decoded), batch)

            return turns.in_time(make)

        chosen = {name: settings for name, settings in CHOICES.items() if not task.tiny or name in TINY_CHOICES}
        plan = Plan(8, steps=2, warmup=1, repeats=1) if task.tiny else Plan(128, steps=20, warmup=5, repeats=2)
        makers = {name: maker(settings) for name, settings in chosen.items()}
        rows = [
            task.row(kind="loader", stored=side, crop=crop, chosen=chosen[row["name"]], **row)
            for row in measure(makers, plan, task.device, Ranks(), told=turns.told)
        ]
    said = ", ".join(f"{row['name']} {row['images_per_s']:.0f}" for row in rows if "missing" not in row)
    bytes_ = int(np.mean(records.length))
    figure = f"images/s of pictures of {bytes_ / 1000:.0f} KB at {side} pixels: {said}"
    return Outcome(figure, (f"The loader alone, batch {plan.batch}, {figure}.",))


def launching(task: Task) -> Outcome:
    """What the loader takes from a thread that launches operations, as training's does."""
    side, scale, crop, rate = (64, (32, 48), 32, 200.0) if task.tiny else (STORED, (256, 480), 224, RATE)
    with drawn("JPEG", DISTINCT, 1 if task.tiny else REPEATED, side=side) as root:
        data = DataConfig(root=(root,), crop=crop, scale=scale)
        records = load_pictures(data, ["train"], seed=0)
        work = loaders.Work(records, data, engine_of(task, data), task.device, Ranks())
        plan = Plan(8, steps=2, warmup=1, repeats=1) if task.tiny else Plan(128, steps=20, warmup=5, repeats=3)
        rows = [task.row(stored=side, crop=crop, **row) for row in launches.rows(work, plan, rate)]
    said = "; ".join(
        f"{row['name']}: {row['launches_per_s'] / row['launches_alone_per_s']:.0%} of the launches alone, "
        f"{row['lock_us']:.1f} µs a picture under the lock"
        for row in rows
    )
    return Outcome(said, (f"Launches beside the loader, batch {plan.batch}: {said}.",))


def end_to_end(task: Task) -> Outcome:
    """Training from records to weights, beside the same steps on a batch that is there."""
    side, scale, crop, names = (
        (64, (32, 48), 32, ["resnet18"]) if task.tiny else (STORED, (256, 480), 224, ["resnet18", "resnet50"])
    )
    dtype = None if task.tiny else torch.bfloat16
    place = Place(task.device, Ranks(), Precision(dtype))
    ceiling = matmul_flops_per_s(dtype or torch.float32, task.device)
    said, turns = [], Turns(task)
    with drawn("JPEG", DISTINCT, 1 if task.tiny else REPEATED, side=side) as root:
        data = DataConfig(root=(root,), crop=crop, scale=scale, val_resize=None, mean=IMAGENET.mean, std=IMAGENET.std)
        for name in names:
            config = resolve(
                Config(amp=not task.tiny, data=data, model=ModelConfig(name=name), train=TrainConfig(log_every=1000))
            )
            makers: dict[str, Make] = {
                "end to end": turns.in_time(partial(training, config, place)),
                "step alone": turns.in_time(partial(training_alone, config, place)),
            }
            rows = measure(makers, plan_of(task, 256), task.device, Ranks(), ceiling, turns.told)
            for row in rows:
                task.row(network=name, stored=side, size=crop, **row)
                if "missing" not in row:
                    waited = f", waiting {row['data_wait']:.0%}" if "data_wait" in row else ""
                    said.append(f"{name} {row['name']} {row['images_per_s']:.0f} images/s{waited}")
            turns.longest_s *= DEEPER
    if not said:
        raise FailedError("nothing was measured in time")
    figure = "; ".join(said)
    return Outcome(figure, (f"Training at {crop} pixels from pictures of {side}, compiled: {figure}.",))
