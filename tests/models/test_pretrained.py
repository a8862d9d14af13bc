"""Weights to start from: torchvision's and files in every wrapping; and what is refused."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from fastflower.config import ModelConfig
from fastflower.data.view import IMAGENET
from fastflower.errors import UserError
from fastflower.models import NETWORKS, create_model
from fastflower.training import pretrained
from fastflower.training.pretrained import Pretrained, load_pretrained, open_pretrained
from tests.conftest import ROOT, TinyNet

Weights = dict[str, torch.Tensor]


def tiny_weights(classes: int = 7) -> Weights:
    torch.manual_seed(7)
    network = TinyNet("", classes)
    network(torch.randn(4, 3, 16, 16))  # running statistics that are not the fresh ones
    return network.state_dict()


def opened(source: object, **model: Any) -> Pretrained:
    loaded = open_pretrained(ModelConfig(pretrained=str(source), **model), print)
    assert loaded
    return loaded


def refusal(source: object, network: nn.Module | None = None, **model: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_pretrained(network or TinyNet("", 3), opened(source, **model))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_same(a: Weights, b: Weights) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def assert_starts_from(loaded: Pretrained, weights: Weights) -> None:
    """A network that loads `found` has `weights`, but keeps its own last layer."""
    network = TinyNet("", 3)
    own = {name: tensor.clone() for name, tensor in network.state_dict().items() if name.startswith("fc.")}
    load_pretrained(network, loaded)
    assert_same(network.state_dict(), weights | own)


def test_the_table_is_torchvisions() -> None:
    ours = {
        (kind, name): f"{pretrained.URL}/{file}"
        for name, network in NETWORKS.items()
        for kind, file in network.weights.items()
    }
    names = [name for name in torchvision.models.list_models() if re.fullmatch(r"resnet\d+|vgg1[69]|alexnet", name)]
    theirs = {
        (weights.name, name): weights.url
        for name in names
        for weights in torchvision.models.get_model_weights(name)
        if weights.name != "IMAGENET1K_FEATURES"  # a VGG without its classifier
    }
    assert ours == theirs


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_network_from_torchvisions_weights_computes_what_torchvisions_does(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name, num_classes=1000)
    with torch.no_grad():
        theirs(torch.randn(4, 3, 64, 64))  # in training mode: moves the running statistics
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    ours = create_model(name, 5)
    fresh = ours.state_dict()["fc.weight"].clone()
    load_pretrained(ours, opened(tmp_path / "weights.pth", name=name))
    assert torch.equal(ours.state_dict()["fc.weight"], fresh)
    theirs.fc = ours.get_submodule("fc")
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-4)


def legacy(value: Any, path: Path) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


def renamed(weights: Weights, rename: Callable[[str], str]) -> Weights:
    return {rename(name): tensor for name, tensor in weights.items()}


@pytest.mark.parametrize(
    ("file", "save"),
    [
        ("w.pth", torch.save),
        ("w.pth", legacy),
        ("w.safetensors", save_file),
        ("w.pth", lambda w, path: torch.save({"state_dict": w, "epoch": 3}, path)),
        ("w.pt", lambda w, path: torch.save({"model": w, "optimizer": {"lr": 0.1}}, path)),
        ("w.pth", lambda w, path: torch.save(renamed(w, lambda n: f"module.{n}"), path)),
        ("w.pth", lambda w, path: torch.save({"model": renamed(w, lambda n: f"_orig_mod.module.{n}")}, path)),
        ("w.safetensors", lambda w, path: save_file(renamed(w, lambda n: f"module._orig_mod.module.{n}"), path)),
        ("w.pth", lambda w, path: torch.save(renamed(w, lambda n: n.replace(".", "._orig_mod.")), path)),
        ("w.pth", lambda w, path: torch.save({n: t for n, t in w.items() if not n.startswith("fc.")}, path)),
    ],
)
def test_files_of_every_wrapping_load(tmp_path: Path, file: str, save: Callable[[Weights, Path], None]) -> None:
    save(tiny_weights(), tmp_path / file)
    loaded = opened(tmp_path / file)
    assert_starts_from(loaded, tiny_weights())
    assert loaded.normalization == IMAGENET


def test_counts_of_batches_may_be_missing(tmp_path: Path) -> None:
    weights, network = tiny_weights(), TinyNet("", 3)
    torch.save({n: t for n, t in weights.items() if not n.endswith("num_batches_tracked")}, tmp_path / "old.pth")
    load_pretrained(network, opened(tmp_path / "old.pth"))
    assert torch.equal(network.state_dict()["bn1.running_var"], weights["bn1.running_var"])
    assert network.state_dict()["bn1.num_batches_tracked"] == 0


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    weights = tiny_weights() | {"conv1.weight": torch.zeros(8, 1, 3, 3), "head.bias": torch.zeros(2)}
    del weights["bn2.weight"]
    torch.save(weights, file)
    sentence = refusal(file)
    for part in (
        str(file),
        "1 missing (bn2.weight)",
        "1 unexpected (head.bias)",
        "1 of another shape (conv1.weight [8, 1, 3, 3], not [8, 3, 3, 3])",
    ):
        assert part in sentence
    torch.save({"fc.weight": torch.zeros(2, 8)}, file)
    own = [name for name in TinyNet("", 3).state_dict() if not name.startswith("fc.") and "num_batches" not in name]
    assert len(own) == 10
    assert f"10 missing ({', '.join(own)});" in refusal(file)
    torch.save({f"x{i}": torch.zeros(1) for i in range(12)} | tiny_weights(), file)
    assert f"12 unexpected ({', '.join(f'x{i}' for i in range(10))}, …);" in refusal(file)
    torch.save(tiny_weights() | {"bn2.running_var": torch.full((8,), torch.inf)}, file)
    assert "bn2.running_var is not finite" in refusal(file)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("w.pth", b""),
        ("w.pth", b"<!doctype html><title>404</title>"),
        ("w.pth", "truncated"),
        ("w.safetensors", "truncated"),
        ("w.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
        ("w.pth", TinyNet("", 3)),  # a whole module, which weights_only refuses
        ("w.pth", {"epoch": 3}),
        ("w.pth", [torch.zeros(1)]),
        ("w.pth", {"state_dict": [1]}),
    ],
)
def test_damaged_and_foreign_files_are_one_sentence(tmp_path: Path, file: str, content: Any) -> None:
    path = tmp_path / file
    if content == "truncated":
        (save_file if path.suffix == ".safetensors" else torch.save)(tiny_weights(), path)
        path.write_bytes(path.read_bytes()[:-2000])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    sentence = refusal(path)
    assert sentence.startswith(f"{path} ")
    assert "state_dict" in sentence


@pytest.mark.parametrize(
    ("source", "model", "part"),
    [
        ("IMAGENET1K_V1", {"name": "plain18"}, "no IMAGENET1K_V1 of plain18, only of resnet18, "),
        ("IMAGENET1K_V2", {"name": "resnet34"}, "no IMAGENET1K_V2 of resnet34, only of resnet50, resnet101, resnet152"),
        ("IMAGENET1K_V1", {"name": "resnet34", "shortcut": "A"}, "model.shortcut B and model.bottleneck_stride 3x3"),
        ("IMAGENET1K_V2", {"name": "resnet50", "shortcut": "C"}, "model.shortcut B and model.bottleneck_stride 3x3"),
        ("IMAGENET1K_V1", {"name": "resnet50", "bottleneck_stride": "1x1"}, "model.bottleneck_stride 3x3"),
        ("IMAGENET1K_V3", {}, "there is no file IMAGENET1K_V3; give IMAGENET1K_V1 or IMAGENET1K_V2, a .pth"),
        (ROOT / "tests", {}, "best.pt; give"),
    ],
)
def test_what_torchvision_does_not_have_is_a_sentence(source: object, model: dict[str, Any], part: str) -> None:
    assert part in refusal(source, **model)


def published(monkeypatch: pytest.MonkeyPatch, weights: Weights, folder: Path) -> tuple[Path, Path]:
    """A file as on torchvision's server (here a folder), and where torch.hub would put it."""
    monkeypatch.setenv("TORCH_HOME", str(folder / "home"))
    folder.mkdir(exist_ok=True)
    torch.save(weights, folder / "w.pth")
    digest = hashlib.sha256((folder / "w.pth").read_bytes()).hexdigest()
    file = (folder / "w.pth").rename(folder / f"tiny-{digest[:8]}.pth")
    monkeypatch.setattr(pretrained, "URL", f"file://{folder}")
    network = replace(NETWORKS["resnet18"], weights={"IMAGENET1K_V1": file.name})
    monkeypatch.setitem(NETWORKS, "resnet18", network)
    return file, folder / "home/hub/checkpoints" / file.name


def test_torchvisions_weights_are_downloaded_once_and_their_hash_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, cached = published(monkeypatch, tiny_weights(), tmp_path / "server")
    said: list[str] = []
    model = ModelConfig(name="resnet18", pretrained="IMAGENET1K_V1")
    first = open_pretrained(model, said.append)
    assert first
    assert first.normalization == IMAGENET
    assert said == [f"Downloading file://{file} to {cached.parent}"]
    whole = file.read_bytes()
    file.unlink()
    again = open_pretrained(model, said.append)  # from torch.hub's folder, where a user may have put it
    assert again
    assert_same(first.weights, again.weights)
    assert len(said) == 1

    cached.unlink()
    offline = refusal("IMAGENET1K_V1", name="resnet18")
    assert offline.startswith(f"file://{file} cannot be downloaded to {cached.parent} (")
    assert "copy it there" in offline
    file.write_bytes(whole[:-100])
    assert "invalid hash value" in refusal("IMAGENET1K_V1", name="resnet18")
    assert list(cached.parent.iterdir()) == []
