"""Folds: by class, never one picture in two of them, and the same from whatever order and sizes."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastflower.config import DataConfig
from fastflower.data.batches import choose_normalization
from fastflower.data.dataset import Dataset, open_dataset
from fastflower.data.folds import Duplicate, assign_folds, duplicates
from fastflower.data.records import Records, concatenate, read_image
from fastflower.data.sources.kaggle import load_files, load_split
from fastflower.data.sources.tfrecord import write_tfrecord
from fastflower.data.splits import class_list, join, load_parts, load_pool, load_records
from fastflower.data.stats import pixel_statistics
from fastflower.data.view import Engine
from fastflower.errors import UserError
from tests.conftest import example, write_dataset, write_folders

Row = tuple[str, int, str]  # id, class, what stands for the picture's bytes


def stored(path: Path, rows: Sequence[Row]) -> Records:
    write_tfrecord(path, [{"id": name.encode(), "class": label, "image": data.encode()} for name, label, data in rows])
    return load_files([path])


def singles(*counts: int) -> list[Row]:
    """So many pictures of each class."""
    return [(f"{label}-{i}", label, f"bytes {label} {i}") for label, count in enumerate(counts) for i in range(count)]


def by_id(records: Records, folds: int, seed: int = 0) -> dict[str, int]:
    fold_of = dict(zip(records.ids.tolist(), assign_folds(records, folds, seed).tolist(), strict=True))
    for name, fold in zip(records.ids.tolist(), assign_folds(records, folds, seed).tolist(), strict=True):
        assert fold_of[name] == fold
    return fold_of


# How folds are assigned


@pytest.mark.parametrize("folds", [2, 3, 5, 7])
@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_folds_differ_by_one_picture_at_most_of_each_class_and_in_all(tmp_path: Path, folds: int, seed: int) -> None:
    records = stored(tmp_path / "a.tfrec", singles(17, 1, 10, 1, 6, 3))
    fold = assign_folds(records, folds, seed)
    assert (str(fold.dtype), fold.shape) == ("int64", (38,))
    for chosen in (records.labels >= 0, *(records.labels == label for label in range(6))):
        counts = np.bincount(fold[chosen], minlength=folds)
        assert len(counts) == folds
        assert np.ptp(counts) <= 1


def test_a_seed_has_the_same_folds_in_every_version(tmp_path: Path) -> None:
    records = stored(tmp_path / "a.tfrec", singles(6, 4))
    assert assign_folds(records, 3, seed=0).tolist() == [0, 1, 2, 0, 1, 2, 0, 2, 0, 1]
    assert len({tuple(assign_folds(records, 3, seed).tolist()) for seed in range(10)}) > 5


def test_neither_order_nor_files_nor_sizes_have_a_say(tmp_path: Path) -> None:
    rows = [*singles(9, 7), ("twin", 1, "bytes 1 3"), ("nameless twin", 0, "bytes 0 0")]
    small = stored(tmp_path / "small.tfrec", rows)
    expected = by_id(small, 3)
    assert by_id(small.select(np.random.default_rng(0).permutation(len(small))), 3) == expected
    large = [(name, label, f"large {data}") for name, label, data in rows]
    parts = [stored(tmp_path / f"{i}.tfrec", large[i::3]) for i in range(3)]
    assert by_id(concatenate(parts), 3) == expected
    assert by_id(concatenate([small, *parts[1:]]), 3) == expected


def test_one_picture_is_in_one_fold_along_any_chain(tmp_path: Path) -> None:
    small = stored(
        tmp_path / "small.tfrec", [*singles(8, 8), ("a", 0, "ab"), ("b", 0, "ab"), ("c", 0, "c"), ("d", 0, "d")]
    )
    large = stored(tmp_path / "large.tfrec", [("a", 0, "A"), ("b", 0, "bc"), ("c", 0, "bc"), ("d", 0, "c")])
    records = concatenate([large, small])
    for seed in range(10):
        fold_of = by_id(records, 4, seed)
        assert len({fold_of[name] for name in "abcd"}) == 1
        assert np.bincount([fold_of[f"0-{i}"] for i in range(8)], minlength=4)[fold_of["a"]] == 0
    assert duplicates(records) == [Duplicate(("a", "b", "c", "d"), (0,))]


def test_many_ids_of_one_picture_are_placed_first_and_the_others_around_them(tmp_path: Path) -> None:
    rows = [*singles(6), *((f"z{i}", 0, "same") for i in range(3))]
    fold_of = by_id(stored(tmp_path / "a.tfrec", rows), 3)
    assert sorted(np.bincount(list(fold_of.values())).tolist()) == [3, 3, 3]
    assert len({fold_of[f"z{i}"] for i in range(3)}) == 1


def test_records_without_an_id_are_told_apart_by_their_bytes(tmp_path: Path) -> None:
    rows = [("", i % 2, f"bytes {i}") for i in range(12)] + [("", 0, "bytes 0"), ("named", 0, "bytes 2")]
    records = stored(tmp_path / "a.tfrec", rows)
    folds = assign_folds(records, 4, seed=0)
    assert (folds[0], folds[2]) == (folds[12], folds[13])
    assert np.ptp(np.bincount(folds[:12][records.labels[:12] == 1], minlength=4)) <= 1
    backwards = assign_folds(records.select(np.arange(14)[::-1]), 4, seed=0)
    assert backwards.tolist() == folds[::-1].tolist()
    assert duplicates(records) == []
    assert duplicates(records.select(np.arange(12))) == []


def test_one_picture_in_two_classes_counts_where_most_of_its_ids_are(tmp_path: Path) -> None:
    rows = [*singles(3, 2), ("x", 1, "same"), ("y", 1, "same"), ("z", 0, "same"), ("p", 0, "even"), ("q", 1, "even")]
    records = stored(tmp_path / "a.tfrec", rows)
    assert duplicates(records) == [Duplicate(("p", "q"), (0, 1)), Duplicate(("x", "y", "z"), (0, 1))]
    fold_of = by_id(records, 3)
    # p and q, a tie, count in class 0 beside three others; x, y and z in class 1 beside two
    assert sorted(np.bincount([fold_of[f"0-{i}"] for i in range(3)], minlength=3).tolist()) == [0, 1, 2]
    assert fold_of["p"] not in {fold_of[f"0-{i}"] for i in range(3)}
    assert len({fold_of["x"], fold_of["1-0"], fold_of["1-1"]}) == 3


def test_more_folds_than_pictures_and_records_without_a_class_are_refused(tmp_path: Path) -> None:
    records = stored(tmp_path / "a.tfrec", [*singles(2, 1), ("0-0", 0, "larger"), ("twin", 1, "bytes 1 0")])
    assert set(assign_folds(records, 3, seed=0).tolist()) == {0, 1, 2}
    with pytest.raises(UserError, match=r"^data\.folds is 4, but there are only 3 different pictures: lower it\.$"):
        assign_folds(records, 4, seed=0)
    write_tfrecord(tmp_path / "b.tfrec", [example(0, 0), example(1, None)])
    with pytest.raises(UserError, match=r"b\.tfrec, record 1 \(id 000001\) has no feature 'class'"):
        assign_folds(load_files([tmp_path / "b.tfrec"]), 2, seed=0)


# What is kept


def test_bytes_are_read_once_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.tfrec"
    rows = [*singles(4), ("twin", 0, "bytes 0 1")]
    first = by_id(stored(path, rows), 2)
    with monkeypatch.context() as patch:
        patch.setattr("fastflower.data.contents.read_image", lambda *_: pytest.fail("read again"))
        assert by_id(load_files([path]), 2) == first
        assert len(duplicates(load_files([path]))) == 1
    stored(path, [*singles(4), ("twin", 0, "bytes 0 2")])
    os.utime(path, (1, 1))
    assert [pictures.ids for pictures in duplicates(load_files([path]))] == [("0-2", "twin")]


def test_a_cache_that_is_damaged_or_cannot_be_written_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = stored(tmp_path / "a.tfrec", singles(4))
    monkeypatch.setenv("FASTFLOWER_CACHE", str(tmp_path / "cache"))
    first = by_id(records, 2)
    (kept,) = (tmp_path / "cache/contents").iterdir()
    for damaged in (b"", b"nothing", kept.read_bytes()[:-3]):
        kept.write_bytes(damaged)
        assert by_id(records, 2) == first
        assert len(kept.read_bytes()) > 4 * 8
    monkeypatch.setenv("FASTFLOWER_CACHE", str(tmp_path / "a.tfrec" / "no folder"))
    assert by_id(records, 2) == first


# How the data's folders are divided


def opened(*roots: Path, seed: int = 0, **settings: Any) -> Dataset:
    return open_dataset(DataConfig(root=roots, **settings), seed)


def parts_of(dataset: Dataset) -> tuple[list[str], list[str]]:
    assert dataset.val is not None
    return dataset.train.ids.tolist(), dataset.val.ids.tolist()


def test_each_record_validates_once_and_trains_in_the_other_folds(small: Path) -> None:
    (small / "class_names.json").write_text(json.dumps(["rose", "tulip", "daisy"]))
    everything = [f"{i:06}" for i in range(68)]
    validated: list[str] = []
    for fold in range(5):
        data = DataConfig(root=(small,), folds=5, fold=fold)
        dataset = open_dataset(data, 3)
        train, val = parts_of(dataset)
        assert sorted(train + val) == everything
        assert dataset.classes == ["rose", "tulip", "daisy"]
        for split, records in (("train", dataset.train), ("val", dataset.val)):
            again = load_records(data, split, dataset.classes, 3)
            assert records is not None
            assert (again.ids.tolist(), again.labels.tolist()) == (records.ids.tolist(), records.labels.tolist())
            assert read_image(again, 0).tobytes() == example(int(again.ids[0]), int(again.labels[0]))["image"]
        validated += val
    assert sorted(validated) == everything


def test_the_test_split_and_data_without_folds_are_as_before(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "a", {"train": 12, "val": 6, "test": 4})
    names = ["0", "1", "2"]
    data = DataConfig(root=(root,), folds=3, fold=2)
    assert load_records(data, "test", names, 0).ids.tolist() == load_split(root, "test").ids.tolist()
    train, val, test = ([part.split for part in parts] for parts in load_parts(data, 0, "train", "val", "test"))
    assert (train, val, test) == (["train"] * 2, ["val"] * 2, ["test"])
    assert parts_of(opened(root)) == ([f"{i:06}" for i in range(12)], [f"{i:06}" for i in range(12, 18)])


def test_training_pictures_alone_are_divided(tmp_path: Path) -> None:
    records = write_dataset(tmp_path / "records", {"train": 12, "test": 3})
    folders = write_folders(tmp_path / "folders", {"rose": 6, "tulip": 6}, first=50)
    for root, names in ((records, {f"{i:06}" for i in range(12)}), (folders, set(load_ids(folders)))):
        validated = [set(parts_of(opened(root, folds=3, fold=fold, val_share=0.5))[1]) for fold in range(3)]
        assert [len(ids) for ids in validated] == [4, 4, 4]
        assert set().union(*validated) == names
    (records / "tfrecords-jpeg-40x40/val").mkdir()
    with pytest.raises(UserError, match=r"tfrecords-jpeg-40x40/val holds no TFRecord files"):
        opened(records, folds=3)


def load_ids(root: Path) -> list[str]:
    return [name for part in load_pool(DataConfig(root=(root,))) for name in part.records.ids.tolist()]


def test_pictures_of_one_name_in_train_and_val_are_two(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "a", {"train/rose": 4, "train/tulip": 4})
    write_folders(tmp_path / "a", {"val/aster": 3, "val/rose": 3, "val/tulip": 2})
    assert len(set(load_ids(root))) == 16
    assert {"train/rose/000000", "val/aster/000000", "val/rose/000003"} < set(load_ids(root))
    validated = []
    for fold in range(2):
        dataset = opened(root, folds=2, fold=fold)
        assert dataset.classes == ["aster", "rose", "tulip"]
        assert dataset.val is not None
        for i, name in enumerate(dataset.val.ids.tolist()):
            assert dataset.classes[dataset.val.labels[i]] == name.split("/")[1]
            assert str(dataset.val.files[dataset.val.file[i]]) == f"{root}/{name}.jpg"
        validated += dataset.val.ids.tolist()
    assert sorted(validated) == sorted(load_ids(root))
    assert load_parts(DataConfig(root=(root,)), 0, "train")[0][0].records.ids[0] == "rose/000000"


def test_folders_are_pooled_and_what_they_share_is_one_picture(tmp_path: Path) -> None:
    a = write_dataset(tmp_path / "a", {"train": 8, "val": 4})
    b = write_dataset(tmp_path / "b", {"train": 6}, size=64)  # the ids of some of a's, and other bytes
    (a / "class_names.json").write_text(json.dumps(["rose", "tulip", "daisy"]))
    (b / "class_names.json").write_text(json.dumps(["daisy", "rose", "tulip"]))
    for order in ((a, b), (b, a)):
        validated = []
        for fold in range(3):
            train, val = parts_of(opened(*order, folds=3, fold=fold))
            assert not set(train) & set(val)
            validated += val
        assert sorted(validated) == sorted([f"{i:06}" for i in [*range(12), *range(6)]])


def test_a_class_that_only_validates_counts(tmp_path: Path) -> None:
    write_tfrecord(tmp_path / "train/a.tfrec", [example(i, 0) for i in range(6)] + [example(6, 1)])
    for fold in range(2):
        assert opened(tmp_path, folds=2, fold=fold).classes == ["0", "1"]


def test_leaving_out_moves_no_picture_to_another_fold(small: Path, tmp_path: Path) -> None:
    whole = opened(small, folds=3, fold=1)
    path = small / "tfrecords-jpeg-40x40/train" / sorted(os.listdir(small / "tfrecords-jpeg-40x40/train"))[0]
    problems = [{"kind": "duplicate", "file": str(path), "record": i, "id": "", "split": ""} for i in range(9)]
    (tmp_path / "skip.json").write_text(json.dumps({"problems": problems}))
    rest = opened(small, folds=3, fold=1, skip=tmp_path / "skip.json")
    assert rest.left_out == 9
    gone = {f"{i:06}" for i in range(9)}
    for before, after in zip(parts_of(whole), parts_of(rest), strict=True):
        assert after == [name for name in before if name not in gone]


def test_normalization_is_that_of_the_folds_training_part(small: Path) -> None:
    normalizations = []
    for fold in range(2):
        data = DataConfig(root=(small,), folds=2, fold=fold)
        dataset = open_dataset(data, 0)
        measured = partial(pixel_statistics, dataset.train, Engine())
        normalizations.append(choose_normalization(data, None, measured))
        pool = load_pool(data)
        records = join(pool, class_list(pool))
        trains = records.select(assign_folds(records, 2, seed=0) != fold)
        assert normalizations[-1] == pixel_statistics(trains, Engine()).normalization
    assert normalizations[0] != normalizations[1]


# Real photographs


def test_real_ids_stay_together_over_all_sizes(flowers5: Path) -> None:
    validated = []
    for fold in range(4):
        dataset = opened(flowers5, folds=4, fold=fold, sizes="all")
        train, val = parts_of(dataset)
        assert not set(train) & set(val)
        assert len(val) == 4 * len(set(val))
        assert dataset.val is not None
        assert dataset.val.sizes == [192, 224, 331, 512]
        alone = opened(flowers5, folds=4, fold=fold, sizes=(192,))
        assert sorted(parts_of(alone)[1]) == sorted(set(val))
        validated += val
    assert len(validated) == 4 * len(set(validated)) == 4 * 270


def test_real_photographs_that_are_there_twice_are_found(flowers102: Path) -> None:
    pool = load_pool(DataConfig(root=(flowers102,)))
    records = join(pool, class_list(pool))
    repeated = duplicates(records)
    assert [len(pictures.ids) for pictures in repeated] == [2] * 5
    assert all(len(pictures.labels) == 1 for pictures in repeated)
    folds = dict(zip(records.ids.tolist(), assign_folds(records, 5, seed=0).tolist(), strict=True))
    assert all(folds[first] == folds[second] for first, second in (pictures.ids for pictures in repeated))
    split = {name: part.split for part in pool for name in part.records.ids.tolist()}
    assert sum(split[first] != split[second] for first, second in (pictures.ids for pictures in repeated)) == 1
    counts = np.bincount(list(folds.values()))
    assert (len(counts), counts.sum()) == (5, 7370)
    assert np.ptp(counts) <= 1


def test_the_same_picture_at_a_stored_size_that_is_not_used_keeps_ids_together(tmp_path: Path) -> None:
    rows = singles(12)
    for size in (40, 48):
        folder = tmp_path / f"tfrecords-jpeg-{size}x{size}" / "train"
        alike = {"0-0": "same", "0-1": "same"} if size == 48 else {}
        stored(folder / "a.tfrec", [(name, label, alike.get(name, f"{size} {data}")) for name, label, data in rows])
    for seed in range(8):  # by chance the two ids would be apart in most of them
        for sizes in ((40,), (48,), "all"):
            folds = [set(parts_of(opened(tmp_path, seed=seed, sizes=sizes, folds=4, fold=k))[1]) for k in range(4)]
            assert [{"0-0", "0-1"} <= fold for fold in folds].count(True) == 1
            assert sum(len(fold) for fold in folds) == 12
