"""Settings that must fit together: which of two follows the other, and which are refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastflower.config import Config
from fastflower.errors import UserError
from fastflower.layers import Layer, Layers
from fastflower.models import NETWORKS
from fastflower.settings import flattened, nested
from fastflower.together import RULES, settle, value_of, with_value
from tests.conftest import fastflower

# below, above, and what becomes of the setting that only `below` named
PAIRS: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ({"train.schedule": "onecycle"}, {"train.epochs": 1}, {"train.warmup_epochs": 0.25}),
    ({"train.schedule": "cosine", "train.epochs": 6}, {"train.warmup_epochs": 10}, {"train.epochs": 40}),
    ({"data.scale": (64, 120)}, {"data.crop": 96, "data.val_resize": 100}, {"data.scale": (96, 180)}),
    ({}, {"data.scale": (64, 96)}, {"data.crop": 64, "data.val_resize": 256}),
    ({"data.val_resize": 64, "data.crop": 56}, {"data.crop": 80}, {"data.val_resize": 80}),
    ({}, {"data.val_resize": 128}, {"data.crop": 128}),
    (
        {"data.crop": 40, "data.scale": (48, 64), "data.val_resize": 48},
        {"model.name": "alexnet"},
        {"data.crop": 63, "data.scale": (63, 84), "data.val_resize": 63},
    ),
    ({"train.freeze_epochs": 2, "train.epochs": 10}, {"train.epochs": 2}, {"train.freeze_epochs": 1}),
    ({"train.freeze_epochs": 2, "train.epochs": 10}, {"train.epochs": 1}, {"train.freeze_epochs": 0}),
    ({"train.epochs": 4}, {"train.freeze_epochs": 5}, {"train.epochs": 10}),
    ({"train.batch_size": 64}, {"train.accumulate": 3}, {"train.batch_size": 63}),
    ({"train.accumulate": 4}, {"train.batch_size": 30}, {"train.accumulate": 3}),
    ({"train.accumulate": 4}, {"train.batch_size": 7}, {"train.accumulate": 1}),
    ({"train.schedule": "plateau"}, {"data.train_on": "train+val"}, {"train.schedule": "cosine"}),
    (
        {"train.early_stop": 5},
        {"data.train_on": "train+val"},
        {"train.early_stop": None, "train.schedule": "cosine"},
    ),
    ({"data.folds": 5, "data.fold": 2}, {"data.train_on": "train+val"}, {"data.folds": None, "data.fold": 0}),
    ({"data.train_on": "train+val"}, {"data.folds": 5}, {"data.train_on": "train"}),
    ({"data.folds": 5, "data.fold": 4}, {"data.folds": 3}, {"data.fold": 0}),
    ({"data.hw_decoder_load": 0.5}, {"train.deterministic": True}, {"data.hw_decoder_load": 0.0}),
    ({"train.nesterov": True}, {"train.momentum": 0.0}, {"train.nesterov": False}),
    ({"train.momentum": 0.0}, {"train.nesterov": True}, {"train.momentum": 0.9}),
    ({}, {"train.schedule": "step", "train.epochs": 20}, {"train.milestones": (10, 15)}),
    ({}, {"train.schedule": "step", "train.epochs": 2}, {"train.milestones": (1,)}),
]


@pytest.mark.parametrize(("below", "above", "expected"), PAIRS)
def test_what_nobody_named_later_follows_and_is_said(
    below: dict[str, Any], above: dict[str, Any], expected: dict[str, Any]
) -> None:
    config, sentences = Layers((Layer("file", nested(below)), Layer("command line", nested(above)))).compose()
    for key, value in (above | expected).items():
        assert value_of(config, key) == value, key
    changed = {key for key, value in expected.items() if value_of(Config(), key) != value or key in below}
    for key in changed:
        assert any(sentence.startswith(f"{key} ") for sentence in sentences) or value_of(config, key) == below.get(key)
    assert len(sentences) <= len(expected) + 1


@pytest.mark.parametrize(
    "named",
    [
        {"train.schedule": "onecycle", "train.epochs": 1, "train.warmup_epochs": 1},
        {"data.crop": 96, "data.scale": (64, 120)},
        {"data.crop": 96, "data.val_resize": 64},
        {"train.freeze_epochs": 2, "train.epochs": 2},
        {"train.batch_size": 64, "train.accumulate": 3},
        {"data.train_on": "train+val", "train.schedule": "plateau"},
        {"data.train_on": "train+val", "data.folds": 3, "train.schedule": "cosine"},
        {"data.fold": 2},
        {"train.nesterov": True, "train.momentum": 0.0},
        {"train.deterministic": True, "data.hw_decoder_load": 0.5},
        {"data.mean": (0.5, 0.5, 0.5)},
    ],
)
def test_what_is_named_in_one_place_and_does_not_fit_is_refused(named: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="^command line: "):
        Layers((Layer("command line", nested(named)),)).compose()


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "data.crop": st.integers(1, 300),
    "data.scale": st.tuples(st.integers(1, 300), st.integers(300, 600)),
    "data.val_resize": st.none() | st.integers(1, 300),
    "data.folds": st.none() | st.integers(2, 6),
    "data.fold": st.integers(0, 6),
    "data.train_on": st.sampled_from(["train", "train+val"]),
    "data.hw_decoder_load": st.none() | st.floats(0, 1),
    "model.name": st.sampled_from(list(NETWORKS)),
    "train.epochs": st.integers(1, 50),
    "train.warmup_epochs": st.floats(0, 50),
    "train.freeze_epochs": st.integers(0, 50),
    "train.batch_size": st.integers(1, 300),
    "train.accumulate": st.integers(1, 300),
    "train.schedule": st.sampled_from(["plateau", "step", "cosine", "onecycle"]),
    "train.early_stop": st.none() | st.integers(1, 5),
    "train.momentum": st.sampled_from([0.0, 0.9]),
    "train.nesterov": st.booleans(),
    "train.deterministic": st.booleans(),
    "train.milestones": st.lists(st.integers(1, 90), min_size=1, max_size=3).map(tuple),
}


@given(st.fixed_dictionaries({}, optional=VALUES), st.data())
def test_settling_ends_keeps_the_strongest_and_is_idempotent(named: dict[str, Any], data: st.DataObject) -> None:
    config, strength = Config(), {key: data.draw(st.integers(1, 3)) for key in named}
    for key, value in named.items():
        config = with_value(config, key, value)
    settled, sentences = settle(config, strength)
    changed = {key for key in VALUES if value_of(settled, key) != value_of(config, key)}
    top = max(strength.values(), default=0)
    assert not {key for key in changed if strength.get(key) == top}
    assert bool(sentences) >= bool(changed)
    for rule in RULES:  # what stays broken could not follow anything stronger
        if rule.broken(settled) and rule.refused:
            assert rule.follow.keys() <= set(rule.keys)


def test_each_rule_knows_its_keys() -> None:
    known = set(flattened(nested(dict.fromkeys(VALUES)))) | {"data.mean", "data.std"}
    for rule in RULES:
        assert set(rule.keys) <= known
        assert set(rule.follow) <= set(rule.keys)


def test_a_shorter_run_than_the_configs_warm_up_is_no_mistake() -> None:
    result = fastflower("train", "--config", "demo", "--train.epochs", 1, "--print-config")
    assert result.code == 0, result.err
    assert "warmup_epochs: 0.25" in result.out
    assert "train.warmup_epochs 1.5 → 0.25, to fit train.epochs 1." in result.err
