"""Pictures a second of the input pipeline, of networks, of training and of evaluation, and what limits them.

    python bench/throughput.py
    python bench/throughput.py loader --data.root DIR --peers
    python bench/throughput.py loader --data.root DIR --launches --threads 1
    python bench/throughput.py model --models resnet18 resnet50 --peers
    python bench/throughput.py train --run runs/NAME --dtype bf16
    python bench/throughput.py eval --run runs/NAME
    python bench/throughput.py --compare BEFORE.jsonl AFTER.jsonl --max-loss 5
    python bench/throughput.py --plot RESULTS.jsonl docs/rates

With nothing else it is the overview: the loader, resnet18's training step and both together on the built-in synthetic
flowers (64 pixels), in one table with MACs, FLOPs, the share of what the machine can do at most, and accuracy; at most
three minutes on two CPU cores.

Compiling, the first steps and work begun ahead do not count; all contenders of a network take turns (see
harness/timing.py). Files come from the page cache once the first epoch has read them. A forward pass counts as 2 FLOPs
a multiply-add, a backward pass as twice the forward pass. Under torchrun images/s are those of all processes together.
"""

from __future__ import annotations

import contextlib
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

from bench.contenders import launches, loaders, loops, networks
from bench.contenders.loops import Place
from bench.harness.common import append, circumstances, start
from bench.harness.compute import matmul_flops_per_s
from bench.harness.timing import Contender, Make, measure
from bench.harness.words import arg, subcommand
from bench.rates import bottleneck
from bench.rates.accuracy import accuracy_here, accuracy_of_a_run, best_accuracy
from bench.rates.compare import compare
from bench.rates.options import (
    Command,
    EvalCommand,
    LoaderCommand,
    ModelCommand,
    OverviewCommand,
    TrainCommand,
    check,
    configure,
    settled,
)
from bench.rates.report import show, show_overview, write_csv
from fastflower.config import Config
from fastflower.data.batches import choose_engine
from fastflower.data.cache import open_cache
from fastflower.data.dataset import with_folders
from fastflower.data.splits import load_pictures
from fastflower.environment import package_versions
from fastflower.errors import UserError
from fastflower.report.curves import write_picture
from fastflower.report.throughput import plot_throughput, read_throughput
from fastflower.runtime.device import choose_device, choose_precision
from fastflower.runtime.distributed import Ranks, processes
from fastflower.runtime.launcher import local_rank
from fastflower.runtime.progress import Display
from fastflower.runtime.repeatable import repeatable
from fastflower.training.network import build_network
from fastflower.training.optimizer import new_optimizer
from fastflower.training.state import Setup, State

Row = dict[str, Any]
MODES = {
    OverviewCommand: "overview",
    LoaderCommand: "loader",
    ModelCommand: "model",
    TrainCommand: "train",
    EvalCommand: "eval",
}
LABELS = {"off": {"eager": False}, "on": {"compiled": True}, "both": {"eager": False, "compiled": True}}


@dataclass(frozen=True)
class Options:
    """A mode to measure, two results files to compare, or one to draw; with nothing else, the overview."""

    mode: (
        Annotated[OverviewCommand, subcommand("overview")]
        | Annotated[LoaderCommand, subcommand("loader")]
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
    split = (records, config.data.scale[1])
    (decoded,) = open_cache(config.data.cache, [split], engine, place.ranks, display.say, display.follow)
    work = loaders.Work(records, config.data, engine, place.device, place.ranks, command.output, decoded)
    if command.launches:
        if place.ranks.world_size > 1:
            raise UserError("--launches measures one process: start it without torchrun.")
        return launches.rows(work, command, command.rate)
    rows = measure(loaders.contenders(work, peers=command.peers), command, place.device, place.ranks)
    measured = {row["name"]: row for row in rows if "missing" not in row}
    rows[0]["bottleneck"] = bottleneck.of_loader(measured, loaders.transfer_s(work))
    if limit := measured.get(loaders.LIMIT):
        for row in measured.values():
            row["share_of_limit"] = row["images_per_s"] / limit["images_per_s"]
    return rows


def measure_networks(command: ModelCommand | TrainCommand, configs: Sequence[Config], place: Place) -> list[Row]:
    """Rows of all networks, one after another; with the run's accuracy where one is given."""
    ceiling = ceiling_flops_per_s(place)
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


def ceiling_flops_per_s(place: Place) -> float:
    """What all processes together multiply, FLOP/s."""
    return sum(place.ranks.gather(matmul_flops_per_s(place.precision.dtype or torch.float32, place.device)))


def measure_passes(command: ModelCommand, config: Config, place: Place, ceiling: float) -> list[Row]:
    """Rows of a network's passes and, with --peers, of others' networks."""
    device = place.device
    ours = partial(build_network, config.model, networks.CLASSES, seed=config.seed, device=device, ranks=Ranks())
    work = networks.Work(
        config.data.crop, device, place.precision, partial(new_optimizer, train=config.train, device=device)
    )
    makers = networks.contenders(work, config.model.name, ours, LABELS[command.compile], peers=command.peers)
    rows = measure(makers, command, place.device, place.ranks, ceiling)
    for row in rows:
        if row.get("role") == "ours" and row.get("part") == "step":
            row["bottleneck"] = bottleneck.of_network(row, place.device, str(place.precision))
    return rows


def measure_loop(command: TrainCommand, config: Config, place: Place, ceiling: float) -> list[Row]:
    """Rows of training or, of an `EvalCommand`, evaluation."""
    loop = loops.evaluation if isinstance(command, EvalCommand) else loops.training
    configs = by_name(command, config, place)
    makers = {name: partial(loop, settings, place) for name, settings in configs.items()}
    rows = measure(makers, command, place.device, place.ranks, ceiling)
    for row in rows:
        row["bottleneck"] = explain(row, command, configs[row["name"]], place)
    return rows


def by_name(command: TrainCommand, config: Config, place: Place) -> dict[str, Config]:
    """The network as it is, compiled, or both: the configuration of each, by the name that its row gets."""
    compiles = config.train.compile if config.train.compile is not None else place.device.type == "cuda"
    labels = LABELS["on" if compiles else "off"] if command.compile == "auto" else LABELS[command.compile]
    return {
        f"{config.model.name}, {label}": replace(config, train=replace(config.train, compile=compiled))
        for label, compiled in labels.items()
    }


def explain(row: Row, command: TrainCommand, config: Config, place: Place) -> str:
    """The sentence on a loop's bottleneck; what its parts take alone is measured first."""
    plan = replace(command, batch=row["batch"], repeats=1)
    if bottleneck.is_loader(row):
        work = loops.loader_work(config, place)
        parts: dict[str, Make] = {loaders.OURS: partial(loaders.ours, work)}
        if work.decoded is None:
            parts[loaders.DECODE] = partial(loaders.decode_only, work)
        alone = {part["name"]: part for part in measure(parts, plan, place.device, place.ranks)}
        return bottleneck.of_loader(alone, loaders.transfer_s(work))
    alone_ms = None
    if place.ranks.world_size > 1 and not isinstance(command, EvalCommand):
        makers = {"without communication": partial(loops.training_alone, config, place)}
        (alone_row,) = measure(makers, plan, place.device, place.ranks)
        alone_ms = alone_row["ms_per_step"]
    return bottleneck.of_network(row, place.device, str(place.precision), alone_ms)


def measure_overview(command: OverviewCommand, configs: Sequence[Config], place: Place) -> list[Row]:
    """Rows of the loader and the decoders alone and, of each network, the training step and training from end to end.

    The accuracy is that of --run or of the latest run, else of what was trained here.
    """
    work = loops.loader_work(configs[0], place)
    makers = {loaders.OURS: partial(loaders.ours, work)} if work.decoded else loaders.contenders(work, peers=False)
    named = {name: settings for config in configs for name, settings in by_name(command, config, place).items()}
    display = Display(Console(stderr=True), shown=place.ranks.is_main)
    logged = {
        name: accuracy_of_a_run(command.run, settings.model.name, display.say) for name, settings in named.items()
    }
    logged = place.ranks.gather(logged)[0]  # so that all processes validate, or none
    trained: dict[str, tuple[Setup, State]] = {}

    def end_to_end(name: str, batch: int) -> Contender:
        trained[name] = loops.prepared(named[name], place, batch)
        return loops.training_of(*trained[name], batch)

    for name, config in named.items():
        makers |= {f"{name}, step": partial(loops.training_alone, config, place)}
        makers |= {f"{name}, end to end": partial(end_to_end, name)}
    rows = measure(makers, command, place.device, place.ranks, ceiling_flops_per_s(place))
    measured = {row["name"]: row for row in rows if "missing" not in row}
    loader, *decoders = (measured[name] for name in (loaders.OURS, loaders.DECODE, loaders.LIMIT) if name in measured)
    if decoders:  # of small pictures DALI, which decodes only what is kept, may be the faster one
        limit = max(decoders, key=lambda row: row["images_per_s"])
        loader |= {"limit": limit["name"], "limit_images_per_s": limit["images_per_s"]}
        loader["share_of_limit"] = loader["images_per_s"] / limit["images_per_s"]
    for name in named:
        step, whole = measured[f"{name}, step"], measured[f"{name}, end to end"]
        for row in (step, whole):
            row["share_of_limit"] = row["mfu"]
        if bottleneck.is_loader(whole):
            whole["bottleneck"] = bottleneck.of_loader(measured, loaders.transfer_s(work))
        else:
            alone_ms = step["ms_per_step"] if place.ranks.world_size > 1 else None
            whole["bottleneck"] = bottleneck.of_network(whole, place.device, str(place.precision), alone_ms)
        whole |= logged[name] or accuracy_here(*trained[name])
    for row in rows:
        row["stored_px"] = work.records.sizes
    return rows


def run_mode(command: Command, console: Console) -> int:
    """Measure, print the table, append to --out, write --csv.

    Raises UserError for settings that measure nothing or do not fit each other or the data.
    """
    check(command)
    device = choose_device("auto", local_rank())
    torch.backends.cudnn.benchmark = True  # as in training
    with processes(device) as ranks, contextlib.ExitStack() as stack:
        configs = configure(command, ranks.world_size)
        config = configs[0]
        stack.enter_context(repeatable(config.train.deterministic, device))
        if not isinstance(command, ModelCommand):
            display = Display(Console(stderr=True), shown=ranks.is_main)
            config = replace(config, data=with_folders(config.data, ranks, display))
        place = Place(device, ranks, choose_precision(config.amp, config.amp_dtype, device))
        command = settled(command, config, str(place.precision))
        if ranks.is_main and command.out:
            append(command.out, [])  # fails now rather than after the measurement
        around = circumstances(command, device, package_versions("torchvision", "timm", "pillow"))
        if isinstance(command, LoaderCommand):
            rows = measure_loader(command, config, place)
        else:
            configs = [replace(settings, data=config.data) for settings in configs]
            if isinstance(command, OverviewCommand):
                rows = measure_overview(command, configs, place)
            else:
                rows = measure_networks(command, configs, place)
        if ranks.is_main:
            report(MODES[type(command)], rows, around, command, console)
    return 0


def report(mode: str, rows: list[Row], around: dict[str, Any], command: Command, console: Console) -> None:
    """Show the rows and write them where they are asked for."""
    (show_overview if mode == "overview" else show)(mode, rows, around, console)
    lines = [{"mode": mode} | row | around for row in rows]
    if command.out:
        append(command.out, lines)
        console.print(f"Added to {command.out}.", markup=False, highlight=False, soft_wrap=True)
    if command.csv:
        write_csv(command.csv, lines)


def run(options: Options, console: Console) -> int:
    """Measure a mode, by default the overview, compare two files or draw one.

    The exit code is 1 where --compare finds too much lost.
    """
    for option, given in (("--compare", options.compare), ("--plot", options.plot)):
        if given and options.mode:
            raise UserError(f"{option} reads results and measures nothing: leave the mode out.")
    if not (options.compare or options.plot):
        return run_mode(options.mode or OverviewCommand(), console)
    if options.plot:
        results, picture = options.plot
        write_picture(picture, plot_throughput(read_throughput(results)))
    return compare(*options.compare, options.max_loss, console) if options.compare else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit code, 2 for a user's mistake."""
    return start(Options, run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
