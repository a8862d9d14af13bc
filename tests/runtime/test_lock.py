"""A folder that one training has for itself: starts in one second, second trainings, file systems without locks."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest

from fastflower.errors import UserError
from fastflower.runtime import lock
from fastflower.runtime.distributed import Ranks
from fastflower.runtime.lock import own_folder
from fastflower.training.metrics import TrainingSums
from tests.conftest import ROOT, fastflower, train_arguments
from tests.processes import in_ranks
from tests.training import tiny_worker
from tests.training.test_resume import signal_at
from tests.training.test_run import rows


def claimed(given: Path | None = None) -> Any:
    return own_folder(given, "train", Ranks())


def test_all_that_start_in_one_second_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda _: "20300101-120000")
    with ExitStack() as stack, ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: stack.enter_context(claimed()).path, range(20)))
        base = Path("runs/train-20300101-120000")
        assert set(folders) == {base, *(Path(f"{base}-{number}") for number in range(2, 21))}
    assert not list(tmp_path.glob("runs/*")), "nothing was written into them"


def test_a_folder_stays_where_something_was_written_or_where_it_was(tmp_path: Path) -> None:
    existing = tmp_path / "there"
    existing.mkdir()
    for path, file in ((existing, None), (tmp_path / "new", "config.yaml")):
        with claimed(path) as folder:
            assert folder.path == path
            if file:
                (path / file).write_text("")
        assert path.is_dir()
        with claimed(path):
            pass
    with pytest.raises(RuntimeError), claimed(tmp_path / "fails"):
        raise RuntimeError
    assert not (tmp_path / "fails").exists()


def test_only_one_has_a_folder_and_the_next_one_after_it(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with claimed(path):
        sentence = f"process {os.getpid()} on .* is training in {path}: wait for its end, or name another --run"
        with pytest.raises(UserError, match=sentence), claimed(path):
            pass
        with pytest.raises(UserError), claimed(path):  # a refusal frees nothing
            pass
    with claimed(path):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_taken_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with claimed(tmp_path / "run") as folder:
        assert folder.path.is_dir()


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file/run"):
        with pytest.raises(UserError, match="cannot be written .*: name a folder with --run"), claimed(path):
            pass


@contextmanager
def other_process(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the folder until it is killed."""
    code = f"""
from pathlib import Path
from fastflower.runtime.distributed import Ranks
from fastflower.runtime.lock import own_folder
with own_folder(Path({str(path)!r}), "", Ranks()):
    print("locked", flush=True)
    input()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.usefixtures("tiny_net")
def test_a_second_training_is_refused_until_the_first_is_gone(finished: Path, small: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file() and path.name != lock.LOCK}
    commands = (
        ["train", "--resume", finished, "--train.epochs", 3],
        [*train_arguments(small, finished), "--train.epochs", 3, "--resume", "auto"],
        [*train_arguments(small, finished), "--overwrite"],
        train_arguments(small, finished),
    )
    with other_process(finished) as process:
        for command in commands:
            refused = fastflower(*command)
            assert refused.code == 2
            assert f"error: process {process.pid} on" in refused.err
            assert f"is training in {finished}:" in refused.err
        assert all(path.read_bytes() == content for path, content in before.items())
        assert fastflower("eval", finished, "--json").code == 0, "who only reads is not kept out"
    assert fastflower(*commands[0]).code == 0
    assert len(rows(finished)) == 3


def test_every_rank_learns_of_a_refusal(small: Path, tmp_path: Path) -> None:
    with claimed(tmp_path / "run") as folder:
        result = in_ranks(tiny_worker.main, *train_arguments(small, folder.path))
        assert result.code == 2
        assert result.err.count(f"is training in {folder.path}:") == 1, "only the main rank speaks"
        assert "Traceback" not in result.err
        assert os.listdir(folder.path) == [lock.LOCK]


@pytest.mark.usefixtures("tiny_net")
def test_overwriting_keeps_the_lock(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, refusals = tmp_path / "run", []
    assert fastflower(*train_arguments(small, run), "--train.epochs", 1).code == 0
    original = TrainingSums.add

    def add(*args: Any, **kwargs: Any) -> None:
        with pytest.raises(UserError) as caught, claimed(run):
            pass
        refusals.append(caught)
        original(*args, **kwargs)

    monkeypatch.setattr(TrainingSums, "add", add)
    assert fastflower(*train_arguments(small, run), "--train.epochs", 1, "--overwrite").code == 0
    assert len(refusals) == 6


@pytest.mark.usefixtures("tiny_net")
def test_a_training_that_fails_before_it_writes_leaves_no_folder(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for run in (None, tmp_path / "named"):
        assert fastflower(*train_arguments(tmp_path / "nothing", run)).code == 2
    assert not (tmp_path / "named").exists()
    assert not (tmp_path / "runs").exists()
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, TrainingSums, 2, signal.SIGINT)
        assert fastflower(*train_arguments(small, tmp_path / "named")).code == 128 + signal.SIGINT
    assert (tmp_path / "named/checkpoints/last.pt").is_file()


@pytest.mark.parametrize("given", ["run", "a/b/run", None])
@pytest.mark.parametrize("kept", ["", "a", "runs"])
def test_a_folder_in_which_nothing_was_written_goes_with_those_that_were_made_for_it(
    given: str | None, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if kept:
        Path(kept).mkdir()
    with own_folder(Path(given) if given else None, "train", Ranks()) as folder:
        assert folder.path.is_dir()
    assert [path.name for path in tmp_path.rglob("*")] == [kept] * bool(kept)
    with own_folder(Path(given) if given else None, "train", Ranks()) as folder:
        folder.config.write_text("")
    assert sorted(path.name for path in folder.path.iterdir()) == [".lock", "config.yaml"]
