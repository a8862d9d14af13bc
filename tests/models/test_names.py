"""What the program knows of networks is in their records: one that a test registers is a network like the others."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastflower.config import ModelConfig, resolve
from fastflower.errors import UserError
from fastflower.flops import count, variants
from fastflower.models import NETWORKS, Network, architecture, create_model, find_network
from fastflower.models.layers import BNReLU
from fastflower.runtime.checkpoint import load_checkpoint
from fastflower.settings import build
from tests.conftest import fastflower, train_arguments

SMALL = Network(name="small", built_by=f"{__name__}:Small", depths=(4, 6), min_size=30, lr=0.03)


class Small(nn.Module):
    """As a newcomer writes it: BatchNorm, and no shortcuts."""

    def __init__(self, network: Network, num_classes: int, *, norm: Any, sync_norm: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in network.depths:
            layers += [nn.Conv2d(channels, width, 3, 2, 1, bias=False), BNReLU(width, norm=norm, sync=sync_norm)]
            channels = width
        self.layers, self.fc = nn.Sequential(*layers), nn.Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] to [N, num_classes]."""
        logits: torch.Tensor = self.fc(self.features(x).mean((2, 3)))
        return logits

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] to [N, 6, ceil(H / 4), ceil(W / 4)]."""
        features: torch.Tensor = self.layers(x)
        return features


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """One module and one record, and no other change."""
    monkeypatch.setitem(NETWORKS, "small", SMALL)


@pytest.mark.usefixtures("registered")
class TestRegistered:
    def test_it_is_made_and_takes_the_options_of_what_it_has(self) -> None:
        network = create_model("small", 5, norm="triton")
        assert isinstance(network, Small)
        assert network(torch.randn(2, 3, 30, 31)).shape == (2, 5)
        assert all(module.norm == "triton" for module in network.modules() if isinstance(module, BNReLU))

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"shortcut": "A"}, "model.shortcut A has no effect on small, which has no shortcuts: leave it out."),
            (
                {"zero_init_gamma": True},
                "model.zero_init_gamma has no effect on small, which has no residual blocks: leave it out.",
            ),
            (
                {"bottleneck_stride": "1x1"},
                "model.bottleneck_stride 1x1 has no effect on small, which has no bottlenecks: leave it out.",
            ),
        ],
    )
    def test_options_of_what_it_has_not_are_refused(self, options: dict[str, Any], sentence: str) -> None:
        with pytest.raises(UserError) as error:
            create_model("small", 5, **options)
        assert str(error.value) == sentence

    def test_it_is_offered_suggested_and_checked(self, small: Path) -> None:
        assert "small" in " ".join(fastflower("train", "--help").out.split())
        misspelled = fastflower("flops", "smal")
        assert misspelled.code == 2
        assert "did you mean small?" in misspelled.err
        with pytest.raises(UserError, match="did you mean small"):
            create_model("smal", 3)
        with pytest.raises(UserError, match="test: data.crop is 29 pixels, but small needs at least 30: raise it."):
            build({"model": {"name": "small"}, "data": {"crop": 29}}, "test")
        assert resolve(build({"model": {"name": "small"}}, "test")).train.lr == 0.03
        asked = ("--model.name", "small", "--model.pretrained", "IMAGENET1K_V1")
        refused = fastflower("train", "--data.root", small, *asked, "--dry_run")
        assert refused.code == 2
        assert "torchvision has no IMAGENET1K_V1 of small, only of resnet18, " in " ".join(refused.err.split())

    def test_it_is_counted(self) -> None:
        (row,) = json.loads(fastflower("flops", "small", "--size", 32, "--json").out)
        assert row["macs"] == (4 * 3 * 16 * 16 + 6 * 4 * 8 * 8) * 9 + 6 * 1000
        assert row["params"] == (4 * 3 + 6 * 4) * 9 + 2 * (4 + 6) + 6 * 1000 + 1000
        assert "small" in fastflower("flops").out
        assert count("small", 32).model == "small"

    def test_it_trains_goes_on_and_is_evaluated_from_its_files(self, small: Path, tmp_path: Path) -> None:
        run, head = tmp_path / "run", tmp_path / "head"
        options = ("--model.name", "small", "--train.no_compile")
        arguments = [word for word in train_arguments(small, None) if word not in ("--model.name", "resnet18")]
        whole = fastflower(*arguments, *options, "--run", run, "--train.epochs", 1)
        assert whole.code == 0, whole.err
        assert "small, 3 classes" in whole.out
        assert fastflower("train", "--resume", run, "--train.epochs", 2).code == 0
        saved = load_checkpoint(run / "checkpoints/last.pt")
        assert saved["config"]["model"]["name"] == "small"
        create_model("small", 3).load_state_dict(saved["model"], strict=True)
        for views in ((), ("--scales", "40")):
            assert json.loads(fastflower("eval", run, "--json", *views).out)["n"] == 20
        weights = run / "checkpoints/best.safetensors"
        again = fastflower(*arguments, *options, "--run", head, "--train.epochs", 1, "--model.pretrained", weights)
        assert again.code == 0, again.err
        other = fastflower(*train_arguments(small, tmp_path / "other"), "--model.pretrained", weights)
        assert other.code == 2
        assert "holds a network of model.name small, not resnet18: give the same." in " ".join(other.err.split())


def test_each_record_has_a_class_that_takes_what_it_says() -> None:
    for name, network in NETWORKS.items():
        assert network.name == name
        options: dict[str, Any] = {}
        if network.shortcuts:
            options |= {"shortcut": "C", "zero_init_gamma": True}
        if network.bottlenecks:
            options["bottleneck_stride"] = "1x1"
        if network.batch_norm:
            options |= {"norm": "triton", "sync_norm": True}
        with torch.device("meta"):
            model = create_model(name, 3, **options).eval()
        assert type(model) is network.load()
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        assert bool(norms) == network.batch_norm
        assert hasattr(model, "fc") == network.global_pooling
        images = torch.empty(1, 3, 3 * network.stride, 2 * network.stride, device="meta")
        if network.global_pooling:
            features: Any = model.features
            assert features(images).shape[2:] == (3, 2)


def test_variants_are_all_names_and_the_papers_form_of_those_with_bottlenecks() -> None:
    v1 = {f"{name}-v1" for name in ("resnet50", "resnet101", "resnet152")}
    assert set(variants()) == NETWORKS.keys() | v1
    assert len(set(variants())) == len(variants())


MODELS = st.builds(
    ModelConfig,
    name=st.sampled_from(["resnet18", "resnet50"]),
    shortcut=st.sampled_from(["A", "B", "C"]),
    bottleneck_stride=st.sampled_from(["3x3", "1x1"]),
    zero_init_gamma=st.booleans(),
    pretrained=st.sampled_from([None, "weights.pth"]),
    norm=st.sampled_from(["auto", "torch", "triton"]),
    sync_norm=st.booleans(),
)


@given(MODELS)
def test_an_architecture_is_what_makes_the_network_and_nothing_else(model: ModelConfig) -> None:
    settings = asdict(model)
    same = architecture(settings)
    assert same == {"name": model.name, "shortcut": model.shortcut, "bottleneck_stride": model.bottleneck_stride}
    assert architecture(asdict(ModelConfig(**same))) == same
    changed = settings | {"pretrained": "else", "norm": "torch", "sync_norm": False, "zero_init_gamma": True}
    assert architecture(changed) == same
    assert architecture({}) == dict.fromkeys(same)


def test_an_unknown_name_has_no_record() -> None:
    with pytest.raises(UserError, match="model.name is 'resnet43', which is unknown .did you mean resnet34"):
        find_network("resnet43")
