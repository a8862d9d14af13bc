"""Settings as nested plain values, as YAML files and checkpoints hold them: read, merged, checked and written."""

from __future__ import annotations

import difflib
import importlib.resources
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import TypeAdapter, ValidationError

from fastflower.config import Config
from fastflower.errors import UserError
from fastflower.models import find_network

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def find_config(given: str | Path) -> Path:
    """A configuration file by its path, or by its name where it comes with fastflower."""
    path = Path(given)
    if not path.suffix and not path.is_file():
        resource = importlib.resources.files("fastflower.configs").joinpath(f"{given}.yaml")
        with importlib.resources.as_file(resource) as bundled:
            if bundled.is_file():
                return bundled
    return path


def load_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, as nested plain values.

    Raises:
        UserError: no such file, not YAML, or not a mapping.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give an existing configuration file.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(settings, dict | None):
        raise UserError(f"{path} holds no settings: write keys such as 'train: {{epochs: 10}}'.")
    return settings or {}


def build(settings: Mapping[str, Any], source: str) -> Config:
    """A checked configuration from nested plain values; what they leave out has its default.

    Args:
        settings: as in a YAML file.
        source: where they come from, for messages.

    Raises:
        UserError: an unknown key (the nearest is suggested), or a value that is wrong by itself or beside another.
    """
    _refuse_unknown_keys(settings, Config, "", source)
    try:
        config = TypeAdapter(Config).validate_python(settings)
    except ValidationError as error:
        # of the branches of a union, the one that got furthest says best what is wrong
        first = max(error.errors(), key=lambda problem: len(problem["loc"]))
        key = ".".join(str(part) for part in _key_path(first["loc"]))
        raise UserError(f"{source}: {key} is {first['input']!r}: {_lower_first(first['msg'])}.") from error
    _check_together(config, source)
    return config


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings where `above` wins."""
    merged = dict(below)
    for key, value in above.items():
        inner = merged.get(key)
        merged[key] = merge(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML that `load_yaml` and `build` read back to the same."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, default_flow_style=None, width=120)


def to_plain(config: DataclassInstance) -> dict[str, Any]:
    """A configuration, or another dataclass, as nested dicts of plain values: what YAML and checkpoints hold."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    settings: dict[str, Any] = plain(asdict(config))
    return settings


def keys(kind: type = Config, prefix: str = "") -> list[str]:
    """All dotted keys, such as `train.lr`."""
    names = []
    for f in fields(kind):
        section = f.default_factory if is_dataclass(f.default_factory) else None
        names += keys(section, f"{prefix}{f.name}.") if isinstance(section, type) else [prefix + f.name]
    return names


def _refuse_unknown_keys(settings: Mapping[str, Any], kind: type, prefix: str, source: str) -> None:
    sections = {f.name: f.default_factory for f in fields(kind) if is_dataclass(f.default_factory)}
    names = {f.name for f in fields(kind)}
    for key, value in settings.items():
        if key not in names:
            near = _nearest(prefix, str(key))
            hint = f"did you mean {near}?" if near else f"the keys here are {', '.join(sorted(names))}."
            raise UserError(f"{source}: there is no setting {prefix}{key}; {hint}")
        section = sections.get(key)
        if isinstance(section, type):
            if not isinstance(value, Mapping):
                raise UserError(f"{source}: {prefix}{key} is {value!r}: it takes keys such as {keys(section)[0]}.")
            _refuse_unknown_keys(value, section, f"{prefix}{key}.", source)


def _nearest(prefix: str, key: str) -> str | None:
    """The dotted key that is most like the unknown one, wherever it stands."""
    if near := difflib.get_close_matches(prefix + key, keys(), n=1):
        return near[0]
    by_name = {dotted.rpartition(".")[2]: dotted for dotted in keys()}
    return next((by_name[name] for name in difflib.get_close_matches(key, by_name, n=1)), None)


def _check_together(config: Config, source: str) -> None:
    data, train = config.data, config.train
    low, high = data.scale
    low_rates = train.schedule in ("plateau", "step")
    final = data.train_on == "train+val"
    least = find_network(config.model.name).min_size
    problems = {
        f"data.scale is {low} {high}: give the smaller size first": low > high,
        f"data.scale starts at {low} pixels, below data.crop ({data.crop}): raise it or lower data.crop": low
        < data.crop,
        f"data.val_resize is {data.val_resize} pixels, below data.crop ({data.crop}): raise it or lower data.crop": (
            data.val_resize is not None and data.val_resize < data.crop
        ),
        f"data.crop is {data.crop} pixels, but {config.model.name} needs at least {least}: raise it": data.crop < least,
        "data.mean and data.std go together: give both or neither": (data.mean is None) != (data.std is None),
        f"data.std is {data.std}: each value must be above 0": data.std is not None and min(data.std) <= 0,
        f"train.warmup_epochs is {train.warmup_epochs:g}, not below train.epochs ({train.epochs}): lower it": (
            not low_rates and train.warmup_epochs >= train.epochs
        ),
        f"train.batch_size is {train.batch_size}, no multiple of train.accumulate ({train.accumulate}): change one": (
            train.batch_size % train.accumulate != 0
        ),
        "train.schedule plateau needs a validation loss, which data.train_on train+val leaves none: take another": (
            final and train.schedule == "plateau"
        ),
        "train.early_stop needs a validation figure, which data.train_on train+val leaves none: drop one of them": (
            final and train.early_stop is not None
        ),
        f"train.freeze_epochs is {train.freeze_epochs}, not below train.epochs ({train.epochs}): lower it": (
            train.freeze_epochs >= train.epochs
        ),
        "data.folds leaves a part to validate on, which data.train_on train+val trains on: drop one of them": (
            final and data.folds is not None
        ),
        f"data.fold is {data.fold}, but there is no data.folds: give the number of folds too": (
            data.folds is None and data.fold > 0
        ),
        f"data.fold is {data.fold}, not below data.folds ({data.folds}): the first fold is 0, lower it": (
            data.folds is not None and data.fold >= data.folds
        ),
        f"data.hw_decoder_load is {data.hw_decoder_load}, but train.deterministic needs 0, or a picture's place "
        "in its batch says by which decoder its pixels are made: give data.hw_decoder_load 0": (
            train.deterministic and bool(data.hw_decoder_load)
        ),
        "train.nesterov needs a train.momentum above 0": train.nesterov and train.momentum == 0,
    }
    for problem, holds in problems.items():
        if holds:
            raise UserError(f"{source}: {problem}.")


def _key_path(location: tuple[int | str, ...]) -> list[int | str]:
    # pydantic appends the branch of a union that it tried; the user's key ends before it
    path: list[int | str] = []
    for part in location:
        if path and not any(key.startswith(".".join(map(str, [*path, part]))) for key in keys()):
            break
        path.append(part)
    return path


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
