"""YAML files as their writers mean them: version 1.2's plain words, one document, no key twice, any usual encoding."""

from __future__ import annotations

import codecs
import re
from pathlib import Path
from typing import Any

import yaml

from fastflower.errors import UserError

ENCODINGS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
# YAML 1.2's core schema: the first characters, and all, of the plain words that are no text.
WORDS = {
    "null": ("~nN", r"~|null|Null|NULL|"),
    "bool": ("tTfF", r"true|True|TRUE|false|False|FALSE"),
    "int": ("-+0123456789", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    "float": (
        "-+.0123456789",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    ),
}


class _Twice(yaml.YAMLError):
    """A key that stands twice."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - the name is PyYAML's

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """PyYAML's, which would let the last of two values win."""
        seen: dict[Any, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise _Twice(f"the key {key.value} stands twice, in lines {seen[key.value]} and {line}: keep one")
                seen[key.value] = line
        return super().construct_mapping(node, deep)

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        """As in version 1.2: 010 is ten."""
        word: str = self.construct_scalar(node)
        base = {"0o": 8, "0x": 16}.get(word[:2], 10)
        number = int(word[2:] if base != 10 else word, base)
        str(number)  # ValueError if it is too long to be written in a message
        return number


class Dumper(yaml.SafeDumper):
    """Writes in quotes what either version of YAML would take for something else than text."""

    yaml_implicit_resolvers = yaml.SafeDumper.yaml_implicit_resolvers.copy()


for _name, (_first, _words) in WORDS.items():
    for _class in (_Loader, Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_words})$"), list(_first))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("^$"), [""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile("^<<$"), ["<"])
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)


def read_yaml(path: Path) -> Any:
    """What a YAML file holds, as plain values; None if it is empty.

    Raises:
        UserError: it cannot be read, or is not one document of YAML.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give an existing configuration file.") from error
    encoding = next((name for mark, name in ENCODINGS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8 (byte {error.start}): save it as UTF-8.") from error
    if "\0" in text:
        raise UserError(f"{path} is no text in UTF-8, but has zero bytes: save it as UTF-8.")
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{path} is not YAML ({_reason(error)}).") from error
    except _Twice as error:
        raise UserError(f"{path}: {error}.") from error
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not YAML ({' '.join(str(error).split())}).") from error


def _reason(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    if "single document" in (error.context or ""):
        return f"line {line} begins another document, by ---: keep one in a file"
    if "'\\t'" in (error.problem or ""):
        return f"there is a tab in line {line}: indent by spaces"
    return f"line {line}: {' '.join(filter(None, (error.context, error.problem))).strip()}"
