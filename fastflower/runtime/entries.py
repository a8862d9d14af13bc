"""What a checkpoint holds, entry by entry, and whether a file that says to be one does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, NotRequired

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
Positive = Annotated[Finite, Field(gt=0)]
Three = Field(min_length=3, max_length=3)


class Group(TypedDict):
    """A group of the optimizer's parameters."""

    params: list[int]
    lr: Annotated[Finite, Field(ge=0)]


class Scaler(TypedDict):
    """The scaler of fp16's loss; its other values are torch's own."""

    scale: Positive
    growth_factor: Positive
    backoff_factor: Positive
    growth_interval: Count
    _growth_tracker: Count


class Records(TypedDict):
    """Records of a split, as `fastflower.data.identity.Identity` has them."""

    count: Count
    names: str
    content: str


class TrainRecords(TypedDict):
    """Records that train, as `fastflower.training.provenance.TrainRecords` has them; earlier versions noted less."""

    count: Count
    names: str
    content: NotRequired[str]
    whole: NotRequired[str]
    left_out: NotRequired[list[Count]]


# Of a trained network, by dotted names.
TRAINED: dict[str, Any] = {
    "model": Weights,
    "ema": Weights | None,
    "classes": Annotated[list[str], Field(min_length=1)],
    "normalization.mean": Annotated[list[Finite], Three],
    "normalization.std": Annotated[list[Positive], Three],
    "config": dict[str, Any],
}
# What going on needs besides.
RESUMED: dict[str, Any] = {
    "optimizer.state": dict[int, dict[str, Tensor | None]],
    "optimizer.param_groups": list[Group],
    "schedule": dict[str, Number],
    "scaler": Annotated[dict[str, Number], Field(max_length=0)] | Scaler,  # empty without fp16
    "rng.cpu": Annotated[Tensor, AfterValidator(_generator_state)],
    "rng.cuda": list[Tensor],
    "sums": Annotated[list[Annotated[list[Finite], Three]], Field(min_length=1)],
    "epoch": Count,
    "position": Count,
    "step": Count,
    "best": Finite | None,
    "best_epoch": Epoch,
    "improved_epoch": Epoch,
    "comparable_from": Count,
    "train_records": TrainRecords,
    "val_records": Annotated[dict[str, Any], Field(max_length=0)] | Records | None,  # empty where it is not known
}
_CHECKS: dict[str, TypeAdapter[Any]] = {name: TypeAdapter(kind) for name, kind in (TRAINED | RESUMED).items()}


def require_trained(state: Mapping[str, Any], path: Path) -> None:
    """Raise UserError unless a trained network is there."""
    require_entries(state, TRAINED, path)


def require_resumable(state: Mapping[str, Any], path: Path) -> None:
    """Raise UserError unless all is there that going on needs."""
    require_entries(state, TRAINED | RESUMED, path)
    if state["position"] and not sum(pictures for *_, pictures in state["sums"]):
        raise UserError(f"{path} is damaged (no sums of an epoch in progress): {_OTHER}.")


def require_entries(state: Mapping[str, Any], names: Iterable[str], path: Path) -> None:
    """Raise UserError unless the entries of these names are there, and of their kinds."""
    for name in names:
        value: Any = state
        for key in name.split("."):
            if not isinstance(value, Mapping) or key not in value:
                raise UserError(f"{path} lacks its entry {name}: {_OTHER}.")
            value = value[key]
        try:
            _CHECKS[name].validate_python(value, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, (name, *first["loc"])))
            raise UserError(f"{path} is damaged ({where}: {first['msg'].lower()}): {_OTHER}.") from error


def is_weights(value: Any) -> bool:
    """Whether it is a state_dict: tensors of plain values by name."""
    try:
        _CHECKS["model"].validate_python(value, strict=True)
    except ValidationError:
        return False
    return True
