"""Batches of a run: what they are made with on this machine, and a rank's share of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

import numpy as np
import torch
from nvidia.dali import backend

from fastflower.arrays import Bools, Floats, Ints
from fastflower.config import DataConfig
from fastflower.data.cache import Decoded, open_cache
from fastflower.data.dataset import Dataset, look_over, open_dataset
from fastflower.data.loader import Iteration, Loader, Loading
from fastflower.data.records import Records
from fastflower.data.sampler import KEYED_ABOVE, evaluation_requests, training_requests, whole_requests
from fastflower.data.splits import require_two_classes
from fastflower.data.stats import PixelStatistics, pixel_statistics
from fastflower.data.view import MOST_THREADS, Engine, Normalization, View
from fastflower.errors import UserError
from fastflower.runtime.distributed import Ranks
from fastflower.runtime.progress import Display


def choose_engine(data: DataConfig, device: torch.device, ranks: Ranks) -> Engine:
    """DALI's device and resources on this machine.

    Raises:
        UserError: the GPU is asked for and DALI or torch does not find it.
    """
    gpu = device.type == "cuda" and backend.GetCUDADeviceCount() > 0  # type: ignore[attr-defined]
    if data.decoder == "gpu" and not gpu:
        raise UserError("data.decoder is gpu, but the network does not run on a GPU that DALI finds: give auto or cpu.")
    place: Literal["cpu", "gpu"] = "gpu" if gpu and data.decoder != "cpu" else "cpu"
    if place == "gpu" and data.decode == "scaled":
        raise UserError("data.decode scaled is for a CPU, and DALI works on a GPU: give auto, or data.decoder cpu.")
    # On a GPU a region is another way through nvJPEG and its hardware, of which nothing was measured yet.
    decode: Literal["whole", "scaled"] = "whole" if place == "gpu" else "scaled"
    return Engine(
        device=place,
        device_id=device.index if place == "gpu" else None,
        decode=decode if data.decode == "auto" else data.decode,
        threads=data.threads or min(ranks.cores, MOST_THREADS[place]),
        prefetch=data.prefetch,
        hw_decoder_load=Engine.hw_decoder_load if data.hw_decoder_load is None else data.hw_decoder_load,
    )


def choose_normalization(
    data: DataConfig, inherited: Normalization | None, measured: Callable[[], PixelStatistics]
) -> Normalization:
    """The given constants, else those that belong to the weights to start from, else the training split's own."""
    if data.mean and data.std:
        return Normalization(data.mean, data.std)
    return inherited or measured().normalization


def choose_lighting(data: DataConfig, measured: Callable[[], PixelStatistics]) -> Floats | None:
    """Directions of the color shift for `fastflower.data.sampler.training_requests`: [3, 3], or None where it is off.

    They are the principal components of the training pixels, each times its eigenvalue and data.lighting (Krizhevsky et
    al. 2012, section 4.1). The eigenvalues are those of RGB in [0, 1], as in the ResNet implementations that followed.
    """
    if not data.lighting:
        return None
    variance, directions = np.linalg.eigh(measured().covariance)
    # an eigenvector is known up to its sign, which must not depend on the library that found it
    directions *= np.sign(directions[np.abs(directions).argmax(axis=0), np.arange(3)])
    axes: Floats = data.lighting * directions * np.maximum(variance, 0)
    return axes


@dataclass(frozen=True)
class TrainingBatches:
    """A rank's training batches of any epoch."""

    loader: Loader
    scale: tuple[int, int]
    seed: int
    global_batch: int
    kept: Bools  # [n], which records of the whole table these are; it decides the order
    balanced: bool = False
    keyed: bool = False  # whether the order is `fastflower.data.sampler.keyed_order`
    lighting: Floats | None = None

    @property
    def steps(self) -> int:
        """Steps in an epoch; the incomplete last batch is dropped."""
        return self.left(0)

    def left(self, position: int) -> int:
        """Steps in the rest of an epoch from `position` of its order, wherever that is."""
        return max(len(self.loader.records) - position, 0) // self.global_batch

    def epoch(self, epoch: int, start: int = 0) -> Iteration:
        """Batches of `epoch` (from 0) from position `start` of its order.

        Raises:
            UserError: there is no such epoch or position.
        """
        if not 0 <= epoch < 2**63 or start < 0:
            raise UserError(f"epoch is {epoch} and start {start}: both are counted from 0.")
        ranks = self.loader.loading.ranks
        requests = training_requests(
            len(self.loader.records),
            seed=self.seed,
            epoch=epoch,
            scale=self.scale,
            global_batch=self.global_batch,
            start=start,
            rank=ranks.rank,
            world_size=ranks.world_size,
            kept=self.kept,
            keyed=self.keyed,
            labels=self.loader.records.labels if self.balanced else None,
            lighting=self.lighting,
        )
        return self.loader.batches(requests)


@dataclass(frozen=True)
class EvaluationBatches:
    """A rank's share of a split, each record once."""

    loader: Loader
    shorter: int | None  # pixels that the shorter side is resized to; None = as stored

    @property
    def steps(self) -> int:
        """Batches of the pass."""
        ranks = self.loader.loading.ranks
        return len(range(ranks.rank, len(self.loader.records), ranks.world_size * self.loader.batch))

    def once(self) -> Iteration:
        """One pass; the last batch may be short."""
        ranks = self.loader.loading.ranks
        requests = evaluation_requests(
            len(self.loader.records),
            shorter=self.shorter,
            batch=self.loader.batch,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )
        return self.loader.batches(requests)


@dataclass(frozen=True)
class WholePictures:
    """A rank's share of a split, each record once, as whole pictures; those of one shape come together."""

    loader: Loader
    shapes: Ints  # [n, 2] height and width (pixels)
    shorter: int | None  # as of `EvaluationBatches`

    def once(self) -> Iteration:
        """One pass."""
        ranks = self.loader.loading.ranks
        return self.loader.batches(
            whole_requests(
                self.shapes,
                shorter=self.shorter,
                crop=self.loader.view.crop,
                batch=self.loader.batch,
                rank=ranks.rank,
                world_size=ranks.world_size,
            )
        )


@dataclass(frozen=True)
class Batches:
    """Both splits as this process reads them."""

    dataset: Dataset
    normalization: Normalization
    train: TrainingBatches
    val: EvaluationBatches | None  # None in a final fit


def open_batches(
    data: DataConfig,
    device: torch.device,
    ranks: Ranks,
    display: Display,
    *,
    batch_size: int,
    seed: int,
    inherited: Normalization | None = None,
    keyed: bool | None = None,
) -> Batches:
    """Index the data, look it over, measure its pixels where needed, and make this process's batches of it.

    Args:
        data: with folders (`with_folders`).
        device: where batches are handed out.
        ranks: the processes.
        display: where progress is shown.
        batch_size: pictures of a batch, over all ranks.
        seed: of the order, of augmentation, and of what validates.
        inherited: normalization where the settings give none; None measures the training split.
        keyed: whether the order is `fastflower.data.sampler.keyed_order`; None = for more than `KEYED_ABOVE` records.

    Raises:
        UserError: bad data, or settings that do not fit it or this machine.
    """
    ranks.share_of(batch_size)
    with ranks.main_first():
        read = display.follow("read pictures")
        dataset = open_dataset(data, seed, read)
        if data.root:
            require_two_classes(data.root[0], dataset.classes)
        dataset, notes = look_over(dataset, read)
        for note in notes:
            display.say(note)
        engine = choose_engine(data, device, ranks)
    measured = cache(partial(pixel_statistics, dataset.train, engine, ranks, display.follow("measure pixels")))
    normalization = choose_normalization(data, inherited, measured)
    lighting = choose_lighting(data, measured)
    loading = Loading(normalization, engine, device, ranks)
    splits: list[tuple[Records, int | None]] = [(dataset.train, data.scale[1])]
    if dataset.val:
        splits.append((dataset.val, data.val_resize))
    decoded = open_cache(data.cache, splits, engine, ranks, display.say, display.follow)
    train = training_batches(
        data,
        dataset.train,
        loading,
        batch_size=batch_size,
        seed=seed,
        kept=dataset.kept,
        keyed=keyed,
        lighting=lighting,
        decoded=decoded[0],
    )
    val = None
    if dataset.val:
        val = evaluation_batches(data, dataset.val, loading, batch_size=batch_size, decoded=decoded[1])
    return Batches(dataset, normalization, train, val)


def training_batches(
    data: DataConfig,
    records: Records,
    loading: Loading,
    *,
    batch_size: int,
    seed: int,
    kept: Bools | None = None,
    keyed: bool | None = None,
    lighting: Floats | None = None,
    decoded: Decoded | None = None,
) -> TrainingBatches:
    """Random scale, crop and flip, and the color shift of `choose_lighting`, in an order that changes each epoch.

    `kept` ([n]) says which of a larger table the records are, and `keyed` which order it has (as of `open_batches`);
    `decoded` has their pixels, if they are in memory.

    A split smaller than `batch_size` (over all ranks) is trained in one batch of its size.

    Raises:
        UserError: the batch cannot be split over the ranks, or there are fewer records than ranks.
    """
    ranks = loading.ranks
    share = ranks.share_of(batch_size)
    if len(records) < batch_size:
        share = len(records) // ranks.world_size
        if not share:
            raise UserError(
                f"the training split has {len(records)} records for {ranks.world_size} processes: start fewer."
            )
    view = View(data.crop, "random", data.scale[1])
    loader = Loader(records, view, share, loading, decoded)
    kept = np.ones(len(records), bool) if kept is None else kept
    keyed = len(kept) > KEYED_ABOVE if keyed is None else keyed
    balanced = data.sampling == "balanced"
    return TrainingBatches(loader, data.scale, seed, share * ranks.world_size, kept, balanced, keyed, lighting)


def evaluation_batches(
    data: DataConfig,
    records: Records,
    loading: Loading,
    *,
    batch_size: int,
    decoded: Decoded | None = None,
) -> EvaluationBatches:
    """Center crop of the resized (or stored) picture; `batch_size` is over all ranks."""
    share = _share_of_pass(batch_size, records, loading)
    view = View(data.crop, "center", data.val_resize)
    return EvaluationBatches(Loader(records, view, share, loading, decoded), data.val_resize)


def whole_pictures(
    data: DataConfig,
    records: Records,
    shapes: Ints,
    loading: Loading,
    *,
    batch_size: int,
    decoded: Decoded | None = None,
) -> WholePictures:
    """The resized (or stored) picture without a crop; `batch_size` is of crops, over all ranks."""
    share = _share_of_pass(batch_size, records, loading)
    view = View(data.crop, "whole", data.val_resize)
    return WholePictures(Loader(records, view, share, loading, decoded), shapes, data.val_resize)


def _share_of_pass(batch_size: int, records: Records, loading: Loading) -> int:
    """A rank's part of a batch of `batch_size` where each record comes once: at least one picture."""
    return max(1, min(batch_size, len(records)) // loading.ranks.world_size)
