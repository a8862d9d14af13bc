"""What each command does: it calls one function, which is imported only now, and prints what that gives.

What comes back from each is the exit code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fastflower import machine
from fastflower.completion import script
from fastflower.config import DataConfig
from fastflower.files import as_word, to_json
from fastflower.options import (
    COMMANDS,
    CheckCommand,
    CompletionCommand,
    CvCommand,
    DemoCommand,
    DoctorCommand,
    EnsembleCommand,
    EvalCommand,
    EvaluationOptions,
    FlopsCommand,
    LrCommand,
    Options,
    PackCommand,
    PredictCommand,
    ReportCommand,
    StatsCommand,
    TrainCommand,
)
from fastflower.runtime.launcher import is_main
from fastflower.runtime.output import Console, without_decoders
from fastflower.settings import to_yaml
from fastflower.tables import written_all

if TYPE_CHECKING:
    from fastflower.evaluation.answers import Answer
    from fastflower.evaluation.session import EvaluationSettings

UNLIMITED = 2**20  # characters of a line


def carry_out(command: Options) -> int:
    """Carry out a command; the exit code."""
    silenced = not command.debug and type(command) not in WITHOUT_PICTURES
    with without_decoders() if silenced else contextlib.nullcontext():
        return FUNCTIONS[type(command)](command)


def run_name(config: str | Path | None, root: object) -> str:
    """What a new folder under runs/ is called after."""
    return Path(config).stem if config else "train" if root else "demo"


def _train(command: TrainCommand) -> int:
    if command.print_config and not command.layers.recipe:
        for sentence in command.layers.compose()[1]:
            Console(stderr=True).print(sentence, highlight=False, markup=False, soft_wrap=True)
        print(to_yaml(command.settings), end="")
        return 0
    from fastflower.training.run import dry_run, settings_alone, train_run

    if command.print_config:
        print(to_yaml(settings_alone(command.layers, Console(stderr=True))), end="")
        return 0
    if command.dry_run:
        dry_run(command.layers, Console())
        return 0
    train_run(
        command.layers,
        name=run_name(command.config, command.settings.data.root),
        run=command.run,
        checkpoint=command.resume,
        overwrite=command.overwrite,
        console=Console(),
    )
    return 0


def _eval(command: EvalCommand) -> int:
    from fastflower.evaluation.analysis import analyse_run, figures_of, summary, write_run
    from fastflower.evaluation.evaluate import evaluate_run

    settings = _evaluation_settings(command)
    evaluated = evaluate_run(
        command.run, command.split, settings, Console(stderr=True), command.names, out=command.out, write=True
    )
    if not is_main():
        return 0
    analysis = analyse_run(evaluated)
    if command.json:
        print(to_json({"split": command.split, **asdict(evaluated.metrics)}))
    else:
        figures = written_all(figures_of(evaluated, analysis))
        made_by = f"{settings.views.title}, {evaluated.trained.checkpoint}"
        _say(f"{command.split}  n {evaluated.metrics.n:,}  {figures}  ({made_by})")
        for part in summary(analysis):
            Console().print(part)
    write_run(evaluated, analysis)
    if not command.json:
        _say(f"Confusion matrix, classes and mistakes: {evaluated.folder}")
    return 0


def _predict(command: PredictCommand) -> int:
    from fastflower.evaluation.answers import answers
    from fastflower.evaluation.predict import KEY, predict_run

    settings = _evaluation_settings(command)
    if command.pictures:
        return _predict_pictures(command, settings)
    predictions, shown = predict_run(
        command.run,
        command.split or "test",
        settings,
        Console(stderr=True),
        out=command.out,
        submission=command.submission,
        sample=command.sample,
        names=command.names,
        top=command.top,
    )
    if is_main():
        _show(answers(predictions, shown, command.top), KEY, as_json=command.json, written=True)
    return 0


def _predict_pictures(command: PredictCommand, settings: EvaluationSettings) -> int:
    from fastflower.evaluation.answers import answers, printable
    from fastflower.evaluation.classifier import KEY, predict_pictures, refuse_split
    from fastflower.evaluation.pictures import passed_over

    refuse_split(command.split, command.submission, command.sample, command.root, command.sizes)
    rows: list[Answer] = []
    console = Console(stderr=True)
    pictures = predict_pictures(
        command.run,
        command.pictures,
        settings,
        console,
        take=lambda part, shown: rows.extend(answers(part, shown, command.top)),
        names=command.names,
        out=command.out,
        top=command.top,
    )
    if is_main():
        _show(rows, KEY, as_json=command.json, written=command.out is not None)
        if command.out:
            _say(f"Predictions of {len(rows)} pictures: {command.out}", console)
        if pictures.passed_over:
            _say(f"{passed_over(pictures)}.", console)
        if pictures.unreadable:
            _say(f"{len(pictures.unreadable)} cannot be read as pictures:", console)
        for name, reason in sorted(pictures.unreadable.items()):
            _say(f"  {printable(name)}: {reason}", console)
    return 1 if pictures.unreadable else 0


def _show(rows: list[Answer], key: str, *, as_json: bool, written: bool) -> None:
    """Print what is said of pictures; of what is written into a file too, a table of the first ones."""
    from fastflower.evaluation.answers import LISTED, answers_table, to_plain

    if as_json:
        print(to_json([to_plain(row, key) for row in rows]))
        return
    table = answers_table(rows[:LISTED] if written else rows, key)
    out = Console()
    if not out.is_terminal:  # a program reads it, to whom a line is a picture
        out = Console(width=max(out.width, Console(width=UNLIMITED).measure(table).maximum))
    out.print(table)
    if written and len(rows) > LISTED:
        _say(f"… and {len(rows) - LISTED:,} more.", Console(stderr=True))


def _ensemble(command: EnsembleCommand) -> int:
    from fastflower.evaluation.ensemble import ensemble_runs, members_table
    from fastflower.evaluation.views import Views

    ensembled = ensemble_runs(
        command.members,
        command.method,
        command.split,
        Console(stderr=True),
        roots=command.root,
        views=Views(command.crops, command.scales),
        mix_views=command.mix_views,
        fit_on=command.fit_on,
        out=command.out,
        submission=command.submission,
        sample=command.sample,
    )
    if command.json:
        rows = [
            {"name": row.name, "views": row.views, "weight": row.weight}
            | (asdict(row.evaluation) if row.evaluation else {})
            for row in ensembled.rows
        ]
        print(to_json(rows))
        return 0
    Console().print(members_table(ensembled.rows))
    for note in ensembled.notes:
        _say(note)
    return 0


def _cv(command: CvCommand) -> int:
    from fastflower.evaluation.crossval import cross_validate, summary
    from fastflower.evaluation.views import Views

    validation = cross_validate(
        command.layers,
        name=f"cv-{run_name(command.config, command.settings.data.root)}",
        run=command.run,
        overwrite=command.overwrite,
        views=Views(command.crops, command.scales),
        test=command.test,
        submission=command.submission,
        console=Console(),
    )
    if is_main():
        Console().print(summary(validation))
    return 0


def _lr(command: LrCommand) -> int:
    from fastflower.evaluation.plots import save_figure
    from fastflower.files import atomic_write, require_writable
    from fastflower.report.lr_range import plot_range
    from fastflower.training.lr_range import Range, conclusion
    from fastflower.training.range_test import range_test

    plot, numbers = command.out.with_suffix(".png"), command.out.with_suffix(".json")
    rates = Range(command.low, command.high, command.steps)
    for path in (plot, numbers):
        require_writable(path)
    test = range_test(command.layers, rates, Console())
    if is_main():
        save_figure(plot, plot_range(test), "png")
        with atomic_write(numbers) as file:
            file.write(to_json(test.to_plain()).encode() + b"\n")
        _say(conclusion(test))
        _say(f"Plot and numbers: {plot}, {numbers}")
    return 0


def _flops(command: FlopsCommand) -> int:
    from fastflower.flops import costs_table, count, layers_table, variants

    costs = [count(name, command.size) for name in command.models or variants()]
    if command.json:
        rows = [asdict(cost) for cost in costs]
        print(to_json([{k: v for k, v in row.items() if k != "layers" or command.layers} for row in rows]))
        return 0
    for cost in costs if command.layers else ():
        Console().print(layers_table(cost))
    Console().print(costs_table(costs))
    return 0


def _report(command: ReportCommand) -> int:
    from fastflower.report.page import runs_tables, write_report

    report = write_report(command.runs, command.out, command.throughput)
    for part in runs_tables(report):
        Console().print(part)
        _say("")
    for sentence in (*report.notes, *report.sentences, f"Report: {report.page}"):
        _say(sentence)
    return 0


def _doctor(command: DoctorCommand) -> int:
    from fastflower.doctor import examine, findings_table, is_ready

    findings = examine()
    if command.json:
        print(to_json([asdict(finding) for finding in findings]))
    else:
        Console().print(findings_table(findings))
    return 0 if is_ready(findings) else 1


def _completion(command: CompletionCommand) -> int:
    print(script(command.shell, COMMANDS), end="")
    return 0


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
    from fastflower.data.check import check, overview, sentences
    from fastflower.data.view import MOST_THREADS
    from fastflower.runtime.progress import Display

    with Display(Console(stderr=command.json), shown=True) as display:
        report = check(command.root, threads=min(machine.cpus(), MOST_THREADS["cpu"]), follow=display.follow)
    if command.json:
        print(to_json(report.to_plain()))
    else:
        for table in overview(report):
            Console().print(table)
            _say("")
        for sentence in (*report.notes, *sentences(report)):
            _say(sentence)
    return 1 if report.problems else 0


def _stats(command: StatsCommand) -> int:
    import torch

    from fastflower.data.batches import choose_engine
    from fastflower.data.splits import load_pictures
    from fastflower.data.stats import pixel_statistics
    from fastflower.runtime.distributed import Ranks
    from fastflower.runtime.progress import Display

    data = DataConfig(root=command.root, sizes=command.sizes)
    records = load_pictures(data, command.split.split("+"), seed=0)
    engine = choose_engine(data, torch.device("cpu"), Ranks())
    with Display(Console(stderr=True), shown=True) as display:
        statistics = pixel_statistics(records, engine, progress=display.follow("measure pixels"))
    mean, std = statistics.normalization.mean, statistics.normalization.std
    settings = {"data": {"mean": list(mean), "std": list(std)}}
    print(yaml.safe_dump(settings, default_flow_style=None, width=120), end="")
    print("  # covariance, which data.lighting uses:")
    for row in statistics.covariance.tolist():
        print(f"  # - {row}")
    return 0


def _pack(command: PackCommand) -> int:
    from fastflower.data.pack import pack
    from fastflower.runtime.progress import Display

    with Display(Console(), shown=True) as display:
        packed = pack(
            command.root,
            command.out,
            sizes=command.sizes,
            quality=command.quality,
            seed=command.seed,
            follow=display.follow,
        )
    for sentence in packed.unreadable:
        _say(f"left out: {sentence}")
    counts = ", ".join(f"{count:,} of {split}" for split, count in packed.pictures.items())
    _say(f"Packed {counts}: train with --data.root {as_word(command.out)}")
    return 1 if packed.unreadable else 0


def _evaluation_settings(options: EvaluationOptions) -> EvaluationSettings:
    from fastflower.evaluation.session import EvaluationSettings
    from fastflower.evaluation.views import Views

    return EvaluationSettings(
        roots=options.root,
        sizes=options.sizes,
        views=Views(options.crops, options.scales),
        device=options.device,
        batch_size=options.batch_size,
        compiled=options.compile,
    )


def _say(text: str, console: Console | None = None) -> None:
    """A line as it is, however long."""
    (console or Console()).print(text, highlight=False, markup=False, soft_wrap=True)


FUNCTIONS: dict[type[Options], Callable[[Any], int]] = {
    TrainCommand: _train,
    EvalCommand: _eval,
    PredictCommand: _predict,
    EnsembleCommand: _ensemble,
    CvCommand: _cv,
    LrCommand: _lr,
    FlopsCommand: _flops,
    ReportCommand: _report,
    DoctorCommand: _doctor,
    CompletionCommand: _completion,
    DemoCommand: _demo,
    CheckCommand: _check,
    StatsCommand: _stats,
    PackCommand: _pack,
}
WITHOUT_PICTURES = (FlopsCommand, ReportCommand, DoctorCommand, CompletionCommand)  # which decode none
