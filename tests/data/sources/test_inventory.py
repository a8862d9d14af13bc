"""Every file of a data folder is a picture of a split and class, or left out and counted."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from fastflower.config import DataConfig
from fastflower.data.dataset import summary
from fastflower.data.sources import layout_of
from fastflower.data.sources.files import SUFFIXES
from fastflower.data.sources.layout import HIDDEN, Inventory, LeftOut
from fastflower.data.splits import inventory_of, load_parts
from tests.conftest import fastflower, train_arguments, write_folders
from tests.data.sources.on_disk import NAMES, counted, opened, refusal, run_check, touch

FOREIGN = ["Thumbs.db", "desktop.ini", ".DS_Store", "._1.jpg", ".hidden.jpg", "ehthumbs.db"]
FOREIGN_FOLDERS = ["__MACOSX", ".ipynb_checkpoints", "@eaDir", "#recycle"]


# Drawn folders against os.walk


def draw(root: Path, random: Random, *, divided: bool) -> dict[str, str]:
    """A drawn data folder; what each split's folder is called (train for all of it)."""
    folders = {split: random.choice(names) for split, names in NAMES.items()} if divided else {"train": "."}
    if divided and random.random() < 0.3:
        del folders["test"]
    number = 0
    for folder in folders.values():
        for kind in ("rose", "tulip", "Lily pad"):
            for _ in range(random.randint(2, 5)):
                below = random.choice(["", "", "deep/", "deep/er/"])
                suffix = random.choice([*SUFFIXES, ".JPG", ".Png"])
                touch(root, f"{folder}/{kind}/{below}{number}{suffix}")
                number += 1
            for _ in range(random.randint(0, 4)):
                name = random.choice([f"{number}.txt", f"{number}.XML", f"notes{number}", f"{number}.psd", *FOREIGN])
                touch(root, f"{folder}/{kind}/{name}")
                number += 1
            if random.random() < 0.3:
                touch(root, f"{folder}/{kind}/{random.choice(FOREIGN_FOLDERS)}/{number}.jpg")
            if random.random() < 0.3:  # a picture by what it holds
                touch(root, f"{folder}/{kind}/IMG_{number}", content=b"\xff\xd8\xff\xe0" + bytes(20))
                number += 1
    if random.random() < 0.5:
        touch(root, "README", "labels.csv", "class_list.TXT")
    return folders


def by_walking(folder: Path) -> tuple[dict[str, str], Counter[str]]:
    """By os.walk: class of each picture, by its path below the folder; and how many others, by kind."""
    pictures: dict[str, str] = {}
    others: Counter[str] = Counter()
    for place, folders, files in os.walk(folder):
        for name in [*folders]:
            if name in FOREIGN_FOLDERS:
                folders.remove(name)
                others["hidden"] += 1
        for name in files:
            path = (Path(place) / name).relative_to(folder)
            suffix = path.suffix.lower()
            if name in FOREIGN:
                others["hidden"] += 1
            elif suffix in SUFFIXES or (Path(place) / name).read_bytes().startswith(b"\xff\xd8\xff"):
                pictures[str(path)] = path.parts[0]
            else:
                others[suffix] += 1
    return pictures, others


@pytest.mark.parametrize("seed", range(12))
def test_each_file_is_a_picture_of_its_class_or_counted(tmp_path: Path, seed: int) -> None:
    random = Random(seed)
    folders = draw(tmp_path, random, divided=seed % 2 == 0)
    layout = layout_of(tmp_path)
    assert layout.splits(tmp_path) == [split for split in NAMES if split in folders]
    for split, folder in folders.items():
        loaded = layout.load(tmp_path, split, DataConfig())
        pictures, others = by_walking(tmp_path / folder)
        records, names = loaded.records, loaded.names
        assert names == sorted(set(pictures.values()))
        own = {
            str(path.relative_to(tmp_path / folder)): names[label]
            for path, label in zip(records.files, records.labels.tolist(), strict=True)
        }
        assert own == pictures
        assert counted(loaded.inventory.left_out) == others
        for row in loaded.inventory.left_out:
            assert Path(row.example).exists()
    if len(folders) > 1:
        beside = {"": 1, ".csv": 1, ".txt": 1} if (tmp_path / "README").exists() else {}
        assert counted(layout.survey(tmp_path).left_out) == beside
    report = run_check(tmp_path)
    found = sum(len(by_walking(tmp_path / folder)[0]) for folder in folders.values())
    assert sum(split["records"] for split in report.splits.values()) == found
    plain = report.to_plain()
    everything = sum((by_walking(tmp_path / folder)[1] for folder in folders.values()), Counter())
    if len(folders) > 1:
        everything += counted(layout.survey(tmp_path).left_out)
    assert sum(row["count"] for row in plain["left_out"]) == sum(everything.values())
    json.dumps(plain)


def test_training_counts_once_what_gives_both_splits(tmp_path: Path) -> None:
    root = touch(tmp_path, *(f"{kind}/{i}.jpg" for kind in ("rose", "tulip") for i in range(10)), "rose/a.txt")
    touch(root, "rose/b.psd", "tulip/c.TXT", "notes.txt")
    (row_txt, row_psd) = opened(root).inventory.left_out
    assert (row_txt.kind, row_txt.count) == (".txt", 3)
    assert (row_psd.kind, row_psd.count) == (".psd", 1)
    for more in ({"folds": 2}, {"val_share": 0.5}):
        assert opened(root, **more).inventory.left_out == opened(root).inventory.left_out
    other = touch(
        tmp_path.with_name("other"), *(f"{s}/{kind}/{i}.jpg" for s in ("train", "val") for kind in "ab" for i in "12")
    )
    touch(other, "val/a/x.txt", "train/b/y.txt", "train/b/z.txt", "extra/1.jpg", "notes.md")
    for more in ({}, {"folds": 2}):
        assert counted(opened(other, **more).inventory.left_out) == {".txt": 3, "extra/": 1, ".md": 1}
    parts = load_parts(DataConfig(root=(root, other)), 0, "train", "val")
    assert counted(inventory_of([part for own in parts for part in own]).left_out)[".txt"] == 6


def test_what_cannot_be_taken_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = touch(tmp_path, *(f"{kind}/{i}.jpg" for kind in ("rose", "tulip") for i in "123"))
    touch(root, "rose/a.psd", "rose/secret", "rose/list.txt", "rose/b.dat")
    os.mkfifo(root / "rose/pipe")
    os.mkfifo(root / "rose/pipe.jpg")
    (root / "rose/gone").symlink_to("nowhere")
    real = open

    def refused(path: str, *arguments: object, **named: object) -> object:
        assert not str(path).endswith((".txt", "pipe"))  # never opened: it is named otherwise, or would not end
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **named)  # type: ignore[call-overload]

    monkeypatch.setattr("builtins.open", refused)
    rows = layout_of(root).load(root, "train", DataConfig()).inventory.left_out
    assert {(row.kind, row.why, row.count) for row in rows} == {
        *((".psd", "not read", 1), (".txt", "", 1), (".dat", "", 1), (".jpg", "no regular file", 1)),
        *(("without extension", "no regular file", 2), ("without extension", "cannot be read: Permission denied", 1)),
    }


def test_what_is_left_out_fits_a_line() -> None:
    rows = tuple(LeftOut(f".kind{i}", "", 1000 - i, "x") for i in range(40))
    for width in (70, 80, 200):
        line = Inventory(rows).left_out_line(width)
        assert line is not None
        assert len(line) <= width
        assert line.startswith("Left out: 1,000 .kind0")
    line = Inventory(
        (*rows[:1], LeftOut("notes/", "beside the splits", 1, "x"), LeftOut(HIDDEN, "", 7, "x"))
    ).left_out_line()
    assert line == "Left out: 1,000 .kind0, folder notes/ (beside the splits)."
    assert Inventory((LeftOut(HIDDEN, "", 7, "x"),)).left_out_line() is None


def test_train_and_check_say_it(tmp_path: Path, tiny_net: None) -> None:
    root = write_folders(
        tmp_path / "data", {"Training/rose": 8, "Training/tulip": 8, "valid/rose": 2, "valid/tulip": 2}
    )
    touch(root, "Training/rose/x.txt", "Training/rose/y.dat", "valid/tulip/.DS_Store", "old/1.jpg")
    trained = fastflower(*train_arguments(root, tmp_path / "run"), "--train.epochs", 1)
    assert trained.code == 0, trained.err
    lines = trained.out.splitlines()
    assert "Folders as splits: Training is train, valid is val." in lines
    assert "Left out: 1 .dat, 1 .txt, folder old/ (beside the splits)." in lines
    checked = fastflower("data", "check", root)
    for word in ("hidden", ".dat", ".txt", "old/", "Folders as splits: Training is train, valid is val."):
        assert word in checked.out
    assert all(len(line) <= 80 for line in checked.out.splitlines() if "│" in line or "─" in line)
    plain = json.loads(fastflower("data", "check", root, "--json").out)
    assert {(row["kind"], row["count"]) for row in plain["left_out"]} == {
        *((".txt", 1), (".dat", 1), ("old/", 1), (HIDDEN, 1)),
    }
    assert plain["classes"] == {"rose": {"train": 8, "val": 2}, "tulip": {"train": 8, "val": 2}}


# Classes


def test_classes_that_lack_a_side_are_said(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "a", {"lily": 1, "rose": 5, "tulip": 5})
    assert "1 of the 3 classes have no picture that validates: lily." in summary(opened(root), DataConfig(root=(root,)))
    (root / "class_names.json").write_text('["aster", "lily", "rose", "tulip", "iris"]')
    lines = summary(opened(root), DataConfig(root=(root,)))
    assert "2 of the 5 classes have no picture to learn from: aster, iris." in lines
    assert (
        "1 of the 3 classes have one picture, so nothing validates them: lily."
        in run_check(write_folders(tmp_path / "b", {"lily": 1, "rose": 5, "tulip": 5})).notes
    )


def test_names_that_nearly_are_the_same_are_said(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "a", {"Rose": 5, "rose ": 5, "sweet pea": 5, "sweet_pea": 5, "tulip": 5})
    lines = summary(opened(root), DataConfig(root=(root,)))
    for names in ("'Rose', 'rose '", "'sweet pea', 'sweet_pea'"):
        assert f"Classes that differ by case or spaces alone: {names}; if they are one, join them." in lines
    other = write_folders(tmp_path / "b", {"train/rose": 2, "train/tulip": 2, "val/Rose": 1, "val/tulip": 1})
    assert "call it 'rose', if it is the same, or take them away." in refusal(opened, other)
