"""The built-in data: its layout, its records (read back by another library) and its pictures."""

from __future__ import annotations

import errno
import itertools
import json
import os
from collections import Counter
from dataclasses import fields
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tfrecord
from PIL import Image

from fastflower.data.classes import listed_classes
from fastflower.data.demo import COLORS, KINDS, draw_flower, write_demo
from fastflower.data.sources.kaggle import load_split
from fastflower.errors import UserError

SMALL: dict[str, Any] = {"sizes": (16,), "train": 24, "val": 12, "test": 12}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """252 + 24 + 12 pictures at two sizes."""
    path = tmp_path_factory.mktemp("demo") / "flowers"
    write_demo(path, sizes=(32, 64), train=252, val=24, test=12)
    return path


def read(root: Path, split: str, size: int) -> list[dict[str, np.ndarray]]:
    """The records of a split in the order of their files."""
    files = sorted((root / f"tfrecords-jpeg-{size}x{size}" / split).iterdir())
    return [record for path in files for record in tfrecord.tfrecord_loader(str(path), None)]


def ids(root: Path, split: str, size: int) -> list[bytes]:
    return [bytes(record["id"]) for record in read(root, split, size)]


def picture(record: dict[str, np.ndarray]) -> Image.Image:
    return Image.open(BytesIO(bytes(record["image"])))


def files(root: Path) -> dict[Path, bytes]:
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_layout_is_that_of_the_kaggle_set(root: Path) -> None:
    expected = {Path("class_names.json")}
    for size, (split, name) in itertools.product(
        (32, 64), (("train", "00-{}-240"), ("train", "01-{}-12"), ("val", "00-{}-24"), ("test", "00-{}-12"))
    ):
        square = f"{size}x{size}"
        expected.add(Path(f"tfrecords-jpeg-{square}/{split}/{name.format(square)}.tfrec"))
    assert set(files(root)) == expected
    for path in expected - {Path("class_names.json")}:  # the count in a file's name is that of its records
        assert len(list(tfrecord.tfrecord_loader(str(root / path), None))) == int(path.stem.split("-")[2])


def test_class_names_are_twelve_synthetic_kinds(root: Path) -> None:
    names = json.loads((root / "class_names.json").read_text())
    assert len(set(names)) == 12
    assert all(name.startswith("synthetic ") for name in names)
    assert listed_classes(root) == names


def test_records_have_an_id_an_image_and_but_for_test_a_class(root: Path) -> None:
    for split in ("train", "val"):
        assert all(set(record) == {"id", "image", "class"} for record in read(root, split, 32))
    assert all(set(record) == {"id", "image"} for record in read(root, "test", 32))


def test_classes_are_balanced_in_each_split_and_shuffled(root: Path) -> None:
    train, val = ([int(record["class"][0]) for record in read(root, split, 32)] for split in ("train", "val"))
    assert Counter(train) == dict.fromkeys(range(12), 21)
    assert Counter(val) == dict.fromkeys(range(12), 2)
    blocks = {tuple(train[start : start + 12]) for start in range(0, 252, 12)}
    assert len(blocks) == 21  # two equal ones among 12! orders would be no chance


def test_ids_are_unique_over_splits_and_the_same_at_each_size(root: Path) -> None:
    splits = ("train", "val", "test")
    every = [name for split in splits for name in ids(root, split, 32)]
    assert len(set(every)) == 252 + 24 + 12
    assert [name for split in splits for name in ids(root, split, 64)] == every


def test_pictures_are_rgb_jpegs_of_their_size_and_show_something(root: Path) -> None:
    for size, split in itertools.product((32, 64), ("train", "val", "test")):
        for record in read(root, split, size):
            image = picture(record)
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (size, size))
            assert np.asarray(image).std() > 8  # grain alone has at most 8


def test_an_id_is_the_same_picture_at_each_size(root: Path) -> None:
    small = np.array([np.asarray(picture(record), np.float32) for record in read(root, "val", 32)])
    large = np.array([np.asarray(picture(record).reduce(2), np.float32) for record in read(root, "val", 64)])
    distance = np.abs(small[:, None] - large[None]).mean(axis=(2, 3, 4))
    same = np.eye(24, dtype=bool)
    # Grain, JPEG and jagged edges are measured to make 10 (at most 15) of 255; two pictures differ by 52 (at least 35).
    assert distance[same].mean() < 14
    assert distance[same].max() < distance[~same].min()


def test_it_loads_as_a_training_set(root: Path) -> None:
    train = load_split(root, "train", sizes=[64])
    train.require_classes(12)
    assert (len(train), train.pictures) == (252, 252)


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        write_demo(tmp_path / name, **SMALL, seed=seed)
    one, two, other = (files(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    assert not set(ids(tmp_path / "one", "train", 16)) & set(ids(tmp_path / "other", "train", 16))
    assert all(one[path] != other[path] for path in one if path.suffix == ".tfrec")


def test_more_pictures_and_sizes_leave_the_first_as_they_are(root: Path, tmp_path: Path) -> None:
    write_demo(tmp_path / "fewer", sizes=(32,), train=30, val=5, test=7)
    for split, count in (("train", 30), ("val", 5), ("test", 7)):
        fewer, more = read(tmp_path / "fewer", split, 32), read(root, split, 32)[:count]
        for a, b in zip(fewer, more, strict=True):
            assert {key: bytes(value) for key, value in a.items()} == {key: bytes(value) for key, value in b.items()}


def test_progress_counts_every_record(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_demo(tmp_path / "demo", sizes=(16, 20), train=3, val=2, test=1, progress=lambda *now: seen.append(now))
    assert seen == [(done, 12) for done in range(1, 13)]


@pytest.mark.parametrize("when", [1, 24, 48])
def test_an_interrupted_writing_leaves_nothing(tmp_path: Path, when: int) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == when:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_demo(tmp_path / "demo", **SMALL, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_the_slower_of_two_processes_takes_what_the_faster_wrote(tmp_path: Path) -> None:
    def overtake(done: int, total: int) -> None:
        if done == total:
            write_demo(tmp_path / "demo", **SMALL)

    write_demo(tmp_path / "demo", **SMALL, progress=overtake)
    write_demo(tmp_path / "again", **SMALL)
    assert files(tmp_path / "demo") == files(tmp_path / "again")
    assert {path.name for path in tmp_path.iterdir()} == {"demo", "again"}


def test_what_another_process_wrote_meanwhile_is_not_passed_off_as_this_set(tmp_path: Path) -> None:
    def overtake(done: int, total: int) -> None:
        if done == total:
            write_demo(tmp_path / "demo", sizes=(16,), train=12, val=12, test=12)

    with pytest.raises(UserError, match=r"demo cannot be written .*: name a new folder"):
        write_demo(tmp_path / "demo", **SMALL, progress=overtake)
    assert len(ids(tmp_path / "demo", "train", 16)) == 12
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("keep me")
    with pytest.raises(UserError, match=r"exists and is not an empty folder: name a new one or remove it\."):
        write_demo(tmp_path, **SMALL)
    with pytest.raises(UserError, match=r"notes\.txt exists and is not an empty folder"):
        write_demo(tmp_path / "notes.txt", **SMALL)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"notes.txt": "keep me"}


def test_an_empty_folder_and_missing_parents_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    write_demo(empty, **SMALL)
    monkeypatch.chdir(tmp_path)
    write_demo(Path("new/parents/demo"), **SMALL)
    assert files(empty) == files(tmp_path / "new" / "parents" / "demo")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/demo cannot be written \(Not a directory\): name a new folder"):
        write_demo(tmp_path / "file" / "demo", **SMALL)


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("fastflower.files.os.fsync", full)
    with pytest.raises(UserError, match=r"demo cannot be written \(No space left on device\)"):
        write_demo(tmp_path / "demo", **SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"sizes": ()}, r"sizes \[\]: give one or more"),
        ({"sizes": (64, 64)}, r"sizes \[64, 64\]: give one or more different"),
        ({"sizes": (8,)}, r"sizes \[8\]: .* at least 16 pixels"),
        ({"val": -1}, "val -1: give a number that is not negative"),
        ({"seed": -1}, "seed -1: give a number that is not negative"),
    ],
)
def test_arguments_out_of_range_are_named(tmp_path: Path, argument: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_demo(tmp_path / "demo", **(SMALL | argument))
    assert list(tmp_path.iterdir()) == []


def test_several_traits_together_tell_two_kinds_apart_and_no_color_does() -> None:
    traits = {field.name for field in fields(KINDS[0])} - {"name", "colors", "accents", "tones"}
    for a, b in itertools.combinations(KINDS, 2):
        assert sum(getattr(a, trait) != getattr(b, trait) for trait in traits) >= 3
    for key in COLORS:
        assert sum(key in kind.colors + kind.accents + kind.tones for kind in KINDS) >= 2
    for kind in KINDS:
        assert all(sum(key in other.colors for other in KINDS) >= 2 for key in kind.colors)


@pytest.mark.parametrize("label", range(12))
def test_two_flowers_of_a_kind_differ(label: int) -> None:
    one, again, other = (np.asarray(draw_flower(np.random.default_rng(seed), label, 64), int) for seed in (1, 1, 2))
    assert (one == again).all()
    assert np.abs(one - other).mean() > 10  # more than the grain


def test_the_kind_decides_what_is_drawn() -> None:
    pictures = [draw_flower(np.random.default_rng(5), label, 64).tobytes() for label in range(12)]
    assert len(set(pictures)) == 12
