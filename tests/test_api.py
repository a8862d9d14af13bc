"""`import fastflower`: the steps of a run as functions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastflower
from fastflower.runtime.checkpoint import load_checkpoint
from tests.conftest import ROOT, train_arguments, write_dataset
from tests.conftest import fastflower as command
from tests.training.test_run import without_times

SETTINGS: dict[str, Any] = {
    "data": {"crop": 32, "scale": [36, 48], "val_resize": 36},
    "model": {"name": "resnet18"},
    "train": {"batch_size": 8, "lr": 0.02, "epochs": 1},
}


def settings(root: Path, **changes: Any) -> dict[str, Any]:
    return SETTINGS | {"data": {**SETTINGS["data"], "root": str(root)}} | changes


def test_train_and_evaluate_are_the_commands(small: Path, tmp_path: Path, tiny_net: None) -> None:
    config = fastflower.load_config(settings=settings(small))
    run = fastflower.train(config, tmp_path / "library", quiet=True)
    assert command(*train_arguments(small, tmp_path / "command"), "--train.epochs", "1").code == 0
    assert without_times(run) == without_times(tmp_path / "command")
    evaluation = fastflower.evaluate(run)
    assert evaluation.n == 20
    assert evaluation.loss == pytest.approx(without_times(run)[0]["val_loss"], abs=1e-6)
    other = write_dataset(tmp_path / "other", {"val": 6})
    assert fastflower.evaluate(run, root=other).n == 6
    with pytest.raises(fastflower.UserError, match="already holds a run"):
        fastflower.train(config, run, quiet=True)
    for crops in (0, 3, -10):
        with pytest.raises(fastflower.UserError, match=f"crops is {crops}: give 1, the center, or 10"):
            fastflower.evaluate(run, crops=crops)


def test_a_loop_of_ones_own(small: Path, tiny_net: None) -> None:
    config = fastflower.load_config(settings=settings(small))
    data = fastflower.load_data(config)
    network = fastflower.build_model(config, len(data.dataset.classes))
    batches = list(data.train.epoch(0))
    assert [len(batch.labels) for batch in batches] == [8] * 6
    assert network(batches[0].images).shape == (8, 3)
    assert data.val is not None
    assert sum(len(batch.labels) for batch in data.val.once()) == 20


def test_pretrained_weights_bring_their_normalization_and_rate(small: Path, tmp_path: Path, tiny_net: None) -> None:
    given = settings(small, train={"batch_size": 8, "epochs": 1})
    run = fastflower.train(fastflower.load_config(settings=given), tmp_path / "run", quiet=True)
    source = run / "checkpoints/best.safetensors"
    other = write_dataset(tmp_path / "other", {"train": 8, "val": 4}, first=500)
    model = {"name": "resnet18", "pretrained": str(source)}
    config = fastflower.load_config(settings=settings(other, model=model, train={"batch_size": 8}))
    assert config.train.lr == 0.01
    saved = load_checkpoint(run / "checkpoints/best.pt")
    data = fastflower.load_data(config)
    assert list(data.normalization.mean) == saved["normalization"]["mean"]
    assert torch.equal(fastflower.build_model(config, 3).state_dict()["conv1.weight"], saved["model"]["conv1.weight"])


def test_configurations_have_names_and_defaults() -> None:
    assert fastflower.load_config("resnet50").model.name == "resnet50"
    assert fastflower.load_config("demo", {"train": {"epochs": 2}}).train.epochs == 2
    assert fastflower.load_config().train.lr == 0.1
    with pytest.raises(fastflower.UserError, match="did you mean train.epochs"):
        fastflower.load_config("demo", {"train": {"epoch": 2}})
    with pytest.raises(fastflower.UserError, match="none.yaml cannot be read"):
        fastflower.load_config("none.yaml")


def test_importing_is_quick_and_misses_nothing() -> None:
    code = "import sys, fastflower; assert 'torch' not in sys.modules; print(fastflower.load_config.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "fastflower.api\n"
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        fastflower.trian  # noqa: B018
