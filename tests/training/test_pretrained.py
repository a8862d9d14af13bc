"""Runs that start from pretrained weights: what they take from them, what they record, and how they go on without."""

from __future__ import annotations

import hashlib
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fastflower.data.view import IMAGENET
from fastflower.runtime.checkpoint import load_checkpoint, save_checkpoint, save_weights
from tests.conftest import fastflower, train_arguments
from tests.models.test_pretrained import assert_same, assert_starts_from, opened, refusal, tiny_weights
from tests.processes import in_ranks
from tests.training import tiny_worker
from tests.training.test_run import assert_same_run, rows

pytestmark = pytest.mark.usefixtures("tiny_net")
IMAGENETS = {"mean": list(IMAGENET.mean), "std": list(IMAGENET.std)}


def arguments(root: Path, run: Path, source: object, *more: object) -> list[object]:
    """Training from `source`, with the learning rate left to the defaults."""
    return [*train_arguments(root, run)[:-2], "--model.pretrained", source, "--train.epochs", 1, *more]


@pytest.fixture
def weights_file(tmp_path: Path) -> Path:
    torch.save(tiny_weights(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def test_training_starts_from_the_weights_with_imagenets_normalization_and_a_tenth_of_the_rate(
    small: Path, tmp_path: Path, weights_file: Path
) -> None:
    result = fastflower(*arguments(small, tmp_path / "run", weights_file))
    assert result.code == 0
    assert f"Starting from {weights_file}, with a new last layer." in result.out
    recorded = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert recorded["train"]["lr"] == rows(tmp_path / "run")[0]["lr"] == 0.01
    assert recorded["model"]["pretrained"] == str(weights_file)
    assert load_checkpoint(tmp_path / "run/checkpoints/last.pt")["normalization"] == IMAGENETS

    # at a rate too low to change a weight, what was trained is what was read
    given = ("--data.mean", 0.1, 0.2, 0.3, "--data.std", 0.4, 0.5, 0.6, "--train.lr", 1e-30)
    assert fastflower(*arguments(small, tmp_path / "still", weights_file, *given)).code == 0
    saved = load_checkpoint(tmp_path / "still/checkpoints/last.pt")
    assert saved["normalization"] == {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    convolutions = [name for name in saved["model"] if name.startswith("conv")]
    assert_same({n: saved["model"][n] for n in convolutions}, {n: tiny_weights()[n] for n in convolutions})
    assert saved["model"]["fc.weight"].shape == (3, 8)


def test_going_on_and_evaluating_need_the_weights_no_more(small: Path, tmp_path: Path, weights_file: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert fastflower(*arguments(small, whole, weights_file, "--train.epochs", 2)).code == 0
    assert fastflower(*arguments(small, stopped, weights_file)).code == 0
    weights_file.unlink()
    assert fastflower("train", "--resume", stopped, "--train.epochs", 2).code == 0
    assert_same_run(whole, stopped)
    assert fastflower("eval", stopped).code == 0
    # a path that has changed, as it does on another machine, is no other network
    moved = fastflower("train", "--resume", stopped, "--train.epochs", 3, "--model.pretrained", tmp_path / "no.pth")
    assert moved.code == 0
    assert load_checkpoint(stopped / "checkpoints/last.pt")["normalization"] == IMAGENETS


def test_runs_and_checkpoints_of_ours_bring_their_normalization(finished: Path, small: Path, tmp_path: Path) -> None:
    checkpoints = finished / "checkpoints"
    best, last = (load_checkpoint(checkpoints / name) for name in ("best.pt", "last.pt"))
    for source, saved in (
        (finished, best),
        (checkpoints / "best.pt", best),
        (checkpoints / "best.safetensors", best),
        (checkpoints / "last.pt", last),
    ):
        loaded = opened(source, name="resnet18")
        assert_starts_from(loaded, saved["model"])
        assert {"mean": list(loaded.normalization.mean), "std": list(loaded.normalization.std)} == best["normalization"]
        assert "model.name resnet18, not resnet34" in refusal(source, name="resnet34")
        assert "model.shortcut B, not A" in refusal(source, name="resnet18", shortcut="A")
    assert best["normalization"] != IMAGENETS
    assert fastflower(*arguments(small, tmp_path / "again", finished)).code == 0
    assert load_checkpoint(tmp_path / "again/checkpoints/last.pt")["normalization"] == best["normalization"]

    averaged = {name: tensor + 1 for name, tensor in best["model"].items()}
    save_checkpoint(tmp_path / "averaged.pt", best | {"ema": averaged})
    assert_starts_from(opened(tmp_path / "averaged.pt", name="resnet18"), averaged)
    v1 = {"name": "resnet50", "shortcut": "B", "bottleneck_stride": "1x1"}
    save_weights(tmp_path / "v1.safetensors", best["model"], {"architecture": v1})
    assert "model.bottleneck_stride 1x1, not 3x3" in refusal(tmp_path / "v1.safetensors", name="resnet50")


def test_weights_that_cannot_be_had_end_a_run_before_it_leaves_anything(small: Path, tmp_path: Path) -> None:
    result = fastflower(*arguments(small, tmp_path / "run", tmp_path / "no.pth"))
    assert result.code == 2
    assert f"there is no file {tmp_path / 'no.pth'}" in result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_download_once(small: Path, tmp_path: Path, weights_file: Path) -> None:
    digest = hashlib.sha256(weights_file.read_bytes()).hexdigest()
    name = f"tiny-{digest[:8]}.pth"
    (tmp_path / "server").mkdir()
    shutil.move(weights_file, tmp_path / "server" / name)
    asked = []

    class Server(SimpleHTTPRequestHandler):
        def log_message(self, _: str, *__: Any) -> None:
            asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=tmp_path / "server")) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/{name}"
        environment = {"TINY_WEIGHTS": address, "TORCH_HOME": str(tmp_path / "home"), "no_proxy": "127.0.0.1"}
        training = arguments(small, tmp_path / "run", "IMAGENET1K_V1")
        result = in_ranks(tiny_worker.main, *training, **environment)
        server.shutdown()
    assert result.code == 0, result.err
    assert asked == [f"/{name}"]
    assert result.out.count(f"Downloading {address}") == 1
    assert load_checkpoint(tmp_path / "run/checkpoints/last.pt")["normalization"] == IMAGENETS
