"""The recipe: settings that fit the data, and why. Nothing here reads a file; `fastflower.training.fit` has the facts.

What somebody has named stays, and the rest is chosen around it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from fastflower.config import Config, ModelConfig, resolve
from fastflower.errors import UserError
from fastflower.flops import count
from fastflower.layers import Recipe
from fastflower.models import architecture, find_network
from fastflower.settings import nested
from fastflower.together import LOW_RATES, WARMUP_SHARE, late_milestones, value_of

HOUR_S = 3600
STEPS = 12  # in an epoch at least, where the pictures suffice: each epoch then moves the weights, and BatchNorm's mean
SMALLEST_BATCH = 8  # of which BatchNorm still takes useful statistics
LARGEST_BATCH = 64  # of a process: more makes few steps of most collections, and little more speed
# The paper's crop of 224 pixels from sides of 256 to 480, at any size.
LOW, HIGH = 256 / 224, 480 / 224
# Sides that are tried from the largest on; a network sees 32 times 32 pixels as one position.
CROPS = (224, 192, 160, 128, 112, 96, 80, 64, 56, 48, 40, 32)
CPU_CROP = 96  # from scratch on a CPU: 224 pixels cost five times as much
DEEPER_FROM = 10_000  # pictures from which on a GPU trains more layers from scratch
# How often pictures are looked at, all epochs together, and the range of epochs that makes.
LOOKS = {("scratch", "cpu"): 100_000, ("scratch", "cuda"): 1_000_000, ("finetune", "cpu"): 20_000}
LOOKS |= {("finetune", "cuda"): 100_000}
EPOCHS = {"scratch": (15, 150), "finetune": (5, 20)}
# Networks that have weights for ImageNet, the first that can be had. On a CPU the smaller ones.
PRETRAINED = {"cuda": ("resnet50", "resnet34", "resnet18"), "cpu": ("resnet18", "resnet34", "resnet50")}
WEIGHTS = "IMAGENET1K_V1"
# Multiply-adds a second of a processor core or a GPU that is slow: what takes an hour at it is measured.
SLOW = {"cpu": 8e9, "cuda": 1e12}
CACHED = 1e9  # bytes of decoded pictures that are kept in memory without asking


@dataclass(frozen=True)
class Facts:
    """What a recipe is fitted to."""

    train: int  # records that train
    val: int  # records that validate
    classes: int
    side: int  # shorter side of the stored pictures (pixels), of most of them
    pixels: float = 0  # of all pictures together, as they are stored
    device: str = "cpu"  # or cuda
    ranks: int = 1  # processes
    cores: int = 1  # processor cores of a process
    weights: tuple[str, ...] = ()  # networks whose weights for ImageNet can be had, or whose weights are named
    missing: str = ""  # why there are none, as the end of a sentence
    rate: float | None = None  # multiply-adds a second over all processes, as measured; None = it was not


@dataclass(frozen=True)
class Fitted:
    """A recipe that fits."""

    settings: dict[str, Any]  # nested: what it has chosen
    reasons: str  # one line
    notes: tuple[str, ...]  # a sentence each
    doubtful: bool  # whether it may take more than an hour, which a measured rate would tell


def fit(recipe: Recipe, facts: Facts, config: Config, named: set[str]) -> Fitted:
    """The settings of a recipe for some data.

    Args:
        recipe: finetune, scratch, or auto = finetune where weights can be had.
        facts: of the data and the machine.
        config: what is named, over the defaults.
        named: the dotted keys that are named, which stay.

    Raises:
        UserError: finetune, and there are no weights for it.
    """
    chosen: dict[str, Any] = {}

    def choose(key: str, value: Any) -> Any:
        if key not in named:
            chosen[key] = value
        return chosen.get(key, value_of(config, key))

    kind, network, notes = _start(recipe, facts, config, named)
    name = choose("model.name", network)
    weights = choose("model.pretrained", WEIGHTS if kind == "finetune" else None)

    batch = choose("train.batch_size", batch_size(facts.train, facts.ranks, config.train.accumulate))
    adaptive = config.train.optimizer == "adamw"
    pictures = batch if isinstance(batch, int) else LARGEST_BATCH * facts.ranks  # until it is found
    lr = choose("train.lr", learning_rate(kind, name, pictures, adaptive=adaptive))
    if lr is None:  # which somebody has named
        lr = resolve(replace(config, model=ModelConfig(name, pretrained=weights))).train.lr
    schedule = choose("train.schedule", "onecycle")
    choose("train.label_smoothing", 0.1)  # few pictures are soon known by heart; it keeps the outputs modest
    choose("train.nesterov", not adaptive and config.train.momentum > 0)

    crops = [config.data.crop] if "data.crop" in named else _crops(kind, name, facts, config, named)
    hours = config.train.hours
    named_epochs = resolve(config).train.epochs if "train.epochs" in named else None
    timed = hours is not None and not named_epochs  # then train.hours says how long
    if named_epochs:
        epochs = named_epochs
    else:
        warmup = config.train.warmup_epochs if "train.warmup_epochs" in named and schedule not in LOW_RATES else 0
        least = max(1, math.ceil(warmup / WARMUP_SHARE), 2 * config.train.freeze_epochs)
        epochs = max(least, _epochs(kind, facts))
    crop, doubtful = crops[0], False
    if facts.rate is None:
        slow = SLOW[facts.device] * facts.ranks * (facts.cores if facts.device == "cpu" else 1)
        doubtful = not timed and seconds(name, crop, epochs, facts, slow) > HOUR_S
    else:
        crop = next((c for c in crops if seconds(name, c, epochs, facts, facts.rate) <= HOUR_S), crops[-1])
        if not named_epochs:
            affordable = int(HOUR_S / seconds(name, crop, 1, facts, facts.rate))
            epochs = max(least, min(epochs, affordable))
    choose("train.epochs", None if timed else epochs)
    warmup = choose("train.warmup_epochs", min(max(1.0, epochs / 10), WARMUP_SHARE * epochs))
    if schedule == "step" and min(config.train.milestones) >= epochs > 1:
        choose("train.milestones", late_milestones(epochs))
    choose("data.crop", crop)
    choose("data.scale", (max(crop, round(crop * LOW)), max(crop, round(crop * HIGH))))
    choose("data.val_resize", max(crop, round(crop * LOW)))
    if 3 * facts.pixels <= CACHED:
        choose("data.cache", "ram")

    length = f"{hours:g} h" if timed else _counted(epochs, "epoch") + (f" (at most {hours:g} h)" if hours else "")
    reasons = (
        f"Recipe: {name} from {_origin(weights, name)}, {_counted(facts.train, 'picture')} of "
        f"{_counted(facts.classes, 'class', 'classes')} in {_batches(batch, facts.train)}, "
        f"{length} of {schedule} at lr {lr:.2g}"
        + (f" with {warmup:g} of warm-up" if schedule not in LOW_RATES else "")
        + f", {_counted(crop, 'pixel')} (stored: {facts.side})"
    )
    if facts.rate:
        took = seconds(name, crop, epochs, facts, facts.rate) / HOUR_S
        reasons += f", about {took:.2g} h at {facts.rate / 1e9:,.0f} G multiply-adds/s as measured"
    return Fitted(nested(chosen), f"{reasons}.", tuple(notes), doubtful)


def _origin(weights: str | None, network: str) -> str:
    """From what training starts, for the line that says it."""
    if weights is None:
        return "scratch"
    return "ImageNet's weights" if weights in find_network(network).weights else f"the weights of {weights}"


def _batches(batch: int | float | str, pictures: int) -> str:
    if not isinstance(batch, int):
        return f"batches to be found (train.batch_size {batch})"
    return f"batches of {batch} ({_counted(max(1, pictures // batch), 'step')} an epoch)"


def _counted(number: int, one: str, several: str = "") -> str:
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def candidates(recipe: Recipe, device: str, config: Config, named: set[str]) -> tuple[str, ...]:
    """Networks whose weights for ImageNet would do, the best first; none where what is named leaves no choice."""
    if recipe == "scratch" or "model.pretrained" in named:
        return ()
    names = (config.model.name,) if "model.name" in named else PRETRAINED[device]
    return tuple(name for name in names if WEIGHTS in find_network(name).weights and _as_published(config.model, name))


def _as_published(model: ModelConfig, name: str) -> bool:
    """Whether a network of that name would be built as its weights need it."""
    return architecture(asdict(replace(model, name=name))) == architecture(asdict(ModelConfig(name)))


def _start(recipe: Recipe, facts: Facts, config: Config, named: set[str]) -> tuple[str, str, list[str]]:
    """From what training starts, the network, and sentences on it."""
    given = config.model.pretrained if "model.pretrained" in named else None
    if given or (facts.weights and recipe != "scratch"):
        fits = "model.name" not in named and facts.weights
        return "finetune", facts.weights[0] if fits else config.model.name, []
    if recipe == "finetune":
        raise UserError(f"--config finetune needs weights for ImageNet, and {facts.missing}.")
    notes = []
    if recipe == "auto" and facts.missing:
        notes.append(
            f"Training from scratch, since {facts.missing}. With weights it takes a fraction of the epochs and usually "
            "errs far less often."
        )
    deep = facts.device == "cuda" and facts.train >= DEEPER_FROM
    return "scratch", config.model.name if "model.name" in named else "resnet34" if deep else "resnet18", notes


def batch_size(pictures: int, ranks: int, pieces: int = 1) -> int:
    """The largest power of two that leaves STEPS steps an epoch, and each process and piece whole pictures."""
    largest = LARGEST_BATCH * ranks
    batch = 1 << int(math.log2(min(max(pictures / STEPS, SMALLEST_BATCH), largest)))
    unit = ranks * pieces
    return max(unit, min(batch, pictures) // unit * unit)


def learning_rate(kind: str, network: str, batch: int, *, adaptive: bool = False) -> float:
    """The highest rate for a batch, with its square root: 0.05 at 64 pictures and so the paper's 0.1 at 256.

    Networks that were published with a lower one get as much less (vgg, alexnet); weights that are only tuned a fifth.
    """
    at_64 = 1e-3 if adaptive else 0.05 * find_network(network).lr / 0.1
    rate = at_64 * math.sqrt(batch / 64) * (0.2 if kind == "finetune" else 1)
    return float(f"{rate:.2g}")


def _crops(kind: str, network: str, facts: Facts, config: Config, named: set[str]) -> list[int]:
    """Sides of the crop, from the wanted one down: of no more pixels than are stored, and fit for what is named."""
    most = min(facts.side / LOW, CPU_CROP if kind == "scratch" and facts.device == "cpu" else 224)
    if "data.scale" in named:
        most = min(most, config.data.scale[0])
    if "data.val_resize" in named and config.data.val_resize:
        most = min(most, config.data.val_resize)
    least = find_network(network).min_size
    smallest = 64 if kind == "scratch" else 112  # below which flowers are hard to tell apart, and weights do not fit
    crops = [crop for crop in CROPS if least <= crop <= most]
    return [crop for crop in crops if crop >= smallest] or crops[:1] or [max(least, int(most))]


def _epochs(kind: str, facts: Facts) -> int:
    """Enough looks at pictures, all together, within the usual range of epochs."""
    low, high = EPOCHS[kind]
    return min(max(round(LOOKS[kind, facts.device] / max(facts.train, 1)), low), high)


def seconds(network: str, crop: int, epochs: int, facts: Facts, rate: float) -> float:
    """Time of all epochs: a training step costs three times as much as a forward pass."""
    return macs(network, crop) * (3 * facts.train + facts.val) * epochs / rate


@cache
def macs(network: str, crop: int) -> int:
    """Multiply-adds of a forward pass for one picture."""
    work: int = count(network, max(crop, find_network(network).min_size)).macs  # a smaller one is refused later
    return work
