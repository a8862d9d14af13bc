"""The command line: parses, builds, calls one function.

Nothing heavy (torch, DALI) is imported before a command runs, so that help answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
import yaml
from rich.text import Text
from tyro.conf import OmitSubcommandPrefixes, subcommand

from fastflower import config as configuration
from fastflower import machine
from fastflower.config import Config, DataConfig
from fastflower.environment import versions
from fastflower.errors import UserError
from fastflower.files import to_json
from fastflower.options import (
    CheckCommand,
    CvCommand,
    DataCommand,
    DemoCommand,
    DoctorCommand,
    EnsembleCommand,
    EvalCommand,
    FlopsCommand,
    PredictCommand,
    ReportCommand,
    StatsCommand,
    TestOptions,
    TrainCommand,
)
from fastflower.runtime.launcher import is_main
from fastflower.runtime.output import Console, discard, tolerant_output, without_decoders
from fastflower.runtime.signals import Interrupted, handling, interrupt

if TYPE_CHECKING:
    from fastflower.evaluation.session import Testing

DESCRIPTION = (
    "Train image classifiers fast: DALI input, plain and residual networks, mixed precision, many GPUs.\n\n"
    "fastflower --version prints the versions of fastflower, torch, DALI and Triton."
)
_NO_COMPILE = ("--train.no_compile", "--train.no-compile", "--no-train.compile", "--no_train.compile")

Command = (
    TrainCommand
    | EvalCommand
    | PredictCommand
    | EnsembleCommand
    | CvCommand
    | FlopsCommand
    | ReportCommand
    | DoctorCommand
    | DataCommand
)


DECODING = (TrainCommand, EvalCommand, PredictCommand, EnsembleCommand, CvCommand, CheckCommand, StatsCommand)


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
        return run(parse(argv))
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


def parse(argv: Sequence[str]) -> Command:
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
    return command


def _checked(settings: Config) -> Config:
    return configuration.resolve(configuration.build(asdict(settings), "command line"))


def _training_defaults(argv: Sequence[str]) -> tuple[Config, Path | None]:
    """Settings before the command line's own, and the checkpoint to resume.

    The settings are those of the resumed run, then of --config; the demo's where neither they nor data are named.
    """
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--config", "--resume", "--run"):
        known.add_argument(option, nargs="?")  # a missing value is for the real parser to name
    known.add_argument("--data.root", dest="root", nargs="?")
    given, _ = known.parse_known_args(argv)
    settings: dict[str, Any] = {}
    source, checkpoint = "defaults", None
    if given.resume:
        from fastflower.runtime.checkpoint import load_checkpoint
        from fastflower.runtime.run_folder import find_checkpoint

        run = Path(given.run) if given.run else None
        checkpoint = find_checkpoint(given.resume, run, _run_name(given.config, given.root))
        if checkpoint:
            source, settings = str(checkpoint), load_checkpoint(checkpoint)["config"]
    if given.config or not (given.root or settings):
        path = configuration.find_config(given.config or "demo")
        source = str(path)
        settings = configuration.merge(settings, configuration.load_yaml(path))
    return configuration.build(settings, source), checkpoint


def _run_name(config: str | Path | None, root: object) -> str:
    return Path(config).stem if config else "train" if root else "demo"


def run(command: Command) -> int:
    """Carry out a command; the exit code."""
    chosen = command.command if isinstance(command, DataCommand) else command
    decodes = isinstance(chosen, DECODING) and not chosen.debug
    carry_out: dict[type, Callable[[Any], int]] = {
        TrainCommand: _train,
        EvalCommand: _eval,
        PredictCommand: _predict,
        EnsembleCommand: _ensemble,
        CvCommand: _cv,
        FlopsCommand: _flops,
        ReportCommand: _report,
        DoctorCommand: _doctor,
        DemoCommand: _demo,
        CheckCommand: _check,
        StatsCommand: _stats,
    }
    with without_decoders() if decodes else contextlib.nullcontext():
        return carry_out[type(chosen)](chosen)


def _train(command: TrainCommand) -> int:
    if command.print_config:
        print(configuration.to_yaml(command.settings), end="")
        return 0
    from fastflower.training.run import dry_run, train_run

    if command.dry_run:
        dry_run(command.settings, Console())
        return 0
    name = _run_name(command.config, command.settings.data.root)
    received = train_run(
        command.settings,
        name=name,
        run=command.run,
        checkpoint=command.resume,
        overwrite=command.overwrite,
        console=Console(),
    )
    return 128 + received if received else 0


def _eval(command: EvalCommand) -> int:
    from fastflower.evaluation.analysis import analyse_run, summary, write_run
    from fastflower.evaluation.evaluate import evaluate_run

    evaluated = evaluate_run(command.run, command.split, _testing(command), Console(stderr=True), command.names)
    if not is_main():
        return 0
    analysis = analyse_run(evaluated)
    figures = {"split": command.split, **asdict(evaluated.figures)}
    if command.json:
        print(to_json(figures))
        write_run(evaluated, analysis, command.out)
        return 0
    shown = figures | {"ece": analysis.ece}
    texts = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items())
    console = Console()
    console.print("  ".join(texts), soft_wrap=True)
    for each in summary(analysis):
        console.print(each)
    folder = write_run(evaluated, analysis, command.out)
    console.print(f"Confusion matrix, classes and mistakes: {folder}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _predict(command: PredictCommand) -> int:
    from fastflower.evaluation.predict import likeliest, predict_pictures, predict_run

    testing = _testing(command)
    if command.images is None:
        files = {"out": command.out, "submission": command.submission, "sample": command.sample}
        predict_run(command.run, command.split, testing, Console(), **files)
        return 0
    if command.submission or command.sample or command.root or command.sizes:
        raise UserError("--submission, --sample, --data.root and --sizes are about a split: drop them, or --images.")
    predictions, shown = predict_pictures(
        command.run, command.images, testing, Console(stderr=True), names=command.names, out=command.out
    )
    if is_main():
        for line in likeliest(predictions, shown):
            print(line)
    return 0


def _ensemble(command: EnsembleCommand) -> int:
    from fastflower.evaluation.ensemble import ensemble_runs, table

    ensembled = ensemble_runs(
        command.members,
        command.method,
        command.split,
        Console(stderr=True),
        roots=command.root,
        fit_on=command.fit_on,
        out=command.out,
        submission=command.submission,
        sample=command.sample,
    )
    if command.json:
        rows = ensembled.rows
        print(to_json([{"name": row.name, "weight": row.weight, **asdict(row.evaluation)} for row in rows]))
        return 0
    if ensembled.rows:
        Console().print(table(ensembled.rows))
    for note in ensembled.notes:
        Console().print(note, highlight=False, markup=False, soft_wrap=True)
    return 0


def _cv(command: CvCommand) -> int:
    from fastflower.evaluation.crossval import cross_validate, summary
    from fastflower.evaluation.views import Views

    found = cross_validate(
        command.settings,
        name=f"cv-{_run_name(command.config, command.settings.data.root)}",
        run=command.run,
        overwrite=command.overwrite,
        views=Views(command.crops, command.scales),
        test=command.test,
        submission=command.submission,
        console=Console(),
    )
    if isinstance(found, int):
        return 128 + found
    if is_main():
        Console().print(summary(found))
    return 0


def _flops(command: FlopsCommand) -> int:
    from fastflower.flops import costs_table, count, layers_table, variants

    costs = [count(name, command.size) for name in command.models or variants()]
    if command.json:
        rows = [asdict(cost) for cost in costs]
        print(to_json([{k: v for k, v in row.items() if k != "layers" or command.layers} for row in rows]))
        return 0
    console = Console()
    if command.layers:
        for cost in costs:
            console.print(layers_table(cost))
    console.print(costs_table(costs))
    return 0


def _report(command: ReportCommand) -> int:
    from fastflower.report.page import table, write_report

    report = write_report(command.runs, command.out, command.throughput)
    console = Console()
    console.print(table(report.rows))
    for sentence in (*report.sentences, f"Report: {report.page}"):
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)
    return 0


def _doctor(command: DoctorCommand) -> int:
    from fastflower.doctor import examine, findings_table, is_ready

    findings = examine()
    if command.json:
        print(to_json([asdict(finding) for finding in findings]))
    else:
        Console().print(findings_table(findings))
    return 0 if is_ready(findings) else 1


def _testing(options: TestOptions) -> Testing:
    from fastflower.evaluation.session import Testing
    from fastflower.evaluation.views import Views

    if options.batch_size is not None and options.batch_size < 1:
        raise UserError(f"--batch_size is {options.batch_size}: give at least 1.")
    return Testing(
        roots=options.root,
        sizes=options.sizes,
        views=Views(options.crops, options.scales),
        device=options.device,
        batch_size=options.batch_size,
        compiled=options.compile,
    )


def _demo(command: DemoCommand) -> int:
    from fastflower.data.demo import write_demo
    from fastflower.runtime.progress import Display

    with Display(Console(), shown=True) as display:
        write_demo(
            command.dir,
            sizes=command.sizes,
            train=command.train,
            val=command.val,
            test=command.test,
            seed=command.seed,
            progress=display.follow("draw synthetic flowers"),
        )
        display.say(f"Synthetic flowers: {command.dir}")
    return 0


def _check(command: CheckCommand) -> int:
    from fastflower.data.check import check, sentences, table
    from fastflower.runtime.progress import Display

    with Display(Console(stderr=command.json), shown=True) as display:
        report = check(command.root, threads=machine.cpus(), follow=display.follow)
    if command.json:
        print(to_json(report.to_plain()))
    else:
        Console().print(table(report))
        for sentence in sentences(report):
            display.say(sentence)
    return 1 if report.problems else 0


def _stats(command: StatsCommand) -> int:
    from fastflower.data.splits import load_pictures
    from fastflower.data.stats import pixel_statistics
    from fastflower.data.view import Engine

    records = load_pictures(DataConfig(root=command.root, sizes=command.sizes), command.split.split("+"), seed=0)
    found = pixel_statistics(records, Engine(threads=machine.cpus()))
    settings = {"data": {"mean": list(found.normalization.mean), "std": list(found.normalization.std)}}
    print(yaml.safe_dump(settings, default_flow_style=None, width=120), end="")
    print("  # covariance, which data.lighting uses:")
    for row in found.covariance.tolist():
        print(f"  # - {row}")
    return 0
