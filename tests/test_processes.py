"""The processes that tests fork: they are told apart, and end, as real ones."""

from __future__ import annotations

import os
import signal
import sys

import pytest
import torch

from fastflower.runtime.distributed import processes
from tests.processes import Result, in_process, in_ranks


def speak_and_end() -> None:
    print(os.environ["WORD"], sys.argv[1:])
    print("to the other stream", file=sys.stderr)
    if sys.argv[1] == "exit":
        sys.exit(3)
    if sys.argv[1] == "die":
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[1] == "raise":
        raise ValueError("for the test")


@pytest.mark.parametrize(("word", "code"), [("return", 0), ("exit", 3), ("die", -signal.SIGKILL), ("raise", 1)])
def test_a_process_has_words_environment_streams_and_an_exit_code(word: str, code: int) -> None:
    result = in_process(speak_and_end, word, 7, WORD="given")
    assert (result.code, result.out) == (code, f"given ['{word}', '7']\n")
    assert result.err.startswith("to the other stream\n")
    assert ("ValueError: for the test" in result.err) == (word == "raise")
    assert "WORD" not in os.environ


def meet() -> None:
    with processes(torch.device("cpu")) as ranks:
        print(f"{ranks.rank} of {ranks.gather(ranks.rank)}")
        sys.stdout.flush()
        if sys.argv[1:] == [str(ranks.rank)]:
            sys.exit(4)


def test_ranks_meet_and_the_one_that_fails_gives_the_exit_code() -> None:
    for words, code in (([], 0), ([0], 4), ([1], 4)):
        result = in_ranks(meet, *words)
        assert result.out == "0 of [0, 1]\n1 of [0, 1]\n"
        assert result.code == code
    assert in_ranks(speak_and_end, "return", WORD="x") == Result(0, "x ['return']\n" * 2, "to the other stream\n" * 2)
