"""A data set as a training run needs it: both splits, the classes, the normalization, and loaders over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from nvidia.dali import backend

from fastflower import machine
from fastflower.config import DataConfig
from fastflower.data import demo
from fastflower.data.cache import Decoded
from fastflower.data.contents import content_digests, require_pictures
from fastflower.data.demo import write_demo
from fastflower.data.loader import Batch, Loader
from fastflower.data.records import Progress, Records, concatenate, miscounted
from fastflower.data.sampler import evaluation_requests, training_requests, whole_requests
from fastflower.data.splits import class_list, is_listed, join, load_parts
from fastflower.data.stats import pixel_statistics
from fastflower.data.view import Engine, Normalization, View
from fastflower.errors import UserError
from fastflower.files import cache_dir, code_digest
from fastflower.runtime.distributed import Ranks


def builtin_root() -> Path:
    """Where the built-in synthetic flowers are, or will be."""
    return cache_dir() / f"synthetic-flowers-{code_digest(demo.__file__)}"


def ensure_builtin(progress: Callable[[int, int], None] | None = None) -> Path:
    """Draw the built-in synthetic flowers unless they are there; `progress` gets pictures done and to do.

    Raises:
        UserError: the cache folder cannot be written.
    """
    root = builtin_root()
    if not root.is_dir():
        try:
            write_demo(root, progress=progress)
        except UserError as error:
            if not root.is_dir():  # else another process was faster
                raise UserError(f"{error} FASTFLOWER_CACHE names another cache folder.") from error
    return root


@dataclass(frozen=True)
class Dataset:
    """The training and validation splits."""

    train: Records
    val: Records | None  # None where training takes both splits
    classes: list[str]
    whole: Records  # what would train if data.skip listed nothing
    kept: np.ndarray  # [n] bool, which of `whole` train
    left_out: int = 0  # records of both splits that data.skip lists


def open_dataset(data: DataConfig, seed: int, progress: Progress | None = None) -> Dataset:
    """Index both splits and check that every record has an image and a class in range.

    `seed` chooses what validates with data.folds, or where a folder of classes has no val; `progress` takes records
    read and to read, where that needs their bytes.

    Raises:
        UserError: names the file, record or key.
    """
    train_parts, val_parts = load_parts(data, seed, "train", "val", progress=progress)
    # with folds, all pictures of a class may be in one, and it counts even where that one validates
    classes = class_list([*train_parts, *val_parts] if data.folds else train_parts)
    train, val = join(train_parts, classes), join(val_parts, classes)
    for records in (train, val):
        records.require_classes(len(classes))
    train_kept, val_kept = (
        ~is_listed(records, data.skip) if data.skip else np.ones(len(records), bool) for records in (train, val)
    )
    left_out = int((~train_kept).sum() + (~val_kept).sum())
    if data.train_on == "train+val":
        whole, kept = concatenate([train, val]), np.concatenate([train_kept, val_kept])
        return Dataset(whole.select(kept), None, classes, whole, kept, left_out)
    return Dataset(train.select(train_kept), val.select(val_kept), classes, train, train_kept, left_out)


def look_over(dataset: Dataset, progress: Progress | None = None) -> tuple[Dataset, list[str]]:
    """Read each record once, so that what is wrong with it is said before the first step.

    Returns:
        The data set, whose records know what they hold, and sentences for the user.

    Raises:
        UserError: names the records that are no pictures.
    """
    splits = require_pictures([dataset.train] if dataset.val is None else [dataset.train, dataset.val], progress)
    train, val = splits[0], None if dataset.val is None else splits[1]
    notes = list(dict.fromkeys(sentence for records in splits for sentence in miscounted(records)))
    if val is not None:
        again = np.flatnonzero(np.isin(content_digests(val), content_digests(train)))
        if len(again):
            notes.append(
                f"{len(again)} of the {len(val)} validation records are also in train, such as "
                f"{val.describe(again[0])}: `fastflower data check` names those of a folder, for data.skip."
            )
    return replace(dataset, train=train, val=val), notes


def choose_engine(data: DataConfig, device: torch.device, ranks: Ranks) -> Engine:
    """DALI's device and resources on this machine.

    Raises:
        UserError: the GPU is asked for and DALI or torch does not find it.
    """
    gpu = device.type == "cuda" and backend.GetCUDADeviceCount() > 0  # type: ignore[attr-defined]
    if data.decoder == "gpu" and not gpu:
        raise UserError("data.decoder is gpu, but the network does not run on a GPU that DALI finds: give auto or cpu.")
    on_gpu = gpu and data.decoder != "cpu"
    return Engine(
        device="gpu" if on_gpu else "cpu",
        device_id=device.index if on_gpu else None,
        threads=data.threads or max(1, machine.cpus() // ranks.local_world_size),
        prefetch=data.prefetch,
        hw_decoder_load=data.hw_decoder_load,
    )


def choose_normalization(
    data: DataConfig, train: Records, engine: Engine, inherited: Normalization | None
) -> Normalization:
    """The given constants, else those that belong to the weights to start from, else the training split's own."""
    if data.mean and data.std:
        return Normalization(data.mean, data.std)
    return inherited or pixel_statistics(train, engine).normalization


def choose_lighting(data: DataConfig, train: Records, engine: Engine) -> np.ndarray | None:
    """Directions of the color shift for `fastflower.data.sampler.training_requests`: [3, 3], or None where it is off.

    They are the principal components of the training pixels, each times its eigenvalue and data.lighting (Krizhevsky et
    al. 2012, section 4.1). The eigenvalues are those of RGB in [0, 1], as in the ResNet implementations that followed.
    """
    if not data.lighting:
        return None
    variance, directions = np.linalg.eigh(pixel_statistics(train, engine).covariance)
    # an eigenvector is known up to its sign, which must not depend on the library that found it
    directions *= np.sign(directions[np.abs(directions).argmax(axis=0), np.arange(3)])
    return data.lighting * directions * np.maximum(variance, 0)


@dataclass(frozen=True)
class TrainingBatches:
    """A rank's training batches of any epoch."""

    loader: Loader
    scale: tuple[int, int]
    seed: int
    global_batch: int
    ranks: Ranks
    kept: np.ndarray  # [n] bool, which records of the whole table these are; it decides the order
    balanced: bool = False
    lighting: np.ndarray | None = None

    @property
    def steps(self) -> int:
        """Steps in an epoch; the incomplete last batch is dropped."""
        return self.left(0)

    def left(self, position: int) -> int:
        """Steps in the rest of an epoch from `position` of its order, wherever that is."""
        return max(len(self.loader.records) - position, 0) // self.global_batch

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Batches of `epoch` (from 0) from position `start` of its order."""
        requests = training_requests(
            len(self.loader.records),
            seed=self.seed,
            epoch=epoch,
            scale=self.scale,
            global_batch=self.global_batch,
            start=start,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            kept=self.kept,
            labels=self.loader.records.labels if self.balanced else None,
            lighting=self.lighting,
        )
        return self.loader.batches(requests)


@dataclass(frozen=True)
class EvaluationBatches:
    """A rank's share of a split, each record once."""

    loader: Loader
    shorter: int
    ranks: Ranks

    @property
    def steps(self) -> int:
        """Batches of the pass."""
        return len(range(self.ranks.rank, len(self.loader.records), self.ranks.world_size * self.loader.batch))

    def once(self) -> Iterator[Batch]:
        """One pass; the last batch may be short."""
        requests = evaluation_requests(
            len(self.loader.records),
            shorter=self.shorter,
            batch=self.loader.batch,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
        )
        return self.loader.batches(requests)


@dataclass(frozen=True)
class WholePictures:
    """A rank's share of a split, each record once, as whole pictures; those of one shape come together."""

    loader: Loader
    shapes: np.ndarray  # [n, 2] height and width (pixels)
    shorter: int | None
    ranks: Ranks

    def once(self) -> Iterator[Batch]:
        """One pass."""
        return self.loader.batches(
            whole_requests(
                self.shapes,
                shorter=self.shorter,
                crop=self.loader.view.crop,
                batch=self.loader.batch,
                rank=self.ranks.rank,
                world_size=self.ranks.world_size,
            )
        )


def training_batches(
    data: DataConfig,
    records: Records,
    normalization: Normalization,
    engine: Engine,
    device: torch.device,
    ranks: Ranks,
    *,
    batch_size: int,
    seed: int,
    kept: np.ndarray | None = None,
    lighting: np.ndarray | None = None,
    decoded: Decoded | None = None,
) -> TrainingBatches:
    """Random scale, crop and flip, and the color shift of `choose_lighting`, in an order that changes each epoch.

    `kept` ([n] bool) says which of a larger table the records are; `decoded` has their pixels, if they are in memory.

    A split smaller than `batch_size` (over all ranks) is trained in one batch of its size.

    Raises:
        UserError: the batch cannot be split over the ranks, or there are fewer records than ranks.
    """
    share = ranks.share_of(batch_size)
    if len(records) < batch_size:
        share = len(records) // ranks.world_size
        if not share:
            raise UserError(
                f"the training split has {len(records)} records for {ranks.world_size} processes: start fewer."
            )
    view = View(data.crop, "random")
    loader = Loader(records, view, normalization, engine, device, share, read_ahead=data.prefetch, decoded=decoded)
    kept = np.ones(len(records), bool) if kept is None else kept
    balanced = data.sampling == "balanced"
    return TrainingBatches(loader, data.scale, seed, share * ranks.world_size, ranks, kept, balanced, lighting)


def evaluation_batches(
    data: DataConfig,
    records: Records,
    normalization: Normalization,
    engine: Engine,
    device: torch.device,
    ranks: Ranks,
    *,
    batch_size: int,
    decoded: Decoded | None = None,
) -> EvaluationBatches:
    """Center crop of the resized (or stored) picture; `batch_size` is over all ranks."""
    share = max(1, min(batch_size, len(records)) // ranks.world_size)
    view = View(data.crop, "center", resize=data.val_resize is not None)
    loader = Loader(records, view, normalization, engine, device, share, read_ahead=data.prefetch, decoded=decoded)
    return EvaluationBatches(loader, data.val_resize or 0, ranks)


def whole_pictures(
    data: DataConfig,
    records: Records,
    shapes: np.ndarray,
    normalization: Normalization,
    engine: Engine,
    device: torch.device,
    ranks: Ranks,
    *,
    batch_size: int,
) -> WholePictures:
    """The resized (or stored) picture without a crop; `batch_size` is of crops, over all ranks."""
    share = max(1, min(batch_size, len(records)) // ranks.world_size)
    view = View(data.crop, "whole", resize=data.val_resize is not None)
    loader = Loader(records, view, normalization, engine, device, batch=share, read_ahead=data.prefetch)
    return WholePictures(loader, shapes, data.val_resize, ranks)
