"""TFRecord files by any of their usual names, and classes as text in them."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from fastflower.config import DataConfig
from fastflower.data.sources.tfrecord import is_shard, missing_shards, write_tfrecord
from fastflower.data.splits import load_parts
from tests.conftest import example, jpeg
from tests.data.sources.on_disk import counted, opened, refusal, run_check, touch

# Names of shards


SHARDS = [
    *("a.tfrec", "a.TFREC", "a.tfrecord", "A.TfRecords", "flowers.tfrecord-00000-of-00001", "train-00000-of-01024"),
    *("flowers-train.tfrecord-00000-of-00002", "train.00000-of-00004", "x.tfrecords-3-of-5", "00-64x64-24.TFREC"),
    *("train-00001-of-00005.tfrecord", "a.tfrecord.gz", "train-00000-of-01024.GZ"),
]
NO_SHARDS = ["dataset_info.json", "train-00000-of-00001.parquet", "a.tfrecord.json", "1-of-3", "a.tf", "tfrec", "a.gz"]


def test_names_of_shards() -> None:
    assert [name for name in (*SHARDS, *NO_SHARDS) if is_shard(name)] == SHARDS


@pytest.mark.parametrize("name", [name for name in SHARDS if not name.lower().endswith("gz")])
def test_shards_are_read_by_any_usual_name(tmp_path: Path, name: str) -> None:
    for split in ("train", "val"):
        write_tfrecord(tmp_path / split / name, [example(i, i % 3) for i in range(6)])
        touch(tmp_path, f"{split}/._{name}", f"{split}/dataset_info.json", f"{split}/.DS_Store")
    dataset = opened(tmp_path)
    assert len(dataset.train) == 6
    assert counted(dataset.inventory.left_out) == {".json": 2, "hidden": 4}


def test_a_compressed_shard_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    write_tfrecord(tmp_path / "train/a.tfrecord", [example(0, 0), example(1, 1)])
    touch(tmp_path, "train/b.tfrecord.gz", content=b"\x1f\x8b" + bytes(40))
    assert "b.tfrecord.gz is not a TFRecord file but gzip: decompress it first." in refusal(
        load_parts, DataConfig(root=(tmp_path,)), 0, "train"
    )


@pytest.mark.parametrize("seed", range(8))
def test_shards_that_are_missing_are_named(seed: int) -> None:
    random = Random(seed)
    count, first = random.randint(1, 20), random.randint(0, 1)
    numbers = [*range(first, first + count)]
    present = sorted(random.sample(numbers, random.randint(1, count)))
    if first:
        present = sorted({*present, count})  # that it counts from 1 shows at its end
    paths = [Path(f"/d/a.tfrecord-{k:05}-of-{count:05}") for k in present]
    sentences = missing_shards([*paths, Path("/d/b.tfrec"), Path("/e/a-00000-of-00001")])
    lacking = [k for k in numbers if k not in present]
    assert len(sentences) == (1 if lacking else 0)
    if lacking:
        assert sentences[0].startswith(f"/d/a.tfrecord-*-of-{count:05}: {len(lacking)} of the {count} files")
        assert f"(number {', '.join(map(str, lacking[:5]))}" in sentences[0]


def test_a_missing_shard_is_said_by_train_and_check(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_tfrecord(tmp_path / split / "a.tfrecord-00001-of-00002", [example(i, i % 2) for i in range(4)])
    said = f"{tmp_path}/train/a.tfrecord-*-of-00002: 1 of the 2 files are missing (number 0): copy or download them."
    assert said in opened(tmp_path).inventory.notes
    assert next(p.text for p in run_check(tmp_path).problems if p.kind == "count") == said


# Classes as text in records


def test_classes_as_text_are_names_or_numbers(tmp_path: Path) -> None:
    def record(i: int, label: str) -> dict[str, bytes | int]:
        return {"id": b"%d" % i, "image": jpeg(40, 40, seed=i), "class": label.encode()}

    named = [("tulip", "장미"), ("rose", "tulip")]
    for number, pair in enumerate(named):
        write_tfrecord(
            tmp_path / f"a/train/{number}.tfrec", [record(2 * number + k, name) for k, name in enumerate(pair)]
        )
    write_tfrecord(tmp_path / "a/val/0.tfrec", [record(9, "rose"), record(10, "tulip")])
    write_tfrecord(tmp_path / "a/test/0.tfrec", [record(11, "")])
    dataset = opened(tmp_path / "a")
    assert dataset.classes == ["rose", "tulip", "장미"]
    assert [dataset.classes[label] for label in dataset.train.labels] == ["tulip", "장미", "rose", "tulip"]
    report = run_check(tmp_path / "a")
    assert report.classes["tulip"] == {"train": 2, "val": 1}
    assert not report.problems
    again = opened(tmp_path / "a")  # by the index in the cache
    assert again.train.labels.tolist() == dataset.train.labels.tolist()
    (tmp_path / "a/class_names.json").write_text('["tulip", "rose", "장미"]')
    listed = opened(tmp_path / "a")
    assert listed.val is not None
    assert [listed.classes[label] for label in listed.val.labels] == ["rose", "tulip"]
    (tmp_path / "a/class_names.json").write_text('["tulip", "rose"]')
    assert "class '장미' in train, which its class_names.json does not list" in refusal(opened, tmp_path / "a")

    for split in ("train", "val"):
        write_tfrecord(tmp_path / f"b/{split}/0.tfrec", [record(0, "10"), record(1, "2")])
    assert opened(tmp_path / "b").train.labels.tolist() == [10, 2]
    assert len(opened(tmp_path / "b").classes) == 11
    write_tfrecord(tmp_path / "b/train/1.tfrec", [record(2, "rose")])
    text = refusal(opened, tmp_path / "b")
    assert text.startswith(f"{tmp_path}/b/train/1.tfrec has names for classes, and {tmp_path}/b/train/0.tfrec numbers")
    write_tfrecord(tmp_path / "c/train/0.tfrec", [record(0, "rose"), record(1, "3")])
    assert "names for classes" in refusal(load_parts, DataConfig(root=(tmp_path / "c",)), 0, "train")
    assert run_check(tmp_path / "c").problems[0].kind == "file"


def test_names_in_train_and_numbers_in_val_are_found(tmp_path: Path) -> None:
    named = [{**example(i, None), "class": name} for i, name in enumerate((b"rose", b"tulip"))]
    write_tfrecord(tmp_path / "train" / "0.tfrec", named)
    write_tfrecord(tmp_path / "val" / "0.tfrec", [example(2, 0), example(3, 1)])
    assert f"{tmp_path} has only numbers for classes in val, but {tmp_path} has names in train: write" in refusal(
        opened, tmp_path
    )
    assert [p.text for p in run_check(tmp_path).problems if p.kind == "class"][:1] == [
        "is of class 0, which train does not have"
    ]
