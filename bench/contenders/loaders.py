"""Who makes training batches from records: our loader, what people use otherwise, and the limit that decoding sets.

All of them read the same records in the same order, and resize, crop and flip by the same distributions.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from typing import Any

import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import DataNode
from torch.utils.data import DataLoader
from torch.utils.dlpack import from_dlpack

from bench.contenders.pictures import Pictures, decode_by_pil, decode_by_torchvision
from bench.harness.missing import need
from bench.harness.timing import Contender, Make, elapsed_ms
from bench.rates.options import Output
from fastflower.arrays import Bytes
from fastflower.config import DataConfig
from fastflower.data.cache import Decoded
from fastflower.data.decoding import decode
from fastflower.data.loader import Loader, Loading
from fastflower.data.pipeline import Inputs, inputs, take_region
from fastflower.data.records import Records, read_image
from fastflower.data.sampler import Request, training_requests
from fastflower.data.view import IMAGENET, Engine, View
from fastflower.errors import UserError
from fastflower.runtime.distributed import Ranks

OURS, CACHED = "fastflower", "fastflower, decoded before"
DECODE, LIMIT = "DALI, decode only", "libjpeg-turbo, decode only"


@dataclass(frozen=True)
class Work:
    """What all contenders do."""

    records: Records
    data: DataConfig
    engine: Engine
    device: torch.device  # where batches are handed over
    ranks: Ranks
    output: Output = "float32"
    decoded: Decoded | None = None  # the records' pixels, where our loader has them in memory

    @property
    def workers(self) -> int:
        """The cores that are left to each process."""
        return self.ranks.cores

    def requests(self, batch: int, steps: int) -> Iterator[Request]:
        """The first `steps` batches of training that are for this process, epoch after epoch.

        Raises UserError where there are too few records for one.
        """
        n, global_batch = len(self.records), batch * self.ranks.world_size
        if n < global_batch:
            raise UserError(
                f"{', '.join(map(str, self.data.root or ()))}: {n} training records, fewer than --batch {batch}"
                + (f" in {self.ranks.world_size} processes" if self.ranks.world_size > 1 else "")
                + ": lower it."
            )
        epochs = (
            training_requests(
                n,
                seed=0,
                epoch=epoch,
                scale=self.data.scale,
                global_batch=global_batch,
                rank=self.ranks.rank,
                world_size=self.ranks.world_size,
            )
            for epoch in count()
        )
        return islice((request for epoch in epochs for request in epoch), steps)


def contenders(work: Work, *, peers: bool) -> dict[str, Make]:
    """Ours, also from decoded pictures where it has them, the decoders alone, and the peers."""
    makers: dict[str, Make] = {OURS: partial(ours, replace(work, decoded=None)), DECODE: partial(decode_only, work)}
    if work.decoded:
        makers[CACHED] = partial(ours, work)
    if work.engine.device == "cpu":
        makers[LIMIT] = partial(limit, work)
    if peers:
        makers |= {
            "DataLoader, PIL and torchvision": partial(pil, work),
            "DataLoader, torchvision v2 on tensors": partial(tensors, work),
            "DALI, separate operators": partial(separate_operators, work),
            "DataLoader, timm's": partial(timms, work),
        }
    return makers


def ours(work: Work, batch: int) -> Contender:
    """Fastflower's Loader."""
    normalization = IMAGENET if work.output == "float32" else None
    view = View(work.data.crop, "random", work.data.scale[1])
    loader = Loader(work.records, view, batch, Loading(normalization, work.engine, work.device), work.decoded)

    def start(steps: int) -> Iterator[torch.Tensor]:
        for made in loader.batches(work.requests(batch, steps)):
            # float16 where DALI normalizes
            yield made.images.float() if work.output == "float32" else made.images

    return Contender(start, "decoded" if work.decoded else "ours", ahead=reads_ahead(loader))


def reads_ahead(loader: Loader) -> int:
    """Batches that a Loader begins before they are asked for: one is in its thread's hand, waiting for room."""
    return 2 * loader.loading.engine.prefetch + 1


def by_dali(
    work: Work, batch: int, definition: Callable[..., DataNode], hand_over: Callable[[Any], Sized]
) -> Contender:
    """A pipeline that reads the same encoded bytes.

    Args:
        work: what it does.
        batch: pictures in a batch.
        definition: takes encoded bytes, shorter side, crop position and flip, and gives the pipeline's output.
        hand_over: what is made of it for the consumer.
    """
    engine = work.engine

    @pipeline_def(
        batch_size=batch,
        num_threads=engine.threads,
        device_id=engine.device_id,
        prefetch_queue_depth=engine.prefetch,
    )
    def pipeline(requests: Iterator[Request]) -> DataNode:
        def source() -> Inputs:
            request = next(requests)
            return inputs([read_image(work.records, index) for index in request.indices], request)

        return definition(*fn.external_source(source=source, num_outputs=4, batch=True))

    def start(steps: int) -> Iterator[Sized]:
        built = pipeline(work.requests(batch, steps))
        with warnings.catch_warnings():  # the decoder alone has no use for positions and flips
            warnings.filterwarnings("ignore", message="The external source node .* produces")
            built.build()
        for _ in range(steps):
            (pictures,) = built.run()
            yield hand_over(pictures)

    return Contender(start, "peer", ahead=engine.prefetch)


def decode_only(work: Work, batch: int) -> Contender:
    """The part of our pipeline that tells how much of its time is decoding."""
    view = View(work.data.crop, "random", work.data.scale[1])

    def definition(encoded: DataNode, shorter: DataNode, crop_yx: DataNode, mirror: DataNode) -> DataNode:
        return take_region(encoded, shorter, crop_yx, view, work.engine)[0]

    return replace(by_dali(work, batch, definition, hand_over=lambda pictures: pictures), role="decoder")


def separate_operators(work: Work, batch: int) -> Contender:
    """DALI as its examples use it: decode; resize; crop, mirror and normalize to [N, C, H, W]."""
    mean, std = ([255 * value for value in values] for values in (IMAGENET.mean, IMAGENET.std))
    floats = {"mean": mean, "std": std, "dtype": types.FLOAT}
    finish = floats if work.output == "float32" else {"dtype": types.UINT8}
    crop = work.data.crop

    def definition(encoded: DataNode, shorter: DataNode, crop_yx: DataNode, mirror: DataNode) -> DataNode:
        pictures = fn.resize(
            decode(encoded, work.engine),
            resize_shorter=fn.cast(shorter, dtype=types.FLOAT),
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )
        place = {"crop": (crop, crop), "crop_pos_y": crop_yx[0], "crop_pos_x": crop_yx[1]}
        return fn.crop_mirror_normalize(pictures, mirror=mirror, output_layout="CHW", **place, **finish)

    def hand_over(pictures: Any) -> torch.Tensor:
        return from_dlpack(pictures.as_tensor()).to(work.device, non_blocking=True)

    return by_dali(work, batch, definition, hand_over)


def limit(work: Work, batch: int) -> Contender:
    """What decoding costs at least: libjpeg-turbo in a thread for each core, and nothing else."""
    need("torchvision")

    def start(steps: int) -> Iterator[Sequence[torch.Tensor]]:
        with ThreadPoolExecutor(work.workers) as pool:
            for request in work.requests(batch, steps):
                yield list(pool.map(lambda i: decode_by_torchvision(read_image(work.records, i)), request.indices))

    return Contender(start, "limit")


def pil(work: Work, batch: int) -> Contender:
    """PIL and torchvision's transforms."""
    tv = need("torchvision.transforms")
    floats = [tv.ToTensor(), tv.Normalize(IMAGENET.mean, IMAGENET.std)]
    finish = floats if work.output == "float32" else [tv.PILToTensor()]
    return replace(dataloader(work, batch, pictures(work, decode_by_pil, tv, finish)), role="baseline")


def tensors(work: Work, batch: int) -> Contender:
    """libjpeg-turbo and torchvision's second transforms, on uint8 tensors up to normalization."""
    v2 = need("torchvision.transforms.v2")
    floats = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET.mean, IMAGENET.std)]
    return dataloader(
        work, batch, pictures(work, decode_by_torchvision, v2, floats if work.output == "float32" else [])
    )


def timms(work: Work, batch: int) -> Contender:
    """Timm's loader: PIL, uint8 batches from the workers (fast_collate), normalized on the device (PrefetchLoader)."""
    tv, timm = need("torchvision.transforms"), need("timm.data.loader")
    dataset = pictures(work, decode_by_pil, tv, [need("timm.data.transforms").ToNumpy()])
    if work.output == "uint8":
        return dataloader(work, batch, dataset, timm.fast_collate)
    normalize = partial(timm.PrefetchLoader, mean=IMAGENET.mean, std=IMAGENET.std, device=work.device)
    return dataloader(work, batch, dataset, timm.fast_collate, normalize)


def pictures(work: Work, decode: Callable[[Bytes], Any], transforms: Any, finish: list[Any]) -> Pictures:
    """The data set: decoded, then resized, cropped and flipped by a torchvision module, then what `finish` does."""
    steps = [transforms.RandomCrop(work.data.crop), transforms.RandomHorizontalFlip(), *finish]
    resize = transforms.functional.resize
    return Pictures(work.records, work.data.scale, decode, resize, transforms.Compose(steps))


def dataloader(
    work: Work,
    batch: int,
    dataset: Pictures,
    collate: Callable[[Any], Any] | None = None,
    around: Callable[[DataLoader[Any]], Any] = iter,
) -> Contender:
    """A DataLoader; its workers start here and live from repeat to repeat. `around` works on what it hands over."""
    schedule: list[list[int]] = []  # filled anew for each repeat: the DataLoader reads it when an iteration begins
    loader = DataLoader(
        dataset,
        batch_sampler=schedule,
        num_workers=work.workers,
        persistent_workers=True,
        collate_fn=collate,
        pin_memory=work.device.type == "cuda",
        multiprocessing_context="spawn",  # a forked process that inherits DALI's or torch's threads may crash
    )
    list(loader)

    def start(steps: int) -> Iterator[torch.Tensor]:
        schedule[:] = [request.indices.tolist() for request in work.requests(batch, steps)]
        for images, _ in around(loader):
            yield images.to(work.device, non_blocking=True)

    # one batch more is ahead of what a PrefetchLoader hands over
    return Contender(start, "peer", ahead=work.workers * (loader.prefetch_factor or 0) + (around is not iter))


def transfer_s(work: Work) -> float:
    """Seconds that a picture takes to the GPU, as the Loader sends those that DALI made on the CPU; else 0."""
    if work.device.type == "cpu" or work.engine.device == "gpu":
        return 0.0
    n = 64
    images = torch.zeros(n, 3, work.data.crop, work.data.crop, dtype=torch.uint8)
    with warnings.catch_warnings(action="ignore"):  # the host has to wait for such a copy
        _, copied_ms = (elapsed_ms(lambda: images.to(work.device), work.device) for _ in range(2))  # the first warms up
    return copied_ms / 1000 / n
