"""What names say: which split, whatever the form of a name; classes may be called as splits are."""

from __future__ import annotations

import json
import os
import shutil
import unicodedata
from pathlib import Path

import pytest

from fastflower.config import DataConfig
from fastflower.data.sources import layout_of
from fastflower.data.sources.naming import folders_by_split, split_meant
from fastflower.data.sources.tfrecord import write_tfrecord
from fastflower.data.splits import load_parts, load_records
from tests.conftest import example, write_folders
from tests.data.sources.on_disk import NAMES, opened, refusal, run_check, touch

# Names of splits


@pytest.mark.parametrize(("name", "split"), [(name, split) for split, names in NAMES.items() for name in names])
def test_usual_names_are_the_splits(tmp_path: Path, name: str, split: str) -> None:
    assert split_meant(name) == split
    folders = {own: (name if own == split else own) for own in NAMES}
    for own, folder in folders.items():
        touch(tmp_path, *(f"{folder}/{kind}/{own}{i}.jpg" for kind in ("rose", "tulip") for i in "123"))
    parts = load_parts(DataConfig(root=(tmp_path,)), 0, *NAMES)
    for own, (part,) in zip(NAMES, parts, strict=True):
        assert {Path(path).stem[:-1] for path in part.records.files} == {own}
        assert part.names == ["rose", "tulip"]
    records = tmp_path / "records"
    for folder in folders.values():
        write_tfrecord(records / folder / "a.tfrec", [example(i, i % 2) for i in range(3)])
        write_tfrecord(records / "tfrecords-jpeg-40x40" / folder / "a.tfrec", [example(i, i % 2) for i in range(4)])
    for root, count in ((records / "tfrecords-jpeg-40x40", 4), (records, 4)):
        assert layout_of(root).splits(root) == [*NAMES]
        assert len(load_parts(DataConfig(root=(root,)), 0, split)[0][0].records) == count
        notes = layout_of(root).survey(root).notes
        assert notes == (() if name == split else (f"Folders as splits: {name} is {split}.",))


@pytest.mark.parametrize("name", ["trains", "value", "valley", "contest", "invalid", "evaluation", "rose", "testament"])
def test_other_names_are_no_splits(name: str) -> None:
    assert split_meant(name) is None


@pytest.mark.parametrize(("one", "other"), [("train", "Training"), ("val", "valid"), ("test", "TEST")])
def test_two_folders_of_one_split_are_refused(tmp_path: Path, one: str, other: str) -> None:
    for folder in {"train", one, other}:
        touch(tmp_path, f"{folder}/rose/1.jpg", f"{folder}/tulip/1.jpg")
    text = refusal(opened, tmp_path)
    assert f"{tmp_path} has the folders " in text
    assert {one, other} <= set(text.replace(",", "").split())
    for folder in {"train", one, other}:
        write_tfrecord(tmp_path / "records" / folder / "a.tfrec", [example(0, 0), example(1, 1)])
    split = split_meant(one)
    assert f"both mean {split}" in refusal(load_parts, DataConfig(root=(tmp_path / "records",)), 0, split)


def test_a_link_to_the_same_folder_is_no_second_one(tmp_path: Path) -> None:
    touch(tmp_path, "training/rose/1.jpg", "training/tulip/1.jpg", "val/rose/2.jpg", "val/tulip/2.jpg")
    (tmp_path / "train").symlink_to("training")
    assert folders_by_split(tmp_path)["train"] == [tmp_path / "train"]
    assert opened(tmp_path).classes == ["rose", "tulip"]


@pytest.mark.parametrize(
    ("folders", "classes"),
    [
        (["valid", "invalid"], ["invalid", "valid"]),
        (["car", "bus", "train"], ["bus", "car", "train"]),
        (["Train", "val", "rose"], ["Train", "rose", "val"]),
    ],
)
def test_classes_may_be_called_as_splits_are(tmp_path: Path, folders: list[str], classes: list[str]) -> None:
    touch(tmp_path, *(f"{folder}/{i}.jpg" for folder in folders for i in range(4)))
    dataset = opened(tmp_path)
    assert dataset.classes == classes
    said = [note for note in dataset.inventory.notes if "is taken as a class: it holds no folders of classes." in note]
    assert len(said) == sum(split_meant(folder) is not None for folder in folders)


def test_a_test_folder_beside_classes_is_not_guessed_about(tmp_path: Path) -> None:
    for content, too in (("test/1.jpg", "; test too, if it is a class"), ("test/rose/1.jpg", "")):
        root = touch(tmp_path / content.replace("/", "_"), "rose/1.jpg", "tulip/1.jpg", content)
        sentence = (
            f"{root} has no folder train beside test: move the folders of classes (rose, tulip) into {root}/train{too}."
        )
        assert refusal(opened, root) == sentence
        report = run_check(root)
        assert sentence in report.notes
        assert [(row.kind, row.why) for row in report.inventory.left_out] == [
            *(("rose/", "beside the splits"), ("tulip/", "beside the splits")),
        ]
        ((part,),) = load_parts(DataConfig(root=(root,)), 0, "test")  # which is what it is for `predict`
        assert len(part.records) == 1
    root = touch(tmp_path / "b", "rose/1.jpg", "tulip/1.jpg", "Valid/rose/1.jpg")
    assert f"beside Valid: move the folders of classes (rose, tulip) into {root}/train." in refusal(opened, root)
    inside = touch(tmp_path / "c", *(f"train/{kind}/{i}.jpg" for kind in ("rose", "test") for i in "123"))
    assert opened(inside).classes == ["rose", "test"]


def test_a_root_that_is_a_split_itself_names_the_others(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "data", {"train/rose": 4, "train/tulip": 4, "val/rose": 1, "test": 1})
    (note,) = opened(root / "train").inventory.notes
    assert note == f"val, test beside {root}/train are not used: --data.root {root} takes all of it."


# Names in other forms


def test_names_are_the_same_in_each_unicode_form(tmp_path: Path) -> None:
    form = {"NFC": "Gänseblümchen", "NFD": "Ga\u0308nseblu\u0308mchen"}
    korean = {"NFC": "장미", "NFD": "\u110c\u1161\u11bc\u1106\u1175"}
    made = {}
    for train, val in (("NFC", "NFC"), ("NFD", "NFC"), ("NFC", "NFD"), ("NFD", "NFD")):
        root = tmp_path / f"{train}-{val}"
        for names in (form, korean):
            for split, own in (("train", names[train]), ("val", names[val])):
                touch(root, *(f"{split}/{own}/{own}{i}.jpg" for i in "12"))
        (root / "class_names.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([korean[val], form[train]]).encode())
        dataset = opened(root)
        assert dataset.val is not None
        made[root] = (
            dataset.classes,
            dataset.train.ids.tolist(),
            dataset.val.ids.tolist(),
            dataset.val.labels.tolist(),
        )
        assert all(path.exists() for path in dataset.train.files)
    assert len({str(kept) for kept in made.values()}) == 1
    assert next(iter(made.values()))[0] == [korean["NFC"], form["NFC"]]
    both = touch(tmp_path / "both", f"{form['NFC']}/1.jpg", f"{form['NFD']}/2.jpg", "rose/1.jpg", "rose/2.jpg")
    assert opened(both).classes == [form["NFC"], "rose"]
    touch(both, f"{form['NFD']}/1.jpg")
    assert "is there twice, by names that differ in their Unicode form alone" in refusal(opened, both)


@pytest.mark.parametrize("name", [b"M\xe4rz/1.jpg", b"rose/\xff.jpg", b"rose/M\xe4rz/1.jpg"])
def test_names_that_are_no_text_are_refused_before_training(tmp_path: Path, name: bytes) -> None:
    root = touch(tmp_path / "data", "rose/1.jpg", "tulip/1.jpg")
    path = os.path.join(os.fsencode(root), name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Path(os.fsdecode(path)).write_bytes(b"x")
    text = refusal(opened, root)
    text.encode()
    assert "\\xe4" in text or "\\xff" in text
    assert "`convmv -f latin1 -t utf8 -r --notest" in text
    refusal(opened, Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"\xe4"))))
    (root / "rose" / os.fsdecode(b"\xe4.txt")).touch()  # not a picture: nothing is written of it
    shutil.rmtree(root)


def test_a_runs_classes_are_found_in_data_of_another_form(tmp_path: Path) -> None:
    names = ["장미", "튤립"]
    root = touch(tmp_path, *(f"val/{name}/{i}.jpg" for name in names for i in "12"))
    for form in ("NFC", "NFD"):
        classes = ["iris", *(unicodedata.normalize(form, name) for name in reversed(names))]
        records = load_records(DataConfig(root=(root,)), "val", classes, seed=0)
        assert records.labels.tolist() == [2, 2, 1, 1]
