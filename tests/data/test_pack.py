"""A packed data set is the same one: classes, splits, ids and, but for JPEG's losses, Pillow's pixels."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from fastflower.config import DataConfig
from fastflower.data import pack as module
from fastflower.data.dataset import open_dataset
from fastflower.data.records import NO_LABEL, read_image
from fastflower.data.sources.kaggle import load_split
from fastflower.data.sources.tfrecord import write_tfrecord
from tests.conftest import contents, fastflower, train_arguments, write_dataset
from tests.data.kinds import KINDS, encode, noise

SIZES = (24, 40)


def smooth(width: int, height: int, seed: int) -> Image.Image:
    """A picture that JPEG and resizing change little."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def photographs(root: Path, *, val: bool = True) -> Path:
    """Folders of three classes with pictures of many kinds and shapes, some of them turned by EXIF."""
    rng = np.random.default_rng(0)
    for number in range(36):
        split = ("train", "train", "val")[number // 3 % 3] if val else ""
        folder = root / split / ("rose", "tulip", "ünique")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        picture = smooth(int(rng.integers(18, 500)), int(rng.integers(18, 500)), number)
        exif = Image.Exif()
        exif[0x0112] = int(rng.integers(1, 9))
        kind, options = [("JPEG", {"quality": 95}), ("PNG", {}), ("WEBP", {"quality": 95})][int(rng.integers(3))]
        (folder / f"{number}.jpg").write_bytes(encode(picture, kind, exif=exif, **options))
    if val:
        (root / "test").mkdir()
        for number in range(5):
            smooth(300, 200, number).save(root / f"test/{number}.png")
    return root


def pack(root: Path, out: Path, *options: object) -> Any:
    return fastflower("data", "pack", root, out, "--sizes", *SIZES, *options)


def relative(folder: Path) -> dict[Path, str]:
    return {path.relative_to(folder): digest for path, digest in contents(folder).items()}


def by_id(root: Path, split: str, size: int | str = "auto") -> dict[str, tuple[int, bytes]]:
    records = load_split(root, split, sizes=(size,) if isinstance(size, int) else "auto")
    return {
        str(records.ids[i]): (int(records.labels[i]), read_image(records, i).tobytes()) for i in range(len(records))
    }


def upright(data: bytes) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(BytesIO(data))).convert("RGB")


@pytest.mark.parametrize("val", [True, False])
def test_classes_splits_and_ids_stay_and_pixels_are_near(tmp_path: Path, val: bool) -> None:
    root, out = photographs(tmp_path / "root", val=val), tmp_path / "out"
    assert pack(root, out).code == 0
    before = open_dataset(DataConfig(root=(root,)), seed=0)
    after = open_dataset(DataConfig(root=(out,), scale=(40, 40)), seed=0)
    assert before.classes == after.classes == ["rose", "tulip", "ünique"]
    for split in ("train", "val"):
        records = getattr(before, split)
        for size in SIZES:
            packed = by_id(out, split, size)
            assert list(packed) == records.ids.tolist()
            for index, (label, data) in enumerate(packed.values()):
                assert label == records.labels[index]
                stored, picture = read_image(records, index).tobytes(), Image.open(BytesIO(data))
                whole, limit = upright(stored), 3 if stored.startswith(b"\xff\xd8") else 0.1  # JPEG at 1/2, 1/4 or 1/8
                scale = min(1, size / min(whole.size))
                wanted = whole.resize([round(scale * side) for side in whole.size], Image.Resampling.LANCZOS)
                assert upright(data).size == wanted.size
                assert picture.format == "JPEG"
                assert min(wanted.size) == min(size, *whole.size)
                if min(whole.size) > size:  # else it may be taken as it is
                    wanted = Image.open(BytesIO(encode(wanted, "JPEG", quality=92)))
                    assert np.abs(np.asarray(picture).astype(int) - np.asarray(wanted)).mean() < limit
    if val:
        assert {name: label for name, (label, _) in by_id(out, "test").items()} == dict.fromkeys("01234", NO_LABEL)
    problems = json.loads(fastflower("data", "check", out, "--json").out)["problems"]
    assert {problem["kind"] for problem in problems} <= {"shape"}  # of which some are long


def test_training_and_check_take_what_is_packed(tmp_path: Path, tiny_net: None) -> None:
    root, out = write_dataset(tmp_path / "root", {"train": 12, "val": 6}), tmp_path / "out"
    assert pack(root, out).code == 0
    for split in ("train", "val"):  # of which none is larger, and so all are as they were
        assert by_id(out, split) == by_id(root, split)
    done = fastflower("data", "check", out)
    assert done.code == 0, done.out
    done = fastflower(*train_arguments(out, tmp_path / "run"))
    assert done.code == 0, done.err


def test_an_id_of_two_splits_stays_in_test_and_is_told_apart_elsewhere(tmp_path: Path) -> None:
    for split in ("train/rose", "train/tulip", "val/rose", "val/tulip", "test"):
        (tmp_path / "root" / split).mkdir(parents=True)
        noise(20, 20, seed=len(split)).save(tmp_path / "root" / split / "1.png")
    assert pack(tmp_path / "root", tmp_path / "out").code == 0
    ids = {split: sorted(by_id(tmp_path / "out", split)) for split in ("train", "val", "test")}
    assert ids == {
        "train": ["train/rose/1", "train/tulip/1"],
        "val": ["val/rose/1", "val/tulip/1"],
        "test": ["1"],
    }


def test_what_cannot_be_read_is_named_at_the_end_and_left_out(tmp_path: Path) -> None:
    root = photographs(tmp_path / "root")
    (root / "train/rose/cut.jpg").write_bytes(KINDS["JPEG"]()[:-30])
    (root / "val/tulip/page.jpg").write_bytes(b"<html>")
    (root / "train/tulip/whole.gif").write_bytes(KINDS["GIF"]())
    for _ in range(2):  # also where there is nothing left to do
        done = pack(root, tmp_path / "out")
        assert done.code == 1
        assert [line for line in done.out.splitlines() if line.startswith("left out")] == [
            f"left out: {root / name} cannot be decoded as a picture ({(root / name).stat().st_size} bytes)."
            for name in ("train/rose/cut.jpg", "val/tulip/page.jpg")
        ]
    assert "tulip/whole" in by_id(tmp_path / "out", "train")
    assert not {"rose/cut", "tulip/page"} & {*by_id(tmp_path / "out", "train"), *by_id(tmp_path / "out", "val")}


@pytest.mark.parametrize("seed", range(3))
def test_a_pack_that_is_killed_goes_on(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    root, out = photographs(tmp_path / "root"), tmp_path / "out"
    code = (
        "import sys; from fastflower import cli; from fastflower.data import pack; pack.PICTURES_PER_FILE = 4\n"
        "encoded = pack._encoded\n"
        "import time; pack._encoded = lambda *words: time.sleep(0.05) or encoded(*words)\n"
        f"sys.argv = ['fastflower', 'data', 'pack', {str(root)!r}, {str(out)!r}, '--sizes', '24', '40']; cli.main()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    while not (out / module.MANIFEST).is_file() or len(list(out.rglob("*.tfrec"))) < 2 + 3 * seed:
        time.sleep(0.002)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    manifest = (out / module.MANIFEST).read_text()
    kept = {
        path: path.stat().st_mtime_ns
        for path in out.rglob("*.tfrec")
        if f'"{path.parent.name}/{path.name[:2]}"' in manifest
    }
    assert kept
    (out / "tfrecords-jpeg-24x24/val").mkdir(parents=True, exist_ok=True)
    (out / "tfrecords-jpeg-24x24/val/00-24x24-9.tfrec").write_bytes(b"of a pack that was killed")
    monkeypatch.setattr(module, "PICTURES_PER_FILE", 4)
    assert pack(root, out).code == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert pack(root, tmp_path / "at_once").code == 0
    assert relative(out) == relative(tmp_path / "at_once")


def test_other_folders_are_refused(tmp_path: Path) -> None:
    root, out = photographs(tmp_path / "root"), tmp_path / "out"
    assert pack(root, out).code == 0
    written = contents(out)
    for options in (("--sizes", *SIZES, "--quality", 80), ("--sizes", 24, 56)):
        done = fastflower("data", "pack", root, out, *options)
        assert done.code == 2
        assert "holds a pack of other pictures or settings" in done.err
    noise(20, 20).save(root / "train/rose/new.png")
    assert pack(root, out).code == 2
    assert contents(out) == written
    (tmp_path / "link").symlink_to(root)
    for place in (root, root / "packed", root / "train/packed", tmp_path / "link/packed"):
        done = pack(root, place)
        assert done.code == 2
        assert f"{place} lies in the data folder {root}: name a folder outside of it" in done.err
        assert not (root / "packed").exists()
    for wrong in (("--sizes", *SIZES, "--quality", 0), ("--sizes", 8)):
        assert fastflower("data", "pack", root, tmp_path / "new", *wrong).code == 2
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_a_sentence_and_no_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, out = photographs(tmp_path / "root"), tmp_path / "out"
    with monkeypatch.context() as patch:

        def full(path: Path, examples: Any) -> None:
            if "val" in path.parts:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            write_tfrecord(path, examples)

        patch.setattr(module, "write_tfrecord", full)
        done = pack(root, out)
    assert done.code == 2
    assert "No space left on device" in done.err
    assert "make room" in done.err
    assert pack(root, out).code == 0
    assert len(by_id(out, "val")) == 12
