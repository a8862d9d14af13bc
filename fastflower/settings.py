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
from fastflower.together import first_misfit
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
        hint = f"; did you mean {near[0]}?" if near else "."
        raise UserError(
            f"there is no configuration {given}{hint} With fastflower come {', '.join(names)}; "
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


def nested(settings: Mapping[str, Any], source: str = "settings") -> dict[str, Any]:
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


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted keys, such as train.lr."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def build(settings: Mapping[str, Any], source: str) -> Config:
    """A checked configuration from nested plain values; what they leave out has its default.

    Args:
        settings: as in a YAML file.
        source: where they come from, for messages.

    Raises:
        UserError: an unknown key (the nearest is suggested), or a value that is wrong by itself or beside another.
    """
    config = typed(settings, source)
    if rule := first_misfit(config):
        raise UserError(f"{source}: {rule.problem(config)}.")
    return config


def typed(settings: Mapping[str, Any], source: str) -> Config:
    """The same as `build`, with each value checked by itself alone."""
    config: Config = _built(Config, settings, "", source)
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
