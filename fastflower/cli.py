"""The command line: from words to a command with its options, and from its end to an exit code.

Nothing heavy (torch, DALI) is imported before a command runs, so that help answers at once.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

from rich.text import Text

from fastflower.arguments import Option, filled, find_command, options_of, read_words
from fastflower.commands import carry_out, run_name
from fastflower.config import Config, resolve
from fastflower.environment import versions
from fastflower.errors import UserError
from fastflower.helptext import command_help, group_help, program_help
from fastflower.options import COMMANDS, CvCommand, LrCommand, Options, TrainCommand
from fastflower.runtime.output import Console, discard, tolerant_output
from fastflower.runtime.signals import Interrupted, handling, interrupt
from fastflower.settings import build, find_config, load_yaml, merge

DESCRIPTION = (
    "Train image classifiers fast: DALI input, plain and residual networks, mixed precision, many GPUs.\n\n"
    "fastflower --version prints the versions of fastflower, torch, DALI and Triton."
)
HELP = {"--help", "-h"}


def main() -> None:
    """Entry point. Exit code 2 for a user's mistake, 128 + n after signal n, 141 where the output's pipe is closed."""
    with tolerant_output():
        try:
            with handling(interrupt):
                code = _exit_code(sys.argv[1:])
                sys.stdout.flush()  # here, where it is known what to do if nobody reads it
        except BrokenPipeError:  # whoever read the output has seen enough
            for stream in (sys.stdout, sys.stderr):
                discard(stream)
            code = 128 + signal.SIGPIPE
        except KeyboardInterrupt as error:
            code = 128 + (error.number if isinstance(error, Interrupted) else signal.SIGINT)
    sys.exit(code)


def _exit_code(argv: Sequence[str]) -> int | str | None:
    """Carry out the command line; says what is wrong with it."""
    if list(argv) == ["--version"]:
        print(versions())
        return 0
    try:
        return carry_out(parse(argv))
    except SystemExit as end:  # by help, or by an option that there is not
        return end.code
    except BrokenPipeError:
        raise
    except (UserError, OSError) as error:
        if "--debug" in argv:
            raise
        if not (isinstance(error, UserError) and error.said_elsewhere):
            sentence = _sentence(error) if isinstance(error, OSError) else str(error)
            Console(stderr=True).print(Text.assemble(("error: ", "bold red"), sentence), soft_wrap=True)
        return 2


def _sentence(error: OSError) -> str:
    """What the system refused, where nobody had more to say about it."""
    what = error.filename or "a file"
    return f"{what}: {error.strerror or error}; check the path, its permissions and the free space."


def parse(argv: Sequence[str]) -> Options:
    """The command and its options; what --config or --resume say are the defaults of a training run.

    Raises:
        UserError: a wrong word, or a bad configuration file or value.
        SystemExit: help was asked for, and is printed.
    """
    if not argv or argv[0] in HELP:
        _show(program_help(DESCRIPTION, COMMANDS, Config()), asked=bool(argv))
    name, words = find_command(argv, COMMANDS)
    if name not in COMMANDS:
        _show(group_help(name, COMMANDS), asked=bool(words))
    kind, options = COMMANDS[name], options_of(COMMANDS[name])
    if not HELP.isdisjoint(words):
        _show(command_help(name, kind, _settings_shown(kind, [word for word in words if word not in HELP])))
    given = read_words(words, name, options)
    own = {option.path[0]: value for option, value in given.items() if not option.is_setting}
    if kind not in (TrainCommand, CvCommand, LrCommand):
        return kind(**own)
    settings, checkpoint = _training_defaults(given)
    settings = filled(settings, given)
    if kind is TrainCommand:
        if own.get("resume") and own.get("overwrite"):
            raise UserError("--resume goes on with a run, --overwrite replaces it by a new one: give one of them.")
        return TrainCommand(**own | {"settings": _checked(settings), "resume": checkpoint})
    if kind is LrCommand:
        return LrCommand(**own | {"settings": _checked(settings)})
    data = settings.data
    folds = (data.folds or 5) if own.get("folds") is None else own["folds"]
    return CvCommand(**own | {"settings": _checked(replace(settings, data=replace(data, folds=folds, fold=0)))})


def _show(text: str, *, asked: bool = True) -> NoReturn:
    """Print help and end: where nobody asked for it, as of a mistake."""
    print(text, end="", file=sys.stdout if asked else sys.stderr)
    raise SystemExit(0 if asked else 2)


def _settings_shown(kind: type[Options], words: Sequence[str]) -> Config:
    """The settings that hold before the options, where the words beside --help say so."""
    try:
        return _training_defaults(read_words(words, "", options_of(kind)))[0]
    except UserError:
        return Config()


def _checked(settings: Config) -> Config:
    return resolve(build(asdict(settings), "command line"))


def _training_defaults(options: Mapping[Option, Any]) -> tuple[Config, Path | None]:
    """Settings before the command line's own, and the checkpoint to resume.

    The settings are those of the resumed run, or of the one that lr is given, then of --config; the demo's where
    neither they nor data are named.
    """
    given = {option.name: value for option, value in options.items()}
    config, root = given.get("config"), given.get("data.root")
    settings: dict[str, Any] = {}
    source, checkpoint = "defaults", None
    if given.get("resume"):
        from fastflower.runtime.checkpoint import load_trained
        from fastflower.runtime.run_folder import find_checkpoint

        checkpoint = find_checkpoint(str(given["resume"]), given.get("run"), run_name(config, root))
        if checkpoint:
            source, settings = str(checkpoint), load_trained(checkpoint)["config"]
    if given.get("trained"):
        path = given["trained"] / "config.yaml"
        source, settings = str(path), load_yaml(path)
    if config or not (root or settings):
        path = find_config(config or "demo")
        source = str(path)
        settings = merge(settings, load_yaml(path))
    return build(settings, source), checkpoint
