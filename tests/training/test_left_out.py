"""A record that cannot be decoded ends a run, is left out by data.skip, and the run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fastflower.data.decoding import decodable
from fastflower.data.sampler import permutation
from fastflower.data.soundness import has_header, is_cut_off
from fastflower.data.sources.tfrecord import write_tfrecord
from fastflower.runtime.checkpoint import load_checkpoint, save_checkpoint
from fastflower.runtime.entries import Checkpoint
from fastflower.tables import NOTHING
from tests.conftest import example, fastflower, jpeg, train_arguments, write_dataset
from tests.training.test_changed_settings import record
from tests.training.test_run import assert_same_run, rows

pytestmark = pytest.mark.usefixtures("tiny_net")

COUNT = 50  # six batches of 8, and two records that do not come in an epoch
GIVEN = ("--data.mean", 0.5, 0.5, 0.5, "--data.std", 0.2, 0.2, 0.2)  # else measuring finds a bad record at once


def undecodable() -> bytes:
    """A picture with a good header and a good end that cannot be decoded."""
    picture = bytearray(jpeg(40, 40))
    tables = picture.find(b"\xff\xc4")  # Huffman's
    picture[tables + 5 : tables + 15] = b"\xff" * 10
    encoded = np.frombuffer(bytes(picture), np.uint8)
    assert has_header(encoded)
    assert not is_cut_off(encoded)
    assert not decodable(encoded)
    return bytes(picture)


def spoil(root: Path, split: str, count: int, *indices: int) -> Path:
    """Write a split of `write_dataset` again, in one file, with these records undecodable."""
    records = [example(i + 1000 * (split == "val"), i % 3) for i in range(count)]
    for index in indices:
        records[index]["image"] = undecodable()
    folder = root / f"tfrecords-jpeg-40x40/{split}"
    for path in folder.glob("*"):
        path.unlink()
    write_tfrecord(folder / f"00-40x40-{count}.tfrec", records)
    return root


def checked(root: Path, file: Path) -> Path:
    """What `data check` prints, in a file."""
    result = fastflower("data", "check", root, "--json")
    assert result.code == 1
    file.write_text(result.out)
    return file


def last(run: Path) -> Checkpoint:
    return load_checkpoint(run / "checkpoints/last.pt")


def test_a_training_record_that_fails_in_the_second_epoch_is_left_out_of_its_rest(tmp_path: Path) -> None:
    bad = int(permutation(COUNT, seed=0, epoch=0)[-1])  # it does not come in the first epoch
    turn = permutation(COUNT, seed=0, epoch=1).tolist().index(bad)
    root = spoil(write_dataset(tmp_path / "data", {"train": 1, "val": 8}, first=1000), "train", COUNT, bad)
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        before = record(patch)
        result = fastflower(*train_arguments(root, run), *GIVEN, "--train.epochs", 2)
    assert result.code == 2
    steps = 6 + turn // 8
    assert f"record {bad} (id {bad:06}) cannot be decoded" in result.err
    assert f"Epoch 2 is saved up to step {steps}: then go on with --resume {run}." in result.err
    assert (last(run)["step"], last(run)["position"]) == (steps, turn // 8 * 8)
    assert len(rows(run)) == 1

    assert fastflower("train", "--resume", run).code == 2  # at the same place, which stays saved
    assert last(run)["step"] == steps

    skip = checked(root, tmp_path / "bad.json")
    with pytest.MonkeyPatch.context() as patch:
        after = record(patch)
        result = fastflower("train", "--resume", run, "--data.skip", skip)
    assert result.code == 0, result.err
    assert "Trains on 49 records; there were 50 before" in result.out
    assert [row["epoch"] for row in rows(run)] == [1, 2]
    kept = [name for name in range(COUNT) if name != bad]
    pictures = before.pictures[1] + [kept[i] for i in after.pictures[1]]
    assert bad not in pictures
    assert len(set(pictures)) == len(pictures) == 48


def test_a_validation_record_that_fails_leaves_the_trained_epoch_saved(small: Path, tmp_path: Path) -> None:
    root, run, whole = spoil(small, "val", 20, 13), tmp_path / "run", tmp_path / "whole"
    result = fastflower(*train_arguments(root, run), "--train.epochs", 2)
    assert result.code == 2
    assert "record 13 (id 001013) cannot be decoded" in result.err
    assert f"Epoch 1 is saved up to step 6: then go on with --resume {run}." in result.err
    assert (last(run)["epoch"], last(run)["position"]) == (0, 48)
    skip = checked(root, tmp_path / "bad.json")
    result = fastflower("train", "--resume", run, "--data.skip", skip)
    assert result.code == 0, result.err
    assert fastflower(*train_arguments(root, whole), "--train.epochs", 2, "--data.skip", skip).code == 0
    assert_same_run(whole, run)
    assert rows(run)[0]["images_per_s"] is None  # no step was trained before the epoch's end
    line = next(line for line in result.out.splitlines() if line.startswith("    1 "))
    assert line.split()[-3] == NOTHING  # images a second


def test_a_first_batch_that_fails_leaves_a_folder_to_begin_in_again(tmp_path: Path) -> None:
    first = int(permutation(COUNT, seed=0, epoch=0)[0])
    root = spoil(write_dataset(tmp_path / "data", {"train": 1, "val": 8}, first=1000), "train", COUNT, first)
    for _ in range(2):
        result = fastflower(*train_arguments(root, tmp_path / "run"), *GIVEN)
        assert result.code == 2
        assert "cannot be decoded" in result.err
        assert "is saved" not in result.err


@pytest.mark.parametrize("steps", [6, 9])  # at an epoch's end and in its middle
def test_leaving_out_more_or_fewer_goes_on(tmp_path: Path, steps: int) -> None:
    root, run, skip = write_dataset(tmp_path / "data", {"train": COUNT, "val": 8}), tmp_path / "run", tmp_path / "skip"
    file = str(next((root / "tfrecords-jpeg-40x40/train").glob("00*")))

    def leave_out(*numbers: int) -> set[int]:
        problems = [
            {"kind": "unreadable", "file": file, "record": number, "id": "", "split": "x"} for number in numbers
        ]
        skip.write_text(json.dumps({"problems": problems}))
        return set(range(COUNT)) - set(numbers)

    kept = leave_out(3, 4, 5)
    stop = ("--train.epochs", 3, "--train.max_steps", steps, "--data.skip", skip)
    with pytest.MonkeyPatch.context() as patch:
        before = record(patch)
        assert fastflower(*train_arguments(root, run), *stop).code == 0
    pictures = [sorted(kept)[i] for i in before.pictures.get(1, [])]  # of 47 records, which are five batches
    kept = leave_out(4, 20, 21, 22)
    with pytest.MonkeyPatch.context() as patch:
        after = record(patch)
        result = fastflower("train", "--resume", run, "--train.max_steps", None)
    assert result.code == 0, result.err
    assert "Trains on 46 records; there were 47 before" in result.out
    pictures += [sorted(kept)[i] for i in after.pictures[1]]
    assert len(set(pictures)) == len(pictures) > 46 - 8 - 3
    assert set(pictures) <= kept | {20, 21, 22}
    assert len(rows(run)) == 3
    # the next epoch is of those that are kept, in the order of the whole table
    whole = [name for name in permutation(COUNT, seed=0, epoch=2).tolist() if name in kept]
    assert [sorted(kept)[i] for i in after.pictures[2]] == whole[:40]


def test_other_bytes_under_the_same_names_are_said_and_other_names_refused(small: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert fastflower(*train_arguments(small, run), "--train.epochs", 1).code == 0
    sentence = "The training records have other bytes than before, under the same names."
    assert sentence not in fastflower("train", "--resume", run, "--train.epochs", 2).out
    split = small / "tfrecords-jpeg-40x40/train"
    first = sorted(split.iterdir())[0]
    write_tfrecord(first, [example(i, i % 3) | {"image": jpeg(40, 40, seed=i)} for i in range(24)])
    result = fastflower("train", "--resume", run, "--train.epochs", 3)
    assert result.code == 0
    assert sentence in result.out
    write_tfrecord(first, [example(i, (i + 1) % 3) for i in range(24)])
    result = fastflower("train", "--resume", run, "--train.epochs", 4)
    assert result.code == 2
    assert "other training records than this would be: keep its data.root, data.sizes" in result.err


@pytest.mark.parametrize("steps", [3, 6])
@pytest.mark.parametrize("skips", [False, True])
def test_checkpoints_of_earlier_versions_go_on(small: Path, tmp_path: Path, steps: int, skips: bool) -> None:
    run, skip = tmp_path / "run", tmp_path / "skip.json"
    skip.write_text(json.dumps({"problems": []}))
    options = ["--data.skip", skip] if skips else []
    assert fastflower(*train_arguments(small, run), "--train.epochs", 2, "--train.max_steps", steps, *options).code == 0
    saved = last(run)
    records = saved["train_records"]
    older = {"train_records": {"count": records["count"], "digest": records["names"]}}
    new = ("val_records", "improved_epoch", "comparable_from", "format")
    save_checkpoint(run / "checkpoints/last.pt", {k: v for k, v in saved.items() if k not in new} | older)
    if steps == 6:  # and its log counted from 0
        (row,) = rows(run)
        (run / "metrics.jsonl").write_text(json.dumps(row | {"epoch": 0}) + "\n")
    result = fastflower("train", "--resume", run, "--train.max_steps", None)
    assert result.code == 0, result.err
    assert [row["epoch"] for row in rows(run)] == [1, 2]
    anew = skips and steps == 3  # the order of such an epoch was another
    assert ("Epoch 1 begins anew" in result.out) == anew
    assert last(run)["step"] == (15 if anew else 12)
