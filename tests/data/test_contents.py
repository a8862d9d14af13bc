"""What the bytes of records are: each is read once, and again when its file is another."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastflower.arrays import Hashes
from fastflower.data import contents as module
from fastflower.data import records as records_module
from fastflower.data.contents import content_digests, contents_of, examined, require_pictures
from fastflower.data.records import Records, concatenate, read_image
from fastflower.data.sources.folder import load_folder
from fastflower.data.sources.kaggle import load_files
from fastflower.data.sources.tfrecord import scan, write_tfrecord
from fastflower.data.stats import pixel_statistics
from fastflower.data.view import Engine
from fastflower.errors import UserError
from tests.conftest import example, fastflower, jpeg, train_arguments, write_dataset, write_folders

PICTURES = [jpeg(20, 20, seed=i) for i in range(12)]
BYTES = [
    *PICTURES[:8],
    PICTURES[0],  # a copy
    PICTURES[9][:-2],  # without its end marker
    b"",
    b"<html>not found</html>",
]
SOUND = [True] * 9 + [False] * 3


def write(path: Path, contents: list[bytes], first: int = 0) -> Records:
    write_tfrecord(path, [example(first + i, 0, data) for i, data in enumerate(contents)])
    return load_files([path])


def digest_of(data: bytes) -> int:
    return int(hashlib.blake2b(data, digest_size=8).hexdigest(), 16)


def test_other_bytes_of_the_same_file_are_other_records(tmp_path: Path) -> None:
    """As where a list says where in a file the pictures are, and is corrected."""
    records = write(tmp_path / "a.tfrec", PICTURES[:6])
    draw = np.random.default_rng(3)
    whole = contents_of(records)
    for _ in range(20):
        shifts, cuts = (draw.integers(0, 2, 6) * draw.integers(1, 300, 6) for _ in range(2))
        moved = replace(records, offset=records.offset + shifts, length=records.length - shifts - cuts)
        contents = contents_of(moved)
        data = [bytes(read_image(moved, index)) for index in range(6)]
        assert contents.digests.tolist() == [digest_of(picture) for picture in data]
        assert contents.sound.tolist() == [not shift + cut for shift, cut in zip(shifts, cuts, strict=True)]
    assert contents_of(records).digests.tolist() == whole.digests.tolist()


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The records that are read, in any order."""
    seen: list[str] = []

    def spy(records: Records, index: int) -> np.ndarray:
        seen.append(records.describe(index))
        return read_image(records, index)

    monkeypatch.setattr(module, "read_image", spy)
    return seen


def stored(folder: Path) -> Records:
    """BYTES in two files of TFRecords, and once more as files of their own."""
    for i, data in enumerate(BYTES):
        (folder / "pictures" / "train" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (folder / "pictures" / "train" / "ab"[i % 2] / f"{i}.jpg").write_bytes(data)
    parts = [write(folder / "t/train/1.tfrec", BYTES[:5]), write(folder / "t/train/2.tfrec", BYTES[5:], 5)]
    return concatenate([*parts, load_folder(folder / "pictures", "train").records])


@settings(deadline=None, max_examples=20)
@given(selections=st.lists(st.lists(st.integers(0, 23), min_size=1, max_size=24), min_size=1, max_size=5))
def test_each_record_is_read_once_whatever_is_asked_for(
    tmp_path_factory: pytest.TempPathFactory, selections: list[list[int]]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("some")
        patch.setenv("FASTFLOWER_CACHE", str(folder / "cache"))
        patch.setattr(module, "CHUNK", 2)  # several threads' shares
        seen: list[str] = []

        def spy(records: Records, index: int) -> np.ndarray:
            seen.append(records.describe(index))
            return read_image(records, index)

        patch.setattr(module, "read_image", spy)
        everything = stored(folder)
        wanted = [digest_of(read_image(everything, i).tobytes()) for i in range(24)]
        sound = [SOUND[BYTES.index(read_image(everything, i).tobytes())] for i in range(24)]
        asked: set[int] = set()
        progress: list[tuple[int, int]] = []
        for selection in selections:
            progress.clear()
            new = len(set(selection) - asked)
            before = len(seen)
            answer = contents_of(everything.select(np.array(selection)), lambda *done: progress.append(done))
            assert answer.digests.tolist() == [wanted[i] for i in selection]
            assert answer.sound.tolist() == [sound[i] for i in selection]
            asked |= set(selection)
            assert set(seen) == {everything.describe(i) for i in asked}
            assert len(set(seen[before:])) == new
            assert progress == [(i + 1, len(progress)) for i in range(len(progress))]
        assert not {path.suffix for path in folder.rglob("cache/contents/*")} - {".npy"}


def in_place(path: Path, data: bytes) -> None:
    with path.open("r+b") as file:
        file.write(data)
        file.truncate()


def renamed_over(path: Path, data: bytes) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(data)
    stat = path.stat()
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(path)


REPLACE = pytest.mark.parametrize("replace", [in_place, renamed_over])


def swap(path: Path, replace: Callable[[Path, bytes], None], data: bytes) -> None:
    """Other content under the old name, of the old size and modification time, as cp -p, rsync -t and tar leave it."""
    before = path.stat()
    replace(path, data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@REPLACE
def test_records_of_the_old_size_and_time_are_seen_to_be_others(
    tmp_path: Path, replace: Callable[[Path, bytes], None]
) -> None:
    """By the index, the digests and the statistics."""
    same = len(PICTURES[1]) + 50
    path, other = tmp_path / "train" / "a.tfrec", tmp_path / "other.tfrec"
    old = write(path, [PICTURES[1].ljust(same, b"\0"), PICTURES[2].ljust(same, b"\0")])
    kept = content_digests(old), pixel_statistics(old, Engine())
    write(other, [PICTURES[3].ljust(same, b"\0"), PICTURES[4].ljust(same, b"\0")], 7)
    swap(path, replace, other.read_bytes())
    new, expected = load_files([path]), load_files([other])
    assert new.ids.tolist() == ["000007", "000008"] != old.ids.tolist()
    assert content_digests(new).tolist() == content_digests(expected).tolist() != kept[0].tolist()
    assert pixel_statistics(new, Engine()).normalization != kept[1].normalization


@REPLACE
def test_a_picture_file_of_the_old_size_and_time_is_seen_to_be_another(
    tmp_path: Path, replace: Callable[[Path, bytes], None]
) -> None:
    root = write_folders(tmp_path, {"train/rose": 3, "train/tulip": 3})
    records = load_folder(root, "train").records
    kept = content_digests(records)
    swap(records.files[2], replace, records.files[2].read_bytes()[::-1])
    again = contents_of(load_folder(root, "train").records)
    assert (again.digests != kept).tolist() == [i == 2 for i in range(6)]
    assert again.sound.tolist() == [i != 2 for i in range(6)]


def test_links_and_permissions_change_nothing_for_a_run(tmp_path: Path) -> None:
    path = tmp_path / "a.tfrec"
    records = write(path, PICTURES)
    kept = content_digests(records)
    path.chmod(0o440)
    (tmp_path / "b.tfrec").hardlink_to(path)
    records_module.open_kept.cache_clear()  # as where more files are open than are kept so
    assert [digest_of(read_image(records, i).tobytes()) for i in range(12)] == kept.tolist()
    shutil.rmtree(os.environ["FASTFLOWER_CACHE"])
    assert np.array_equal(content_digests(records), kept)


def test_a_file_that_changes_while_it_is_read_is_refused_and_nothing_is_kept_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "train" / "a.tfrec"
    records = write(path, PICTURES)
    shutil.rmtree(os.environ["FASTFLOWER_CACHE"])

    def then_write(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            values = list(function(*arguments))
            with path.open("ab") as file:
                file.write(b"more")
            return np.array(values)

        return called

    sentence = "train/a.tfrec has changed while it was read: start again when nobody writes to it"
    with monkeypatch.context() as patch, pytest.raises(UserError, match=sentence):
        patch.setattr("fastflower.data.sources.kaggle.scan", then_write(scan))
        load_files([path])
    records = write(path, PICTURES)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=sentence):
        patch.setattr(module, "read_image", then_write(read_image))
        contents_of(records.select(np.arange(1)))
    assert len(list(Path(os.environ["FASTFLOWER_CACHE"]).rglob("*.np?"))) == 1  # the index


@pytest.mark.parametrize("damage", [b"", b"no array", "other array", "folder", None])
def test_a_damaged_cache_costs_reading_again(tmp_path: Path, read: list[str], damage: bytes | str | None) -> None:
    records = write(tmp_path / "a.tfrec", PICTURES)
    kept = contents_of(records)
    (cached,) = Path(os.environ["FASTFLOWER_CACHE"]).glob("contents/*")
    if isinstance(damage, bytes):
        cached.write_bytes(damage)
    elif damage == "other array":
        np.save(cached, np.arange(7))
    elif damage == "folder":
        cached.unlink()
        (cached / "below").mkdir(parents=True)
    again = contents_of(records)
    assert np.array_equal(again.digests, kept.digests)
    assert again.sound.all()
    assert len(read) == (12 if damage is None else 24)


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_records_that_are_no_pictures_are_named_at_once(tmp_path: Path, count: int) -> None:
    bad = [PICTURES[0][:-2], b"", b"page"] * 3
    val = write(tmp_path / "val/b.tfrec", [*bad[: count - 1], *PICTURES], 20)
    train = write(tmp_path / "train/a.tfrec", [*PICTURES[:3], bad[count - 1]])
    require_pictures([train.select(np.arange(3)), val.select(np.arange(count - 1, len(val)))])
    with pytest.raises(UserError) as refused:
        require_pictures([train, val])
    sentence = str(refused.value)
    places = [f"{tmp_path}/train/a.tfrec, record 3 (id 000003)"]
    places += [f"{tmp_path}/val/b.tfrec, record {i} (id {20 + i:06})" for i in range(count - 1)]
    assert [place in sentence for place in places] == [i < 5 for i in range(count)]
    assert ("and 4 more" in sentence) == (count == 9)
    assert "--data.skip bad.json, which `fastflower data check ROOT --json > bad.json` writes" in sentence


UNDIVIDED, DIVIDED = {"rose": 8, "tulip": 8}, {"train/rose": 8, "train/tulip": 8, "val/rose": 4}


def write_sizes(root: Path) -> list[Path]:
    for size in (40, 48):
        write_dataset(root, {"train": 12, "val": 6}, size=size)
    return [root]


@pytest.mark.parametrize(
    ("write", "options", "count"),
    [
        (write_sizes, [], 18),
        (write_sizes, ["--data.folds", 3], 36),  # which have to be the same at all sizes
        (lambda root: [write_folders(root, UNDIVIDED)], [], 16),
        (lambda root: [write_folders(root, DIVIDED)], ["--data.folds", 2], 20),
        (lambda root: [write_folders(root / "a", UNDIVIDED), write_folders(root / "b", DIVIDED)], [], 36),
        (lambda root: [write_folders(root / "b", DIVIDED), write_folders(root / "a", UNDIVIDED)], [], 36),
    ],
)
def test_a_start_looks_each_record_up_once(
    tmp_path: Path,
    tiny_net: None,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[Path], list[Path]],
    options: list[object],
    count: int,
) -> None:
    """For what validates, the sentences to the user and what the checkpoint says; a test of the network too."""
    roots, run, keys = write(tmp_path / "data"), tmp_path / "run", module._keys
    asked: list[str] = []

    def spy(records: Records) -> Any:
        asked.extend(records.describe(index) for index in range(len(records)))
        return keys(records)

    monkeypatch.setattr(module, "_keys", spy)
    command, *config, option, _ = train_arguments(roots[0], run)[:5]
    settings = train_arguments(roots[0], run)[5:]
    trained = fastflower(command, *config, option, *roots, *settings, "--train.epochs", 1, *options)
    assert trained.code == 0, trained.err
    assert len(asked) == len(set(asked)) == count
    asked.clear()
    evaluated = fastflower("eval", run)
    assert evaluated.code == 0, evaluated.err
    assert len(asked) == len(set(asked)) > 0


@given(parts=st.lists(st.lists(st.integers(0, 11), min_size=1, max_size=12), min_size=1, max_size=4))
@settings(deadline=None, max_examples=20)
def test_what_is_known_of_records_goes_where_they_go(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[int]]
) -> None:
    """Into what is selected of them and joined; of unknown ones that join them nothing is known until it is asked."""
    records, keys = write(tmp_path_factory.mktemp("some") / "a.tfrec", BYTES), module._keys
    selected = [examined(records).select(np.array(part)) for part in parts]
    joined = concatenate(selected)
    assert joined.contents is not None
    indices = np.concatenate(parts)
    assert joined.contents.digests.tolist() == [digest_of(BYTES[i]) for i in indices]
    assert joined.contents.sound.tolist() == [SOUND[i] for i in indices]
    assert concatenate([records, records]).contents is None
    mixed = [part if i % 2 else replace(part, contents=None) for i, part in enumerate([*selected, records])]
    with_unknown = concatenate(mixed)
    asked: list[int] = []

    def spy(records: Records) -> Hashes:
        asked.extend(records.number.tolist())
        return keys(records)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_keys", spy)
        answer = contents_of(with_unknown)
    everything = np.concatenate([part.number for part in mixed])
    assert answer.digests.tolist() == [digest_of(BYTES[i]) for i in everything]
    assert answer.sound.tolist() == [SOUND[i] for i in everything]
    assert asked == [i for part in mixed if part.contents is None for i in part.number]
