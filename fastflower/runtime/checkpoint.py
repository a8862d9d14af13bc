"""Checkpoints: tensors and plain Python values, written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors

from fastflower.errors import UserError
from fastflower.files import atomic_write, to_json
from fastflower.runtime.entries import Checkpoint, TrainedNetwork, as_checkpoint, as_trained
from fastflower.settings import build, to_plain

FORMAT = 2  # goes up when an older checkpoint cannot be gone on from


def save_checkpoint(path: Path, state: Mapping[str, object]) -> None:
    """Write `state` to `path`, atomically.

    Raises:
        OSError: the disk is full or the folder cannot be written; an earlier checkpoint at `path` is intact.
    """
    with atomic_write(path) as file:
        try:
            torch.save({"format": FORMAT, **state}, file)
        except RuntimeError as error:
            if isinstance(cause := error.__context__, OSError):  # while torch cleaned up, it ran into another error
                raise OSError(cause.errno, cause.strerror) from error
            raise


def load_checkpoint(path: Path) -> Checkpoint:
    """Read what `save_checkpoint` wrote, onto the CPU, to go on from it.

    Weights have plain names, whatever wrapped the network that they were saved from; the configuration has all
    settings, those that are newer than the checkpoint at their defaults; and the records that trained have all that can
    be told of them where an earlier version noted less.

    Raises:
        UserError: the file is missing, damaged or of another kind.
    """
    saved = as_checkpoint(_with_newer_entries(_read(path)), path)
    network, records = _as_used(saved, path), saved["train_records"]
    if "left_out" not in records and not network["config"]["data"]["skip"]:  # then none was left out
        records = {**records, "whole": records["names"], "left_out": []}
    return {**saved, **network, "train_records": records}


def load_trained(path: Path) -> TrainedNetwork:
    """Read the trained network alone of what `save_checkpoint` wrote, as `load_checkpoint` does."""
    return trained_network(_read(path), path)


def trained_network(state: Mapping[str, Any], path: Path) -> TrainedNetwork:
    """That of a checkpoint of ours, as `load_trained` gives it; raises UserError unless it is whole."""
    return _as_used(as_trained(state, path), path)


def _read(path: Path) -> dict[str, Any]:
    """A file's content, which says to be a checkpoint of ours; UserError unless it does."""
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
    if not isinstance(state["format"], int) or state["format"] != FORMAT:
        raise UserError(
            f"{path} was written by another version of fastflower (format {state['format']}, this one reads {FORMAT}): "
            "use that version, or train again."
        )
    return state


def _as_used(saved: TrainedNetwork, path: Path) -> TrainedNetwork:
    """With plain names of the weights, and all settings."""
    return {
        **saved,
        "model": plain_names(saved["model"], path),
        "ema": None if saved["ema"] is None else plain_names(saved["ema"], path),
        "config": to_plain(build(saved["config"], str(path))),
    }


def _with_newer_entries(state: Mapping[str, Any]) -> dict[str, Any]:
    """With what earlier versions did not save, where that can be told."""
    newer = {"improved_epoch": state.get("best_epoch"), "comparable_from": 0, "val_records": {}, **state}
    newer = {"spent_s": 0.0, "closing_s": 0.0, **newer}
    records = state.get("train_records")
    if isinstance(records, Mapping) and "digest" in records:
        newer["train_records"] = {"names": records["digest"], **records}
    return newer


def plain_names(weights: Mapping[str, torch.Tensor], source: Path) -> dict[str, torch.Tensor]:
    """Weights without what DistributedDataParallel and torch.compile put before or into their names.

    Raises:
        UserError: two would have one name.
    """
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        short = ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))
        if short in plain:
            raise UserError(f"{source} holds two tensors {short}, one of them as {name}: keep the network's alone.")
        plain[short] = tensor
    return plain


def misfit(own: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> str:
    """How a state_dict's names and shapes differ from a network's `own`, in words; empty where they do not."""
    shapes = {name: (list(weights[name].shape), list(own[name].shape)) for name in own if name in weights}
    problems = {
        "missing": [name for name in own if name not in weights],
        "unexpected": [name for name in weights if name not in own],
        "of another shape": [f"{name} {its}, not {ours}" for name, (its, ours) in shapes.items() if its != ours],
    }
    return ", ".join(f"{len(names)} {what} ({_first_ten(names)})" for what, names in problems.items() if names)


def require_fit(network: torch.nn.Module, weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raise UserError, with the first names, unless a checkpoint's weights are those of the network that it names."""
    if problems := misfit(network.state_dict(), weights):
        raise UserError(
            f"{path} does not fit the network of its settings, keys: {problems}; give a checkpoint as training has "
            "written it."
        )


def _first_ten(names: list[str]) -> str:
    return ", ".join(names[:10]) + (", …" if len(names) > 10 else "")


def weights_of(saved: TrainedNetwork) -> dict[str, torch.Tensor]:
    """The state_dict that a checkpoint's figures are about: the average's, where one was kept."""
    return saved["ema"] or saved["model"]


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
            if inner := first_non_finite(value, f"{name}."):
                return inner
        elif isinstance(value, torch.Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
            return name
    return None
