"""The settings of a run: composed of what was named, and by a recipe fitted to the pictures and the machine."""

from __future__ import annotations

import contextlib
import itertools
import time
from dataclasses import replace

import numpy as np
import torch
from rich.console import Console

from fastflower.config import Config, resolve
from fastflower.data.dataset import open_dataset, with_folders
from fastflower.data.decoding import shapes_of
from fastflower.errors import UserError
from fastflower.layers import Layer, Layers, Recipe
from fastflower.runtime.distributed import Ranks
from fastflower.runtime.progress import Display
from fastflower.runtime.signals import Signals
from fastflower.training import recipe
from fastflower.training.pretrained import at_hand, network_of
from fastflower.training.recipe import Facts, Fitted, candidates, macs
from fastflower.training.setup import prepare
from fastflower.training.step import training_network, training_step

SAMPLE = 200  # pictures whose sizes are looked up, evenly over the split
MEASURED_STEPS = 5


def settings_of(layers: Layers, device: torch.device, ranks: Ranks, console: Console) -> Config:
    """The settings of a run, the same on all ranks; says what follows what, and what a recipe has chosen and why.

    Args:
        layers: what was named.
        device: where the network will run.
        ranks: the processes.
        console: where sentences and progress are shown.

    Raises:
        UserError: settings that do not fit together, bad data, or weights that a recipe needs and cannot be had.
    """
    display = Display(console, shown=ranks.is_main)
    if layers.recipe:
        layers.compose()  # two that are named and do not fit are refused before data are read for them
        with display:
            fitted = _fit(layers.recipe, layers, device, ranks, display)
        for sentence in (*fitted.notes, fitted.reasons):
            display.say(sentence)
        layers = layers.over(Layer("recipe", fitted.settings))
    config, sentences = layers.compose()
    for sentence in sentences:
        display.say(sentence)
    return resolve(config)


def _fit(kind: Recipe, layers: Layers, device: torch.device, ranks: Ranks, display: Display) -> Fitted:
    config, named = layers.typed(), layers.keys
    data = with_folders(config.data, ranks, display)
    with ranks.main_first():
        own = _facts(kind, replace(config, data=data), named, device, ranks, display)
    facts = ranks.gather(own)[0]  # machines may differ in what they have
    fitted = recipe.fit(kind, facts, config, named)
    if fitted.doubtful:
        provisional, _ = layers.over(Layer("recipe", fitted.settings)).compose()
        display.say("Measuring how fast this machine trains, since it may take more than an hour.")
        rate = _rate(resolve(provisional), device, ranks)
        fitted = recipe.fit(kind, replace(facts, rate=rate), config, named)
    return fitted


def _facts(
    kind: Recipe, config: Config, named: set[str], device: torch.device, ranks: Ranks, display: Display
) -> Facts:
    data = config.data
    if "data.scale" not in named and "data.sizes" not in named:
        data = replace(data, scale=(2**30, 2**30))  # the largest stored size is what there is
    dataset = open_dataset(data, config.seed, display.follow("read pictures"))
    if not len(dataset.train):
        raise UserError("data.skip leaves no record to train on: shorten it.")
    some = np.unique(np.linspace(0, len(dataset.train) - 1, SAMPLE).astype(np.int64))
    shapes = shapes_of(dataset.train.select(some))
    weights, missing = _weights(kind, config, named, device, display)
    val = len(dataset.val) if dataset.val else 0
    return Facts(
        train=len(dataset.train),
        val=val,
        classes=len(dataset.classes),
        side=int(np.median(shapes.min(axis=1))),
        pixels=float(shapes.prod(axis=1).mean()) * (len(dataset.train) + val),
        device=device.type,
        ranks=ranks.world_size,
        cores=ranks.cores,
        weights=weights,
        missing=missing,
    )


def _weights(
    kind: Recipe, config: Config, named: set[str], device: torch.device, display: Display
) -> tuple[tuple[str, ...], str]:
    """Networks that have weights to start from, and why there are none, as the end of a sentence."""
    if "model.pretrained" in named:
        given = config.model.pretrained
        network = network_of(given, recipe.PRETRAINED[device.type]) if given else None
        return (network,) if network else (), "model.pretrained is none"
    if wanted := candidates(kind, device.type, config, named):
        return at_hand(wanted, recipe.WEIGHTS, display.say)
    return (), "there are none of a network like the one that is named" if kind == "finetune" else ""


def _rate(config: Config, device: torch.device, ranks: Ranks) -> float:
    """Multiply-adds a second of all processes together, by a few steps of training as slow as the slowest process's."""
    silent = Display(Console(), shown=False)
    setup, state = prepare(config, device, ranks, silent)
    network = training_network(setup, state)
    times = [time.perf_counter()]
    with Signals() as signals, contextlib.closing(setup.train.epoch(0)) as batches:
        for batch in ranks.lockstep(itertools.islice(batches, MEASURED_STEPS), signals):
            training_step(setup, state, network, batch)
            state.sums.first_bad()  # waits for the device
            times.append(time.perf_counter())
    if len(times) > 2:
        del times[0]  # the first step compiles and allocates
    slowest_us = ranks.max(int(1e6 * (times[-1] - times[0]) / (len(times) - 1)))
    return 3 * macs(config.model.name, config.data.crop) * setup.train.global_batch / (max(slowest_us, 1) / 1e6)
