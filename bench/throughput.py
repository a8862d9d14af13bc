"""Pictures a second of the input pipeline, of networks, of training and of evaluation, and what limits them.

    python bench/throughput.py loader --data.root DIR --peers
    python bench/throughput.py model --models resnet18 resnet50 --peers
    python bench/throughput.py train --run runs/NAME --dtype bf16
    python bench/throughput.py eval --run runs/NAME
    python bench/throughput.py --compare BEFORE.jsonl AFTER.jsonl --max_loss 5
    python bench/throughput.py --plot RESULTS.jsonl docs/rates

Compiling, the first steps and work begun ahead do not count; all contenders of a network take turns (see timing.py).
Files come from the page cache once the first epoch has read them. A forward pass counts as 2 FLOPs a multiply-add, a
backward pass as twice the forward pass. Under torchrun images/s are those of all processes together.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where `bench` lies

import torch
from rich.console import Console
from tyro.conf import arg, subcommand

from bench import bottleneck, loaders, loops, networks
from bench.common import append, circumstances, start
from bench.compare import compare
from bench.compute import matmul_flops_per_s
from bench.loops import Place
from bench.throughput_options import (
    Command,
    EvalCommand,
    LoaderCommand,
    ModelCommand,
    TrainCommand,
    check,
    configure,
    settled,
)
from bench.throughput_report import show, write_csv
from bench.timing import Make, measure
from fastflower.config import Config, load_yaml
from fastflower.curves import plot_throughput, write_picture
from fastflower.data.cache import open_cache
from fastflower.data.dataset import choose_engine
from fastflower.data.sources import load_pictures
from fastflower.engine.distributed import local_rank, processes
from fastflower.engine.precision import choose_device, choose_precision
from fastflower.engine.progress import Display
from fastflower.engine.run import RunFolder
from fastflower.engine.setup import with_data
from fastflower.environment import package_versions
from fastflower.errors import UserError
from fastflower.report import read_throughput

Row = dict[str, Any]
MODES = {LoaderCommand: "loader", ModelCommand: "model", TrainCommand: "train", EvalCommand: "eval"}
LABELS = {"off": {"eager": False}, "on": {"compiled": True}, "both": {"eager": False, "compiled": True}}


@dataclass(frozen=True)
class Options:
    """A mode to measure, two results files to compare, or one to draw."""

    mode: (
        Annotated[LoaderCommand, subcommand("loader")]
        | Annotated[ModelCommand, subcommand("model")]
        | Annotated[TrainCommand, subcommand("train")]
        | Annotated[EvalCommand, subcommand("eval")]
        | None
    ) = None
    compare: Annotated[tuple[Path, Path] | None, arg(metavar="BEFORE AFTER")] = None
    """Results files of --out: print the ratios of images/s of what both have."""
    max_loss: float = 5.0
    """Percent that --compare lets anything lose before the exit code is 1."""
    plot: Annotated[tuple[Path, Path] | None, arg(metavar="RESULTS PICTURE")] = None
    """A results file of --out: draw it as PICTURE.png and PICTURE.svg."""


def measure_loader(command: LoaderCommand, config: Config, place: Place) -> list[Row]:
    """Rows of our loader, of the decoders alone and, with --peers, of what else is used."""
    with place.ranks.main_first():
        records = load_pictures(config.data, ["train"], seed=0)
        engine = choose_engine(config.data, place.device, place.ranks)
    display = Display(Console(stderr=True), shown=place.ranks.is_main)
    (decoded,) = open_cache(config.data.cache, [records], engine, place.ranks, display.say, display.follow)
    work = loaders.Work(records, config.data, engine, place.device, place.ranks, command.output, decoded)
    rows = measure(loaders.contenders(work, peers=command.peers), command, place.device, place.ranks)
    found = {row["name"]: row for row in rows if "missing" not in row}
    rows[0]["bottleneck"] = bottleneck.of_loader(found, loaders.transfer_s(work))
    if limit := found.get(loaders.LIMIT):
        for row in found.values():
            row["share_of_limit"] = row["images_per_s"] / limit["images_per_s"]
    return rows


def measure_networks(command: ModelCommand | TrainCommand, configs: Sequence[Config], place: Place) -> list[Row]:
    """Rows of all networks, one after another; with the run's accuracy where one is given."""
    mine = matmul_flops_per_s(place.precision.dtype or torch.float32, place.device)
    ceiling = sum(place.ranks.gather(mine))
    rows: list[Row] = []
    for config in configs:
        if isinstance(command, ModelCommand):
            new = measure_passes(command, config, place, ceiling)
        else:
            new = measure_loop(command, config, place, ceiling)
        if command.run and (accuracy := best_accuracy(command.run, config.model.name)) is not None:
            new = [row | {"val_accuracy": accuracy} for row in new]
        rows += new
        torch.compiler.reset()  # the next network is none that this one's code should be adapted to
    return rows


def measure_passes(command: ModelCommand, config: Config, place: Place, ceiling: float) -> list[Row]:
    """Rows of a network's passes and, with --peers, of others' networks."""
    name = config.model.name
    work = networks.Work(config, place.device, place.precision)
    makers = networks.contenders(work, LABELS[command.compile], peers=command.peers)
    rows = measure(makers, command, place.device, place.ranks, ceiling)
    for row in rows:
        if row["name"].startswith(f"{name}, ") and row["name"].endswith(", step"):
            row["bottleneck"] = bottleneck.of_network(row, place.device, str(place.precision))
    return rows


def measure_loop(command: TrainCommand, config: Config, place: Place, ceiling: float) -> list[Row]:
    """Rows of training or, of an `EvalCommand`, evaluation."""
    loop = loops.evaluation if isinstance(command, EvalCommand) else loops.training
    compiles = config.train.compile if config.train.compile is not None else place.device.type == "cuda"
    labels = LABELS["on" if compiles else "off"] if command.compile == "auto" else LABELS[command.compile]
    configs = {
        f"{config.model.name}, {label}": replace(config, train=replace(config.train, compile=compiled))
        for label, compiled in labels.items()
    }
    makers = {name: partial(loop, settings, place) for name, settings in configs.items()}
    rows = measure(makers, command, place.device, place.ranks, ceiling)
    for row in rows:
        row["bottleneck"] = explain(row, command, configs[row["name"]], place)
    return rows


def explain(row: Row, command: TrainCommand, config: Config, place: Place) -> str:
    """The sentence on a loop's bottleneck; what its parts take alone is measured first."""
    plan = replace(command, batch=row["batch"], repeats=1)
    if bottleneck.is_loader(row):
        work = loops.loader_work(config, place)
        parts: dict[str, Make] = {loaders.OURS: partial(loaders.ours, work)}
        if work.decoded is None:
            parts[loaders.DECODE] = partial(loaders.decode_only, work)
        alone = {found["name"]: found for found in measure(parts, plan, place.device, place.ranks)}
        return bottleneck.of_loader(alone, loaders.transfer_s(work))
    alone_ms = None
    if place.ranks.world_size > 1 and not isinstance(command, EvalCommand):
        makers = {"without communication": partial(loops.training_alone, config, place)}
        (alone_row,) = measure(makers, plan, place.device, place.ranks)
        alone_ms = alone_row["ms_per_step"]
    return bottleneck.of_network(row, place.device, str(place.precision), alone_ms)


def best_accuracy(run: Path, model: str) -> float | None:
    """The highest validation accuracy of a run; None where it has none yet, or is of another network than `model`.

    Raises:
        UserError: its configuration cannot be read, or its log is damaged.
    """
    if load_yaml(RunFolder(run).config).get("model", {}).get("name") != model:
        return None
    path = RunFolder(run).metrics
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return max((row["val_accuracy"] for row in rows if row["val_accuracy"] is not None), default=None)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as the log of a run: give another --run.") from error


def run_mode(command: Command, console: Console) -> int:
    """Measure, print the table, append to --out, write --csv.

    Raises UserError for settings that measure nothing or do not fit each other or the data.
    """
    check(command)
    device = choose_device("auto", local_rank())
    torch.backends.cudnn.benchmark = True  # as in training
    with processes(device) as ranks:
        configs = configure(command, ranks.world_size)
        config = configs[0]
        if not isinstance(command, ModelCommand):
            config = with_data(config, ranks, Display(Console(stderr=True), shown=ranks.is_main))
        place = Place(device, ranks, choose_precision(config.amp, config.amp_dtype, device))
        command = settled(command, config, str(place.precision))
        if ranks.is_main and command.out:
            append(command.out, [])  # fails now rather than after the measurement
        around = circumstances(command, device, package_versions("torchvision", "timm", "pillow"))
        if isinstance(command, LoaderCommand):
            rows = measure_loader(command, config, place)
        else:
            rows = measure_networks(command, [replace(each, data=config.data) for each in configs], place)
        if ranks.is_main:
            report(MODES[type(command)], rows, around, command, console)
    return 0


def report(mode: str, rows: list[Row], around: dict[str, Any], command: Command, console: Console) -> None:
    """Show the rows and write them where they are asked for."""
    show(mode, rows, around, console)
    lines = [{"mode": mode} | row | around for row in rows]
    if command.out:
        append(command.out, lines)
        console.print(f"Added to {command.out}.", markup=False, highlight=False, soft_wrap=True)
    if command.csv:
        write_csv(command.csv, lines)


def run(options: Options, console: Console) -> int:
    """Measure a mode, compare two files or draw one; the exit code: 1 where --compare finds too much lost."""
    for option, given in (("--compare", options.compare), ("--plot", options.plot)):
        if given and options.mode:
            raise UserError(f"{option} reads results and measures nothing: leave the mode out.")
    if options.mode:
        return run_mode(options.mode, console)
    if not (options.compare or options.plot):
        raise UserError("there is nothing to do: give loader, model, train or eval, --compare or --plot.")
    if options.plot:
        results, picture = options.plot
        write_picture(picture, plot_throughput(read_throughput(results)))
    return compare(*options.compare, options.max_loss, console) if options.compare else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit code, 2 for a user's mistake."""
    return start(Options, run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
