"""Completion: bash offers the commands, their options and the words that these take, and else leaves it to files."""

from __future__ import annotations

import shlex
import subprocess

import pytest

from fastflower.arguments import options_of
from fastflower.options import COMMANDS
from fastflower.values import choices_of
from tests.conftest import fastflower


def offered(*lines: list[str]) -> list[set[str]]:
    """What bash offers for the last word of each line."""
    script = fastflower("completion", "bash").out
    for words in lines:
        before, last = shlex.quote(words[-2]), shlex.quote(words[-1])
        script += f"COMP_WORDS=({shlex.join(words)}) COMP_CWORD={len(words) - 1} COMPREPLY=()\n"
        script += f'_fastflower fastflower {last} {before}\necho "${{COMPREPLY[*]}}"\n'
    done = subprocess.run(["bash", "-u"], input=script, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return [set(line.split()) for line in done.stdout.split("\n")[:-1]]


def test_bash_offers_what_may_come_next() -> None:
    lines = [["fastflower", ""], ["fastflower", "tr"], ["fastflower", "data", ""], ["fastflower", "train", "--train.b"]]
    lines += [["fastflower", "train", "--data.cache", ""], ["fastflower", "train", "--train.compile", "o"]]
    lines += [["fastflower", "data", "check", "--j"], ["fastflower", "eval", "runs/"], ["fastflower", "xyz", "--"]]
    first = {name.partition(" ")[0] for name in COMMANDS}
    assert offered(*lines) == [
        first | {"--help", "--version"},
        {"train"},
        {name.partition(" ")[2] for name in COMMANDS if name.startswith("data ")},
        {"--train.batch-size", "--train.best"},
        {"off", "ram", "gpu", "auto"},
        {"on", "off"},
        {"--json"},
        set(),
        set(),
    ]


def test_every_option_of_every_command_is_offered() -> None:
    offers = offered(*(["fastflower", *name.split(), "--"] for name in COMMANDS))
    for kind, words in zip(COMMANDS.values(), offers, strict=True):
        assert {option.flag for option in options_of(kind) if not option.is_positional} < words


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_scripts_have_the_same_words(shell: str) -> None:
    script = fastflower("completion", shell).out
    for name, kind in COMMANDS.items():
        assert name.split()[0] in script
        for option in options_of(kind):
            if not option.is_positional:
                assert (f"-l {option.flag[2:]} " if shell == "fish" else f" {option.flag} ") in script
                assert " ".join(choices_of(option.annotation)) in script


def test_another_shell_is_refused_with_those_that_there_are() -> None:
    assert "it takes bash, zsh or fish" in fastflower("completion", "csh").err
