"""Write a data set once as TFRecords of small JPEG pictures, from which training reads fast.

The layout is Kaggle's: OUT/tfrecords-jpeg-SxS/{train,val,test}/NN-SxS-COUNT.tfrec, and class_names.json. SxS names the
length of the shorter side: the picture keeps its aspect, and is never enlarged. It is upright, RGB, resized by Pillow's
Lanczos filter, and a JPEG with 4:2:0 chroma; a JPEG that needs none of it is taken as it is.

A file of records is written at once. OUT/.pack.json tells which are done, so that a pack that was stopped goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastflower import machine
from fastflower.config import SPLITS, DataConfig
from fastflower.data.converted import UnreadableError, Upright, upright
from fastflower.data.names import are_places
from fastflower.data.records import NO_LABEL, Progress, Records, read_image
from fastflower.data.soundness import is_sound
from fastflower.data.sources import layout_of
from fastflower.data.sources.tfrecord import write_tfrecord
from fastflower.data.splits import class_list, join, load_parts
from fastflower.data.stamp import file_keys
from fastflower.errors import UserError
from fastflower.files import atomic_write, digest, remove_temporaries, to_json

PICTURES_PER_FILE = 512
MANIFEST = ".pack.json"


@dataclass(frozen=True)
class Packed:
    """What a pack has written."""

    pictures: dict[str, int]  # of each split
    unreadable: list[str]  # a sentence for each picture that is left out


def pack(
    root: Path, out: Path, *, sizes: Sequence[int], quality: int, seed: int, follow: Callable[[str], Progress]
) -> Packed:
    """Write the splits of `root` to `out`, with the same classes, labels and ids.

    Where `root` is divided by a share (`data.val_share`), that of `seed` validates. An id that stands in two splits,
    as where files are numbered anew in each, gets the name of its split before it.

    Args:
        root: the data set's folder.
        out: a new or empty folder outside of `root`, or one that the same pack was writing.
        sizes: pixels, of the shorter sides.
        quality: of JPEG, from 1 to 100.
        seed: chooses what validates, as in training.
        follow: makes a callback (done, to do) for a named part of the work.

    Raises:
        UserError: `out` is something else or cannot be written, an argument is out of range, or the data is no data
            set; names the file, record or option.
    """
    sizes = sorted(set(sizes))
    if not sizes or sizes[0] < 16:
        raise UserError(f"--sizes is {' '.join(map(str, sizes)) or '(none)'}: give sizes of at least 16 pixels.")
    if not 1 <= quality <= 100:
        raise UserError(f"--quality is {quality}: give a number from 1 to 100.")
    root, out = root.absolute(), out.absolute()
    if out.resolve().is_relative_to(root.resolve()):  # where it may be taken for a class
        raise UserError(f"{out} lies in the data folder {root}: name a folder outside of it.")
    splits, classes = _load(root, sizes[-1], seed, follow("look for copies"))
    made = {"sizes": sizes, "quality": quality, "data": _identity(splits, classes)}
    try:
        state = _begin(out, made)
        if classes is not None:
            with atomic_write(out / "class_names.json") as file:
                file.write(to_json(classes, indent=2).encode() + b"\n")
        return _write(out, splits, sizes, quality, state, follow("pack"))
    except OSError as error:
        raise UserError(
            f"{error.filename or out} cannot be written ({error.strerror}): make room or name another folder. "
            "What is written stays, and the same command goes on."
        ) from error


def _load(root: Path, largest: int, seed: int, progress: Progress) -> tuple[dict[str, Records], list[str] | None]:
    """Each split's records, at the smallest stored size that is large enough, and the classes where they have names."""
    data = DataConfig(root=(root,), scale=(largest, largest))
    names = ["train", "val"] + (["test"] if "test" in layout_of(root).splits(root) else [])
    parts = load_parts(data, seed, *names, progress=progress)
    classes = class_list(parts[0])
    records = {name: join(part, classes) for name, part in zip(names, parts, strict=True)}
    for name in ("train", "val"):
        records[name].require_classes(len(classes))
    numbered = are_places(classes) and all(part.names is None for part in parts[0])
    return records, None if numbered else classes


def _identity(splits: dict[str, Records], classes: list[str] | None) -> str:
    """Changes when a file, the division into splits or a class does."""
    parts = [to_json(classes).encode()]
    for name, records in splits.items():
        parts += [name.encode(), *file_keys(records.files, records.stamps)]
        parts += [np.ascontiguousarray(column).tobytes() for column in (records.file, records.offset, records.labels)]
    return digest(*parts, size=16).hex()


def _begin(out: Path, made: dict[str, Any]) -> dict[str, Any]:
    """What an earlier pack of the same has done so far: file numbers by split, and sentences of what it left out."""
    path = out / MANIFEST
    for file in (path, out / "class_names.json"):
        remove_temporaries(file)
    if path.is_file():
        try:
            state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            state = {}
        if state.get("made") != made:
            raise UserError(f"{out} holds a pack of other pictures or settings: name a new folder, or remove it.")
        return state
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty: name a new folder.")
    return {"made": made, "done": {}}


def _write(
    out: Path, splits: dict[str, Records], sizes: Sequence[int], quality: int, state: dict[str, Any], progress: Progress
) -> Packed:
    total, done = sum(len(records) for records in splits.values()), 0
    twice = _ids_in_two(splits)
    pool = ThreadPoolExecutor(machine.cpus(), "pack")
    try:
        for split, records in splits.items():
            for number, start in enumerate(range(0, len(records), PICTURES_PER_FILE)):
                chosen = range(start, min(start + PICTURES_PER_FILE, len(records)))
                name = f"{split}/{number:02d}"
                if name not in state["done"]:
                    _remove(out, sizes, split, number)
                    examples: list[list[dict[str, bytes | int]]] = [[] for _ in sizes]
                    left_out = []
                    encoded = pool.map(lambda index, own=records: _encoded(own, index, sizes, quality), chosen)
                    for index, pictures in zip(chosen, encoded, strict=True):
                        if isinstance(pictures, str):
                            left_out.append(pictures)
                        else:
                            features = _features(records, index, split, twice)
                            for own, picture in zip(examples, pictures, strict=True):
                                own.append({"image": picture, **features})
                        done += 1
                        progress(done, total)
                    for size, own in zip(sizes, examples, strict=True):
                        if own:
                            folder = out / f"tfrecords-jpeg-{size}x{size}" / split
                            write_tfrecord(folder / f"{number:02d}-{size}x{size}-{len(own)}.tfrec", own)
                    state["done"][name] = {"pictures": len(examples[0]), "left_out": left_out}
                    with atomic_write(out / MANIFEST) as file:
                        file.write(to_json(state, indent=1).encode() + b"\n")
                else:
                    done += len(chosen)
                    progress(done, total)
    finally:
        pool.shutdown(cancel_futures=True)
    shards = state["done"].items()
    counts = {split: sum(s["pictures"] for name, s in shards if name.startswith(f"{split}/")) for split in splits}
    return Packed(counts, [sentence for _, shard in shards for sentence in shard["left_out"]])


def _remove(out: Path, sizes: Sequence[int], split: str, number: int) -> None:
    """What a pack that was stopped wrote of a file's sizes, and parts of them."""
    for size in sizes:
        folder = out / f"tfrecords-jpeg-{size}x{size}" / split
        for pattern in (f"{number:02d}-*", f".{number:02d}-*.tmp"):
            for path in folder.glob(pattern):
                path.unlink(missing_ok=True)


def _ids_in_two(splits: dict[str, Records]) -> set[str]:
    """The ids that are in more than one split."""
    names = np.concatenate([np.unique(records.ids[records.ids != ""]) for records in splits.values()])
    distinct, counts = np.unique(names, return_counts=True)
    return set(distinct[counts > 1].tolist())


def _features(records: Records, index: int, split: str, twice: set[str]) -> dict[str, bytes | int]:
    features: dict[str, bytes | int] = {}
    if name := str(records.ids[index]):
        prefix = f"{split}/" if name in twice and split != SPLITS[-1] else ""  # a submission names those of test
        features["id"] = (prefix + name).encode()
    if records.labels[index] != NO_LABEL:
        features["class"] = int(records.labels[index])
    return features


def _encoded(records: Records, index: int, sizes: Sequence[int], quality: int) -> list[bytes] | str:
    """A record's picture at each size (ascending), as JPEG; a sentence where it cannot be read."""
    try:
        data = read_image(records, index)
        if not is_sound(data):
            raise UnreadableError("")
        stored = upright(data, at_least=2 * sizes[-1])
        return [
            data.tobytes() if stored.is_plain_jpeg and min(stored.size) <= size else _jpeg(stored, size, quality)
            for size in sizes
        ]
    except UnreadableError as error:
        reason = f", {error}" if str(error) else ""
        return f"{records.describe(index)} cannot be decoded as a picture ({records.length[index]} bytes{reason})."
    except UserError as error:
        return str(error)


def _jpeg(stored: Upright, size: int, quality: int) -> bytes:
    """The picture with its shorter side resized to `size` unless it is shorter."""
    picture, (width, height) = stored.picture, stored.size
    if (shorter := min(width, height)) > size:
        width, height = (round(side * size / shorter) for side in (width, height))
    if (width, height) != picture.size:
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    picture.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()
