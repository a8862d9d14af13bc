"""atomic_write: whole or absent, whatever happens meanwhile; and JSON that every reader takes."""

from __future__ import annotations

import ast
import errno
import json
import math
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastflower.files import atomic_write, cache_dir, code_digest, remove_temporaries, to_json
from tests.conftest import ROOT


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file.bin"


@pytest.fixture(autouse=True)
def _umask() -> Iterator[None]:
    old = os.umask(0o022)
    yield
    os.umask(old)


def write(path: Path, data: bytes) -> None:
    with atomic_write(path) as file:
        file.write(data)


def names(path: Path) -> list[str]:
    return [p.name for p in path.parent.iterdir()]


def full_disk(*_: object) -> NoReturn:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_writes_and_replaces(path: Path) -> None:
    for data in (b"first", b"", b"x" * 100_000):
        write(path, data)
        assert path.read_bytes() == data
        assert names(path) == ["file.bin"]


def test_folders_are_made(path: Path) -> None:
    write(path.parent / "a" / "b" / "c", b"deep")
    assert (path.parent / "a" / "b" / "c").read_bytes() == b"deep"


def test_nothing_bears_the_name_before_the_end(path: Path) -> None:
    with atomic_write(path) as file:
        file.write(b"part")
        file.flush()
        assert not path.exists()
    with atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"part"
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("old", [None, b"old"])
def test_an_exception_inside_changes_nothing(path: Path, old: bytes | None, kind: type[BaseException]) -> None:
    if old is not None:
        path.write_bytes(old)

    def fail(file: IO[bytes]) -> NoReturn:
        file.write(b"new")
        raise kind

    with pytest.raises(kind), atomic_write(path) as file:
        fail(file)
    assert names(path) == ([] if old is None else ["file.bin"])
    assert old is None or path.read_bytes() == old


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path.write_bytes(b"old")
    monkeypatch.setattr(os, call, full_disk)
    with pytest.raises(OSError, match="No space left") as caught:
        write(path, b"new")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert names(path) == ["file.bin"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_disk_that_fills_up_while_buffers_are_flushed(path: Path) -> None:
    path.write_bytes(b"old")

    def write_to_a_full_disk(file: IO[bytes]) -> None:
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, file.fileno())
        os.close(full)
        file.write(b"new")

    with pytest.raises(OSError, match="No space left"), atomic_write(path) as file:
        write_to_a_full_disk(file)
    assert path.read_bytes() == b"old"
    assert names(path) == ["file.bin"]


@pytest.mark.parametrize("strerror", [True, False])
def test_a_failure_names_the_file_and_not_the_temporary_one(path: Path, strerror: bool) -> None:
    raised = OSError(errno.EIO, "Input/output error") if strerror else OSError("encoder error -2")
    with pytest.raises(OSError, match="Input" if strerror else "encoder error") as caught, atomic_write(path):
        raise raised
    assert caught.value.filename == str(path)
    with pytest.raises(FileNotFoundError) as other, atomic_write(path):
        (path.parent / "another").read_bytes()
    assert other.value.filename == str(path.parent / "another")


def test_what_killed_writers_left_goes_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a[1].bin"
    left = [tmp_path / f".a[1].bin.{'0' * 10}{number:02}.tmp" for number in range(3)]
    others = [tmp_path / name for name in (".a1.bin.000000000000.tmp", ".a[1].bin.mine.tmp", "a[1].bin", ".a[1].bin")]
    for file in (*left, *others):
        file.write_text("")
    remove_temporaries(path)
    assert sorted(tmp_path.iterdir()) == sorted(others)
    remove_temporaries(tmp_path / "no folder" / "a")


def test_synced_before_it_takes_the_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(descriptor: int) -> None:
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        if not folder:
            assert os.fstat(descriptor).st_size == 3  # Python's buffer was flushed first
        calls.append("sync folder" if folder else "sync file")
        fsync(descriptor)

    def spy_replace(source: str, target: Path) -> None:
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    write(path, b"new")
    assert calls == ["sync file", "rename", "sync folder"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664), (0o000, 0o666)])
def test_mode_follows_the_umask(path: Path, umask: int, mode: int) -> None:
    os.umask(umask)
    write(path, b"x")
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert os.umask(umask) == umask  # and the umask is as it was


def test_concurrent_writers_give_one_whole_file(path: Path) -> None:
    contents = [bytes([65 + i]) * (200_000 + i) for i in range(4)]
    write(path, contents[0])
    errors: list[BaseException] = []
    done = threading.Event()

    def writer(data: bytes) -> None:
        try:
            for _ in range(10):
                with atomic_write(path) as file:
                    for start in range(0, len(data), 50_000):
                        file.write(data[start : start + 50_000])
        except BaseException as error:
            errors.append(error)

    def reader() -> None:
        while not done.is_set():
            if path.read_bytes() not in contents:
                errors.append(AssertionError("a part of a file"))

    watcher = threading.Thread(target=reader)
    writers = [threading.Thread(target=writer, args=(data,)) for data in contents]
    for thread in (watcher, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    watcher.join()
    assert errors == []
    assert path.read_bytes() in contents
    assert names(path) == ["file.bin"]


def test_a_folder_that_cannot_be_made(path: Path) -> None:
    path.write_bytes(b"a file, not a folder")
    with pytest.raises(OSError, match=r"exists|Not a directory"):
        write(path / "below", b"x")
    assert path.read_bytes() == b"a file, not a folder"


def test_no_descriptor_is_left_open(path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        write(path, b"x")
        with pytest.raises(RuntimeError), atomic_write(path):
            raise RuntimeError
    assert len(os.listdir("/proc/self/fd")) == before


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("FASTFLOWER_CACHE", "~/named")
    assert cache_dir() == Path("/home/someone/named")
    monkeypatch.setenv("FASTFLOWER_CACHE", "")
    assert cache_dir() == Path("/xdg/fastflower")
    monkeypatch.delenv("FASTFLOWER_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path("/home/someone/.cache/fastflower")


def test_the_digest_of_code_changes_with_each_of_its_files(tmp_path: Path) -> None:
    digests = []
    for number, texts in enumerate((("a", "b"), ("a", "b"), ("a", "c"), ("d", "b"))):
        sources = [tmp_path / f"{number}{name}" for name in "xy"]  # other names, so that nothing is remembered
        for source, text in zip(sources, texts, strict=True):
            source.write_text(text)
        digests.append(code_digest(*map(str, sources)))
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def without_undefined(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_undefined(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_undefined(item) for item in value]
    return None if isinstance(value, float) and (math.isnan(value) or math.isinf(value)) else value


@given(plain_values)
def test_json_has_null_where_a_number_is_not_finite_and_all_else_as_it_was(value: Any) -> None:
    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads(to_json(value), parse_constant=refuse) == without_undefined(value)


def test_all_json_is_written_by_one_function() -> None:
    found = []
    for folder in ("fastflower", "kernels", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and ast.unparse(node) in ("json.dumps", "json.dump"):
                    found.append(str(path.relative_to(ROOT)))
    assert found == ["fastflower/files.py"]
