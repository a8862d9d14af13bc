"""Checkpoints: tensors and plain Python values, written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors

from fastflower.data.pipeline import Normalization
from fastflower.errors import UserError
from fastflower.files import atomic_write, to_json

FORMAT = 2  # goes up when an older checkpoint cannot be gone on from


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write `state` to `path`, atomically.

    Raises:
        OSError: the disk is full or the folder cannot be written; an earlier checkpoint at `path` is intact.
    """
    with atomic_write(path) as file:
        torch.save({"format": FORMAT, **state}, file)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, onto the CPU.

    Raises:
        UserError: the file is missing, damaged or of another kind.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): give a run folder or one of its checkpoints."
        ) from error
    try:
        with file:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever the instructions in a damaged file run into
        raise UserError(
            f"{path} is not a checkpoint or is damaged: give a run's checkpoints/last.pt or best.pt."
        ) from error
    if not isinstance(state, dict) or "format" not in state:
        raise UserError(f"{path} is not a checkpoint of fastflower: give a run's checkpoints/last.pt or best.pt.")
    if state["format"] != FORMAT:
        raise UserError(
            f"{path} was written by another version of fastflower (format {state['format']}, this one reads {FORMAT}): "
            "use that version, or train again."
        )
    return state


def weights_of(saved: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The state_dict that a checkpoint's figures are about: the average's, where one was kept."""
    return saved["ema"] or saved["model"]


def normalization_of(saved: Mapping[str, Any]) -> Normalization:
    """What a checkpoint's network was trained with."""
    return Normalization(tuple(saved["normalization"]["mean"]), tuple(saved["normalization"]["std"]))


def save_weights(path: Path, model: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a model's state_dict as safetensors, with metadata as JSON strings, atomically."""
    data = to_safetensors(
        {name: tensor.detach().cpu().contiguous() for name, tensor in model.items()},
        {name: to_json(value) for name, value in metadata.items()},
    )
    with atomic_write(path) as file:
        file.write(data)


def first_non_finite(state: Mapping[str, Any], prefix: str = "") -> str | None:
    """The name of the first floating-point tensor in nested `state` that holds NaN or infinity."""
    for key, value in state.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            if found := first_non_finite(value, f"{name}."):
                return found
        elif isinstance(value, torch.Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
            return name
    return None
