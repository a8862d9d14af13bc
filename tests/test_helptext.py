"""Help: made of the dataclasses, for any width, whole, and in words that are no Python."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest

from fastflower.arguments import options_of
from fastflower.config import Config
from fastflower.helptext import MOST_USED, command_help, program_help
from fastflower.layers import FITTED
from fastflower.options import COMMANDS, Named, Options, Positional
from fastflower.settings import build, keys
from tests.conftest import fastflower


@dataclass(frozen=True)
class Bake(Options):
    """Bake a cake: fastflower bake OVEN --hot

    It takes
    a while.

        fastflower bake OVEN --size 3     # a small one
    """

    oven: Positional[Path]
    """The oven."""
    cakes: Positional[tuple[Path, ...]] = ()
    """What is
    baked."""
    size: int | None = None
    """Its size; None = as large as the oven."""
    hot: bool = False
    """Hotter."""
    form: Literal["round", "square"] = "round"
    """Its form."""
    layers: tuple[int, ...] = (1, 2)
    """Layers; None = none at all."""
    sugar: Annotated[float, Named("taste.sugar_share")] = 0.5
    """Sugar."""
    settings: Annotated[Config, Named("")] = field(default_factory=Config)


def test_help_is_made_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = command_help("bake", Bake, build({"train": {"epochs": 3}}, ""))
    assert text.startswith(
        "usage: fastflower bake OVEN [CAKES ...] [--OPTION VALUE ...]\n\n"
        "Bake a cake.\n\n"
        "examples:\n"
        "  fastflower bake OVEN --hot\n"
        "  fastflower bake OVEN --size 3     # a small one\n\n"
        "It takes a while.\n\n"
        "most used:\n"
    )
    for line in (
        "  OVEN                        The oven.",
        "  CAKES                       What is baked.",
        "  --size INT                  Its size; default: as large as the oven.",
        "  --hot                       Hotter.",
        "  --form {round,square}       Its form. (default: round)",
        "  --layers INT ...            Layers; none = none at all. (default: 1 2)",
        "  --train.epochs INT          Passes over the training split; none = 70, or as\n"
        "                              many as train.hours leaves time for. (default: 3)",
    ):
        assert f"\n{line}\n" in text
    assert "\n  --taste.sugar-share NUMBER  Sugar. (default: 0.5)\n" in text


@pytest.mark.parametrize("columns", [60, 80, 110, 200])
@pytest.mark.parametrize("command", COMMANDS)
def test_lines_are_as_long_as_the_terminal_allows(command: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    kind = COMMANDS[command]
    text = command_help(command, kind, Config())
    words = " ".join(text.split())
    for option in options_of(kind):
        assert f" {option.flag}" in words
        assert " ".join(option.text.split()).split("; None =")[0].partition(" None =")[0] in words
    ends = [line for line in text.splitlines() if len(line) > columns]
    assert all(line.startswith(("  fastflower ", "usage: ", "  --")) or " " not in line.strip() for line in ends)
    # nothing is wrapped twice: no line could have taken the next one's first word
    width = min(columns, 140)
    for first, second in re.findall(r"\n {30}(\S.*)(?=\n {30}(\S+))", text):
        assert 30 + len(first) + 1 + len(second) > width or first.endswith(":") or "default:" in second


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_no_words_of_python(command: str) -> None:
    result = fastflower(*command.split(), "--help")
    assert result.code == 0
    assert result.err == ""
    for word in ("None", "{None}", "typing", "Annotated", "PATH]]", "True", "False", "_size", "PosixPath"):
        assert not re.search(rf"(--\S*|[( ]){re.escape(word)}\b", result.out), word


def test_programs_help_opens_with_examples_and_a_dozen_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = program_help("What it is.", COMMANDS, Config())
    assert text.index("examples:") < text.index("commands:") < text.index("most used options of train:")
    assert all(f"\n  {name} " in text for name in COMMANDS)
    shown = re.findall(r"^  (--\S+)", text.partition("most used")[2], re.MULTILINE)
    assert 10 <= len(shown) <= 15
    assert max(map(len, text.splitlines())) <= 80
    named = {option.name for option in options_of(COMMANDS["train"])}
    assert len(named & set(MOST_USED)) >= 12


@pytest.mark.parametrize(
    ("words", "code"), [([], 2), (["-h"], 0), (["--help"], 0), (["data"], 2), (["data", "-h"], 0), (["eval", "-h"], 0)]
)
def test_help_that_nobody_asked_for_is_a_mistake(words: list[str], code: int) -> None:
    result = fastflower(*words)
    assert result.code == code
    assert (result.err if code else result.out).startswith("usage: fastflower")
    assert (result.out if code else result.err) == ""


def test_help_shows_what_holds_beside_the_other_words(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("train: {epochs: 123}\n")
    for words in (["--config", tmp_path / "mine.yaml", "--help"], ["--help", f"--config={tmp_path / 'mine.yaml'}"]):
        assert "(default: 123)" in fastflower("train", *words).out
    assert fastflower("train", "--help", "--nonsense").code == 0


@pytest.mark.parametrize("words", [["train"], ["cv"], ["train", "PICTURES"], ["train", "--config", "scratch"]])
def test_help_says_what_is_fitted_to_the_data_in_place_of_a_number_that_is_not_used(words: list[str]) -> None:
    text = " ".join(fastflower(*words, "--help").out.split())
    assert text.count("(default: fitted to the data)") == len(FITTED)
    assert "as many as train.hours leaves time for. (default: fitted to the data)" in text
    assert set(FITTED) <= set(keys())
    assert "fitted to the data)" not in " ".join(fastflower(words[0], "--config", "demo", "--help").out.split())
