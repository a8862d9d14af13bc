"""Output in other encodings, into closed pipes, and from Python."""

from __future__ import annotations

import errno
import io
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fastflower as api
from fastflower import cli
from fastflower.runtime.output import Console, Tolerant, tolerant_output
from tests.conftest import ROOT, train_arguments, train_settings
from tests.processes import in_process

ENCODINGS = ("ascii", "latin-1", "cp1252", "koi8-r", "shift_jis", "utf-8", "utf-16")
CLOSED = 128 + 13  # by SIGPIPE


def command(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("environment", {})
    words = [sys.executable, "-m", "fastflower", *map(str, arguments)]
    return subprocess.Popen(words, env=environment, **options)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_an_encoding_lacks_is_replaced(encoding: str) -> None:
    draw = random.Random(encoding)
    text = "".join(draw.choice("a│→é…д字\n█×\udcff") for _ in range(500))
    raw = io.BytesIO()
    stream = Tolerant(io.TextIOWrapper(raw, encoding, newline=""))
    for start in range(0, 500, 50):
        assert stream.write(text[start : start + 50]) == 50
    stream.flush()
    assert raw.getvalue().decode(encoding) == text.encode(encoding, "replace").decode(encoding)
    assert stream.encoding == encoding


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"PYTHONIOENCODING": "latin-1"}, ["cv", "--help"]),
        ({"PYTHONIOENCODING": "ascii"}, ["flops", "resnet18"]),
        ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, ["data", "check"]),
    ],
)
def test_commands_answer_in_it(environment: dict[str, str], words: list[object], small: Path, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"\xffbl\xc3\xbcte")
    small.rename(odd)
    if words[-1] == "check":
        words = [*words, odd.rename(tmp_path / "plain")]  # names that are not UTF-8 are refused
    for arguments, code in ((words, 0), (["train", "--config", odd / "→"], 2), (["train", "--nonsense", "█"], 2)):
        process = command(*arguments, environment=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, err = process.communicate(timeout=120)
        assert process.returncode == code, (arguments, err)
        assert b"Traceback" not in err
        assert out or code


def test_training_goes_on_in_it(small: Path, tmp_path: Path, tiny_net: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding in ("ascii", "latin-1"):
        raw = io.BytesIO()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding))
            run = tmp_path / encoding
            patch.setattr(sys, "argv", ["fastflower", *map(str, train_arguments(small, run)), "--train.epochs", "2"])
            with pytest.raises(SystemExit) as end:
                cli.main()
            assert not end.value.code
            api.train(api.load_config(settings=train_settings(small, epochs=2)), tmp_path / f"{encoding}-python")
            sys.stdout.flush()
        assert raw.getvalue().decode(encoding).count("Done. Best validation loss") == 2
        for folder in (run, tmp_path / f"{encoding}-python"):
            assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_closed_pipe_ends_with_its_signal(stream: str, small: Path, tmp_path: Path) -> None:
    cases: dict[str, list[list[object]]] = {
        "stdout": [["--help"], ["train", "--print_config"]],
        "stderr": [["eval", tmp_path / "none"], ["train", "--nonsense"]],
    }
    for words in cases[stream]:
        reader, writer = os.pipe()
        os.close(reader)
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {stream: writer}
        process = command(*words, **streams)
        os.close(writer)
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out or b"", err or b"") == (CLOSED, b"", b""), words


def into_a_closed_pipe() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    cli.main()


def test_a_closed_pipe_ends_what_runs_for_longer(small: Path) -> None:
    for words in (["flops", "resnet18", "--layers"], ["data", "check", small]):
        done = in_process(into_a_closed_pipe, *words)
        assert (done.code, done.out, done.err) == (CLOSED, "", ""), words


CLOSING = (">&-", "2>&-", "<&- >&- 2>&-")  # in a shell


def closed_from_the_start(closing: str, *words: object) -> subprocess.CompletedProcess[bytes]:
    shell = ["sh", "-c", f'exec "$@" {closing}', "sh", sys.executable, *map(str, words)]
    return subprocess.run(shell, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, timeout=120)


@pytest.mark.parametrize("closing", [*(pytest.param(one, marks=pytest.mark.slow) for one in CLOSING[:2]), CLOSING[2]])
def test_standard_streams_may_be_closed_from_the_start(closing: str, small: Path) -> None:
    for words, code in ((["data", "check", small], 0), (["train", "--help"], 0), (["train", "--nonsense"], 2)):
        done = closed_from_the_start(closing, "-m", "fastflower", *words)
        assert (done.returncode, b"Traceback" in done.stderr) == (code, False), (words, done.stderr)


@pytest.mark.parametrize("closing", CLOSING)
def test_no_file_gets_what_is_written_to_a_closed_stream(closing: str, tmp_path: Path) -> None:
    program = """
import os, sys
from fastflower.runtime.output import tolerant_output, without_decoders
with tolerant_output(), without_decoders(), open(sys.argv[1], "w") as file:
    for number in (1, 2):
        os.write(number, b"what a library says")
    os.system("echo what a process says; echo and what it says of errors >&2")
    print("text")
    print("text", file=sys.stderr)
    file.write("kept")
"""
    done = closed_from_the_start(closing, "-c", program, tmp_path / "file")
    assert (done.returncode, (tmp_path / "file").read_text()) == (0, "kept"), done.stderr


class Failing(io.StringIO):
    """A stream that cannot be written, and is a terminal or not."""

    def __init__(self, number: int, *, terminal: bool) -> None:
        super().__init__()
        self._number, self._terminal = number, terminal

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self._terminal

    def write(self, _: str) -> int:
        """Fail."""
        raise OSError(self._number, os.strerror(self._number))

    def flush(self) -> None:
        """Fail."""
        self.write("")


def test_only_a_terminal_that_is_gone_is_no_failure() -> None:
    gone = Tolerant(Failing(errno.EIO, terminal=True))
    assert gone.write("text") == 4
    gone.flush()
    for number, terminal in ((errno.EIO, False), (errno.ENOSPC, False), (errno.ENOSPC, True), (errno.EPIPE, True)):
        stream = Tolerant(Failing(number, terminal=terminal))
        for write in (lambda stream=stream: stream.write("text"), stream.flush):
            with pytest.raises(OSError, match=os.strerror(number)):
                write()


def test_richs_console_raises_where_its_pipe_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Failing(errno.EPIPE, terminal=False))
    with tolerant_output(), pytest.raises(BrokenPipeError):
        Console().print("text")


def onto_a_full_disk() -> None:
    with open("/dev/full", "w") as full:
        os.dup2(full.fileno(), 1)
    cli.main()


def test_a_full_disk_is_a_sentence() -> None:
    done = in_process(onto_a_full_disk, "flops", "resnet18")
    assert done.code == 2
    assert done.err.startswith("error: ")
    assert "No space left on device" in done.err
    assert len(done.err.splitlines()) == 1
