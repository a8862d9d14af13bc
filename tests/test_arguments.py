"""Words of a command line: every spelling of every option, and one sentence for each mistake."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastflower import values
from fastflower.arguments import Option, options_of, read_words
from fastflower.cli import parse
from fastflower.config import Config
from fastflower.errors import UserError
from fastflower.hints import MEANT
from fastflower.options import COMMANDS, EvalCommand, Options, Positional, TrainCommand
from fastflower.settings import keys
from tests.conftest import fastflower

TRAIN = [option for option in options_of(TrainCommand) if not option.is_positional]


def of(kind: type, *words: str) -> dict[str, Any]:
    return {option.name: value for option, value in read_words(words, "x", options_of(kind)).items()}


def drawn(draw: Callable[[st.SearchStrategy[str]], str], option: Option) -> tuple[list[str], Any]:
    """Words that an option takes, and the value that they mean."""
    samples = ["0", "1", "3", "0.5", "64 96", "1,2", "0.1 0.2 0.3", "on", "off", "auto", "none", "null", "~", "None"]
    samples += [str(choice) for kind, _ in values.alternatives(option.annotation) for choice in values._choices(kind)]
    samples += ["~/x", "some/path"] if Path in [kind for kind, _ in values.alternatives(option.annotation)] else []
    fitting = [sample for sample in samples if values.reads(option.annotation, words_of(sample))]
    text = draw(st.sampled_from(fitting))
    return text.split(" "), values.read(option.annotation, words_of(text))


def words_of(text: str) -> str | list[str]:
    return text.split(" ") if " " in text else text


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_options_are_read_in_any_spelling_and_order(data: st.DataObject) -> None:
    words, wanted = [], {}
    for option in data.draw(st.lists(st.sampled_from(TRAIN), min_size=1, max_size=8, unique=True)):
        taken, value = drawn(data.draw, option)
        names = [option.name, *option.others]
        flag = "--" + data.draw(st.sampled_from([*names, *(name.replace("_", "-") for name in names)]))
        if value is False and values.is_switch(option.annotation) and data.draw(st.booleans()):
            words.append(
                data.draw(st.sampled_from([option.opposite, option.opposite.replace("-", "_").replace("__", "--")]))
            )
        elif value is True and values.is_switch(option.annotation) and data.draw(st.booleans()):
            words.append(flag)
        else:
            words += [f"{flag}={taken[0]}"] if len(taken) == 1 and data.draw(st.booleans()) else [flag, *taken]
        wanted[option.name] = value
    assert of(TrainCommand, *words) == wanted


WORDS = [
    *(
        "train",
        "eval",
        "data",
        "check",
        "--",
        "-",
        "=",
        "--=",
        "-1",
        "-h",
        "--lr",
        "--x=",
        "--data.sizes",
        "64",
        "--amp",
    ),
    *(
        "--amp",
        "--train.compile",
        "auto",
        "--scales",
        "1,,2",
        "",
        "é\0",
        "--train.lr=",
        "--no-",
        "--no-amp=on",
        "--data.root",
    ),
    *("~nobody", "1e999", "9" * 5000),
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=6))
def test_any_words_are_a_command_or_one_sentence(words: list[str]) -> None:
    with contextlib.suppress(SystemExit):  # by help
        sentence = ""
        try:
            parse(words)
        except UserError as error:
            sentence = str(error)
        assert re.fullmatch(r"|.*[.?]", sentence)


@dataclass(frozen=True)
class Some(Options):
    """Something."""

    first: Positional[Path]
    rest: Positional[tuple[Path, ...]] = ()
    sizes: tuple[int, ...] = ()
    roots: tuple[Path, ...] = ()
    pair: tuple[int, int] = (1, 2)
    name: str | None = None
    flag: bool = False


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("a --sizes 1 2 b", {"first": Path("a"), "rest": (Path("b"),), "sizes": (1, 2)}),
        ("--sizes 1 2 a", {"first": Path("a"), "sizes": (1, 2)}),
        ("--sizes 1,2 a b", {"first": Path("a"), "rest": (Path("b"),), "sizes": (1, 2)}),
        ("--roots a b c", {"first": Path("c"), "roots": (Path("a"), Path("b"))}),
        ("--pair 3 a", {"first": Path("a"), "pair": (3, 3)}),
        ("--pair 3 4 5", {"first": Path("5"), "pair": (3, 4)}),
        ("--flag a", {"first": Path("a"), "flag": True}),
        ("--flag off a", {"first": Path("a"), "flag": False}),
        ("--flag --no-flag a", {"first": Path("a"), "flag": False}),
        ("--name -1 a", {"first": Path("a"), "name": "-1"}),
        ("--name=--x a", {"first": Path("a"), "name": "--x"}),
        ("--name none -- --a --b", {"first": Path("--a"), "rest": (Path("--b"),), "name": None}),
    ],
)
def test_values_end_where_the_next_word_is_none(words: str, wanted: dict[str, Any]) -> None:
    assert of(Some, *words.split()) == wanted


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train", "--train.epochs", "x"], "--train.epochs is x: it takes a whole number above 0 or none."),
        (["train", "--train.epochs=-1"], "--train.epochs is -1: it takes a whole number above 0 or none."),
        (["train", "--train.epochs"], "--train.epochs has no value: it takes a whole number above 0 or none."),
        (["train", "--train.epochs", "--amp"], "--train.epochs has no value: it takes a whole number above 0 or none."),
        (["train", "--train.lr=nan"], "--train.lr is nan: it takes a number above 0 or none."),
        (["train", "--train.ema", "1"], "--train.ema is 1: it takes a number from 0 and below 1."),
        (["train", "--train.momentum", "2"], "--train.momentum is 2: it takes a number from 0 to 1."),
        (["train", "--data.folds", "1"], "--data.folds is 1: it takes a whole number from 2 on or none."),
        (["train", "--data.cache", "rom"], "--data.cache is rom: it takes off, ram, gpu or auto; did you mean ram?"),
        (["train", "--amp=perhaps"], "--amp is perhaps: it takes on or off."),
        (["train", "--train.compile=perhaps"], "--train.compile is perhaps: it takes on, off or auto."),
        (["train", "--no-amp=on"], "--no-amp takes no value: give --no-amp, or --amp with on or off."),
        (["train", "--train.no-compile=off"], "--train.no-compile takes no value: "),
        (["train", "--data.root", "a", "--data.root=b"], "--data.root stands twice, with different values: "),
        (["train", "--train.batch-size", "1.0"], "--train.batch-size is 1.0: it takes a whole number above 0, "),
        (["cv", "a", "--folds", "3", "--data.folds", "4"], "--folds 3 and --data.folds 4 both name the number of "),
        (["cv", "a", "--data.fold", "1"], "cv trains all folds: leave --data.fold out"),
        (["train", "--data.mean", "1", "2"], "--data.mean is 1 2: it takes 3 numbers or none."),
        (
            ["train", "--data.sizes", "some"],
            "--data.sizes is some: it takes auto, all or one or more whole ",
        ),
        (["eval", "r", "--crops", "5"], "--crops is 5: it takes 1 or 10."),
        (["eval", "r", "--scales", "224,x"], "--scales is 224,x: it takes one or more whole numbers above 0."),
        (["eval"], "fastflower eval needs RUN: it is fastflower eval RUN [--OPTION VALUE ...]."),
        (["eval", "a", "b"], "there is no place for b in fastflower eval RUN [--OPTION VALUE ...]."),
        (["trian"], "there is no command trian; did you mean train?"),
        (["data", "chek"], "there is no command data chek; did you mean data check?"),
        (["check"], "there is no command check; did you mean data check?"),
        (["evaluate"], "there is no command evaluate; did you mean eval?"),
        (["xyzzy"], "there is no command xyzzy; there are completion, cv, data check, "),
        (["--amp", "train"], "a command comes first: "),
        (["train", "--xyzzy"], "there is no option --xyzzy; fastflower train --help lists all."),
        (["train", "--train.lrr", "1"], "there is no option --train.lrr; did you mean --train.lr?"),
        (["train", "--config", "resnet43"], "there is no configuration resnet43; did you mean resnet34?"),
        (["train", "--config", "xyzzy"], "there is no configuration xyzzy. With fastflower come demo, "),
        (["train", "--config", "demo.yaml"], "the configuration that comes with fastflower is called demo."),
    ],
)
def test_a_mistake_is_one_sentence_on_standard_error(words: list[str], sentence: str) -> None:
    result = fastflower(*words)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"error: {sentence}") or sentence in result.err
    assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize("word", ["", " "])
def test_a_variable_of_the_shell_that_is_not_set_is_no_value(word: str) -> None:
    for kind in COMMANDS.values():
        for option in options_of(kind):
            for words in [[word]] if option.is_positional else [[option.flag, word], [f"{option.flag}={word}"]]:
                with pytest.raises(UserError, match=r"^\S+ is empty: it takes |^there is no place for "):
                    read_words(words, "x", [option])


@pytest.mark.parametrize(
    ("word", "option"),
    [
        *((word, "--train.lr") for word in ("learning_rate", "learning-rate", "lr", "base-lr")),
        *((word, "--train.batch-size") for word in ("batch", "batch-size", "batch_size", "bs", "b")),
        *((word, "--data.crop") for word in ("imgsz", "img-size", "image_size", "input-size")),
        *((word, "--model.name") for word in ("arch", "model", "network")),
        *((word, "--train.epochs") for word in ("epochs", "epoch", "num-epochs")),
        *((word, "--data.threads") for word in ("workers", "num_workers", "j")),
        *((word, "--model.pretrained") for word in ("pretrained", "weights")),
        *((word, "--run") for word in ("output", "output-dir", "out")),
        ("wd", "--train.weight-decay"),
        ("weight-decay", "--train.weight-decay"),
        ("data", "--data.root"),
        ("momentum", "--train.momentum"),
    ],
)
def test_names_of_other_programs_lead_to_the_meant_option(word: str, option: str, tmp_path: Path) -> None:
    for flag in {f"--{word}", f"-{word}" if len(word) == 1 else f"--{word}"}:
        for written in ([flag, "1"], [f"{flag}=1"]):
            assert fastflower("train", *written).err == f"error: there is no option {flag}; it is {option} here.\n"
    if option == "--run" or word in ("data", "model"):  # keys of a file that are sections, or no settings
        return
    key = option[2:].replace("-", "_")
    (tmp_path / "mine.yaml").write_text(f"{word}: 1\n")
    assert (
        f"there is no setting {word}; did you mean {key}?"
        in fastflower("train", "--config", tmp_path / "mine.yaml").err
    )


def test_every_hint_is_an_option_of_some_command() -> None:
    names = {option.name for kind in COMMANDS.values() for option in options_of(kind)}
    assert {name for meant in MEANT.values() for name in meant} <= names


def test_train_and_eval_call_their_data_by_the_same_names() -> None:
    shared = ["--data.root", "x", "--data.sizes", "64", "--device", "cpu"]
    train, evaluation = of(TrainCommand, *shared), of(EvalCommand, "run", *shared)
    assert train.items() <= (evaluation | {"run": None}).items()
    for flag in ("--batch-size", "--batch_size", "--train.batch-size", "--train.batch_size"):
        assert of(EvalCommand, "run", flag, "3")["batch_size"] == 3
    for flag in ("--sizes", "--data.sizes"):
        assert of(EvalCommand, "run", flag, "64", "96")["data.sizes"] == (64, 96)


def test_every_setting_is_an_option_with_a_text() -> None:
    settings_options = {option.name: option for option in options_of(TrainCommand) if option.is_setting}
    assert sorted(settings_options) == sorted(keys())
    assert all(option.text for kind in COMMANDS.values() for option in options_of(kind))
    defaults = Config()
    assert settings_options["train.batch_size"].value_in(defaults) == defaults.train.batch_size


def test_no_two_options_have_one_name() -> None:
    for kind in COMMANDS.values():
        names: Sequence[str] = [name for option in options_of(kind) for name in (option.name, *option.others)]
        assert len(set(names)) == len(names)
