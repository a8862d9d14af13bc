"""Signals that ask a command to stop: what is saved, and the exit code."""

from __future__ import annotations

import itertools
import os
import pkgutil
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGTERM, SIGUSR1
from typing import Any

import numpy as np
import pytest

import fastflower as api
from fastflower.data.reading import Reader
from fastflower.runtime.checkpoint import load_checkpoint
from fastflower.runtime.lock import LOCK
from fastflower.runtime.signals import ASKING, Interrupted, Signals, Stopped, handling, interrupt
from tests.conftest import ROOT, fastflower, train_arguments, train_settings
from tests.processes import in_process
from tests.training import tiny_worker


@pytest.fixture(autouse=True)
def _heard() -> Iterator[None]:
    """SIGHUP is ignored where the tests themselves run under nohup, and so it would be by what they start."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def sending(number: int, function: Callable[..., Any], at: int = 1) -> Callable[..., Any]:
    """The same function, which sends this process a signal when it is called for the time `at`."""
    calls = itertools.count(1)

    def call(*arguments: Any, **named: Any) -> Any:
        if next(calls) == at:
            os.kill(os.getpid(), number)
        return function(*arguments, **named)

    return call


def contents(folder: Path) -> dict[Path, bytes]:
    """All files in a folder, but for the locks of run folders."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != LOCK}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])  # SIGHUP: below; all: without saving
def test_each_of_them_saves_at_the_next_step(number: int, small: Path, tmp_path: Path) -> None:
    name = signal.Signals(number).name
    done = in_process(tiny_worker.main, *train_arguments(small, tmp_path / "run"), TINY_SIGNAL=f"0:3:{number}")
    assert (done.code, done.err) == (128 + number, "")
    assert f"Stopped by {name} and saved" in done.out
    assert load_checkpoint(tmp_path / "run/checkpoints/last.pt")["step"] == 4


def not_hung_up() -> None:
    """The command line as nohup starts it."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    tiny_worker.main()


def test_one_that_is_ignored_stays_so(small: Path, tmp_path: Path) -> None:
    words = [*train_arguments(small, tmp_path / "run"), "--train.epochs", 1]
    assert in_process(not_hung_up, *words, TINY_SIGNAL=f"0:3:{signal.SIGHUP}").code == 0
    assert load_checkpoint(tmp_path / "run/checkpoints/last.pt")["step"] == 6


def test_a_terminal_that_closes_stops_and_saves(small: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    words = [*train_arguments(small, tmp_path / "run"), "--train.epochs", 10_000]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/training/tiny_worker.py"), *map(str, words)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: os.login_tty(os.dup(theirs)),  # so that it controls the process
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    while b"validation" not in shown:  # the header above the first epoch's figures
        shown += os.read(ours, 4096)
    os.close(ours)
    assert process.wait(120) == 128 + signal.SIGHUP
    assert load_checkpoint(tmp_path / "run/checkpoints/last.pt")["step"] >= 6


def test_any_command_ends_with_its_number_and_leaves_what_was_there(
    small: Path, tmp_path: Path, tiny_net: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    for folder, seed in ((run, 1), (other, 2)):
        assert fastflower(*train_arguments(small, folder), "--train.epochs", 1, "--seed", seed).code == 0
    settings, epochs = train_arguments(small, None)[1:], ("--train.epochs", 9)
    loader, drawn, report = "fastflower.data.reading.Reader.read", tmp_path / "drawn", tmp_path / "report"
    trainings: list[list[object]] = [
        ["train", *settings, *epochs, "--run", tmp_path / "new", "--overwrite"],
        ["train", "--resume", run, *epochs],
        ["cv", "--folds", 2, *settings, *epochs, "--run", tmp_path / "folds"],
    ]
    others: list[tuple[list[object], str, int]] = [  # what is called while they run, and how many times
        (["train", "--dry_run", *settings], loader, 2),
        (["eval", run], loader, 3),
        (["predict", run, "--split", "val"], loader, 3),
        (["ensemble", run, other, "--split", "train"], loader, 6),
        (["data", "check", small], "fastflower.data.check.read_image", 68),
        (["data", "stats", small, "--split", "train+val"], "fastflower.data.decoding.read_picture", 68),
        (["data", "demo", drawn, "--train", 8, "--val", 8, "--test", 8], "fastflower.data.demo._expose", 24),
        (["report", run, "--out", report], "fastflower.report.page.write_report", 1),
        (["flops", "resnet18"], "fastflower.flops.count", 1),
        (["doctor"], "fastflower.doctor.examine", 1),
    ]
    moments = np.random.default_rng(0)

    def stop(words: list[object], place: str, calls: int, number: int) -> str:
        """What a command says that gets a signal at a drawn moment."""
        at = int(moments.integers(calls)) + 1
        with monkeypatch.context() as patch:
            patch.setattr(place, sending(number, pkgutil.resolve_name(place), at))
            result = fastflower(*words)
        assert (result.code, result.err) == (128 + number, ""), (words, at)
        return result.out

    rarer = itertools.cycle((SIGHUP, SIGUSR1))
    for words, place, calls in others:
        for number in (SIGTERM, SIGINT) if calls > 1 else (next(rarer),):
            before = contents(tmp_path)
            assert "saved" not in stop(words, place, calls, number)
            assert contents(tmp_path) == before, words
    finished, log = load_checkpoint(run / "checkpoints/best.pt")["step"], (run / "metrics.jsonl").read_text()
    for words in trainings:
        for number in (SIGTERM, SIGINT):
            out = stop(words, loader, 13, number)
            assert f"Stopped by {signal.Signals(number).name} and saved." in out
            assert "Go on with" in out
    for folder in (run, tmp_path / "new", tmp_path / "folds/fold-0"):
        assert load_checkpoint(folder / "checkpoints/last.pt")["step"] >= (finished if folder == run else 0)
    assert (run / "metrics.jsonl").read_text().startswith(log)
    assert all(signal.getsignal(asking) != interrupt for asking in ASKING), "handlers are as before"


def test_a_second_ctrl_c_interrupts_at_once() -> None:
    with Signals() as signals:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt) as error:
            signal.raise_signal(signal.SIGINT)
        assert not isinstance(error.value, Stopped), "what runs does not save"


def test_outside_the_main_thread_everything_works_without_them(
    small: Path, tmp_path: Path, tiny_net: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluations: list[Any] = []

    def work() -> None:
        with handling(interrupt), Signals():
            run = api.train(api.load_config(settings=train_settings(small, epochs=1)), tmp_path / "run", quiet=True)
            evaluations.append(api.evaluate(run))

    before = [signal.getsignal(number) for number in ASKING]
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert evaluations[0].n == 20
    assert [signal.getsignal(number) for number in ASKING] == before


def test_training_from_python_says_which(
    small: Path, tmp_path: Path, tiny_net: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Reader, "read", sending(signal.SIGUSR1, Reader.read))
    with pytest.raises(Interrupted) as error:
        api.train(api.load_config(settings=train_settings(small, epochs=1)), tmp_path / "run", quiet=True)
    assert error.value.number == signal.SIGUSR1
    assert (tmp_path / "run/checkpoints/last.pt").is_file()
