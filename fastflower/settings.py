"""Settings as nested plain values, as YAML files and checkpoints hold them: read, merged, checked and written."""

from __future__ import annotations

import difflib
import importlib.resources
from collections.abc import Collection, Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import yaml

from fastflower import hints, values
from fastflower.config import Config
from fastflower.errors import UserError
from fastflower.models import find_network
from fastflower.yaml_files import Dumper, read_yaml

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def find_config(given: str | Path) -> Path:
    """A configuration file by its path, or by its name where it comes with fastflower.

    Raises:
        UserError: a name of which there is none.
    """
    path = Path(given).expanduser()
    bundled = importlib.resources.files("fastflower.configs")
    names = sorted(entry.name.removesuffix(".yaml") for entry in bundled.iterdir() if entry.name.endswith(".yaml"))
    if path.is_file():
        return path
    if str(given) in names:
        with importlib.resources.as_file(bundled.joinpath(f"{given}.yaml")) as file:
            return file
    if path.name == str(given) and path.stem in names:
        raise UserError(f"there is no file {path}; the configuration that comes with fastflower is called {path.stem}.")
    if not path.suffix and path.name == str(given):
        near = difflib.get_close_matches(path.name, names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"there is no configuration {given}; {hint}With fastflower come {', '.join(names)}; "
            "of your own give the file, such as mine.yaml."
        )
    return path


def load_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, as nested plain values.

    Raises:
        UserError: no such file, not YAML, or not a mapping.
    """
    settings = read_yaml(path)
    if not isinstance(settings, dict | None):
        raise UserError(f"{path} holds no settings: write keys such as 'train: {{epochs: 10}}'.")
    return nested(settings or {}, str(path))


def nested(settings: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Settings whose keys may be dotted (train.epochs), as nested ones.

    Raises:
        UserError: a setting that is given in both ways.
    """
    sections = {field.name for field in fields(Config) if is_dataclass(field.default_factory)}
    empty = {key for key in sections & set(settings) if settings[key] is None}  # all its keys are commented out
    plain = {key: value for key, value in settings.items() if "." not in str(key) and key not in empty}
    for dotted, value in settings.items():
        section, dot, name = str(dotted).partition(".")
        if not dot:
            continue
        inner = plain.get(section, {})
        if not isinstance(inner, Mapping) or name in inner:
            raise UserError(f"{source}: {dotted} stands beside {section}, which gives it too: keep one of them.")
        plain[section] = {**inner, name: value}
    return plain


def build(settings: Mapping[str, Any], source: str) -> Config:
    """A checked configuration from nested plain values; what they leave out has its default.

    Args:
        settings: as in a YAML file.
        source: where they come from, for messages.

    Raises:
        UserError: an unknown key (the nearest is suggested), or a value that is wrong by itself or beside another.
    """
    config: Config = _built(Config, settings, "", source)
    _check_together(config, source)
    return config


def _built(kind: type, settings: Mapping[str, Any], prefix: str, source: str) -> Any:
    """A section's dataclass of its settings."""
    annotations = get_type_hints(kind, include_extras=True)
    built = {}
    for key, value in settings.items():
        if key not in annotations:
            raise UserError(f"{source}: there is no setting {prefix}{key}; {_hint(prefix, str(key), annotations)}")
        annotation = annotations[key]
        if is_dataclass(annotation):
            if not isinstance(value, Mapping):
                first = keys(annotation)[0]  # type: ignore[arg-type]
                raise UserError(f"{source}: {prefix}{key} is {value!r}: it takes keys such as {first}.")
            built[key] = _built(annotation, value, f"{prefix}{key}.", source)  # type: ignore[arg-type]
            continue
        try:
            built[key] = values.read(annotation, value)
        except ValueError as error:
            raise UserError(f"{source}: {values.refusal(prefix + key, value, annotation)}") from error
    return kind(**built)


def _hint(prefix: str, key: str, names: Collection[str]) -> str:
    near = hints.nearest(prefix + key.replace("-", "_"), keys())
    return f"did you mean {near}?" if near else f"the keys here are {', '.join(sorted(names))}."


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings where `above` wins."""
    merged = dict(below)
    for key, value in above.items():
        inner = merged.get(key)
        merged[key] = merge(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML that `load_yaml` and `build` read back to the same."""
    return yaml.dump(to_plain(config), Dumper=Dumper, sort_keys=False, default_flow_style=None, width=120)


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
        f"train.warmup_epochs is {train.warmup_epochs:g}, not below train.epochs ({train.most_epochs:g}): lower it": (
            not low_rates and train.warmup_epochs >= train.most_epochs
        ),
        f"train.batch_size is {train.batch_size}, no multiple of train.accumulate ({train.accumulate}): change one": (
            isinstance(train.batch_size, int) and train.batch_size % train.accumulate != 0
        ),
        "train.schedule plateau needs a validation loss, which data.train_on train+val leaves none: take another": (
            final and train.schedule == "plateau"
        ),
        "train.early_stop needs a validation figure, which data.train_on train+val leaves none: drop one of them": (
            final and train.early_stop is not None
        ),
        f"train.freeze_epochs is {train.freeze_epochs}, not below train.epochs ({train.most_epochs:g}): lower it": (
            train.freeze_epochs >= train.most_epochs
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
