"""What throughput.py is asked, and the configuration that follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from bench.harness.common import require_positive
from bench.harness.words import arg
from fastflower.config import Config, resolve
from fastflower.errors import UserError
from fastflower.models import NormChoice
from fastflower.runtime.run_folder import RunFolder
from fastflower.settings import build, find_config, load_yaml, merge

Output = Literal["float32", "uint8"]
Dtype = Literal["fp32", "bf16", "fp16"]
LOCAL = Path(__file__).parents[1] / "results" / "local.jsonl"  # not under version control, unlike the files beside it


@dataclass(frozen=True)
class Common:
    """Options of all modes."""

    batch: int = 64
    """Pictures in a batch, of each process; halved for a contender whose batch memory does not hold."""
    steps: int = 30
    """Timed steps of a repeat."""
    warmup: int = 5
    """Steps before them that do not count; more where a contender works further ahead."""
    repeats: int = 3
    """How often each contender is measured; reported are the median and the range."""
    out: Path | None = LOCAL
    """File to append one JSON line a row to; None = no file."""
    csv: Path | None = None
    """File to write the rows to as a table."""


@dataclass(frozen=True)
class Pictures(Common):
    """Options of the modes that read pictures."""

    root: Annotated[tuple[Path, ...] | None, arg(name="data.root")] = None
    """Data folder, or several, as data.root; None = the run's, or the built-in synthetic flowers."""
    sizes: Literal["auto", "all"] | tuple[int, ...] | None = None
    """Stored sizes to read (pixels), as data.sizes; None = the run's, or auto."""
    crop: Annotated[int | None, arg(aliases=["--size"])] = None
    """Side of the pictures in a batch (pixels); None = the run's, or 224, or 56 of the built-in ones."""
    scale: tuple[int, int] | None = None
    """Range of the shorter side before the crop in training (pixels); None = the run's, or 256 480, or 64 96 of the
    built-in ones."""
    decode: Literal["auto", "scaled", "region", "whole"] | None = None
    """What of a picture is decoded, as data.decode; None = the run's, or auto."""
    threads: int | None = None
    """CPU threads of each process that decode and augment, as data.threads."""


@dataclass(frozen=True)
class Networks(Common):
    """Options of the modes that compute with networks."""

    run: Path | None = None
    """Run folder whose settings are taken where no option says otherwise, and whose best validation accuracy is shown
    beside the speed."""
    models: tuple[str, ...] = ()
    """Networks to measure; where none is named, the run's, or resnet18."""
    dtype: Dtype | None = None
    """Type of the matrix products; None = the run's, or fp32."""
    norm: NormChoice | None = None
    """How BatchNorm + ReLU is computed, as model.norm; None = the run's, or auto."""


@dataclass(frozen=True)
class LoaderCommand(Pictures):
    """Training batches from records: read, decode, resize, crop, flip, normalize; no network.

    Beside it stand DALI's decoder alone and, as the limit, bare libjpeg-turbo.
    """

    output: Output = "float32"
    """What is handed over: float32, normalized, or uint8 before normalization."""
    cache: Literal["off", "ram", "gpu", "auto"] = "off"
    """Also measure our loader from decoded pictures, as data.cache keeps them."""
    peers: bool = False
    """Measure in turn with it what people use otherwise: PIL and torchvision's transforms in a DataLoader, torchvision
    v2 on tensors, DALI's separate operators, timm's loader."""
    launches: bool = False
    """Measure instead what our loader takes from a thread that launches operations, as training's does: launches a
    second alone and beside the loader, and for how long the loader's thread holds Python's lock."""
    rate: float = 500.0
    """Images/s that --launches also holds the loader to."""


@dataclass(frozen=True)
class ModelCommand(Networks):
    """Forward pass, forward and backward pass, and training step on one synthetic batch that is on the device.

    Processes do not exchange gradients here.
    """

    size: int | None = None
    """Side of the pictures (pixels); None = the run's data.crop, or 56."""
    compile: Literal["on", "off", "both"] = "both"
    """Measure networks compiled by torch.compile, as they are, or both."""
    peers: bool = False
    """Measure in turn with them torchvision's and timm's networks of the same name."""


@dataclass(frozen=True)
class TrainCommand(Pictures, Networks):
    """Training from end to end: the loader, the network, the optimizer and, over processes, their exchange."""

    cache: Literal["off", "ram", "gpu", "auto"] | None = None
    """Where decoded pictures are kept, as data.cache; None = the run's, or off."""
    compile: Literal["auto", "on", "off", "both"] = "auto"
    """Measure networks compiled by torch.compile, as they are, or both; auto = as the run, or on a GPU only."""


@dataclass(frozen=True)
class EvalCommand(TrainCommand):
    """Evaluation from end to end: the loader of the validation split and the network."""

    val_resize: int | None = None
    """Shorter side before the center crop (pixels), as data.val_resize; None = the run's, or 256, or 64 of the built-in
    ones."""


@dataclass(frozen=True)
class OverviewCommand(EvalCommand):
    """One table of the loader, of the training step on a batch that is there, and of both together, which is training.

    Without any option it takes resnet18 and the built-in synthetic flowers of 64 pixels, and no more than three minutes
    on two CPU cores, drawing the flowers and compiling the resampler included.
    """

    steps: int = 15
    """Timed steps of a repeat."""
    dtype: Dtype | None = None
    """Type of the matrix products; None = the run's, or what --amp comes to on this machine."""


Command = LoaderCommand | ModelCommand | TrainCommand | EvalCommand
C = TypeVar("C", bound=Common)


def check(command: Command) -> None:
    """UserError for settings that measure nothing."""
    require_positive(
        command, *sorted({"batch", "steps", "warmup", "repeats", "size", "threads", "rate"} & vars(command).keys())
    )
    if command.warmup >= command.steps:
        raise UserError(f"--warmup {command.warmup} is not below --steps {command.steps}: lower it or raise --steps.")


def configure(command: Command, world_size: int) -> list[Config]:
    """The configurations that the options, the run and the defaults come to: one for each network.

    Raises:
        UserError: no such run, or settings that do not fit each other.
    """
    options = vars(command)
    data = {
        key: options.get(key) for key in ("root", "sizes", "crop", "scale", "decode", "threads", "cache", "val_resize")
    }
    if isinstance(command, ModelCommand):
        data["crop"] = command.size
    if isinstance(command, LoaderCommand):
        below: Mapping[str, Any] = {} if command.root else load_yaml(find_config("demo"))
    else:
        below = _below(command, data["root"])
    given: dict[str, Any] = {
        "data": _given(data),
        "model": _given({"norm": options.get("norm")}),
        "train": {"batch_size": command.batch * world_size, "accumulate": 1, "freeze_epochs": 0},
    }
    if not isinstance(command, EvalCommand):
        given["data"]["val_resize"] = None  # so that it does not have to fit the crop
    if dtype := options.get("dtype"):
        given |= {"amp": dtype != "fp32", "amp_dtype": "auto" if dtype == "fp32" else dtype}
    settings = merge(below, given)
    names = dict.fromkeys(options.get("models", ()))
    named = [merge(settings, {"model": {"name": name}}) for name in names] or [settings]
    return [resolve(build(of_network, "command line")) for of_network in named]


def _below(command: ModelCommand | TrainCommand | EvalCommand, root: object) -> Mapping[str, Any]:
    """Settings that options stand above: the run's, or those of the built-in data where no other is named."""
    if command.run:
        return merge(
            load_yaml(RunFolder(command.run).config), {"model": {"pretrained": None}}
        )  # the weights' values do not change the speed
    settings = {"model": {"name": "resnet18"}} if root else load_yaml(find_config("demo"))
    return merge(settings, {"amp": isinstance(command, OverviewCommand)})


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def settled(command: C, config: Config, dtype: str) -> C:
    """The command with what its options left to the run or to defaults, so that results tell what was measured."""
    data = config.data
    taken = {key: getattr(data, key) for key in ("root", "sizes", "crop", "scale", "decode", "cache", "val_resize")}
    taken |= {"size": data.crop, "models": (config.model.name,), "norm": config.model.norm, "dtype": dtype}
    open_ = {key: value for key, value in vars(command).items() if key in taken and value in (None, ())}
    return replace(command, **{key: taken[key] for key in open_})
