"""The recipe as a function of facts and of what is named: properties over drawn ones."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastflower.config import Config, resolve
from fastflower.errors import UserError
from fastflower.layers import FITTED, Layer, Layers, Recipe
from fastflower.models import NETWORKS
from fastflower.settings import build, flattened, nested, to_plain
from fastflower.training import recipe
from fastflower.training.recipe import HOUR_S, PRETRAINED, SMALLEST_BATCH, STEPS, Facts, Fitted, candidates, fit

DEVICES = st.sampled_from(["cpu", "cuda"])
SOME_FACTS = st.builds(
    Facts,
    train=st.integers(2, 1_500_000),
    val=st.integers(0, 50_000),
    classes=st.integers(2, 5000),
    side=st.integers(24, 4000),
    pixels=st.floats(0, 1e13),
    device=DEVICES,
    ranks=st.integers(1, 16),
    cores=st.integers(1, 64),
    weights=st.sampled_from([(), ("resnet18",), ("resnet50", "resnet18")]),
    missing=st.just("there is no network"),
    rate=st.none() | st.floats(1e8, 1e15),
)
NAMED: dict[str, st.SearchStrategy[Any]] = {
    "data.crop": st.integers(32, 256),
    "data.scale": st.tuples(st.integers(64, 300), st.integers(300, 600)),
    "data.val_resize": st.none() | st.integers(64, 300),
    "data.cache": st.sampled_from(["off", "ram"]),
    "model.name": st.sampled_from(list(NETWORKS)),
    "model.shortcut": st.sampled_from(["A", "B"]),
    "train.epochs": st.integers(1, 300),
    "train.batch_size": st.integers(1, 512),
    "train.accumulate": st.integers(1, 4),
    "train.lr": st.floats(1e-5, 1),
    "train.schedule": st.sampled_from(["plateau", "step", "cosine", "onecycle"]),
    "train.warmup_epochs": st.floats(0, 30),
    "train.freeze_epochs": st.integers(0, 10),
    "train.label_smoothing": st.floats(0, 0.3),
    "train.momentum": st.sampled_from([0.0, 0.9]),
    "train.nesterov": st.booleans(),
    "train.optimizer": st.sampled_from(["sgd", "adamw"]),
}
SOME_NAMED = st.fixed_dictionaries({}, optional=NAMED)


def fitted(facts: Facts, named: dict[str, Any], kind: Recipe = "scratch") -> tuple[Fitted, Config]:
    """What the recipe chooses, and the settings that come of it, which `build` has checked."""
    layers = Layers((Layer("command line", nested(named)),))
    chosen = fit(kind, facts, layers.typed(), layers.keys)
    config, sentences = layers.over(Layer("recipe", chosen.settings)).compose()
    assert sentences == [], "the recipe fits around what is named"
    return chosen, resolve(config)


def fits_together(named: dict[str, Any]) -> bool:
    """Whether what is named is no contradiction by itself."""
    try:
        Layers((Layer("", nested(named)),)).over(Layer("", {})).compose()
    except UserError:
        return False
    return True


@settings(deadline=None)
@given(SOME_FACTS)
def test_whatever_the_data_the_settings_fit_them(facts: Facts) -> None:
    chosen, config = fitted(facts, {}, "auto")
    data, train = config.data, config.train
    assert train.epochs is not None
    assert build(to_plain(config), "again") == config
    assert 0 < train.warmup_epochs < train.epochs
    assert data.crop <= max(facts.side, 32)
    assert data.crop <= data.scale[0] <= data.scale[1]
    assert data.val_resize is not None
    assert data.val_resize >= data.crop
    assert train.pictures % facts.ranks == 0
    assert train.pictures <= max(facts.train, facts.ranks)
    if facts.train >= STEPS * 2 * SMALLEST_BATCH and facts.ranks == 1:
        assert facts.train // train.pictures >= STEPS
    assert "\n" not in chosen.reasons
    assert chosen.reasons.startswith("Recipe: ")
    assert set(flattened(chosen.settings)) <= set(FITTED)
    assert (config.model.pretrained is not None) == bool(facts.weights)
    assert fitted(facts, {}, "auto") == (chosen, config)
    if facts.rate is not None:
        assert not chosen.doubtful
        seconds = recipe.seconds(config.model.name, data.crop, train.epochs, facts, facts.rate)
        assert seconds <= HOUR_S or train.epochs == 1
        slower = fitted(replace(facts, rate=facts.rate / 3), {}, "auto")[1]
        assert (slower.data.crop, slower.train.most_epochs) <= (data.crop, train.epochs)


@settings(deadline=None)
@given(SOME_FACTS, SOME_NAMED.filter(fits_together), st.sampled_from(["auto", "scratch"]))
def test_what_is_named_stays_and_the_rest_fits_around_it(facts: Facts, named: dict[str, Any], kind: Recipe) -> None:
    chosen, config = fitted(facts, named, kind)
    flat = flattened(to_plain(config))
    for key, value in named.items():
        assert flat[key] == (list(value) if isinstance(value, tuple) else value), key
    assert not set(flattened(chosen.settings)) & set(named)


def test_both_known_rates_are_on_one_curve() -> None:
    assert recipe.learning_rate("scratch", "resnet18", 64) == 0.05
    assert recipe.learning_rate("scratch", "resnet34", 256) == 0.1
    assert recipe.learning_rate("scratch", "vgg16", 256) == 0.01
    assert recipe.learning_rate("finetune", "resnet50", 64) == 0.01


def test_the_configuration_for_102_flowers_is_of_the_recipes_kind() -> None:
    """Its sizes, batch, rate and length are what the recipe chooses for the pictures that it was made for."""
    facts = Facts(train=6552, val=818, classes=102, side=64, cores=2)
    own = flattened(to_plain(fitted(facts, {})[1]))
    its = flattened(to_plain(Layers((Layer("", build_file("flowers102_64")),)).typed()))
    for key in ("data.crop", "data.scale", "data.val_resize", "model.name", "train.epochs", "train.batch_size"):
        assert own[key] == its[key], key
    assert (own["train.lr"], own["train.schedule"]) == (its["train.lr"], its["train.schedule"])


def build_file(name: str) -> dict[str, Any]:
    from fastflower.settings import find_config, load_yaml

    return load_yaml(find_config(name))


def test_weights_are_refused_or_said_where_there_are_none() -> None:
    facts = Facts(train=220, val=50, classes=5, side=224, missing="the server does not answer")
    with pytest.raises(UserError, match="finetune needs weights for ImageNet, and the server does not answer"):
        fitted(facts, {}, "finetune")
    (note,) = fitted(facts, {}, "auto")[0].notes
    assert note.startswith("Training from scratch, since the server does not answer.")
    assert fitted(facts, {}, "scratch")[0].notes == ()
    tuned = fitted(replace(facts, weights=("resnet18",)), {}, "auto")[1]
    assert (tuned.model.name, tuned.model.pretrained, tuned.data.crop) == ("resnet18", "IMAGENET1K_V1", 192)
    assert tuned.train.most_epochs < fitted(facts, {}, "scratch")[1].train.most_epochs
    assert fitted(replace(facts, weights=("resnet18",)), {}, "scratch")[1].model.pretrained is None


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_weights_are_looked_for_only_where_they_would_fit(device: str) -> None:
    def looked_for(**named: Any) -> tuple[str, ...]:
        flat = {f"model.{key}": value for key, value in named.items()}
        config = Layers((Layer("", nested(flat)),)).typed()
        return candidates("auto", device, config, set(flat))

    assert looked_for() == PRETRAINED[device]
    assert looked_for(name="resnet34") == ("resnet34",)
    assert looked_for(name="plain34") == ()
    assert looked_for(shortcut="A") == ()
    assert set(looked_for(bottleneck_stride="1x1")) <= {"resnet18", "resnet34"}
    assert looked_for(pretrained=None) == looked_for(pretrained="w.pth") == ()
    assert candidates("scratch", device, Config(), set()) == ()


def test_what_would_take_more_than_an_hour_on_a_slow_machine_is_to_be_measured() -> None:
    small = Facts(train=220, val=50, classes=5, side=500, cores=2)
    assert not fitted(small, {})[0].doubtful
    assert fitted(replace(small, train=20_000), {})[0].doubtful
    assert not fitted(replace(small, train=20_000, rate=1e11), {})[0].doubtful


@settings(deadline=None)
@given(SOME_FACTS, st.sampled_from([0.1, 2.0]))
def test_hours_take_the_place_of_epochs_that_nobody_named(facts: Facts, hours: float) -> None:
    chosen, config = fitted(facts, {"train.hours": hours}, "auto")
    assert config.train.epochs is None
    assert not chosen.doubtful
    assert f"{hours:g} h of onecycle" in chosen.reasons
    assert fitted(facts, {"train.hours": hours, "train.epochs": 9}, "auto")[1].train.epochs == 9


@settings(deadline=None)
@given(SOME_FACTS, st.sampled_from([{}, {"train.epochs": 3}, {"train.epochs": None}, {"train.lr": None}]))
def test_what_is_said_is_what_happens(facts: Facts, named: dict[str, Any]) -> None:
    chosen, config = fitted(facts, named, "auto")
    train = config.train
    said = re.search(
        r"in batches of (\d+) \(([\d,]+) steps? an epoch\), (\d+) epochs? of \w+ at lr ([\de.-]+)", chosen.reasons
    )
    assert said, chosen.reasons
    assert [int(said[k]) for k in (1, 3)] == [train.batch_size, train.epochs]
    assert float(said[4]) == pytest.approx(train.peak_lr, rel=0.05)
    assert not re.search(r"\b1 (steps|epochs|pictures|pixels|classes)\b", chosen.reasons)
    if facts.rate is not None:
        hours = recipe.seconds(config.model.name, config.data.crop, train.epochs or 0, facts, facts.rate) / HOUR_S
        assert f"about {hours:.2g} h at" in chosen.reasons


def test_the_origin_of_weights_and_the_limit_of_time_are_said() -> None:
    facts = Facts(train=220, val=50, classes=5, side=64)
    line = fitted(facts, {"model.name": "resnet18", "model.pretrained": "runs/other"})[0].reasons
    assert "resnet18 from the weights of runs/other" in line
    line = fitted(facts, {"train.hours": 0.5, "train.epochs": 9})[0].reasons
    assert "9 epochs (at most 0.5 h) of onecycle" in line


@settings(deadline=None)
@given(SOME_FACTS, st.sampled_from(["auto", 0.9]))
def test_a_batch_that_is_still_to_be_found_stays(facts: Facts, asked: Any) -> None:
    chosen, config = fitted(facts, {"train.batch_size": asked}, "auto")
    assert f"in batches to be found (train.batch_size {asked}), " in chosen.reasons
    assert config.train.batch_size == asked
    assert config.train.peak_lr > 0
