"""Markdown taken apart: what is written, what is code, and which commands are in it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("fastflower", "make", "python", "python3", "torchrun")
OPERATORS = (";", "&&", "||", "|", "&")
CODE = re.compile(
    r"^ *```(?P<language>\w*)\n(?P<fenced>[\s\S]*?)^ *```\n"
    r"|(?<=\n\n)(?P<indented> {4,}\S.*\n(?:(?: {4}.*)?\n)*)",
    re.MULTILINE,
)
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")


@dataclass(frozen=True)
class Block:
    """A block of code of a page."""

    language: str  # of a fence; "" where it is indented
    line: int  # of the page, from 1
    text: str


@dataclass(frozen=True)
class Page:
    """A page apart: what is written and what is code."""

    prose: str  # with as many lines as the page
    blocks: list[Block]


def read(text: str) -> Page:
    """Take the blocks of code, fenced or indented, out of a page."""
    text += "\n"
    blocks = []
    for match in CODE.finditer(text):
        kind = "indented" if match["fenced"] is None else "fenced"
        blocks.append(Block(match["language"] or "", text.count("\n", 0, match.start(kind)) + 1, match[kind]))
    return Page(CODE.sub(lambda match: "\n" * match[0].count("\n"), text), blocks)


def commands(block: Block) -> Iterator[tuple[int, list[str]]]:
    """The line of each command of a block, and its words, as often as loops around it carry it out."""
    loops: list[tuple[str, list[str]]] = []
    number, joined = block.line, ""
    for offset, line in enumerate([*block.text.splitlines(), ""]):
        joined += line.strip().removeprefix("!")
        if joined.endswith("\\"):
            joined = joined[:-1]
            continue
        for words in simple_commands(joined):
            if words[:1] == ["for"]:
                loops.append((words[1], words[3:]))
            elif words == ["done"]:
                loops.pop()
            else:
                called = without_wrappers(words)
                if called and Path(called[0]).name in PROGRAMS:
                    for expanded in expand(called, loops):
                        yield number, [Path(expanded[0]).name, *expanded[1:]]
        number, joined = block.line + offset + 1, ""


def simple_commands(line: str) -> list[list[str]]:
    """The words of a line, of each command in it, without comments and what output is redirected to."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError:  # a quotation that does not close: no command, or one that will not parse
        words = line.split()
    groups: list[list[str]] = [[]]
    for word in words:
        if word in OPERATORS:
            groups.append([])
        else:
            groups[-1].append(word)
    return [words[: next((i for i, word in enumerate(words) if word in (">", ">>", "<")), None)] for words in groups]


def without_wrappers(words: list[str]) -> list[str]:
    """A command without what stands before it: do, VARIABLE=VALUE, timeout."""
    while words and (words[0] == "do" or re.match(r"[A-Za-z_]\w*=", words[0])):
        words = words[1:]
    if words[:1] == ["timeout"]:
        options = next(i for i, word in enumerate(words[1:], start=1) if not word.startswith("-"))
        return words[options + 1 :]
    return words


def expand(words: list[str], loops: Sequence[tuple[str, list[str]]]) -> list[list[str]]:
    """A command with each value of the variables of loops."""
    expanded = [words]
    for name, values in loops:
        expanded = [
            [re.sub(rf"\${name}\b|\${{{name}}}", lambda _, value=value: value, word) for word in command]  # type: ignore[misc]
            for command in expanded
            for value in values
        ]
    return expanded


def spans(page: Page) -> Iterator[tuple[int, str]]:
    """The line of each span of code in the prose, and its text on one line."""
    for match in SPAN.finditer(page.prose):
        yield page.prose.count("\n", 0, match.start()) + 1, " ".join(match[1].split())


def mentioned_commands(page: Page) -> Iterator[tuple[int, list[str]]]:
    """The line of each command in a sentence, and its words; settings with a value are taken as those of training."""
    for line, span in spans(page):
        (words, *_) = simple_commands(span)
        if len(words) > 1 and re.match(r"--(data|model|train)\.", words[0]):
            yield line, ["fastflower", "train", *words]
        elif len(words) > 1 and words[0] in PROGRAMS:
            yield line, words
