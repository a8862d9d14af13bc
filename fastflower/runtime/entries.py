"""What a checkpoint holds, entry by entry, and whether a file that says to be one does: each key is named here once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NotRequired, cast

import torch
from pydantic import AfterValidator, BeforeValidator, Field, InstanceOf, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # the standard library's, in the form that pydantic reads

from fastflower.errors import UserError


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_complex() or tensor.is_quantized:
        raise ValueError("a tensor without plain values")
    return tensor


def _generator_state(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype != torch.uint8 or tensor.shape != torch.get_rng_state().shape:
        raise ValueError("no state of torch's generator")
    return tensor


def _number(value: Any) -> Any:
    # pydantic takes whatever can be made a float, a tensor too
    if not isinstance(value, int | float) or (isinstance(value, int) and abs(value) > LARGEST):
        raise ValueError("not a number, or too large a one")
    return value


_OTHER = "give a checkpoint as training has written it"
LARGEST = 2**53  # up to which floats hold all integers
Tensor = Annotated[InstanceOf[torch.Tensor], AfterValidator(_dense)]
Weights = Annotated[dict[str, Tensor], Field(min_length=1)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Epoch = Annotated[int, Field(ge=-1, le=LARGEST)]  # -1: none
Number = Annotated[float, BeforeValidator(_number)]
Finite = Annotated[Number, Field(allow_inf_nan=False)]
Seconds = Annotated[Finite, Field(ge=0)]
Positive = Annotated[Finite, Field(gt=0)]
Three = Field(min_length=3, max_length=3)


class Identity(TypedDict):
    """What tells a table of records from others, wherever it is stored."""

    count: Count
    names: str  # digest of the ids and classes, in their order
    content: str  # digest of the encoded pictures, in the same order


class TrainRecords(TypedDict):
    """The records that train, and which data.skip leaves out; earlier versions noted less."""

    count: Count
    names: str
    content: NotRequired[str]
    whole: NotRequired[str]  # digest of the ids and classes with those that are left out
    left_out: NotRequired[list[Count]]  # their places among all
    keyed: NotRequired[bool]  # whether the order of an epoch is computed, not sorted; where it is not noted, it is not


class MeanAndStd(TypedDict):
    """Of the normalization, a value for each of red, green and blue."""

    mean: Annotated[list[Finite], Three]
    std: Annotated[list[Positive], Three]


class Group(TypedDict):
    """A group of the optimizer's parameters; its other options are those of the configuration."""

    params: list[int]
    lr: Annotated[Finite, Field(ge=0)]


class OptimizerState(TypedDict):
    """What torch's optimizers give of themselves: what they remember of each parameter by its number, and groups."""

    state: dict[int, dict[str, Tensor | None]]
    param_groups: list[Group]


class Scaler(TypedDict):
    """The scaler of fp16's loss; its other values are torch's own."""

    scale: Positive
    growth_factor: Positive
    backoff_factor: Positive
    growth_interval: Count
    _growth_tracker: Count


class Generators(TypedDict):
    """The states of torch's random generators, of the CPU and of each GPU."""

    cpu: Annotated[Tensor, AfterValidator(_generator_state)]
    cuda: list[Tensor]


class TrainedNetwork(TypedDict):
    """What a checkpoint holds of the network that was trained: enough to use it."""

    model: Weights
    ema: Weights | None  # the weights' moving average, where one was kept
    classes: Annotated[list[str], Field(min_length=1)]
    normalization: MeanAndStd
    config: dict[str, Any]


class Checkpoint(TrainedNetwork):
    """All that a checkpoint holds: what going on needs besides. See `fastflower.training.state.State`."""

    optimizer: OptimizerState
    schedule: dict[str, Number]
    scaler: Annotated[dict[str, Number], Field(max_length=0)] | Scaler  # empty without fp16
    rng: Generators
    sums: Annotated[list[Annotated[list[Finite], Three]], Field(min_length=1)]
    epoch: Count
    position: Count
    step: Count
    best: Finite | None
    best_epoch: Epoch
    improved_epoch: Epoch
    comparable_from: Count
    spent_s: Seconds
    closing_s: Seconds
    train_records: TrainRecords
    val_records: Annotated[dict[str, Any], Field(max_length=0)] | Identity | None  # empty where it is not known


class About(TypedDict, total=False):
    """What a file of weights alone says of them, as far as starting from them needs it."""

    architecture: Any
    normalization: MeanAndStd


_ABOUT = TypeAdapter(About)
_CHECKPOINT = TypeAdapter(Checkpoint)
_TRAINED_NETWORK = TypeAdapter(TrainedNetwork)
_WEIGHTS = TypeAdapter[dict[str, torch.Tensor]](Weights)


def as_trained(state: Mapping[str, Any], path: Path) -> TrainedNetwork:
    """The same, of which a trained network is known to be there; raises UserError unless it is."""
    return cast(TrainedNetwork, _checked(state, _TRAINED_NETWORK, path))


def as_checkpoint(state: Mapping[str, Any], path: Path) -> Checkpoint:
    """The same, of which all is known to be there that going on needs; raises UserError unless it is."""
    saved = cast(Checkpoint, _checked(state, _CHECKPOINT, path))
    if saved["position"] and not sum(pictures for *_, pictures in saved["sums"]):
        raise UserError(f"{path} is damaged (no sums of an epoch in progress): {_OTHER}.")
    return saved


def as_about(metadata: Mapping[str, Any], path: Path) -> About:
    """The same, as what it says is known to be of the kinds that it must be; raises UserError unless it is."""
    return cast(About, _checked(metadata, _ABOUT, path))


def _checked(state: Mapping[str, Any], kind: TypeAdapter[Any], path: Path) -> Mapping[str, Any]:
    """The same, with what the schema does not name."""
    try:
        kind.validate_python(state, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        entry = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            raise UserError(f"{path} lacks its entry {entry}: {_OTHER}.") from error
        raise UserError(f"{path} is damaged ({entry}: {first['msg'].lower()}): {_OTHER}.") from error
    return state


def is_weights(value: Any) -> bool:
    """Whether it is a state_dict: tensors of plain values by name."""
    try:
        _WEIGHTS.validate_python(value, strict=True)
    except ValidationError:
        return False
    return True
