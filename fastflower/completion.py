"""Scripts by which a shell completes commands, options and the words that an option takes."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from fastflower.arguments import Option, options_of
from fastflower.values import choices_of, is_switch

Shell = Literal["bash", "zsh", "fish"]


@dataclass(frozen=True)
class Command:
    """What may follow a command."""

    name: str
    flags: dict[str, Option]
    words: dict[str, list[str]]  # of the options that take some of a few words


def script(shell: Shell, commands: Mapping[str, type]) -> str:
    """The script for a shell."""
    writers: dict[Shell, Callable[[list[Command]], Iterator[str]]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
    return "\n".join(writers[shell]([_command(name, kind) for name, kind in commands.items()])) + "\n"


def _command(name: str, kind: type) -> Command:
    options = [option for option in options_of(kind) if not option.is_positional]
    flags = {option.flag: option for option in options}
    words = {option.flag: choices_of(option.annotation) for option in options}
    flags |= {option.opposite: option for option in options if is_switch(option.annotation) and option.is_setting}
    return Command(name, flags, {flag: choices for flag, choices in words.items() if choices})


def _groups(commands: list[Command]) -> dict[str, list[str]]:
    """The second words of commands by the first: data: demo, check, stats."""
    groups: dict[str, list[str]] = {}
    for command in commands:
        first, _, second = command.name.partition(" ")
        groups.setdefault(first, []).extend([second] if second else [])
    return groups


def _bash(commands: list[Command]) -> Iterator[str]:
    def offered(words: Iterable[str]) -> str:
        return f'COMPREPLY=($(compgen -W {shlex.quote(" ".join(words))} -- "$word"))'

    groups = _groups(commands)
    yield "_fastflower() {"
    yield "    local word=$2 before=$3 command=${COMP_WORDS[1]} IFS=$' \\t\\n'"
    yield f"    if [ $COMP_CWORD -eq 1 ]; then {offered([*groups, '--help', '--version'])}; return; fi"
    yield from (
        f"    if [ $command = {name} ]; then if [ $COMP_CWORD -eq 2 ]; then {offered(seconds)}; return; fi; "
        f'command="{name} ${{COMP_WORDS[2]}}"; fi'
        for name, seconds in groups.items()
        if seconds
    )
    yield '    case "$command $before" in'
    for command in commands:
        for flag, words in command.words.items():
            yield f"        {shlex.quote(f'{command.name} {flag}')}) {offered(words)}; return ;;"
    yield "    esac"
    yield '    case "$command $word" in'
    for command in commands:
        yield f"        {shlex.quote(command.name)}' -'*) {offered([*command.flags, '--help'])} ;;"
    yield "    esac"
    yield "}"
    yield "complete -o default -F _fastflower fastflower"


def _zsh(commands: list[Command]) -> Iterator[str]:
    def offered(words: Iterable[str]) -> str:
        return f"compadd -- {shlex.join(words)}"

    groups = _groups(commands)
    yield "#compdef fastflower"
    yield "_fastflower() {"
    yield "    local word=${words[CURRENT]} before=${words[CURRENT-1]} command=${words[2]}"
    yield f"    if (( CURRENT == 2 )); then {offered([*groups, '--help', '--version'])}; return; fi"
    yield from (
        f"    if [[ $command == {name} ]]; then if (( CURRENT == 3 )); then {offered(seconds)}; return; fi; "
        f'command="{name} ${{words[3]}}"; fi'
        for name, seconds in groups.items()
        if seconds
    )
    yield '    case "$command $before" in'
    for command in commands:
        for flag, words in command.words.items():
            yield f"        ({shlex.quote(f'{command.name} {flag}')}) {offered(words)}; return ;;"
    yield "    esac"
    yield '    case "$command $word" in'
    for command in commands:
        yield f"        ({shlex.quote(command.name)}' -'*) {offered([*command.flags, '--help'])}; return ;;"
    yield "    esac"
    yield "    _files"
    yield "}"
    yield 'if [ "$funcstack[1]" = _fastflower ]; then _fastflower "$@"; else compdef _fastflower fastflower; fi'


def _fish(commands: list[Command]) -> Iterator[str]:
    groups = _groups(commands)
    yield f"complete -c fastflower -f -n __fish_use_subcommand -a {shlex.quote(' '.join(groups))}"
    for name, seconds in groups.items():
        if seconds:
            unsaid = f"__fish_seen_subcommand_from {name}; and not __fish_seen_subcommand_from {' '.join(seconds)}"
            yield f"complete -c fastflower -f -n {shlex.quote(unsaid)} -a {shlex.quote(' '.join(seconds))}"
    for command in commands:
        said = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in command.name.split())
        for flag, option in command.flags.items():
            words = command.words.get(flag)
            takes = f" -x -a {shlex.quote(' '.join(words))}" if words else "" if is_switch(option.annotation) else " -r"
            text = " ".join(option.text.split()).split("; ")[0].split(". ")[0]
            yield f"complete -c fastflower -n {shlex.quote(said)} -l {flag[2:]}{takes} -d {shlex.quote(text)}"
