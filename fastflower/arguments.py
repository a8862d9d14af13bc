"""The options of a command, read from its dataclass, and the words of a command line, read by them.

An option is a field: its name, type, default and the text under it. The fields of settings inside a command count as
its own, under dotted names.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import textwrap
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from fastflower import hints, values
from fastflower.errors import UserError
from fastflower.options import FIXED, POSITIONAL, Named


@dataclass(frozen=True)
class Option:
    """One option of a command, or one of the words that stand without a name."""

    path: tuple[str, ...]  # attributes that lead from the command to its value
    name: str  # dotted, with underscores: train.batch_size
    others: tuple[str, ...]  # names that are accepted too
    annotation: Any
    default: Any  # MISSING where it must be given
    text: str
    is_positional: bool

    @property
    def flag(self) -> str:
        """How it is written: --train.batch-size, or RUN where it has no name."""
        return self.name.upper() if self.is_positional else "--" + self.name.replace("_", "-")

    @property
    def is_setting(self) -> bool:
        """Whether it is one of the settings inside the command, which a configuration file may also give."""
        return len(self.path) > 1

    @property
    def section(self) -> str:
        """The first part of a dotted name: train."""
        return self.name.rpartition(".")[0]

    @property
    def opposite(self) -> str:
        """How a switch is turned off: --train.no-compile."""
        section, dot, last = self.name.rpartition(".")
        return f"--{section}{dot}no-{last}".replace("_", "-")

    def value_in(self, settings: Any) -> Any:
        """Its value if nothing is given: that of the settings, if it is one of them."""
        return functools.reduce(getattr, self.path[1:], settings) if self.is_setting else self.default


def options_of(command: type) -> list[Option]:
    """All options of a command, in the order of its fields; those of its bases come last."""
    own = set(vars(command).get("__annotations__", {}))
    options = list(_options(command, (), ""))
    return sorted(options, key=lambda option: option.path[0] not in own)


def _options(kind: type, path: tuple[str, ...], prefix: str) -> Iterable[Option]:
    annotations, texts = get_type_hints(kind, include_extras=True), field_texts(kind)
    for field in fields(kind):
        annotation = annotations[field.name]
        metadata = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
        if FIXED in metadata:
            continue
        naming = next((one for one in metadata if isinstance(one, Named)), Named())
        name = field.name if naming.name is None else naming.name
        inner = get_args(annotation)[0] if metadata else annotation
        if is_dataclass(inner) and isinstance(inner, type):
            yield from _options(inner, (*path, field.name), f"{prefix}{name}." if name else prefix)
            continue
        default = field.default if field.default_factory is MISSING else field.default_factory()
        text, positional = texts.get(field.name, ""), POSITIONAL in metadata
        yield Option((*path, field.name), prefix + name, naming.others, annotation, default, text, positional)


@functools.cache
def field_texts(kind: type) -> Mapping[str, str]:
    """The string under each field of a dataclass, its bases' too."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if is_dataclass(base):
            (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
            assert isinstance(definition, ast.ClassDef)
            for statement, below in itertools.pairwise(definition.body):
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                    match below:
                        case ast.Expr(ast.Constant(str(text))):
                            texts[statement.target.id] = inspect.cleandoc(text)
    return texts


def find_command(words: Sequence[str], names: Collection[str]) -> tuple[str, list[str]]:
    """The command that a line begins with, such as "data check", and the words after it; a group of them as "data".

    Raises:
        UserError: there is none of that name.
    """
    groups = {name.partition(" ")[0] for name in names if " " in name}
    first, rest = words[0], list(words[1:])
    if first in groups:
        if not rest or rest[0].startswith("-"):
            return first, rest
        first, rest = f"{first} {rest[0]}", rest[1:]
    if first in names:
        return first, rest
    if first.startswith("-"):
        raise UserError(f"a command comes first: fastflower COMMAND {first} ...; fastflower --help lists them.")
    near = hints.nearest_command(first, sorted(names)) or hints.nearest_command(first.rpartition(" ")[2], sorted(names))
    hint = f"did you mean {near}?" if near else f"there are {', '.join(sorted(names))}."
    raise UserError(f"there is no command {first}; {hint}")


def read_words(words: Sequence[str], command: str, options: Sequence[Option]) -> dict[Option, Any]:
    """The values that the words after a command's name give.

    Raises:
        UserError: an option that there is not, or a value that its option does not take.
    """
    given: dict[Option, Any] = {}
    unnamed: list[str] = []
    positional = [option for option in options if option.is_positional]
    waiting = deque(words)
    while waiting:
        word = waiting.popleft()
        if word == "--":
            unnamed += waiting
            break
        if not _is_option(word):
            unnamed.append(word)
            continue
        name, attached, value = word.partition("=")
        option, switched = _find(name, command, options)
        if switched is not None:
            if attached:
                raise UserError(f"{name} takes no value: give {name}, or {option.flag} with on or off.")
            given[option] = switched
            continue
        taken = [value] if attached else _following(waiting, option, _wanted(positional, unnamed))
        read = _read(option, taken, name)
        if values.most(option.annotation) is None and given.get(option, read) != read:
            raise UserError(f"{name} stands twice, with different values: give all of them after one.")
        given[option] = read
    return given | _placed(unnamed, positional, command)


def _is_option(word: str) -> bool:
    return word.startswith("--") or (word[:1] == "-" and word[1:2].isalpha() and not values.reads(float, word))


def _find(flag: str, command: str, options: Sequence[Option]) -> tuple[Option, bool | None]:
    """The option of a name, and what a switch is set to by the name alone (False: --no-amp)."""
    name = flag.lstrip("-").replace("-", "_")
    by_name = {name: option for option in options if not option.is_positional for name in (option.name, *option.others)}
    if flag.startswith("--") and name in by_name:
        return by_name[name], None
    for option in by_name.values():
        if bool in [kind for kind, _ in values.alternatives(option.annotation)]:
            section, dot, last = option.name.rpartition(".")
            if name in (f"{section}{dot}no_{last}", f"no_{option.name}"):
                return option, False
    known = {name: option.flag for name, option in by_name.items()} | {
        option.name: option.flag for option in options if option.is_positional
    }
    if certain := hints.meant(name, known):
        raise UserError(f"there is no option {flag}; it is {known[certain]} here.")
    near = hints.nearest(name, known)
    hint = f"did you mean {known[near]}?" if near else f"fastflower {command} --help lists all."
    raise UserError(f"there is no option {flag}; {hint}")


def _wanted(positional: Sequence[Option], unnamed: Sequence[str]) -> tuple[int, bool]:
    """How many words without a name are still needed, and whether one more would be taken."""
    needed = sum(option.default is MISSING for option in positional) - len(unnamed)
    room = any(values.most(option.annotation) is None for option in positional) or len(positional) > len(unnamed)
    return max(needed, 0), room


def _following(waiting: deque[str], option: Option, wanted: tuple[int, bool]) -> list[str]:
    """Take the words that are an option's values from those that follow it."""
    most, annotation = values.most(option.annotation), option.annotation
    if values.is_switch(annotation):
        return [waiting.popleft()] if waiting and values.reads(annotation, waiting[0] or "?") else []
    needed, room = wanted
    taken: list[str] = []
    while waiting and not _is_option(waiting[0]) and len(taken) != most:
        if taken and (len(waiting) <= needed or (room and not values.reads(_item(annotation), waiting[0]))):
            break
        taken.append(waiting.popleft())
    return taken


def _item(annotation: Any) -> Any:
    """The type of a tuple's first item."""
    return next(get_args(kind)[0] for kind, _ in values.alternatives(annotation) if get_origin(kind) is tuple)


def _read(option: Option, words: Sequence[str], flag: str) -> Any:
    annotation = option.annotation
    if not words and values.is_switch(annotation):
        return True
    if not words:
        raise UserError(f"{flag} has no value: it takes {values.takes(annotation)}.")
    if not all(map(str.strip, words)):  # a variable of the shell that is not set; none is a word
        raise UserError(values.refusal(flag, "", annotation))
    try:
        return values.read(annotation, words[0] if len(words) == 1 else list(words))
    except ValueError as error:
        raise UserError(values.refusal(flag, " ".join(words), annotation)) from error


def _placed(words: Sequence[str], positional: Sequence[Option], command: str) -> dict[Option, Any]:
    """The values of the options that have no names: the first words, and all that are left for one that takes many."""
    line = usage(command, positional)
    given: dict[Option, Any] = {}
    left = list(words)
    for option in positional:
        many = values.most(option.annotation) is None
        taken, left = (left, []) if many else (left[:1], left[1:])
        if taken:
            given[option] = _read(option, taken, option.flag)
        elif option.default is MISSING:
            raise UserError(f"fastflower {command} needs {option.flag}: it is {line}.")
    if left:
        raise UserError(f"there is no place for {left[0]} in {line}.")
    return given


def _usage(option: Option) -> str:
    word = option.flag + (" ..." if values.most(option.annotation) is None else "")
    return word if option.default is MISSING else f"[{word}]"


def usage(command: str, options: Sequence[Option]) -> str:
    """The line that shows how a command is called."""
    words = [_usage(option) for option in options if option.is_positional]
    return " ".join(["fastflower", command, *words, "[--OPTION VALUE ...]"])
