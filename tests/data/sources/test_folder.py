"""Class folders, and one data set from several folders: which pictures, which classes, which split."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastflower.config import DataConfig
from fastflower.data.dataset import Dataset, open_dataset
from fastflower.data.decoding import decodable
from fastflower.data.records import NO_LABEL, Records, read_image
from fastflower.data.soundness import is_sound
from fastflower.data.sources.files import SUFFIXES
from fastflower.data.sources.folder import load_folder
from fastflower.data.splits import load_parts, load_records
from fastflower.data.stats import pixel_statistics
from fastflower.data.view import Engine
from fastflower.errors import UserError
from tests.conftest import example, write_dataset, write_folders


def opened(*roots: Path, seed: int = 0, **settings: Any) -> Dataset:
    return open_dataset(DataConfig(root=roots, **settings), seed)


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def classes_of(records: Records, names: list[str] | None) -> dict[str, str | None]:
    """What each picture is, by id."""
    assert names is not None
    labels = [None if label == NO_LABEL else names[label] for label in records.labels]
    return dict(zip(records.ids.tolist(), labels, strict=True))


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


# Which files


def test_each_picture_is_a_record_of_its_own_file(tmp_path: Path) -> None:
    touch(tmp_path, "train/tulip/b.jpg", "train/tulip/deep/er/c.jpg", "train/rose/z.jpg", "val/tulip/v.jpg")
    touch(tmp_path, "test/2.jpg", "test/more/1.jpg", "notes/readme.txt")
    loaded = load_folder(tmp_path, "train")
    records, names = loaded.records, loaded.names
    assert names == ["rose", "tulip"]
    assert records.ids.tolist() == ["rose/z", "tulip/b", "tulip/deep/er/c"]
    assert records.labels.tolist() == [0, 1, 1]
    assert [read_image(records, i).tobytes().decode() for i in range(3)] == [
        *("train/rose/z.jpg", "train/tulip/b.jpg", "train/tulip/deep/er/c.jpg"),
    ]
    assert records.describe(1) == str(tmp_path / "train/tulip/b.jpg")
    assert (records.pictures, records.sizes) == (3, [])
    assert {records.offset.dtype, records.length.dtype, records.number.dtype} == {np.dtype(np.int64)}
    loaded = load_folder(tmp_path, "val")
    val, names = loaded.records, loaded.names
    assert (val.ids.tolist(), names) == (["tulip/v"], ["tulip"])
    loaded = load_folder(tmp_path, "test")
    test, names = loaded.records, loaded.names
    assert classes_of(test, names) == {"2": None, "more/1": "more"}


def test_without_split_folders_all_of_it_is_train(tmp_path: Path) -> None:
    loaded = load_folder(touch(tmp_path, "rose/a.jpg", "tulip/a.jpg"), "train")
    records, names = loaded.records, loaded.names
    assert (records.ids.tolist(), names) == (["rose/a", "tulip/a"], ["rose", "tulip"])
    for split in ("val", "test"):
        assert f"{tmp_path} has no folder {split}: a data folder holds" in refusal(
            lambda split=split: load_folder(tmp_path, split)  # type: ignore[misc]
        )


def test_extensions_in_any_case_and_nothing_else(tmp_path: Path) -> None:
    names = [f"{i}{suffix}" for i, suffix in enumerate((*SUFFIXES, ".JPG", ".Jpeg", ".pNg"))]
    touch(tmp_path / "rose", *names, "two.dots.jpg")
    touch(
        tmp_path / "rose", "Thumbs.db", "notes.txt", "a.psd", "jpg", ".jpg", "._0.jpg", ".cache/x.jpg", "@eaDir/x.jpg"
    )
    touch(tmp_path, "__MACOSX/x.jpg", ".git/x.jpg")
    (tmp_path / "rose/folder.jpg").mkdir()
    os.mkfifo(tmp_path / "rose/pipe.jpg")
    loaded = load_folder(tmp_path, "train")
    records, classes = loaded.records, loaded.names
    assert classes == ["rose"]
    assert sorted(path.name for path in records.files) == sorted([*names, "two.dots.jpg"])
    assert "rose/two.dots" in records.ids


def test_names_that_differ_in_the_extension_alone_are_two_pictures(tmp_path: Path) -> None:
    records = load_folder(touch(tmp_path, "rose/1.jpg", "rose/1.png", "rose/2.jpg"), "train").records
    assert records.ids.tolist() == ["rose/1.jpg", "rose/1.png", "rose/2"]


def test_the_order_is_not_the_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, *(f"{kind}/{sub}{i}.jpg" for kind in "cab" for sub in ("", "s/") for i in (2, 10, 1)))
    expected = load_folder(tmp_path, "train").records.ids.tolist()
    assert expected == sorted(expected)
    scandir = os.scandir

    class Backwards:
        def __init__(self, path: Path) -> None:
            self.entries = sorted(scandir(path), key=lambda entry: entry.name, reverse=True)

        def __enter__(self) -> list[os.DirEntry[str]]:
            return self.entries

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr("os.scandir", Backwards)
    assert load_folder(tmp_path, "train").records.ids.tolist() == expected


def test_links_are_followed_and_end(tmp_path: Path) -> None:
    root = touch(tmp_path / "root", "rose/a.jpg", "tulip/deep/a.jpg")
    touch(tmp_path / "elsewhere", "b.jpg", "c.jpg")
    (root / "rose/b.jpg").symlink_to(tmp_path / "elsewhere/b.jpg")
    (root / "daisy").symlink_to(tmp_path / "elsewhere")
    (root / "tulip/deep/up").symlink_to(root / "tulip")
    (tmp_path / "elsewhere/self").symlink_to(".")
    loaded = load_folder(root, "train")
    records, names = loaded.records, loaded.names
    assert names == ["daisy", "rose", "tulip"]
    assert records.ids.tolist() == ["daisy/b", "daisy/c", "rose/a", "rose/b", "tulip/deep/a"]
    assert read_image(records, 3).tobytes() == b"b.jpg"
    (root / "rose/gone.jpg").symlink_to(tmp_path / "nothing.jpg")
    assert f"{root / 'rose/gone.jpg'} cannot be read (No such file" in refusal(lambda: load_folder(root, "train"))


def test_content_decides_the_kind(tmp_path: Path) -> None:
    """Every kind that an extension stands for can be decoded, whatever the name says."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8))
    (tmp_path / "rose").mkdir()
    for kind in ("PNG", "BMP", "TIFF", "PPM", "JPEG2000", "WEBP", "JPEG", "GIF", "AVIF"):
        buffer = BytesIO()
        faithful: dict[str, Any] = (
            {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind in ("JPEG", "AVIF") else {}
        )
        picture.save(buffer, kind, **faithful)
        (tmp_path / f"rose/{kind}.jpg").write_bytes(buffer.getvalue())
    records = load_folder(tmp_path, "train").records
    assert len(records) == 9
    expected = np.asarray(picture).mean((0, 1)) / 255
    for i in range(9):
        assert is_sound(read_image(records, i))
        assert decodable(read_image(records, i)), records.describe(i)
        measured = pixel_statistics(records.select(np.array([i])), Engine())
        np.testing.assert_allclose(measured.normalization.mean, expected, atol=0.01)


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ([], "{root} holds no pictures (.jpg, "),
        (["readme.txt"], "{root} holds no pictures (.jpg, "),
        (["1.jpg", "2.jpg"], "{root}/1.jpg is in no class's folder"),
        (["train/1.jpg", "val/1.jpg"], "{root}/train/1.jpg is in no class's folder"),
        (["train/rose/1.jpg", "train/2.jpg"], "{root}/train/2.jpg is in no class's folder"),
        (["train/rose/1.jpg", "val/1.jpg"], "{root}/val/1.jpg is in no class's folder"),
        (["train/rose/readme.txt"], "{root}/train holds no pictures"),
        (["train/rose/1.jpg", "val/rose/readme.txt"], "{root}/val holds no pictures"),
        (["val/rose/1.jpg"], "{root} has no folder train"),
        (["train/rose/1.jpg", "train/tulip/1.psd"], "{root}/train/tulip holds no pictures"),
        (["rose/1.jpg", "tulip/1.psd"], "{root}/tulip holds no pictures"),
        (["rose/1.jpg", "tulip/1.jpg"], "{root}: there are no records for val"),
    ],
)
def test_what_is_no_data_folder_is_one_sentence(tmp_path: Path, files: list[str], sentence: str) -> None:
    text = refusal(lambda: opened(touch(tmp_path, *files)))
    assert text.startswith(sentence.format(root=tmp_path))
    if "/tulip holds" not in text and "records for val" not in text:
        for layout in ("tfrecords-jpeg-SxS/{train,val,test}/*.tfrec", "train/CLASS/*.jpg", "CLASS/*.jpg"):
            assert layout in text


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "rose/a.jpg")
    scandir = os.scandir

    def refused(path: str) -> Any:
        if str(path).endswith("rose"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", refused)
    assert refusal(lambda: opened(tmp_path)).startswith(f"{tmp_path / 'rose'} cannot be read (Permission denied)")


# What validates


def test_a_val_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    touch(tmp_path, *(f"train/{kind}/{i}.jpg" for kind in ("daisy", "rose", "tulip") for i in range(3)))
    touch(tmp_path, "val/rose/8.jpg", "val/tulip/9.jpg", "val/daisy/readme.txt")  # no daisy
    data = opened(tmp_path)
    assert data.val is not None
    assert len(data.train) == 9
    assert classes_of(data.val, data.classes) == {"rose/8": "rose", "tulip/9": "tulip"}
    touch(tmp_path, "val/lily/1.jpg")
    text = refusal(lambda: opened(tmp_path))
    assert text.startswith(f"{tmp_path} has pictures of class 'lily' in val ({tmp_path}/val/lily/1.jpg)")


def test_without_val_there_may_be_a_test(tmp_path: Path) -> None:
    touch(tmp_path, "train/rose/1.jpg", "train/rose/2.jpg", "test/3.jpg")
    parts = load_parts(DataConfig(root=(tmp_path,)), 0, "train", "val", "test")
    assert [len(part.records) for (part,) in parts] == [1, 1, 1]
    assert parts[2][0].records.ids.tolist() == ["3"]


def test_a_final_fit_trains_on_both(tmp_path: Path) -> None:
    root = touch(tmp_path, *(f"rose/{i}.jpg" for i in range(20)))
    split, final = opened(root), opened(root, train_on="train+val")
    assert split.val is not None
    assert final.val is None
    assert final.train.ids.tolist() == [*split.train.ids, *split.val.ids]


# Classes


def test_labels_of_a_known_class_list(tmp_path: Path) -> None:
    touch(tmp_path, "val/rose/1.jpg", "val/tulip/2.jpg", "test/3.jpg", "test/tulip/4.jpg", "test/batch/5.jpg")
    classes = ["tulip", "iris", "rose"]
    data = DataConfig(root=(tmp_path,))
    val = load_records(data, "val", classes, seed=0)
    assert (val.ids.tolist(), val.labels.tolist()) == (["rose/1", "tulip/2"], [2, 0])
    test = load_records(data, "test", classes, seed=0)
    assert classes_of(test, classes) == {"3": None, "batch/5": None, "tulip/4": "tulip"}
    text = refusal(lambda: test.require_classes(3))
    assert text.startswith(f"{tmp_path}/test/3.jpg has no class")
    text = refusal(lambda: load_records(data, "val", ["iris", "rose"], seed=0))
    assert text.startswith(f"{tmp_path} has pictures of class 'tulip' in val")
    assert "none of the 2 classes of training (iris, rose)" in text


def test_tfrecords_with_other_names_are_mapped_by_name(small: Path) -> None:
    (small / "class_names.json").write_text(json.dumps(["rose", "tulip", "daisy"]))
    data = DataConfig(root=(small,))
    val = load_records(data, "val", ["daisy", "lily", "rose", "tulip"], seed=0)
    assert val.labels.tolist() == [(2, 3, 0)[i % 3] for i in range(20)]
    text = refusal(lambda: load_records(data, "val", ["daisy", "tulip"], seed=0))
    assert "has pictures of class 'rose' in val" in text
    assert f"{val.describe(0)}" in text


def test_several_folders_share_a_class_list(tmp_path: Path) -> None:
    folders = [
        touch(
            tmp_path / "a", *(f"train/{kind}/a{i}.jpg" for kind in ("tulip", "lily") for i in "12"), "val/lily/av.jpg"
        ),
        touch(tmp_path / "b", *(f"{kind}/b{i}.jpg" for kind in ("daisy", "tulip") for i in "12")),
    ]
    for order in (folders, folders[::-1]):
        data = opened(*order)
        assert data.val is not None
        assert data.classes == ["daisy", "lily", "tulip"]
        kinds = classes_of(data.train, data.classes) | classes_of(data.val, data.classes)
        assert {name: name.partition("/")[0] for name in kinds} == kinds
        assert (len(data.train), len(data.val)) == (6, 3)
        for records in (data.train, data.val):
            for i in range(len(records)):
                assert records.ids[i] in read_image(records, i).tobytes().decode()


def test_names_that_a_file_lists_come_first_and_in_its_order(tmp_path: Path, small: Path) -> None:
    (small / "class_names.json").write_text(json.dumps(["rose", "daisy", "lily"]))
    folder = touch(tmp_path / "a", "tulip/1.jpg", "tulip/2.jpg", "lily/1.jpg", "lily/2.jpg", "aster/1.jpg")
    data = opened(folder, small)
    assert data.val is not None
    assert data.classes == ["rose", "daisy", "lily", "aster", "tulip"]
    assert (len(data.train), len(data.val)) == (3 + 48, 2 + 20)
    kinds = classes_of(data.train, data.classes)
    assert kinds["aster/1"] == "aster"
    assert [kinds[f"{i:06}"] for i in range(3)] == ["rose", "daisy", "lily"]
    assert read_image(data.train, 3 + 47).tobytes() == example(47, 47 % 3)["image"]
    (folder / "class_names.json").write_text(json.dumps(["tulip", "lily"]))
    sentence = (
        "class 'aster' in train, which its class_names.json does not list: correct the folder's name or the list."
    )
    assert sentence in refusal(lambda: opened(folder))
    (folder / "class_names.json").write_text(json.dumps(["tulip", "lily", "aster", "iris"]))
    assert opened(folder).classes == ["tulip", "lily", "aster", "iris"]
    (folder / "class_names.json").write_text(json.dumps(["tulip", "lily", "tulip"]))
    assert "the class name 'tulip' twice" in refusal(lambda: opened(folder))


def test_numbers_join_numbers_alone(tmp_path: Path, small: Path) -> None:
    other = write_dataset(tmp_path / "other", {"train": 8, "val": 4}, classes=4, first=100)
    data = opened(small, other)
    assert data.val is not None
    assert data.classes == ["0", "1", "2", "3"]
    assert data.train.labels.tolist() == [*(i % 3 for i in range(48)), *(i % 4 for i in range(8))]
    assert (len(data.val), data.val.describe(20)) == (24, f"{data.val.files[2]}, record 0 (id 000108)")
    named = touch(tmp_path / "named", "rose/1.jpg", "rose/2.jpg")
    text = refusal(lambda: opened(named, small))
    assert text.startswith(f"{small} has only numbers for classes, but {named} has names: write")
    assert str(small / "class_names.json") in text


# What is left out


def listing(path: Path, *records: tuple[object, int]) -> Path:
    problems = [
        {"kind": "duplicate", "file": str(file), "record": number, "id": "x", "split": "train"}
        for file, number in records
    ]
    path.write_text(json.dumps({"records": 99, "problems": problems}))
    return path


def test_listed_records_are_left_out(tmp_path: Path, small: Path) -> None:
    (small / "class_names.json").write_text(json.dumps(["rose", "tulip", "lily"]))
    folder = touch(tmp_path / "a", "train/rose/1.jpg", "train/rose/2.jpg", "train/tulip/1.jpg", "val/rose/3.jpg")
    (folder / "train/rose/same.jpg").symlink_to("1.jpg")
    whole = opened(small, folder)
    assert whole.val is not None
    shards = whole.train.files
    (tmp_path / "link").symlink_to(tmp_path)
    skip = listing(
        tmp_path / "skip.json",
        *((shards[0], 3), (shards[1], 3), (shards[0], 3), (shards[0], 500)),
        (tmp_path / "link/a/train/rose/same.jpg", 0),  # the same folder by another name
        (folder / "train/tulip/1.jpg", 0),
        (folder / "train/rose/gone.jpg", 0),
        (tmp_path / "elsewhere/rose/2.jpg", 0),
        (whole.val.files[0], 7),
    )
    rest = opened(small, folder, skip=skip)
    assert rest.val is not None
    assert set(whole.train.ids) - set(rest.train.ids) == {"000003", "000027", "rose/same", "tulip/1"}
    assert {name for name in rest.train.ids if "/" in name} == {"rose/1", "rose/2"}
    assert set(whole.val.ids) - set(rest.val.ids) == {whole.val.ids[7]}
    assert rest.left_out == 5
    assert rest.classes == whole.classes
    val = load_records(DataConfig(root=(small, folder), skip=skip), "val", rest.classes, seed=0)
    assert val.ids.tolist() == rest.val.ids.tolist()


def test_leaving_out_does_not_move_the_split(tmp_path: Path) -> None:
    root = touch(tmp_path / "a", *(f"rose/{i}.jpg" for i in range(30)))
    whole = opened(root)
    assert whole.val is not None
    rest = opened(root, skip=listing(tmp_path / "skip.json", *((whole.val.files[i], 0) for i in range(20))))
    assert rest.val is not None
    assert rest.left_out == 20
    assert set(rest.val.ids) <= set(whole.val.ids)
    assert set(rest.train.ids) <= set(whole.train.ids)
    every = listing(tmp_path / "all.json", *((path, 0) for path in whole.val.files))
    assert "lists every record of a split" in refusal(lambda: opened(root, skip=every))


@pytest.mark.parametrize(
    "text", ["", "no JSON", "[]", "{}", '{"problems": 3}', '{"problems": ["a"]}', '{"problems": [{"file": "a"}]}']
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, small: Path, text: str) -> None:
    skip = tmp_path / "skip.json"
    skip.write_text(text)
    sentence = refusal(lambda: opened(small, skip=skip))
    assert sentence.startswith(f"data.skip {skip} does not hold the problems that `fastflower data check")
    assert "cannot be read (No such file" in refusal(lambda: opened(small, skip=tmp_path / "none.json"))


def test_statistics_know_a_folder_by_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folders(tmp_path / "a", {"rose": 2, "tulip": 2})
    (tmp_path / "b").symlink_to("a")
    first = pixel_statistics(load_folder(tmp_path / "a", "train").records, Engine())
    monkeypatch.setattr("fastflower.data.stats._measure", lambda *_: pytest.fail("measured again"))
    again = pixel_statistics(load_folder(tmp_path / "b", "train").records, Engine())
    assert again.normalization == first.normalization
