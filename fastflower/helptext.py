"""Help texts, written from what the commands and their options say of themselves, for any width of a terminal."""

from __future__ import annotations

import inspect
import re
import shutil
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

from fastflower.arguments import Option, options_of, usage
from fastflower.config import Config
from fastflower.values import choices_left_out, is_switch, placeholder, written

NAMES_WIDTH = 28  # columns in which the options stand, beside what they do
WIDEST = 140  # columns: longer lines are hard to read
# What most runs set, in this order; a command with settings shows them first.
MOST_USED = (
    *("pictures", "data.root", "config", "run", "resume", "model.name", "model.pretrained", "data.crop"),
    *("train.epochs", "train.batch_size", "train.lr", "train.hours", "data.threads", "amp", "device"),
)
EXAMPLES = """\
fastflower train PICTURES                     # a folder for each class
fastflower eval runs/NAME                     # how good it is, where it errs
fastflower predict runs/NAME NEW --out x.csv  # what is on new pictures
fastflower train --config resnet34 --data.root DATA --amp
fastflower COMMAND --help                     # all options of a command"""
NONE = r"\bNone = "
JOINED = "\0"  # a space at which no line ends


def command_help(command: str, kind: type, settings: Config, fitted: Collection[str] = ()) -> str:
    """The help of one command.

    Args:
        command: its name, such as "data check".
        kind: its dataclass.
        settings: those that hold where nothing is given.
        fitted: names of those that are fitted to the data instead.
    """
    options = options_of(kind)
    summary, examples, rest = described(kind)
    parts = [f"usage: {usage(command, options)}", _wrapped(summary)]
    if examples:
        parts.append(_section("examples", examples))
    parts += [_wrapped(paragraph) for paragraph in rest]
    common = [option for name in MOST_USED for option in options if option.name == name]
    if any(option.is_setting for option in options):
        parts.append(_section("most used", _rows(common, settings, fitted)))
        options = [option for option in options if option not in common]
    for title, belonging in _by_section(options).items():
        parts.append(_section(title, _rows(belonging, settings, fitted)))
    if any(option.is_setting for option in options):
        parts.append(_wrapped("Settings are the keys of a configuration file too: train: {batch_size: 64}."))
    return "\n\n".join(parts) + "\n"


def program_help(description: str, commands: Mapping[str, type], settings: Config, fitted: Collection[str] = ()) -> str:
    """The help of the program: examples, commands, and the most used options of training."""
    listed = _table([(name, described(kind)[0]) for name, kind in commands.items()])
    options = options_of(commands["train"])
    common = [option for name in MOST_USED for option in options if option.name == name]
    parts = [
        "usage: fastflower COMMAND [--OPTION VALUE ...]",
        *[_wrapped(paragraph) for paragraph in description.split("\n\n")],
        _section("examples", EXAMPLES.splitlines()),
        _section("commands", listed),
        _section("most used options of train", _rows(common, settings, fitted)),
    ]
    return "\n\n".join(parts) + "\n"


def group_help(group: str, commands: Mapping[str, type]) -> str:
    """The help of several commands with one first word, such as data."""
    listed = _table([(name, described(kind)[0]) for name, kind in commands.items() if name.startswith(f"{group} ")])
    return f"usage: fastflower {group} COMMAND [--OPTION VALUE ...]\n\n" + _section("commands", listed) + "\n"


def described(kind: type) -> tuple[str, list[str], list[str]]:
    """What a command's docstring says: its first sentence, its examples (indented lines), its other paragraphs."""
    first, *paragraphs = inspect.cleandoc(kind.__doc__ or "").split("\n\n")
    summary, colon, example = " ".join(first.split()).partition(": fastflower ")
    examples = [f"fastflower {example}"] if colon else []
    rest = []
    for paragraph in paragraphs:
        if paragraph.startswith("    "):
            examples += textwrap.dedent(paragraph).splitlines()
        else:
            rest.append(paragraph)
    return summary.rstrip(".") + ".", examples, rest


def explained(option: Option, default: Any, *, fitted: bool = False) -> str:
    """What an option does, and what holds if it is not given."""
    text = " ".join(option.text.split())
    if fitted:
        return f"{re.sub(NONE, 'none = ', text)}{_choices(option)} (default: fitted to the data)"
    text = re.sub(NONE, "default: " if default is None else "none = ", text)
    text = re.sub(r"([.)]) default: ", r"\1 Default: ", text)
    text += _choices(option)
    if default is MISSING or default == () or (default is False and not option.is_setting):
        return text
    if default is None:
        return (
            text if "default:" in text.lower() or not is_switch(option.annotation) else f"{text} (default:{JOINED}auto)"
        )
    value = written(default)
    return f"{text} (default:{JOINED if len(value) < NAMES_WIDTH else ' '}{value.replace(' ', JOINED)})"


def _choices(option: Option) -> str:
    """The sentence on those that its placeholder leaves out."""
    choices = choices_left_out(option.annotation)
    return f" One of {', '.join(choices)}." if choices else ""


def _width() -> int:
    return max(min(shutil.get_terminal_size().columns, WIDEST), 40)


def _wrapped(text: str) -> str:
    return "\n".join(_lines(" ".join(text.split()), _width()))


def _lines(text: str, width: int) -> list[str]:
    lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    return [line.replace(JOINED, " ") for line in lines]


def _section(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"{title}:", *(f"  {line}" for line in lines)])


def _by_section(options: Sequence[Option]) -> dict[str, list[Option]]:
    """Options under the titles that they stand under, in the order of the settings."""
    titles = ["options", *(field.name for field in fields(Config))]
    sections: dict[str, list[Option]] = {}
    for option in options:
        sections.setdefault(option.section if option.is_setting and option.section else "options", []).append(option)
    return {title: sections[title] for title in titles if title in sections}


def _rows(options: Sequence[Option], settings: Config, fitted: Collection[str]) -> list[str]:
    texts = (
        explained(option, option.value_in(settings), fitted=option.is_setting and option.name in fitted)
        for option in options
    )
    return _table([(_invocation(option), text) for option, text in zip(options, texts, strict=True)])


def _invocation(option: Option) -> str:
    if option.is_positional:
        return option.flag
    if placeholder(option.annotation):
        return f"{option.flag} {placeholder(option.annotation)}"
    return f"{option.flag}, {option.opposite}" if option.is_setting else option.flag


def _table(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Names, and beside each its text; under it where a name is long."""
    lines = []
    for name, text in rows:
        first, *others = _lines(text, _width() - NAMES_WIDTH - 2) or [""]
        if len(name) + 2 > NAMES_WIDTH:
            lines += [name, " " * NAMES_WIDTH + first]
        else:
            lines.append(f"{name:<{NAMES_WIDTH}}{first}")
        lines += [" " * NAMES_WIDTH + line for line in others]
    return [line.rstrip() for line in lines]
