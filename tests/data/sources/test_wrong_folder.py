"""A folder that is not quite the data's is refused with the one that was likely meant."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fastflower.data.splits import require_two_classes
from tests.conftest import fastflower, train_arguments, write_dataset, write_folders
from tests.data.sources.on_disk import opened, refusal, run_check, touch


@pytest.mark.parametrize("below", ["flowers", "flowers/flowers", "a/b/c"])
@pytest.mark.parametrize("inner", [("daisy", "rose"), ("train/daisy", "train/rose", "val/rose", "val/daisy")])
def test_a_root_too_high_is_refused_with_the_likely_one(tmp_path: Path, below: str, inner: tuple[str, ...]) -> None:
    root = touch(tmp_path / "download", *(f"{below}/{folder}/{i}.jpg" for folder in inner for i in "123"))
    touch(root, "LICENSE.txt", ".DS_Store")
    if len(inner) == 2:
        text = refusal(require_two_classes, root, opened(root).classes)
        assert text.startswith(f"{root} has one class, {below.split('/')[0]}, and nothing to tell it from: ")
    elif "/" not in below:
        text = refusal(opened, root)
    else:
        text = refusal(require_two_classes, root, opened(root).classes)
    assert text.endswith(f"give --data.root {root / below}.")
    assert [p.kind for p in run_check(root).problems][:1] in (["class"], ["file"])


def test_a_split_in_itself_is_refused_with_where_to_move_it(tmp_path: Path) -> None:
    wrapped = ("train/train/rose/1.jpg", "train/train/tulip/1.jpg")
    root = touch(tmp_path / "alone", *wrapped)
    assert refusal(require_two_classes, root, ["train"]).endswith(f"give --data.root {root}/train/train.")
    root = touch(tmp_path / "both", *wrapped, "val/val/rose/1.jpg", "val/val/tulip/1.jpg")
    assert refusal(require_two_classes, root, ["train"]).endswith(
        f"its classes seem to be in {root}/train/train: move its folders into {root}/train."
    )


def test_train_refuses_one_class_before_it_reads_all(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "data", {"flowers/rose": 4, "flowers/tulip": 4})
    refused = fastflower(*train_arguments(root, tmp_path / "run"))
    assert refused.code == 2
    assert f"give --data.root {root}/flowers." in refused.err
    assert not (tmp_path / "run").exists()
    single = write_folders(tmp_path / "single", {"rose": 6})
    refused = fastflower(*train_arguments(single, tmp_path / "run"))
    assert refused.code == 2
    assert "one class, rose, and nothing to tell it from: add pictures of another class." in refused.err
    records = write_dataset(tmp_path / "records", {"train": 6, "val": 2}, classes=1)
    assert fastflower(*train_arguments(records, tmp_path / "run")).code == 2


def test_records_in_a_folder_below_are_named(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "a" / "b", {"train": 4, "val": 2})
    assert refusal(opened, tmp_path).endswith(f"Its data seem to be in {root}: give --data.root {root}.")
    size = root / "tfrecords-jpeg-40x40"
    assert refusal(opened, size / "train").endswith(f"Its data seem to be in {size}: give --data.root {size}.")


def test_a_root_too_low_is_refused_with_its_parent(tmp_path: Path) -> None:
    root = touch(tmp_path / "flowers", "rose/1.jpg", "tulip/1.jpg", "daisy/1.jpg", "empty/a.txt")
    text = refusal(opened, root / "rose")
    assert f"{root}/rose/1.jpg is in no class's folder: if rose is a class itself, give --data.root {root}" in text
    assert "(daisy, rose, tulip)" in text
    shutil.rmtree(root / "tulip")
    shutil.rmtree(root / "daisy")
    assert "if rose" not in refusal(opened, root / "rose")


def test_splits_within_classes_are_refused(tmp_path: Path) -> None:
    root = touch(tmp_path, *(f"{kind}/{split}/1.jpg" for kind in ("rose", "tulip") for split in ("train", "valid")))
    assert refusal(opened, root) == (
        f"{root}/rose holds splits (train, valid) in the place of a class: move what they hold into {root}/train/rose "
        "and so on."
    )
    assert run_check(root).problems


def test_pictures_deeper_than_classes_are_said(tmp_path: Path) -> None:
    root = touch(tmp_path, *(f"{kind}/{sub}/{i}.jpg" for kind in ("seg_a", "seg_b") for sub in "xy" for i in "12"))
    (note,) = opened(root).inventory.notes
    assert note == f"Classes are the 2 folders in {root}; all pictures are in folders of theirs, such as seg_a/x."
    touch(root, "seg_a/1.jpg")
    assert opened(root).inventory.notes == ()


def test_links_that_lead_in_circles_end(tmp_path: Path) -> None:
    root = tmp_path / "data"
    touch(root, "wrap/readme.txt")
    (root / "wrap/again").symlink_to(root)
    assert refusal(opened, root).startswith(f"{root} holds no pictures")
    (root / "wrap/self").symlink_to("self")  # leads to itself alone
    assert "Too many levels of symbolic links" in refusal(opened, root)
