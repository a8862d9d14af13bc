"""What validates where a folder of classes has no val: a share of each class, and never a picture that trains."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastflower.config import DataConfig
from fastflower.data.dataset import Dataset, open_dataset
from fastflower.data.folds import hold_out
from fastflower.data.records import Records, concatenate, read_image
from fastflower.data.sources.folder import load_folder
from fastflower.data.splits import load_parts, load_records
from fastflower.errors import UserError


def opened(*roots: Path, seed: int = 0, **settings: Any) -> Dataset:
    return open_dataset(DataConfig(root=roots, **settings), seed)


def write(root: Path, files: dict[str, str]) -> Path:
    """Files by their path below root, and what stands for their pictures."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def touch(root: Path, *names: str) -> Path:
    return write(root, {name: f"{root}/{name}" for name in names})


def validating(records: Records, share: float, seed: int = 0) -> set[str]:
    return set(records.ids[hold_out(records, np.zeros(len(records), np.int64), share, seed)].tolist())


@pytest.mark.parametrize(
    ("pictures", "share", "count"),
    [(1, 0.1, 0), (2, 0.1, 1), (4, 0.1, 1), (14, 0.1, 1), (16, 0.1, 2), (40, 0.25, 10), (1, 0.9, 0), (3, 0.99, 2)],
)
def test_of_each_class_its_share_validates(tmp_path: Path, pictures: int, share: float, count: int) -> None:
    touch(tmp_path, *(f"rose/{i}.jpg" for i in range(pictures)), *(f"tulip/{i}.jpg" for i in range(20)))
    chosen = validating(load_folder(tmp_path, "train").records, share)
    assert sum(name.startswith("rose/") for name in chosen) == count
    assert sum(name.startswith("tulip/") for name in chosen) == min(round(share * 20), 19)


def test_the_split_is_the_seeds_alone(tmp_path: Path) -> None:
    root = touch(tmp_path / "a", *(f"{kind}/{i}.jpg" for kind in ("rose", "tulip") for i in range(30)))
    first = opened(root, val_share=0.2)
    assert first.val is not None
    assert len(first.val) == 12
    assert sorted([*first.train.ids, *first.val.ids]) == sorted(load_folder(root, "train").records.ids)
    for seed, same in ((0, True), (1, False)):
        again = load_records(DataConfig(root=(root,), val_share=0.2), "val", first.classes, seed)
        assert (again.ids.tolist() == first.val.ids.tolist()) == same
    touch(root, *(f"daisy/{i}.jpg" for i in range(30)))  # labels shift, nothing else
    more = opened(root, val_share=0.2)
    assert more.val is not None
    assert [name for name in more.val.ids if "daisy" not in name] == first.val.ids.tolist()
    records = load_folder(root, "train").records
    backwards = records.select(np.arange(len(records))[::-1])
    assert validating(backwards, 0.2) == validating(records, 0.2)


def test_a_picture_in_several_folders_is_on_one_side(tmp_path: Path) -> None:
    """Also where one folder has more pictures than another, so that each by itself would choose others."""
    roots = (tmp_path / "small", tmp_path / "large")
    touch(roots[0], *(f"rose/{i}.jpg" for i in range(20)))
    touch(roots[1], *(f"rose/{i}.jpg" for i in range(5, 100)))
    both = opened(*roots)
    assert both.val is not None
    assert not set(both.val.ids) & set(both.train.ids)
    assert len(both.val) + len(both.train) == 115
    for root in roots:  # so that what validates of a single one was not trained on with others
        alone = opened(root).val
        assert alone is not None
        assert set(alone.ids) <= set(both.val.ids)


NAMES = st.tuples(st.sampled_from("abc"), st.integers(0, 12))  # class and number
FOLDERS = st.lists(st.sets(NAMES, min_size=1, max_size=25), min_size=1, max_size=3)


@settings(deadline=None, max_examples=60)
@given(folders=FOLDERS, share=st.floats(0.05, 0.9), seed=st.integers(0, 5))
def test_without_copies_the_share_of_each_class_that_comes_first_by_hash_validates(
    tmp_path_factory: pytest.TempPathFactory, folders: list[set[tuple[str, int]]], share: float, seed: int
) -> None:
    root = tmp_path_factory.mktemp("data")
    roots = [touch(root / str(k), *(f"{kind}/{k}-{i}.jpg" for kind, i in drawn)) for k, drawn in enumerate(folders)]
    wanted = set()
    for k, drawn in enumerate(folders):
        for kind in {kind for kind, _ in drawn}:
            ids = [f"{kind}/{k}-{i}" for other, i in drawn if other == kind]
            ids.sort(key=lambda name: hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=16).digest())
            wanted.update(ids[: min(max(round(share * len(ids)), 1), len(ids) - 1)])
    if wanted:
        data = opened(*roots, seed=seed, val_share=share)
        assert data.val is not None
        assert set(data.val.ids.tolist()) == wanted
        assert len(data.train) + len(data.val) == sum(map(len, folders))


@settings(deadline=None, max_examples=100)
@given(
    folders=FOLDERS,
    pictures=st.lists(st.integers(0, 14), min_size=75, max_size=75),
    share=st.floats(0.05, 0.9),
    named_apart=st.booleans(),
)
def test_copies_are_on_one_side(
    tmp_path_factory: pytest.TempPathFactory,
    folders: list[set[tuple[str, int]]],
    pictures: list[int],
    share: float,
    named_apart: bool,
) -> None:
    """In a class, in several classes and in several folders, by bytes and by id; and each class trains."""
    root = tmp_path_factory.mktemp("data")
    numbers = iter(pictures)
    roots = []
    for k, drawn in enumerate(folders):
        names = [f"{kind}/{f'{k}-' if named_apart else ''}{i}.jpg" for kind, i in sorted(drawn)]
        roots.append(write(root / str(k), {name: f"picture {next(numbers)}" for name in names}))
    divided = load_parts(DataConfig(root=tuple(roots), val_share=share), 0, "train", "val")
    train, val = (concatenate([part.records for part in parts]) for parts in divided)
    sides = [{read_image(records, i).tobytes() for i in range(len(records))} for records in (train, val)]
    assert not sides[0] & sides[1]
    assert not set(train.ids.tolist()) & set(val.ids.tolist())
    assert len(train) + len(val) == sum(map(len, folders))
    classes = {kind for drawn in folders for kind, _ in drawn}
    assert {name.partition("/")[0] for name in train.ids.tolist()} == classes


@pytest.mark.parametrize("copies", [2, 3])
@pytest.mark.parametrize("several", [False, True])
def test_a_share_of_the_different_pictures_validates_with_all_copies(
    tmp_path: Path, copies: int, several: bool
) -> None:
    """Within a class, or a whole folder of classes that is there again under other names."""
    roots = [tmp_path / (str(k) if several else "all") for k in range(copies)]
    for k, root in enumerate(roots):
        write(root, {f"{kind}/{i}-{k}.jpg": f"{kind} {i}" for kind in ("rose", "tulip") for i in range(20)})
    data = opened(*dict.fromkeys(roots), val_share=0.2)
    assert data.val is not None
    contents = {read_image(data.val, i).tobytes() for i in range(len(data.val))}
    assert len(data.val) == copies * len(contents)
    if not several:  # else each folder chooses by its own names
        assert len(contents) == 8


def test_a_class_that_is_one_picture_only_trains(tmp_path: Path) -> None:
    write(tmp_path, {f"rose/{i}.jpg": "one" for i in range(9)} | {f"tulip/{i}.jpg": str(i) for i in range(9)})
    data = opened(tmp_path, val_share=0.5)
    assert data.val is not None
    assert data.val.labels.tolist() == [1] * 4
    write(tmp_path, {f"tulip/{i}.jpg": "another" for i in range(9)})
    with pytest.raises(UserError, match="no records for val: add some .a class needs two different pictures"):
        opened(tmp_path, val_share=0.5)
