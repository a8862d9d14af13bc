"""The command line: from words to a command with its options, and from its end to an exit code.

Nothing heavy (torch, DALI) is imported before a command runs, so that help answers at once.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from rich.text import Text

from fastflower.arguments import Option, find_command, options_of, read_words
from fastflower.commands import carry_out, run_name
from fastflower.config import Config, resolve
from fastflower.environment import versions
from fastflower.errors import UserError
from fastflower.helptext import command_help, group_help, program_help
from fastflower.layers import FITTED, Layer, Layers, for_other_pictures, split_recipe
from fastflower.options import COMMANDS, CvCommand, LrCommand, Options, TrainCommand
from fastflower.runtime.output import Console, discard, tolerant_output
from fastflower.runtime.signals import Interrupted, handling, interrupt
from fastflower.settings import find_config, load_yaml, nested
from fastflower.values import written

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
        _show(program_help(DESCRIPTION, COMMANDS, Config(), FITTED), asked=bool(argv))
    name, words = find_command(argv, COMMANDS)
    if name not in COMMANDS:
        _show(group_help(name, COMMANDS), asked=bool(words))
    kind, options = COMMANDS[name], options_of(COMMANDS[name])
    if not HELP.isdisjoint(words):
        _show(command_help(name, kind, *_settings_shown(kind, [word for word in words if word not in HELP])))
    given = read_words(words, name, options)
    own = {option.path[0]: value for option, value in given.items() if not option.is_setting}
    if kind not in (TrainCommand, CvCommand, LrCommand):
        return kind(**own)
    if kind is LrCommand:
        own = _run_or_pictures(own)
    named = _named(given, own)
    if kind is TrainCommand:
        if own.get("resume") and own.get("overwrite"):
            raise UserError("--resume goes on with a run, --overwrite replaces it by a new one: give one of them.")
        below, checkpoint = _below(own, named)
        settings, layers = _over(below, named)
        return TrainCommand(**own | {"settings": settings, "layers": layers, "resume": checkpoint})
    below, _ = _below(own, named)
    if kind is LrCommand:
        settings, layers = _over(below, named)
        return LrCommand(**own | {"settings": settings, "layers": layers})
    folds = _folds(own, named)
    if folds is None:
        folds = below.typed().data.folds or 5
    settings, layers = _over(below, named | {"data.folds": folds, "data.fold": 0})
    return CvCommand(**own | {"settings": settings, "layers": layers})


def _show(text: str, *, asked: bool = True) -> NoReturn:
    """Print help and end: where nobody asked for it, as of a mistake."""
    print(text, end="", file=sys.stdout if asked else sys.stderr)
    raise SystemExit(0 if asked else 2)


def _settings_shown(kind: type[Options], words: Sequence[str]) -> tuple[Config, Collection[str]]:
    """The settings that hold before the options, as the words beside --help say, and names of those that are fitted."""
    try:
        given = read_words(words, "", options_of(kind))
        own = {option.path[0]: value for option, value in given.items() if not option.is_setting}
        if own.get("config") or own.get("resume"):
            below, _ = _below(own, {})
            return below.typed(), set(FITTED) - below.keys if below.recipe else ()
    except UserError:
        pass
    return Config(), FITTED


def _run_or_pictures(own: Mapping[str, Any]) -> dict[str, Any]:
    """What lr is given, with the configuration of the run where its folder is that of one.

    Raises:
        UserError: a run and --config are given.
    """
    runs = [config for folder in own.get("pictures", ()) if (config := folder / "config.yaml").is_file()]
    if not runs:
        return dict(own)
    if own.get("config") or len(own["pictures"]) > 1:
        raise UserError(f"{runs[0].parent} is a run, which has settings: give it without --config and other folders.")
    return {key: value for key, value in own.items() if key != "pictures"} | {"config": runs[0]}


def _named(given: Mapping[Option, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the command line names, by dotted keys.

    Raises:
        UserError: it names two folders of pictures.
    """
    named = {option.name: value for option, value in given.items() if option.is_setting}
    if pictures := own.get("pictures"):
        root = named.setdefault("data.root", pictures)
        if root != pictures:
            raise UserError(f"{written(pictures)} and --data.root {written(root)} both name the pictures: give one.")
    return named


def _folds(own: Mapping[str, Any], named: Mapping[str, Any]) -> int | None:
    """How many folds the command line of cv names.

    Raises:
        UserError: it names two numbers of them, or a single fold.
    """
    if "data.fold" in named:
        raise UserError("cv trains all folds: leave --data.fold out, or train one by fastflower train --data.fold.")
    given = [number for number in (own.get("folds"), named.get("data.folds")) if number is not None]
    if len(set(given)) > 1:
        raise UserError(f"--folds {given[0]} and --data.folds {given[1]} both name the number of folds: give one.")
    return given[0] if given else None


def _below(own: Mapping[str, Any], named: Mapping[str, Any]) -> tuple[Layers, Path | None]:
    """Settings below the command line's own, of --config over those of the resumed run, and the checkpoint to resume.

    Without both it is the data's recipe; or the demo's configuration, where no pictures are named.

    Raises:
        UserError: a file that cannot be read or is no configuration, or no such run.
    """
    config, root, checkpoint = own.get("config"), named.get("data.root"), None
    if own.get("resume"):
        from fastflower.runtime.checkpoint import load_trained
        from fastflower.runtime.run_folder import find_checkpoint

        checkpoint = find_checkpoint(str(own["resume"]), own.get("run"), run_name(config, root))
        if checkpoint:
            saved = Layer(str(checkpoint), load_trained(checkpoint)["config"])
            return (_of_file(config) if config else Layers()).over(saved), checkpoint
    if not config:
        return Layers(recipe="auto") if root else _of_file("demo"), None
    layers = _of_file(config)
    if root and find_config(config) == find_config("demo"):
        layers = for_other_pictures(layers)
    return layers, None


def _of_file(given: str | Path) -> Layers:
    path = find_config(given)
    recipe, settings = split_recipe(load_yaml(path), str(path))
    return Layers((Layer(str(path), settings),), recipe)


def _over(below: Layers, named: Mapping[str, Any]) -> tuple[Config, Layers]:
    """The settings, and who named them; what a recipe is still to be fitted to is not checked together yet.

    Raises:
        UserError: a bad value, or two that do not fit together.
    """
    layers = replace(below, named=(*below.named, Layer("command line", nested(named, "command line"))))
    config = layers.typed() if layers.recipe else layers.compose()[0]
    return resolve(config), layers
