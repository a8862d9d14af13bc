"""Files that are whole or absent, whatever happens meanwhile; JSON that every reader takes; the cache folder."""

from __future__ import annotations

import ast
import errno
import hashlib
import json
import math
import os
import pwd
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastflower import files
from fastflower.errors import UserError
from fastflower.files import atomic_write, cache_dir, code_digest, digest, lend_cache, remove_temporaries, to_json
from tests.conftest import ROOT, train_arguments


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


@pytest.fixture
def no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user whose home folder is a file, so that it cannot be written; the folder for temporary files."""
    (tmp_path / "file").write_text("")
    (tmp_path / "temporary").mkdir()
    for name in ("FASTFLOWER_CACHE", "XDG_CACHE_HOME", "MPLCONFIGDIR", "TORCH_HOME", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


def test_without_a_home_the_cache_is_private(no_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_: int) -> NoReturn:
        raise KeyError("no entry in the list of users")

    private = no_home / f"fastflower-{os.getuid()}"
    assert cache_dir() == private
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.delenv("HOME")
    assert cache_dir() == private
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which does not count, by its specification
    assert cache_dir() == private
    monkeypatch.setenv("XDG_CACHE_HOME", str(no_home / "xdg"))
    assert cache_dir() == no_home / "xdg/fastflower"
    monkeypatch.setenv("FASTFLOWER_CACHE", "~/named")
    with pytest.raises(UserError, match="FASTFLOWER_CACHE is ~/named, but there is no such home folder"):
        cache_dir()
    monkeypatch.setenv("FASTFLOWER_CACHE", "/dev/null/named")
    assert cache_dir() == Path("/dev/null/named"), "what is named is taken as it is"


@pytest.mark.parametrize("planted", ["link", "file", "writable", "readable", "anothers"])
def test_a_private_folder_that_is_not_ours_is_not_used(
    planted: str, no_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = no_home / f"fastflower-{os.getuid()}"
    if planted == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        private.symlink_to(tmp_path / "elsewhere")
    elif planted == "file":
        private.write_text("")
    else:
        private.mkdir(mode=0o700)
        private.chmod({"writable": 0o777, "readable": 0o755}.get(planted, 0o700))
    if planted == "anothers":
        me = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: me + 1)
        private.rename(no_home / f"fastflower-{me + 1}")
        private = no_home / f"fastflower-{me + 1}"
    files._folder_of_process.cache_clear()
    folder = cache_dir()
    assert folder.is_dir()
    assert folder != private
    assert folder == cache_dir(), "the same while the process lives"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    files._folder_of_process().cleanup()
    files._folder_of_process.cache_clear()


def test_other_libraries_get_a_place_where_home_has_none(no_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = ("MPLCONFIGDIR", "TORCH_HOME", "TRITON_HOME")
    monkeypatch.setenv("TORCH_HOME", "/named")
    lend_cache()
    private = no_home / f"fastflower-{os.getuid()}"
    assert [os.environ[name] for name in variables] == [f"{private}/matplotlib", "/named", f"{private}/triton"]
    for name in variables:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FASTFLOWER_CACHE", "/dev/null/named")  # cannot be written either
    lend_cache()
    assert os.environ["TORCH_HOME"] == f"{private}/torch"
    for name in variables:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(no_home))
    lend_cache()
    assert not set(variables) & set(os.environ)


@pytest.mark.parametrize("named", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_commands_work_where_no_home_can_be_written(named: bool, no_home: Path, small: Path, tmp_path: Path) -> None:
    """As in a container whose user has no home: with a cache folder, or with one that cannot be written either."""
    (tmp_path / "here").mkdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(no_home)}
    if named:
        environment["FASTFLOWER_CACHE"] = "/dev/null/cache"
    run = tmp_path / "run"
    commands = ([*train_arguments(small, run), "--train.epochs", 1], ["eval", run], ["data", "check", small])
    program = f"""
import sys
from tests.training.tiny_worker import main
for words in {[list(map(str, words)) for words in commands]}:
    sys.argv[1:] = words
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
"""
    command, folder = [sys.executable, "-c", program], tmp_path / "here"
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert not list((tmp_path / "here").iterdir()), "such as a folder named ~"
    assert (no_home / f"fastflower-{os.getuid()}/index").is_dir() != named


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


@given(st.lists(st.binary(max_size=300)), st.integers(1, 64))
def test_a_digest_is_that_of_the_parts_together(parts: list[bytes], size: int) -> None:
    expected = hashlib.blake2b(b"".join(parts), digest_size=size).digest()
    assert digest(*parts, size=size) == digest(*(memoryview(part) for part in parts), size=size) == expected


@given(plain_values)
def test_json_has_null_where_a_number_is_not_finite_and_all_else_as_it_was(value: Any) -> None:
    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads(to_json(value), parse_constant=refuse) == without_undefined(value)


def test_all_json_is_written_by_one_function() -> None:
    writers = []
    for folder in ("fastflower", "kernels", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and ast.unparse(node) in ("json.dumps", "json.dump"):
                    writers.append(str(path.relative_to(ROOT)))
    assert writers == ["fastflower/files.py"]
