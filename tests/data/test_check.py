"""`data check`: every kind of trouble is found where it is, and nothing else."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastflower.data import records as module
from fastflower.data.check import SHOWN, Report, check, sentences
from fastflower.data.decoding import BATCH
from fastflower.data.sources.kaggle import load_split
from fastflower.data.sources.layout import Problem
from fastflower.data.sources.tfrecord import write_tfrecord
from fastflower.data.stamp import Stamp
from fastflower.errors import UserError
from tests.conftest import READABLE, example, fastflower, jpeg, write_dataset, write_folders

Record = dict[str, bytes | int]


def run(root: Path) -> Report:
    return check(root, threads=2, follow=lambda _: lambda done, total: None)


def write(root: Path, split: str, records: Sequence[Record], size: int = 40, name: str = "a.tfrec") -> Path:
    path = root / f"tfrecords-jpeg-{size}x{size}" / split / name
    write_tfrecord(path, records)
    return path


def named_in(report: Report) -> list[tuple[Any, ...]]:
    """Kind, split, record and id of each problem of a file or record."""
    return [(p.kind, p.split, p.record, p.id) for p in of_records(report)]


def of_records(report: Report) -> list[Problem]:
    """The problems but for the one of the whole, that there is a single class."""
    return [p for p in report.problems if p.record is not None or p.kind != "class"]


def flip(path: Path, offset: int) -> None:
    """Change a bit of a file, and nothing of what its index is known by."""
    stat = path.stat()
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_sound_set_is_counted_and_has_no_problems(tmp_path: Path) -> None:
    for size in (40, 48):
        write_dataset(tmp_path, {"train": 2 * BATCH + 3, "val": 10, "test": 5}, size=size)
    (tmp_path / "tfrecords-jpeg-40x40.zip").touch()
    report = run(tmp_path)
    assert report.problems == []
    assert list(report.splits.items()) == [
        ("train", {"records": 134, "pictures": 67, "classes": 3, "sizes": [40, 48]}),
        ("val", {"records": 20, "pictures": 10, "classes": 3, "sizes": [40, 48]}),
        ("test", {"records": 10, "pictures": 5, "classes": 0, "sizes": [40, 48]}),
    ]
    assert report.classes == {
        "0": {"train": 23, "val": 4},
        "1": {"train": 22, "val": 3},
        "2": {"train": 22, "val": 3},
    }
    assert list(sentences(report)) == ["No problems."]


def without(record: Record, feature: str) -> Record:
    return {name: value for name, value in record.items() if name != feature}


TROUBLES: dict[str, tuple[dict[str, list[Record]], list[tuple[Any, ...]], str]] = {
    "cut off picture": (
        {"train": [example(0, 0), example(1, 0, jpeg(40, 40)[:300]), example(2, 0)]},
        [("unreadable", "train", 1, "000001")],
        r"cannot be decoded as a picture \(300 bytes\)",
    ),
    "no picture, twice": (
        {"train": [example(0, 0, b""), example(1, 0, b"<html>"), example(2, 0, b"<html>"), example(3, 0)]},
        [("unreadable", "train", i, f"00000{i}") for i in range(3)],
        r"cannot be decoded as a picture \(0 bytes\)",
    ),
    "no image at all": (
        {"val": [without(example(0, 0), "image"), example(1, 0)]},
        [("unreadable", "val", 0, "000000")],
        "has no feature 'image'",
    ),
    "shapes at their limits": (
        {
            "test": [
                example(i, None, jpeg(w, h)) for i, (w, h) in enumerate([(15, 40), (16, 128), (129, 16), (128, 16)])
            ]
        },
        [("shape", "test", 0, "000000"), ("shape", "test", 2, "000002")],
        "is 15×40 pixels",
    ),
    "class missing in train, not in test": (
        {"train": [example(0, 0), example(1, None)], "test": [example(2, None)]},
        [("class", "train", 1, "000001")],
        "has no class",
    ),
    "class outside": (
        {"train": [example(0, 0), example(1, 1)], "val": [example(2, 2), example(3, -1)], "test": [example(4, 2)]},
        [("class", "val", 0, "000002"), ("class", "val", 1, "000003"), ("class", "test", 0, "000004")],
        r"has class 2, outside 0\.\.1",
    ),
    "no class that could be one": (
        {"train": [example(0, -1)]},
        [("class", "train", 0, "000000")],
        r"has class -1, outside 0\.\.99999",
    ),
    "id missing": (
        {"train": [example(0, 0), without(example(1, 0), "id"), without(example(2, 0), "id")]},
        [("no id", "train", 1, ""), ("no id", "train", 2, "")],
        "has no id",
    ),
    "id twice": (
        {"train": [example(7, 0), example(8, 0), example(7, 0), example(7, 0, jpeg(40, 40))]},
        [("id twice", "train", 2, "000007"), ("id twice", "train", 3, "000007")],
        r"has the id of .*a\.tfrec, record 0 \(id 000007\)",
    ),
    "one picture under two ids": (
        {"train": [example(0, 0, jpeg(40, 40)), example(1, 0), example(2, 3, jpeg(40, 40))]},
        [("duplicate", "train", 2, "000002")],
        r"is the same picture as .*record 0 \(id 000000\), there of class 0$",
    ),
    "two pictures without ids": (
        {"train": [without(example(0, 0, jpeg(40, 40)), "id"), without(example(1, 0, jpeg(40, 40)), "id")]},
        [("no id", "train", 0, ""), ("no id", "train", 1, ""), ("duplicate", "train", 1, "")],
        "has no id",
    ),
    "one picture in two splits, under another id and the same": (
        {
            "train": [example(0, 0, jpeg(40, 40)), example(1, 0)],
            "val": [example(5, 0, jpeg(40, 40)), example(6, 0)],
            "test": [without(example(6, 0), "class"), example(9, None)],
        },
        [("leak", "train", 0, "000000"), ("leak", "val", 1, "000006")],
        r"is the same picture as .*/val/a\.tfrec, record 0 \(id 000005\)$",
    ),
    "one id in two splits": (
        {"train": [example(0, 0)], "val": [example(1, 0), example(0, 0, jpeg(40, 40))]},
        [("leak", "train", 0, "000000")],
        r"has the id of .*/val/a\.tfrec, record 1 \(id 000000\)$",
    ),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_each_trouble_is_named_and_nothing_else(tmp_path: Path, trouble: str) -> None:
    splits, expected, first_text = TROUBLES[trouble]
    for split, records in splits.items():
        write(tmp_path, split, records)
    report = run(tmp_path)
    assert named_in(report) == expected
    for problem in of_records(report):
        assert problem.file == str(tmp_path / "tfrecords-jpeg-40x40" / problem.split / "a.tfrec")
    assert re.search(first_text, of_records(report)[0].text)
    assert {name: split["records"] for name, split in report.splits.items()} == {
        name: len(records) for name, records in splits.items()
    }


def test_one_id_at_several_sizes_is_one_picture(tmp_path: Path) -> None:
    """Even with the same bytes, as where a small picture was not enlarged; across splits it is a leak at each size."""
    for size in (40, 48):
        write(tmp_path, "train", [example(0, 0, jpeg(40, 40)), example(1, 0)], size)
    assert named_in(run(tmp_path)) == []
    write(tmp_path, "val", [example(5, 0, jpeg(40, 40))], 40)
    write(tmp_path, "val", [example(6, 0)], 48)
    assert named_in(run(tmp_path)) == [("leak", "train", 0, "000000")] * 2


def test_a_changed_byte_is_found_by_its_checksum(tmp_path: Path) -> None:
    root = write_dataset(tmp_path, {"train": 6}, files=1)
    records = load_split(root, "train")  # which leaves an index in the cache
    (path,) = records.files
    flip(path, int(records.offset[4] + records.length[4]) - 200)
    report = run(root)
    assert report.problems[0] == Problem(
        "crc", "train", str(path), 4, "000004", "does not match its checksum: copy or download the file again"
    )
    assert {p.record for p in report.problems} == {4}  # the picture may also have become unreadable


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda data: data[:-100], "is cut off in record 4"),
        (lambda data: b"no records at all", "is not a TFRecord file"),
        (lambda data: b"", "holds no records"),
        (lambda data: data.replace(b"image", b"imag\xff"), None),
    ],
)
def test_a_damaged_file_is_named_and_the_rest_is_checked(tmp_path: Path, damage: Any, text: str | None) -> None:
    root = write_dataset(tmp_path, {"train": 10, "val": 4}, files=2)
    bad = next((root / "tfrecords-jpeg-40x40" / "train").glob("00-*"))
    write(root, "val", [example(77, 0, b"no picture")], name="z.tfrec")
    bad.write_bytes(damage(bad.read_bytes()))
    report = run(root)
    assert report.splits["val"]["records"] == 5
    assert ("unreadable", "val", 0, "000077") in named_in(report)
    if text:
        (problem,) = (p for p in report.problems if p.split == "train")
        assert (problem.kind, problem.file, problem.record) == ("file", str(bad), None)
        assert text in problem.text
        assert report.splits["train"]["records"] == 5
    else:
        assert [p.kind for p in report.problems if p.file == str(bad)].count("crc") == 5


def test_damaged_files_alone_are_a_report_too(tmp_path: Path) -> None:
    write(tmp_path, "train", [example(0, 0)]).write_bytes(b"?")
    report = run(tmp_path)
    assert named_in(report) == [("file", "train", None, "")]
    assert (report.splits, report.classes) == ({}, {})


def test_a_size_without_a_split_that_others_have_is_named(tmp_path: Path) -> None:
    for size in (40, 48):
        write_dataset(tmp_path, {"train": 4}, size=size)
    write(tmp_path, "val", [example(9, 0)], size=40)
    (problem,) = run(tmp_path).problems
    assert (problem.kind, problem.split) == ("file", "val")
    assert problem.file == str(tmp_path / "tfrecords-jpeg-48x48" / "val")


def test_folders_of_splits_without_sizes_and_a_list_of_names(tmp_path: Path) -> None:
    write_tfrecord(tmp_path / "val" / "a.tfrecord", [example(0, 1)])
    (tmp_path / "class_names.json").write_text('["iris", "rose"]')
    report = run(tmp_path)
    assert report.splits == {"val": {"records": 1, "pictures": 1, "classes": 1, "sizes": []}}
    assert report.classes == {"iris": {"val": 0}, "rose": {"val": 1}}
    assert report.problems == []


def test_odd_files_that_no_decoder_reads_are_named(odd_images: Path, tmp_path: Path) -> None:
    unreadable = ["html_error_page.jpg", "truncated.jpg", "zero_bytes.jpg"]
    names = sorted(path.name for path in odd_images.iterdir())
    assert set(names) == {*READABLE, *unreadable, "flipped_bytes.jpg"}  # whose errors no decoder notices
    images = [(odd_images / name).read_bytes() for name in names]
    records = [{"id": name.encode(), "image": image, "class": 0} for name, image in zip(names, images, strict=True)]
    write(tmp_path, "train", records)  # type: ignore[arg-type]
    problems = of_records(run(tmp_path))
    assert [p.id for p in problems if p.kind == "unreadable"] == unreadable
    assert [p.id for p in problems if p.kind == "shape"] == ["one_pixel.jpg", "panorama_1200x40.jpg"]
    assert len(problems) == 5


def test_photographs_at_four_sizes_have_no_problems(flowers5: Path) -> None:
    report = run(flowers5)
    assert report.problems == []
    assert report.splits["train"] == {"records": 880, "pictures": 220, "classes": 5, "sizes": [192, 224, 331, 512]}
    assert set(report.classes) == {"daisy", "dandelion", "rose", "sunflower", "tulip"}
    assert {tuple(counts.items()) for counts in report.classes.values()} == {(("train", 44), ("val", 10))}


def test_class_folders_are_checked_alike(tmp_path: Path) -> None:
    root = write_folders(tmp_path, {"train/rose": 4, "train/tulip": 3, "val/rose": 2, "val/weed": 1, "test": 1})
    (root / "train/rose/page.JPG").write_bytes(b"<html>")
    (root / "val/rose/copy.jpeg").write_bytes((root / "train/tulip/000005.jpg").read_bytes())
    (root / "val/rose/000000.jpg").write_bytes(jpeg(40, 40))  # a name as in train, and another picture
    report = run(root)
    assert report.classes == {"rose": {"train": 5, "val": 4}, "tulip": {"train": 3, "val": 0}}
    assert report.splits["test"] == {"records": 1, "pictures": 1, "classes": 0, "sizes": []}
    assert named_in(report) == [
        ("unreadable", "train", 0, "rose/page"),
        ("leak", "train", 0, "tulip/000005"),
        ("class", "val", 0, "weed/000009"),
    ]
    assert report.problems[0].file == str(root / "train/rose/page.JPG")
    lines = list(sentences(report))
    assert lines[0] == f"unreadable: {root}/train/rose/page.JPG cannot be decoded as a picture (6 bytes)"
    assert lines[1].endswith(f"is the same picture as {root}/val/rose/copy.jpeg, there of class rose")
    assert lines[2].endswith("is of class weed, which train does not have")
    (root / "train/empty").mkdir()
    again = run(root)
    (problem,) = (p for p in again.problems if p.kind == "file")
    assert "train/empty holds no pictures" in problem.text
    assert [p for p in again.problems if p.kind != "file"] == report.problems  # the others are looked at all the same


@pytest.mark.parametrize("listed", [False, True])
def test_where_train_is_refused_the_rest_has_its_classes(listed: bool, tmp_path: Path) -> None:
    root = write_folders(tmp_path, {"train/rose": 2, "train/tulip": 2, "val/rose": 2, "val/tulip": 1, "test": 1})
    (root / "train/loose.jpg").write_bytes(jpeg(40, 40))
    if listed:
        (root / "class_names.json").write_text('["tulip", "rose"]')
    report = run(root)
    assert [(problem.kind, problem.split) for problem in report.problems] == [("file", "train")]
    assert {name: counts["val"] for name, counts in report.classes.items()} == {"rose": 2, "tulip": 1}


def test_a_picture_that_may_not_be_read_is_named_and_the_rest_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_folders(tmp_path, {"train/rose": 3, "train/tulip": BATCH, "val/rose": 2})
    closed, page = root / "train/tulip/000005.jpg", root / "val/rose/page.jpg"
    page.write_bytes(b"<html>")
    opened = module.open_kept

    def refused(path: Path, stamp: Stamp) -> Any:
        if path == closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, stamp)

    monkeypatch.setattr(module, "open_kept", refused)
    report = run(root)
    assert named_in(report) == [("unreadable", "train", 0, "tulip/000005"), ("unreadable", "val", 0, "rose/page")]
    assert next(sentences(report)) == f"unreadable: {closed} cannot be read (Permission denied)"


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_no_data_set_is_a_users_mistake(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    if name == "absent":
        with pytest.raises(UserError, match="absent is not a folder"):
            run(tmp_path / name)
    else:
        (problem,) = run(tmp_path / name).problems
        assert (problem.kind, problem.split) == ("file", "train")
        assert "empty holds no pictures" in problem.text


def test_the_command_prints_a_table_and_some_problems_or_one_object(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "set", {"train": 6, "test": 2})
    sound = fastflower("data", "check", root)
    assert sound.code == 0
    assert "No problems." in sound.out
    bad = write(root, "val", [example(100 + i, 0, b"no picture") for i in range(SHOWN + 3)])
    shown = fastflower("data", "check", root)
    assert shown.code == 1
    assert [name for name in ("train", "val", "test") if name in shown.out] == ["train", "val", "test"]
    lines = shown.out.splitlines()
    assert sum(line.startswith(f"unreadable: {bad}, record ") for line in lines) == SHOWN
    assert lines[-3:-1] == ["and 3 more; --json lists all.", f"{SHOWN + 3} problems: {SHOWN + 3} unreadable"]
    assert lines[-1].endswith(f"`fastflower data check {root} --json > bad.json`, then `--data.skip bad.json`.")
    listed = fastflower("data", "check", root, "--json")
    assert listed.code == 1
    report = json.loads(listed.out)
    assert list(report) == ["root", "splits", "classes", "problems", "notes", "left_out"]
    assert report["root"] == str(root)
    assert len(report["problems"]) == SHOWN + 3
    assert report["problems"][2] == {
        **{"kind": "unreadable", "split": "val", "file": str(bad), "record": 2, "id": "000102"},
        "text": "cannot be decoded as a picture (10 bytes)",
    }


def test_paths_are_absolute_and_those_of_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "train", [example(0, 0), example(1, 0, b"no picture")])
    monkeypatch.chdir(tmp_path)
    (problem,) = of_records(run(Path()))
    records = load_split(tmp_path, "train")
    assert Path(problem.file) == records.files[records.file[1]]
    assert problem.record == records.number[1]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """Ten times as many files, 100 MB, take less than half of that more at the peak, in a process of its own."""
    image, rng = jpeg(40, 40), np.random.default_rng(0)
    for name, files in (("small", 1), ("large", 10)):
        for file in range(files):  # decoders do not mind what follows a picture
            records = [example(50 * file + i, i % 2, image + rng.bytes(200_000)) for i in range(50)]
            write(tmp_path / name, "train", records, name=f"{file}.tfrec")
    code = f"""
import re
from pathlib import Path
from tests.data.test_check import run
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
sizes = []
for name in ("small", "large"):
    assert not run(Path({str(tmp_path)!r}) / name).problems
    sizes.append(peak())
print(sizes)
assert sizes[1] < sizes[0] + 45_000, sizes
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_each_record_and_file_is_one_step_of_progress(small: Path) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}

    def follow(description: str) -> Any:
        return lambda done, total: seen.setdefault(description, []).append((done, total))

    check(small, threads=1, follow=follow)
    assert seen == {
        "verify checksums": [(i + 1, 4) for i in range(4)],
        "decode": [(i + 1, 68) for i in range(68)],
    }


def test_a_file_with_another_number_of_records_than_its_name_says(tmp_path: Path) -> None:
    root = write_dataset(tmp_path, {"train": 24, "val": 6})
    folder = root / "tfrecords-jpeg-40x40"
    (folder / "val/00-40x40-3.tfrec").rename(folder / "val/00-40x40-5.tfrec")
    result = fastflower("data", "check", root, "--json")
    assert result.code == 1
    (problem,) = json.loads(result.out)["problems"]
    assert (problem["kind"], problem["split"], problem["record"]) == ("count", "val", None)
    assert problem["file"] == f"{folder}/val/00-40x40-5.tfrec"
    assert problem["text"].startswith(f"{folder}/val/00-40x40-5.tfrec has 3 records, but by its name 5: copy")
    shown = fastflower("data", "check", root)
    assert (shown.code, "1 problem: 1 count" in shown.out) == (1, True)
