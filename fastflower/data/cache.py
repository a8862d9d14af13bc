"""Pictures decoded once, in memory: later epochs begin with their pixels, and need no decoder.

In host memory the processes of a machine share one copy; in a GPU's memory each process has its own.
"""

from __future__ import annotations

import mmap
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from nvidia.dali.pipeline import DataNode

from fastflower import machine
from fastflower.arrays import Bytes, Ints
from fastflower.data.decoding import BATCH, decoded_pictures, read_picture, undecodable
from fastflower.data.records import LEAVE_OUT, Records
from fastflower.data.resample import Region
from fastflower.data.scaled import Scaled, factors, scaled
from fastflower.data.soundness import header_shape
from fastflower.data.view import Engine
from fastflower.errors import UserError
from fastflower.runtime.distributed import Ranks

Choice = Literal["off", "ram", "gpu", "auto"]
Place = Literal["ram", "gpu"]

SHARED = Path("/dev/shm")  # where Linux keeps memory that processes share
MOST, MOST_AUTO = 0.8, 0.5  # share of the free memory that a cache takes at most


@dataclass(frozen=True)
class Decoded:
    """The pixels of a split's records, as they are decoded."""

    shapes: Ints  # [n, 2], height and width of them, turned by EXIF
    starts: Ints  # [n], place in `pixels`
    pixels: Bytes | torch.Tensor  # [bytes] uint8, in host memory or on the GPU
    small: Mapping[int, Scaled] = field(default_factory=dict)  # of those records that are decoded smaller than they are

    @property
    def place(self) -> Literal["cpu", "gpu"]:
        """Whose memory it is."""
        return "gpu" if isinstance(self.pixels, torch.Tensor) else "cpu"

    def picture(self, index: int) -> Bytes | torch.Tensor:
        """RGB of a record, uint8 [H, W, 3]; a view."""
        (height, width), start = self.shapes[index].tolist(), int(self.starts[index])
        return self.pixels[start : start + 3 * height * width].reshape(height, width, 3)

    def region(self, index: int) -> Region:
        """All of a record's picture that is in host memory, as it is resampled from."""
        pixels = np.asarray(self.picture(index))
        way = self.small.get(index)
        return way.region(pixels) if way else Region(pixels, (0, 0), pixels.shape[:2])


def choose_place(choice: Choice, needed: int, engine: Engine, ranks: Ranks) -> tuple[Place | None, str]:
    """Where `needed` bytes of pixels are kept, None for nowhere, and a sentence that says so ("" for "off").

    auto takes the GPU's memory if all fit into half of what is free there, else host memory on the same terms.

    Raises:
        UserError: "gpu" where DALI does not work on one.
    """
    if choice == "gpu" and engine.device != "gpu":
        raise UserError("data.cache gpu needs DALI on a GPU (data.decoder): give ram or auto.")
    places: list[Place] = {"off": [], "ram": ["ram"], "gpu": ["gpu"], "auto": ["gpu", "ram"]}[choice]  # type: ignore[assignment]
    most = MOST_AUTO if choice == "auto" else MOST
    free = {place: _free(place, engine, ranks) for place in places if place == "ram" or engine.device == "gpu"}
    for place, size in free.items():
        if needed <= most * size:
            return place, f"Keeping the decoded pictures in {_NAMES[place]}: {_gb(needed)}."
    if not free:
        return None, ""
    room = " and ".join(f"{_gb(size)} of {_NAMES[place]}" for place, size in free.items())
    return None, f"The decoded pictures would take {_gb(needed)}, and {room} are free: each epoch decodes them anew."


_NAMES = {"ram": "host memory", "gpu": "the GPU's memory"}


def _gb(size: int) -> str:
    return f"{size / 1e9:.2g} GB" if size < 1e10 else f"{size / 1e9:.0f} GB"


def _free(place: Place, engine: Engine, ranks: Ranks) -> int:
    """Bytes that can still be taken."""
    if place == "gpu":
        return torch.cuda.mem_get_info(engine.device_id)[0]
    free = machine.memory().free
    if ranks.local_world_size > 1:
        status = os.statvfs(SHARED)
        free = min(free, status.f_bavail * status.f_frsize)
    return free


def open_cache(
    choice: Choice,
    splits: Sequence[tuple[Records, int | None]],
    engine: Engine,
    ranks: Ranks,
    say: Callable[[str], None],
    follow: Callable[[str], Callable[[int, int], None]],
) -> list[Decoded | None]:
    """Decode splits into memory, each record once; None of each where that is not wanted or does not fit.

    Every rank must call it; those of one machine share the work, and host memory.

    Args:
        choice: where to.
        splits: the records, and what shorter sides are resized to at most (pixels; None = they are not).
        engine: what decodes; "gpu" memory is its GPU's.
        ranks: the processes.
        say: takes sentences for the user.
        follow: makes a callback (done, to do) for a named part of the work.

    Raises:
        UserError: a record cannot be decoded, or `choice` cannot be had.
    """
    if choice == "off":
        return [None for _ in splits]
    with ranks.together():
        ways = [_ways(records, largest, engine) for records, largest in splits]
        place, sentence = choose_place(choice, int(sum(way.sizes.sum() for way in ways)), engine, ranks)
    if place != _agree(place, ranks):  # what is free may have changed between two readings
        place, sentence = None, "Not every process finds room for the decoded pictures: each epoch decodes them anew."
    say(sentence)
    if place is None:
        return [None for _ in splits]
    return [_decode(records, way, place, engine, ranks, follow) for (records, _), way in zip(splits, ways, strict=True)]


class _Ways(NamedTuple):
    """How records are decoded."""

    sizes: Ints  # [n] bytes
    small: dict[int, Scaled]  # those decoded smaller than they are


def _ways(records: Records, largest: int | None, engine: Engine) -> _Ways:
    shapes = np.zeros((len(records), 2), np.int64)
    small = {}
    for index in range(len(records)):
        encoded = read_picture(records, index)
        shapes[index] = header_shape(encoded)
        if engine.decode == "scaled" and (factor := int(factors(shapes[index : index + 1], largest)[0])) > 1:
            way = scaled(encoded, tuple(shapes[index].tolist()), factor)
            if way:
                small[index], shapes[index] = way, way.decoded_shape
    return _Ways(3 * shapes.prod(axis=1), small)


def _agree(place: Place | None, ranks: Ranks) -> Place | None:
    """What all ranks have chosen, None where they differ."""
    chosen = set(ranks.gather(place))
    return chosen.pop() if len(chosen) == 1 else None


def _decode(
    records: Records,
    ways: _Ways,
    place: Place,
    engine: Engine,
    ranks: Ranks,
    follow: Callable[[str], Callable[[int, int], None]],
) -> Decoded:
    sizes, small = ways
    ends = np.cumsum(sizes)
    total, n = int(ends[-1]), len(records)
    if place == "gpu":
        pixels: Bytes | torch.Tensor = torch.empty(total, dtype=torch.uint8, device=f"cuda:{engine.device_id}")
        shapes, mine = np.zeros((n, 2), np.int64), np.arange(n)
    else:
        memory = _memory(16 * n + total, ranks)
        shapes, pixels = memory[: 16 * n].view(np.int64).reshape(n, 2), memory[16 * n :]
        mine = np.arange(ranks.local_rank, n, ranks.local_world_size)
    decoded = Decoded(shapes, ends - sizes, pixels, small)
    progress = follow("decode once")
    with ranks.together():
        for done, (index, picture) in enumerate(_pictures(records, mine, small, place, engine), start=1):
            if 3 * picture.shape[0] * picture.shape[1] != sizes[index]:
                where = records.describe(index)
                raise UserError(f"{where} has not the size that its header says: leave it out {LEAVE_OUT}.")
            shapes[index] = picture.shape[:2]
            decoded.picture(index)[:] = picture  # type: ignore[assignment]
            progress(done, len(mine))
    return decoded


def _pictures(
    records: Records, indices: Ints, small: Mapping[int, Scaled], place: Place, engine: Engine
) -> Iterator[tuple[int, Bytes | torch.Tensor]]:
    """The records at `indices` as they are decoded, in any order, each with its number."""
    by_dali = np.array([index for index in indices.tolist() if index not in small], np.int64)
    to_place = (lambda pictures: pictures) if place == "gpu" else DataNode.cpu
    yield from decoded_pictures(records, by_dali, engine, to_place)

    def decode_small(index: int) -> tuple[int, Bytes]:
        try:
            return index, small[index].decode(read_picture(records, index))
        except ValueError as error:
            raise undecodable((records, index)) from error

    with ThreadPoolExecutor(engine.threads, "decode") as threads:
        mine = [index for index in indices.tolist() if index in small]
        for start in range(0, len(mine), BATCH):
            yield from threads.map(decode_small, mine[start : start + BATCH])


def _memory(size: int, ranks: Ranks) -> Bytes:
    """Zeroed host memory, [size], that all processes of this machine see; gone with the last of them."""
    if ranks.local_world_size == 1:
        return np.zeros(size, np.uint8)
    path = SHARED / f"fastflower-{secrets.token_hex(8)}"
    failure = None
    if ranks.local_rank == 0:
        try:
            with path.open("xb") as file:
                os.posix_fallocate(file.fileno(), 0, size)  # taken now: later, a full machine would kill us
        except OSError as error:
            failure = error
    leader = ranks.rank - ranks.local_rank
    path, failure = ranks.gather((path, failure))[leader]
    if not failure:
        with path.open("r+b") as file:
            memory = np.frombuffer(mmap.mmap(file.fileno(), size), np.uint8)
    ranks.gather(None)  # all have opened it
    if ranks.local_rank == 0:
        path.unlink(missing_ok=True)
    if failure:
        raise UserError(f"{path} cannot take {_gb(size)} ({failure.strerror}): give data.cache off.")
    return memory
