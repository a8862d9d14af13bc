"""Settings that must fit together: which do not, and which of them follows where the user named only the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from fastflower.config import Config
from fastflower.models import find_network
from fastflower.values import written

WARMUP_SHARE = 0.25  # of the epochs, where one of the two follows the other
LOW_RATES = ("plateau", "step")  # schedules that begin at the rate itself, without a warm-up


@dataclass(frozen=True)
class Rule:
    """Settings of which a combination does not work."""

    broken: Callable[[Config], bool]
    problem: Callable[[Config], str]  # the sentence that refuses it, without its end
    keys: tuple[str, ...]  # dotted, all that it is about
    follow: Mapping[str, Callable[[Config], Any]]  # the value with which each of some keys would fit the others
    refused: bool = True  # or else it works, but not as meant


def first_misfit(config: Config) -> Rule | None:
    """The first combination that is refused, if there is one."""
    return next((rule for rule in RULES if rule.refused and rule.broken(config)), None)


def settle(config: Config, strength: Mapping[str, int]) -> tuple[Config, list[str]]:
    """Let a setting follow those that it does not fit, where one of them was named by somebody stronger.

    Args:
        config: the settings.
        strength: by dotted key, how strongly it was named; 0 or missing = it is a default.

    Returns:
        The settings, of which some may still not fit (`first_misfit`), and a sentence for each that follows another.
    """
    said, sentences = dict(strength), []
    while step := _next(config, said):
        rule, key = step
        value = rule.follow[key](config)
        strongest = max(said.get(other, 0) for other in rule.keys)
        for_whom = [other for other in rule.keys if other != key and said.get(other, 0) == strongest]
        reason = " and ".join(f"{other} {written(value_of(config, other))}" for other in for_whom)
        sentences.append(f"{key} {written(value_of(config, key))} → {written(value)}, to fit {reason}.")
        config, said[key] = with_value(config, key, value), strongest
    return config, sentences


def _next(config: Config, said: Mapping[str, int]) -> tuple[Rule, str] | None:
    """A broken rule, and the weakest key that can follow a stronger one."""
    for rule in RULES:
        if rule.broken(config):
            strongest = max(said.get(key, 0) for key in rule.keys)
            weaker = [key for key in rule.follow if said.get(key, 0) < strongest]
            if weaker:
                return rule, min(weaker, key=lambda key: said.get(key, 0))
    return None


def value_of(config: Config, key: str) -> Any:
    """A setting by its dotted key."""
    return attrgetter(key)(config)


def with_value(config: Config, key: str, value: Any) -> Config:
    """The same settings with another value of a dotted key."""
    section, _, name = key.rpartition(".")
    if not section:
        return replace(config, **{name: value})
    return replace(config, **{section: replace(getattr(config, section), **{name: value})})


def _grown(scale: tuple[int, int], crop: int) -> tuple[int, int]:
    """Sizes from `crop` on, which are as far apart as those of `scale`, and reach at least as far."""
    low, high = scale
    return crop, max(high, round(crop * high / low))


def _multiple(size: int, pieces: int) -> int:
    return max(1, round(size / pieces)) * pieces


def late_milestones(epochs: int) -> tuple[int, ...]:
    """After half and three quarters of so many epochs."""
    return tuple(sorted({max(1, epochs // 2), max(1, epochs * 3 // 4)}))


def _divisor(size: int, pieces: int) -> int:
    return next(number for number in range(min(pieces, size), 0, -1) if size % number == 0)


RULES = (
    Rule(
        lambda c: c.data.scale[0] > c.data.scale[1],
        lambda c: f"data.scale is {written(c.data.scale)}: give the smaller size first",
        ("data.scale",),
        {},
    ),
    Rule(
        lambda c: c.data.crop < find_network(c.model.name).min_size,
        lambda c: (
            f"data.crop is {c.data.crop} pixels, but {c.model.name} needs at least "
            f"{find_network(c.model.name).min_size}: raise it"
        ),
        ("data.crop", "model.name"),
        {"data.crop": lambda c: find_network(c.model.name).min_size},
    ),
    Rule(
        lambda c: c.data.scale[0] < c.data.crop,
        lambda c: (
            f"data.scale starts at {c.data.scale[0]} pixels, below data.crop ({c.data.crop}): raise it or lower "
            "data.crop"
        ),
        ("data.scale", "data.crop"),
        {"data.scale": lambda c: _grown(c.data.scale, c.data.crop), "data.crop": lambda c: c.data.scale[0]},
    ),
    Rule(
        lambda c: c.data.val_resize is not None and c.data.val_resize < c.data.crop,
        lambda c: (
            f"data.val_resize is {c.data.val_resize} pixels, below data.crop ({c.data.crop}): raise it or lower "
            "data.crop"
        ),
        ("data.val_resize", "data.crop"),
        {"data.val_resize": lambda c: c.data.crop, "data.crop": lambda c: c.data.val_resize},
    ),
    Rule(
        lambda c: (c.data.mean is None) != (c.data.std is None),
        lambda c: "data.mean and data.std go together: give both or neither",
        ("data.mean", "data.std"),
        {},
    ),
    Rule(
        lambda c: c.data.std is not None and min(c.data.std) <= 0,
        lambda c: f"data.std is {c.data.std}: each value must be above 0",
        ("data.std",),
        {},
    ),
    Rule(
        lambda c: c.train.schedule not in LOW_RATES and c.train.warmup_epochs >= c.train.most_epochs,
        lambda c: (
            f"train.warmup_epochs is {c.train.warmup_epochs:g}, not below train.epochs ({c.train.most_epochs:g}): "
            "lower it"
        ),
        ("train.warmup_epochs", "train.epochs"),
        {
            "train.warmup_epochs": lambda c: WARMUP_SHARE * c.train.most_epochs,
            "train.epochs": lambda c: math.ceil(c.train.warmup_epochs / WARMUP_SHARE),
        },
    ),
    Rule(
        lambda c: isinstance(c.train.batch_size, int) and c.train.batch_size % c.train.accumulate != 0,
        lambda c: (
            f"train.batch_size is {c.train.batch_size}, no multiple of train.accumulate ({c.train.accumulate}): "
            "change one"
        ),
        ("train.batch_size", "train.accumulate"),
        {
            "train.batch_size": lambda c: _multiple(c.train.pictures, c.train.accumulate),
            "train.accumulate": lambda c: _divisor(c.train.pictures, c.train.accumulate),
        },
    ),
    Rule(
        lambda c: c.data.train_on == "train+val" and c.train.schedule == "plateau",
        lambda c: (
            "train.schedule plateau needs a validation loss, which data.train_on train+val leaves none: take another"
        ),
        ("data.train_on", "train.schedule"),
        {"train.schedule": lambda c: "cosine"},
    ),
    Rule(
        lambda c: c.data.train_on == "train+val" and c.train.early_stop is not None,
        lambda c: (
            "train.early_stop needs a validation figure, which data.train_on train+val leaves none: drop one of them"
        ),
        ("data.train_on", "train.early_stop"),
        {"train.early_stop": lambda c: None},
    ),
    Rule(
        lambda c: c.train.freeze_epochs >= c.train.most_epochs,
        lambda c: (
            f"train.freeze_epochs is {c.train.freeze_epochs}, not below train.epochs ({c.train.most_epochs:g}): "
            "lower it"
        ),
        ("train.freeze_epochs", "train.epochs"),
        {
            "train.freeze_epochs": lambda c: int(c.train.most_epochs // 2),
            "train.epochs": lambda c: 2 * c.train.freeze_epochs,
        },
    ),
    Rule(
        lambda c: c.data.train_on == "train+val" and c.data.folds is not None,
        lambda c: "data.folds leaves a part to validate on, which data.train_on train+val trains on: drop one of them",
        ("data.train_on", "data.folds"),
        {"data.folds": lambda c: None, "data.train_on": lambda c: "train"},
    ),
    Rule(
        lambda c: c.data.folds is None and c.data.fold > 0,
        lambda c: f"data.fold is {c.data.fold}, but there is no data.folds: give the number of folds too",
        ("data.folds", "data.fold"),
        {"data.fold": lambda c: 0},
    ),
    Rule(
        lambda c: c.data.folds is not None and c.data.fold >= c.data.folds,
        lambda c: f"data.fold is {c.data.fold}, not below data.folds ({c.data.folds}): the first fold is 0, lower it",
        ("data.folds", "data.fold"),
        {"data.fold": lambda c: 0},
    ),
    Rule(
        lambda c: c.train.deterministic and bool(c.data.hw_decoder_load),
        lambda c: (
            f"data.hw_decoder_load is {c.data.hw_decoder_load}, but train.deterministic needs 0, or a picture's place "
            "in its batch says by which decoder its pixels are made: give data.hw_decoder_load 0"
        ),
        ("train.deterministic", "data.hw_decoder_load"),
        {"data.hw_decoder_load": lambda c: 0.0},
    ),
    Rule(
        lambda c: c.train.nesterov and c.train.momentum == 0,
        lambda c: "train.nesterov needs a train.momentum above 0",
        ("train.nesterov", "train.momentum"),
        {"train.nesterov": lambda c: False, "train.momentum": lambda c: 0.9},
    ),
    Rule(  # what would be no schedule at all
        lambda c: c.train.schedule == "step" and 1 < c.train.most_epochs <= min(c.train.milestones),
        lambda c: (
            f"train.milestones {written(c.train.milestones)} are all after train.epochs ({c.train.most_epochs:g})"
        ),
        ("train.schedule", "train.epochs", "train.milestones"),
        {"train.milestones": lambda c: late_milestones(int(c.train.most_epochs))},
        refused=False,
    ),
)
