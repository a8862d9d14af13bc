"""Every setting of a run: one typed structure is the YAML file's schema, the command line and what a run records.

The text under a field is its help on the command line.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError
from tyro.constructors import PrimitiveConstructorSpec

from fastflower.errors import UserError
from fastflower.models import MODEL_NAMES, BottleneckStride, NormChoice, Shortcut

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
RGB = tuple[float, float, float]

_SWITCH = {"on": True, "true": True, "off": False, "false": False, "auto": None, "none": None}
# A flag with a third state: `--x`, `--x on|off|auto`.
Switch = Annotated[
    bool | None,
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="[on|off|auto]",
        instance_from_str=lambda args: _SWITCH[" ".join(args).lower()] if args else True,
        is_instance=lambda value: value is None or isinstance(value, bool),
        str_from_instance=lambda value: ["auto" if value is None else "on" if value else "off"],
    ),
]


@dataclass(frozen=True)
class Data:
    """Pictures: where they are and how they become batches."""

    root: Path | None = None
    """Folder that holds tfrecords-jpeg-SxS/{train,val,test}; none = the built-in synthetic flowers."""
    sizes: Literal["auto", "all"] | tuple[PositiveInt, ...] = "auto"
    """Stored sizes to use (pixels): auto = the smallest that is at least the minimum of data.scale, else the largest;
    all = every picture at every size; or a list."""
    crop: PositiveInt = 224
    """Side of the square that the network sees (pixels)."""
    scale: tuple[PositiveInt, PositiveInt] = (256, 480)
    """Training resizes each picture's shorter side to a size drawn uniformly from this range (pixels)."""
    val_resize: PositiveInt | None = 256
    """Validation resizes the shorter side to this before the center crop (pixels); none = crop the stored picture."""
    mean: RGB | None = None
    """Mean of R, G, B in [0, 1] for normalization; none = measured on the training split."""
    std: RGB | None = None
    """Standard deviation of R, G, B in [0, 1]; none = measured on the training split."""
    decoder: Literal["auto", "cpu", "gpu"] = "auto"
    """Where DALI decodes and augments; auto = on the GPU where there is one."""
    threads: PositiveInt | None = None
    """DALI's CPU threads per process; none = the machine's cores shared by its processes."""
    prefetch: PositiveInt = 2
    """Batches that DALI keeps in work, and as many finished ones that wait for the training step."""
    hw_decoder_load: Share = 0.65
    """Share of the JPEGs given to the hardware decoder of GPUs that have one (A100, H100 and later)."""


@dataclass(frozen=True)
class Model:
    """The network."""

    name: Literal[MODEL_NAMES] = "resnet34"  # type: ignore[valid-type]
    """Architecture, as in "Deep Residual Learning"."""
    shortcut: Shortcut = "B"
    """Residual shortcuts: A = zero padding, B = projection where dimensions grow, C = all projections."""
    bottleneck_stride: BottleneckStride = "3x3"
    """Where bottleneck blocks subsample: 3x3 (v1.5, torchvision's) or 1x1 (v1, the paper's)."""
    zero_init_gamma: bool = False
    """Start each residual branch at zero (last BatchNorm's gamma = 0)."""
    norm: NormChoice = "auto"
    """BatchNorm + ReLU by torch's operators or by our Triton kernels (in plain torch on a CPU); auto = triton on kinds
    of GPU where it was measured to be faster, else torch. The weights are the same."""
    sync_norm: bool = False
    """Take BatchNorm's statistics over all processes' pictures (SyncBatchNorm), for small batches; by our kernels."""


@dataclass(frozen=True)
class Train:
    """Optimization."""

    epochs: PositiveInt = 70
    """Passes over the training split."""
    batch_size: PositiveInt = 256
    """Pictures in a step, over all processes together."""
    lr: PositiveFloat = 0.1
    """Learning rate: the first (plateau) or the highest (cosine, onecycle)."""
    momentum: Share = 0.9
    """SGD's momentum."""
    weight_decay: NonNegativeFloat = 1e-4
    """L2 penalty on all parameters."""
    schedule: Literal["plateau", "cosine", "onecycle"] = "plateau"
    """plateau = multiply lr by factor when the validation loss has not improved for more than patience epochs;
    cosine = linear warm-up, then half a cosine to 0; onecycle = cosine up from lr/25 in the warm-up, then down to
    lr/250000."""
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """What plateau multiplies the learning rate by."""
    patience: Annotated[int, Field(ge=0)] = 7
    """Epochs without improvement (by a relative 1e-4) that plateau lets pass; the next one lowers the rate."""
    warmup_epochs: NonNegativeFloat = 1.0
    """Length of the warm-up of cosine and onecycle (epochs; fractions allowed)."""
    compile: Switch = None
    """torch.compile the network; auto = on a GPU only."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    """torch.compile's mode."""
    log_every: PositiveInt = 20
    """Steps between readings of the loss from the device (progress line, NaN check)."""


@dataclass(frozen=True)
class Config:
    """All settings of a training run."""

    amp: bool = False
    """Mixed precision."""
    amp_dtype: Literal["auto", "bf16", "fp16"] = "auto"
    """Type of mixed precision: auto = bf16 on GPUs from compute capability 8.0 on, fp16 with loss scaling on older
    ones, fp32 on a CPU without bf16 instructions; naming a type forces it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the network runs; auto = on the GPU where there is one."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of initialization, order and augmentation."""
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    train: Train = field(default_factory=Train)


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


def to_plain(config: Config) -> dict[str, Any]:
    """Nested dicts of plain values: what YAML and checkpoints hold."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(asdict(config))


def keys(kind: type = Config, prefix: str = "") -> list[str]:
    """All dotted keys, such as `train.lr`."""
    found = []
    for f in fields(kind):
        nested = f.default_factory if is_dataclass(f.default_factory) else None
        found += keys(nested, f"{prefix}{f.name}.") if isinstance(nested, type) else [prefix + f.name]
    return found


def _refuse_unknown_keys(settings: Mapping[str, Any], kind: type, prefix: str, source: str) -> None:
    sections = {f.name: f.default_factory for f in fields(kind) if is_dataclass(f.default_factory)}
    known = {f.name for f in fields(kind)}
    for key, value in settings.items():
        if key not in known:
            near = _nearest(prefix, str(key))
            hint = f"did you mean {near}?" if near else f"the keys here are {', '.join(sorted(known))}."
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
    by_name = {known.rpartition(".")[2]: known for known in keys()}
    return next((by_name[name] for name in difflib.get_close_matches(key, by_name, n=1)), None)


def _check_together(config: Config, source: str) -> None:
    data, train = config.data, config.train
    low, high = data.scale
    problems = {
        f"data.scale is {low} {high}: give the smaller size first": low > high,
        f"data.scale starts at {low} pixels, below data.crop ({data.crop}): raise it or lower data.crop": low
        < data.crop,
        f"data.val_resize is {data.val_resize} pixels, below data.crop ({data.crop}): raise it or lower data.crop": (
            data.val_resize is not None and data.val_resize < data.crop
        ),
        "data.mean and data.std go together: give both or neither": (data.mean is None) != (data.std is None),
        f"data.std is {data.std}: each value must be above 0": data.std is not None and min(data.std) <= 0,
        f"train.warmup_epochs is {train.warmup_epochs:g}, not below train.epochs ({train.epochs}): lower it": (
            train.schedule != "plateau" and train.warmup_epochs >= train.epochs
        ),
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
