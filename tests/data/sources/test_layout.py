"""Layouts on disk: another one is a class and a line of the registry, and all that reads data takes it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from fastflower.config import SPLITS, DataConfig
from fastflower.data import sources
from fastflower.data.check import Report, check, sentences
from fastflower.data.classes import listed_classes
from fastflower.data.dataset import open_dataset
from fastflower.data.records import Records, read_image
from fastflower.data.sources import LAYOUTS, layout_of
from fastflower.data.sources.layout import Layout, Loaded, one_of
from fastflower.data.sources.tfrecord import write_tfrecord
from fastflower.data.splits import class_list, join, load_parts, load_pictures, load_pool
from fastflower.data.stamp import stamp_of
from fastflower.data.stats import pixel_statistics
from fastflower.data.view import Engine
from fastflower.errors import UserError
from tests.conftest import example, fastflower, jpeg, train_arguments, write_dataset, write_folders

LIST, PICTURES = "pictures.txt", "pictures.bin"
Row = tuple[str, str, str, bytes]  # split, class, id and picture


class Listed(Layout):
    """All pictures one after another in a file, and a text that says of each: split, class, id, offset and length."""

    form = f"{PICTURES} and {LIST}"
    ids_are_of_split = False
    holds_out = True

    def holds(self, root: Path) -> bool:
        return (root / LIST).is_file()

    def splits(self, root: Path) -> list[str]:
        splits = {row[0] for row in self._rows(root)}
        return [split for split in SPLITS if split in splits]

    def load(self, root: Path, split: str, data: DataConfig) -> Loaded:
        rows = self._rows(root)
        numbers = [number for number, row in enumerate(rows) if row[0] == split]
        if not numbers:
            raise UserError(f"{root / LIST} has no picture of {split}: add some.")
        names = sorted({rows[number][1] for number in numbers})
        places = np.array([[int(text) for text in rows[number][3:]] for number in numbers], np.int64)
        return Loaded(
            Records(
                files=(root / PICTURES,),
                stamps=(stamp_of(root / PICTURES),),
                counts=(len(rows),),
                counts_by_name=(None,),
                sides=(None,),
                mends=(f"write it into {LIST}",),
                file=np.zeros(len(numbers), np.int64),
                number=np.array(numbers),
                offset=places[:, 0],
                length=places[:, 1],
                ids=np.array([rows[number][2] for number in numbers]),
                labels=np.array([names.index(rows[number][1]) for number in numbers]),
            ),
            names,
        )

    @staticmethod
    def _rows(root: Path) -> list[list[str]]:
        return [line.split() for line in (root / LIST).read_text().splitlines()]


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a line in the registry does."""
    monkeypatch.setattr(sources, "LAYOUTS", (Listed(), *LAYOUTS))


def write_list(root: Path, rows: Sequence[Row]) -> Path:
    root.mkdir(parents=True)
    lines, offset = [], 0
    for *said, image in rows:
        lines.append(" ".join([*said, str(offset), str(len(image))]))
        offset += len(image)
    (root / LIST).write_text("\n".join(lines))
    (root / PICTURES).write_bytes(b"".join(row[3] for row in rows))
    return root


def as_list(folders: Path, root: Path) -> Path:
    """The pictures of class folders with splits, in the layout above."""
    rows = [
        (split, path.parent.name, path.stem, path.read_bytes())
        for split in SPLITS
        for path in sorted((folders / split).glob("*/*.jpg"))
    ]
    return write_list(root, rows)


def same_images(one: Records, other: Records) -> bool:
    return [read_image(one, i).tobytes() for i in range(len(one))] == [
        read_image(other, i).tobytes() for i in range(len(other))
    ]


def run_check(root: Path) -> Report:
    return check(root, threads=1, follow=lambda _: lambda done, total: None)


TRAIN, VAL = {"train/rose": 8, "train/tulip": 8}, {"val/rose": 3, "val/tulip": 3}


@pytest.mark.usefixtures("registered")
class TestAnotherLayout:
    """Is read as the same pictures in class folders are."""

    def test_splits_and_classes(self, tmp_path: Path) -> None:
        folders = write_folders(tmp_path / "folders", TRAIN | VAL)
        root = as_list(folders, tmp_path / "listed")
        listed, expected = (open_dataset(DataConfig(root=(data,)), 0) for data in (root, folders))
        assert listed.classes == expected.classes == ["rose", "tulip"]
        assert listed.val is not None
        assert expected.val is not None
        for one, other in ((listed.train, expected.train), (listed.val, expected.val)):
            assert one.labels.tolist() == other.labels.tolist()
            assert same_images(one, other)
        with pytest.raises(UserError, match=rf"{root}/{LIST} has no picture of test: add some\."):
            load_parts(DataConfig(root=(root,)), 0, "test")

    def test_what_is_held_out_and_folds(self, tmp_path: Path) -> None:
        root = as_list(write_folders(tmp_path / "folders", TRAIN), tmp_path / "listed")
        dataset = open_dataset(DataConfig(root=(root,), val_share=0.25), 0)
        assert dataset.val is not None
        assert (len(dataset.train), dataset.val.labels.tolist()) == (12, [0, 0, 1, 1])
        validated: list[str] = []
        for fold in range(3):
            dataset = open_dataset(DataConfig(root=(root,), folds=3, fold=fold), 0)
            assert dataset.val is not None
            assert not set(dataset.train.ids) & set(dataset.val.ids)
            validated += dataset.val.ids.tolist()
        assert sorted(validated) == [f"{i:06}" for i in range(16)]

    def test_it_joins_other_layouts(self, tmp_path: Path) -> None:
        listed = as_list(write_folders(tmp_path / "a", TRAIN | VAL), tmp_path / "listed")
        folders = write_folders(tmp_path / "b", {"train/aster": 4, "train/rose": 4, "val/aster": 2}, first=50)
        pool = load_pool(DataConfig(root=(listed, folders)))
        assert [len(part.records) for part in pool] == [16, 6, 8, 2]
        assert class_list(pool) == ["aster", "rose", "tulip"]
        ids = join(pool, class_list(pool)).ids.tolist()
        assert (ids[0], ids[-1]) == ("000000", "val/aster/000059")  # those of class folders are of their split
        (listed / "class_names.json").write_text('["tulip", "rose"]')
        assert class_list(load_pool(DataConfig(root=(listed,)))) == ["tulip", "rose"]
        (listed / "class_names.json").write_text('["tulip"]')
        with pytest.raises(
            UserError, match=r"'rose' in train, which its class_names\.json does not list: correct the name or"
        ):
            load_pool(DataConfig(root=(listed,)))

    def test_statistics(self, tmp_path: Path) -> None:
        folders = write_folders(tmp_path / "folders", TRAIN | VAL)
        both = [
            pixel_statistics(load_pictures(DataConfig(root=(root,)), ["train"], seed=0), Engine()).normalization
            for root in (folders, as_list(folders, tmp_path / "listed"))
        ]
        assert both[0] == both[1]

    def test_a_run_and_what_follows(self, tmp_path: Path, tiny_net: None) -> None:
        folders = write_folders(tmp_path / "folders", TRAIN | VAL)
        root, rows = as_list(folders, tmp_path / "listed"), {}
        for name, data in (("one", root), ("other", folders)):
            trained = fastflower(*train_arguments(data, tmp_path / name), "--train.epochs", 1)
            assert trained.code == 0, trained.err
            rows[name] = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])
        for key in ("train_loss", "val_loss", "val_accuracy"):
            assert rows["one"][key] == rows["other"][key]
        evaluated = fastflower("eval", tmp_path / "one", "--json")
        assert evaluated.code == 0, evaluated.err
        assert json.loads(evaluated.out)["n"] == 6

    def test_check_finds_each_trouble(self, tmp_path: Path) -> None:
        picture = jpeg(40, 40)
        rows = [
            *(("train", "rose", f"r{i}", jpeg(40, 40, seed=i + 1)) for i in range(4)),
            *[("train", "tulip", "r1", jpeg(40, 40, seed=9)), ("train", "tulip", "t", picture)],
            *[("train", "tulip", "page", b"<html>"), ("val", "weed", "w", jpeg(40, 40, seed=20))],
            *[("val", "tulip", "copy", picture), ("val", "rose", "r2", jpeg(40, 40, seed=30))],
        ]
        root = write_list(tmp_path / "listed", rows)
        report = run_check(root)
        assert [(p.kind, p.split, p.record, p.id) for p in report.problems] == [
            ("leak", "train", 2, "r2"),
            ("id twice", "train", 4, "r1"),
            ("leak", "train", 5, "t"),
            ("unreadable", "train", 6, "page"),
            ("class", "val", 7, "w"),
        ]
        assert {problem.file for problem in report.problems} == {str(root / PICTURES)}
        assert report.classes == {"rose": {"train": 4, "val": 1}, "tulip": {"train": 2, "val": 1}}
        lines = list(sentences(report))
        assert lines[3].startswith(f"unreadable: {root / PICTURES}, record 6 (id page) cannot be decoded as a picture")
        assert lines[4].endswith("is of class weed, which train does not have")
        (tmp_path / "skip.json").write_text(json.dumps(report.to_plain()))
        (root / "class_names.json").write_text('["rose", "tulip", "weed"]')
        rest = open_dataset(DataConfig(root=(root,), skip=tmp_path / "skip.json"), 0)
        assert rest.left_out == 5
        assert rest.train.ids.tolist() == ["r0", "r1", "r3"]

    def test_check_goes_on_after_a_split_that_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        root = as_list(write_folders(tmp_path / "folders", TRAIN | VAL), tmp_path / "listed")
        load = Listed.load

        def refused(self: Listed, root: Path, split: str, data: DataConfig) -> Loaded:
            if split == "train":
                raise UserError("a reason.")
            return load(self, root, split, data)

        monkeypatch.setattr(Listed, "load", refused)
        report = run_check(root)
        assert [(p.kind, p.split, p.file, p.text) for p in report.problems if p.kind == "file"] == [
            ("file", "train", str(root), "a reason.")
        ]
        assert report.splits["val"]["records"] == 6

    def test_it_is_named_among_the_others(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=rf"none is not a folder: a data folder holds {PICTURES} and {LIST}, or "):
            layout_of(tmp_path / "none")


def write_a_list(root: Path) -> Path:
    return write_list(root, [("train", "rose", "a", jpeg(40, 40))])


@pytest.mark.parametrize(
    ("write", "name", "splits"),
    [
        (lambda root: write_dataset(root, {"train": 4, "val": 2}), "SizedTFRecords", ["train", "val"]),
        (lambda root: write_dataset(root, {"val": 2}) / "tfrecords-jpeg-40x40", "SizedTFRecords", ["val"]),
        (lambda root: write_dataset(root, {"test": 2}, size=64), "SizedTFRecords", ["test"]),
        (lambda root: write_folders(root, {"rose": 1}), "ClassFolders", ["train"]),
        (lambda root: write_folders(root, {"train/rose": 1, "test": 1}), "ClassFolders", ["train", "test"]),
        (lambda root: write_folders(root, {"val/rose": 1}), "ClassFolders", ["val"]),
        (write_a_list, "ClassFolders", ["train"]),  # as long as nobody has registered it
    ],
)
def test_a_folder_has_one_layout_which_knows_its_splits(
    tmp_path: Path, write: Callable[[Path], Path], name: str, splits: list[str]
) -> None:
    root = write(tmp_path / "data")
    layout = layout_of(root)
    assert (type(layout).__name__, layout.splits(root)) == (name, splits)


def test_a_size_that_alone_has_a_split_counts(tmp_path: Path) -> None:
    write_dataset(tmp_path, {"train": 4})
    write_dataset(tmp_path, {"train": 4, "val": 2}, size=64)
    assert layout_of(tmp_path).splits(tmp_path) == ["train", "val"]


def test_every_layout_is_named_where_a_folder_is_none(tmp_path: Path) -> None:
    for refused in (lambda: layout_of(tmp_path / "none"), lambda: load_parts(DataConfig(root=(tmp_path,)), 0, "train")):
        with pytest.raises(UserError) as caught:
            refused()
        assert str(caught.value).endswith(f"{one_of(LAYOUTS)}.")


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(root: Path) -> list[str]:
        raise PermissionError(13, "Permission denied", str(root))

    monkeypatch.setattr("fastflower.data.sources.kaggle.os.listdir", refused)
    for ask in (layout_of, listed_classes, run_check):
        with pytest.raises(UserError, match=rf"{tmp_path} cannot be read \(Permission denied\): check its permissions"):
            ask(tmp_path)


@pytest.mark.usefixtures("registered")
def test_a_record_that_is_all_of_its_file_is_named_by_the_file(tmp_path: Path) -> None:
    """Wherever records begin: also the first of a file without a header."""

    def described(root: Path, *splits: str) -> list[str]:
        parts = load_parts(DataConfig(root=(root,), val_share=0.5), 0, *splits)
        return sorted(part.records.describe(0) for (part,) in parts)

    folders = write_folders(tmp_path / "folders", {"train/rose": 2, "val/rose": 1})
    assert described(folders, "train") == [f"{folders}/train/rose/000000.jpg"]
    two = write_list(tmp_path / "two", [("train", "rose", f"{i}", jpeg(40, 40, seed=i)) for i in range(2)])
    assert described(two, "train", "val") == [f"{two}/{PICTURES}, record {i} (id {i})" for i in range(2)]
    records = write_dataset(tmp_path / "records", {"train": 1, "val": 1})
    assert described(records, "train")[0].endswith(".tfrec, record 0 (id 000000)")


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_a_record_without_a_class_is_mended_as_its_layout_says(tmp_path: Path, order: list[int]) -> None:
    """Also in one table with others'."""
    folders = write_folders(tmp_path / "folders", {"test": 1})
    stored = tmp_path / "records"
    write_tfrecord(stored / "test" / "a.tfrec", [example(7, None)])
    records = load_pictures(DataConfig(root=(folders, stored)), ["test"], seed=0)
    said = [
        f"{folders}/test/000000.jpg has no class, which this command needs: put it into its class's folder.",
        f"{stored}/test/a.tfrec, record 0 (id 000007) has no feature 'class', which this command needs: "
        "write it or drop the file.",
    ]
    with pytest.raises(UserError) as caught:
        records.select(np.array(order)).require("class")
    assert str(caught.value) == said[order[0]]


def test_nothing_but_the_registry_knows_a_layout() -> None:
    package = Path(sources.__file__).parents[2]
    names = "|".join(type(layout).__module__.rpartition(".")[2] for layout in LAYOUTS)
    imported = re.compile(rf"data\.sources(\.| import .*\b)({names})\b")
    assert imported.search("from fastflower.data.sources import tfrecord, kaggle")
    outside = [path for path in package.rglob("*.py") if path.parent != Path(sources.__file__).parent]
    assert len(outside) > 50
    assert [path for path in outside if imported.search(path.read_text())] == []


def test_help_and_docs_name_each_layout() -> None:
    package = Path(sources.__file__).parents[2]
    for text in ((package / "config.py").read_text(), one_of(LAYOUTS)):
        for layout in LAYOUTS:
            assert layout.form in " ".join(text.split())
    docs = (package.parent / "docs" / "data.md").read_text()
    for word in re.findall(r"[a-zS-]+-SxS|CLASS|\{train,val,test\}", one_of(LAYOUTS)):
        assert word.replace("CLASS", "ROOT/train/rose/1.jpg") in docs
