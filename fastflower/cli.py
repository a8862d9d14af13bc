"""The command line: from words to a command with its options, and from its end to an exit code.

Nothing heavy (torch, DALI) is imported before a command runs, so that help answers at once.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.text import Text
from tyro.conf import OmitSubcommandPrefixes, subcommand

from fastflower.commands import carry_out, run_name
from fastflower.config import Config, resolve
from fastflower.environment import versions
from fastflower.errors import UserError
from fastflower.options import (
    CvCommand,
    DataCommand,
    DoctorCommand,
    EnsembleCommand,
    EvalCommand,
    FlopsCommand,
    Options,
    PredictCommand,
    ReportCommand,
    TrainCommand,
)
from fastflower.runtime.output import Console, discard, tolerant_output
from fastflower.runtime.signals import Interrupted, handling, interrupt
from fastflower.settings import build, find_config, load_yaml, merge

DESCRIPTION = (
    "Train image classifiers fast: DALI input, plain and residual networks, mixed precision, many GPUs.\n\n"
    "fastflower --version prints the versions of fastflower, torch, DALI and Triton."
)
_NO_COMPILE = ("--train.no_compile", "--train.no-compile", "--no-train.compile", "--no_train.compile")


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
        UserError: a bad configuration file or value.
    """
    argv = ["--train.compile=off" if word in _NO_COMPILE else word for word in argv]
    settings, checkpoint = _training_defaults(argv) if argv[:1] in (["train"], ["cv"]) else (Config(), None)
    commands: Any = (
        Annotated[TrainCommand, subcommand("train", default=TrainCommand(settings))]
        | Annotated[EvalCommand, subcommand("eval")]
        | Annotated[PredictCommand, subcommand("predict")]
        | Annotated[EnsembleCommand, subcommand("ensemble")]
        | Annotated[CvCommand, subcommand("cv", default=CvCommand(settings))]
        | Annotated[FlopsCommand, subcommand("flops")]
        | Annotated[ReportCommand, subcommand("report")]
        | Annotated[DoctorCommand, subcommand("doctor")]
        | Annotated[DataCommand, subcommand("data", description=DataCommand.__doc__)]
    )
    command = tyro.cli(
        commands,
        prog="fastflower",
        description=DESCRIPTION,
        args=argv,
        use_underscores=True,
        config=(OmitSubcommandPrefixes,),
    )
    if isinstance(command, TrainCommand):
        if command.resume and command.overwrite:
            raise UserError("--resume goes on with a run, --overwrite replaces it by a new one: give one of them.")
        return replace(command, settings=_checked(command.settings), resume=checkpoint)
    if isinstance(command, CvCommand):
        data = command.settings.data
        folds = (data.folds or 5) if command.folds is None else command.folds
        folded = replace(command.settings, data=replace(data, folds=folds, fold=0))
        return replace(command, settings=_checked(folded))
    return command.command if isinstance(command, DataCommand) else command


def _checked(settings: Config) -> Config:
    return resolve(build(asdict(settings), "command line"))


def _training_defaults(argv: Sequence[str]) -> tuple[Config, Path | None]:
    """Settings before the command line's own, and the checkpoint to resume.

    The settings are those of the resumed run, then of --config; the demo's where neither they nor data are named.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--config", "--resume", "--run"):
        parser.add_argument(option, nargs="?")  # a missing value is for the real parser to name
    parser.add_argument("--data.root", dest="root", nargs="?")
    given, _ = parser.parse_known_args(argv)
    settings: dict[str, Any] = {}
    source, checkpoint = "defaults", None
    if given.resume:
        from fastflower.runtime.checkpoint import load_trained
        from fastflower.runtime.run_folder import find_checkpoint

        run = Path(given.run) if given.run else None
        checkpoint = find_checkpoint(given.resume, run, run_name(given.config, given.root))
        if checkpoint:
            source, settings = str(checkpoint), load_trained(checkpoint)["config"]
    if given.config or not (given.root or settings):
        path = find_config(given.config or "demo")
        source = str(path)
        settings = merge(settings, load_yaml(path))
    return build(settings, source), checkpoint
