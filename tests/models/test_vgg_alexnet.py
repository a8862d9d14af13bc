"""VGG and AlexNet against torchvision's, and what training does with networks that have no BatchNorm and no `fc`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
import yaml
from torch import nn

from fastflower.config import Config, TrainConfig, resolve
from fastflower.errors import UserError
from fastflower.models import create_model, find_network
from fastflower.models.layers import head_prefix
from fastflower.runtime.checkpoint import load_checkpoint
from fastflower.runtime.distributed import Ranks
from fastflower.settings import build
from fastflower.training.network import build_network
from fastflower.training.optimizer import LR_SCALE, freeze, parameter_groups
from fastflower.training.pretrained import load_pretrained
from tests.conftest import PLAIN, fastflower
from tests.models.test_pretrained import Weights, opened

# torchvision's published counts, 1000 classes.
PARAMETERS = {"vgg16": 138_357_544, "vgg19": 143_667_240, "alexnet": 61_100_840}
CLASSICS = tuple(PARAMETERS)
HEAD = {"classifier.6.weight", "classifier.6.bias"}


def pair(name: str, num_classes: int = 1000) -> tuple[nn.Module, nn.Module]:
    """Ours and torchvision's, without weights."""
    with torch.device("meta"):
        return create_model(name, num_classes), torchvision.models.get_model(name, num_classes=num_classes)


def drawn(network: nn.Module) -> Weights:
    """Weights of its shapes that keep the activations' size."""
    torch.manual_seed(0)
    return {
        name: torch.randn(tensor.shape) * (math.sqrt(2 / tensor[0].numel()) if tensor.dim() > 1 else 0.1)
        for name, tensor in network.state_dict().items()
    }


@pytest.mark.parametrize("name", CLASSICS)
def test_layout_and_parameter_count_are_torchvisions(name: str) -> None:
    ours, theirs = pair(name)
    layouts = [[(key, value.shape, value.dtype) for key, value in m.state_dict().items()] for m in (ours, theirs)]
    assert layouts[0] == layouts[1]
    assert sum(p.numel() for p in ours.parameters()) == PARAMETERS[name]
    # the same chain of modules with the same settings; AlexNet's ReLUs and pools included
    assert str(ours.get_submodule("features")) == str(theirs.get_submodule("features"))
    assert str(ours.get_submodule("classifier")) == str(theirs.get_submodule("classifier"))


@pytest.mark.parametrize("name", CLASSICS)
@torch.no_grad()
def test_weights_load_strictly_both_ways_and_give_the_same_logits(name: str) -> None:
    ours, theirs = (network.eval() for network in pair(name, 10))
    theirs.load_state_dict(drawn(theirs), assign=True)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for size in (find_network(name).min_size, 96):  # the pooling repeats positions, and averages them
        images = torch.randn(2, 3, size, size)
        wanted = theirs(images)
        assert wanted.std() > 0.1
        torch.testing.assert_close(ours(images.to(memory_format=torch.channels_last)), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CLASSICS)
def test_the_smallest_crop_is_the_smallest_that_runs(name: str) -> None:
    ours, _ = pair(name)
    least = find_network(name).min_size
    assert ours(torch.empty(1, 3, least, least, device="meta")).shape == (1, 1000)
    with pytest.raises(RuntimeError, match="too small"):
        ours(torch.empty(1, 3, least - 1, least - 1, device="meta"))
    fits = {"model": {"name": name}, "data": {"crop": least}}
    build(fits, "test")
    with pytest.raises(
        UserError, match=f"test: data.crop is {least - 1} pixels, but {name} needs at least {least}: raise it."
    ):
        build(fits | {"data": {"crop": least - 1}}, "test")


@torch.no_grad()
def test_he_initialization_keeps_the_activations_size() -> None:
    torch.manual_seed(0)
    network = create_model("alexnet", 10)
    weights = {name: p for name, p in network.named_parameters() if p.dim() > 1}
    for name, weight in weights.items():
        he = math.sqrt(2 / weight[0].numel())
        if name in HEAD:
            assert weight.abs().max() <= 1 / math.sqrt(4096)  # torch's own: uniform
        else:
            assert weight.std().item() == pytest.approx(he, rel=0.02), name
    assert all((p == 0).all() for name, p in network.named_parameters() if p.dim() == 1 and name not in HEAD)
    hidden = torch.randn(64, 9216).relu()
    for layer in list(network.eval().get_submodule("classifier").children())[:-1]:
        hidden = layer(hidden)
    assert hidden.square().mean().item() == pytest.approx(0.5, rel=0.2)  # of its input


def test_dropout_draws_from_the_seed_in_training_alone() -> None:
    network = create_model("alexnet", 3)
    images = torch.randn(2, 3, 64, 64)

    def outputs(seed: int, *, training: bool) -> torch.Tensor:
        torch.manual_seed(seed)
        logits: torch.Tensor = network.train(training)(images)
        return logits

    assert torch.equal(outputs(1, training=True), outputs(1, training=True))
    assert not torch.equal(outputs(1, training=True), outputs(2, training=True))
    assert torch.equal(outputs(1, training=False), outputs(2, training=False))


def test_compiled_and_channels_last_give_the_gradients_of_eager() -> None:
    torch.manual_seed(0)
    network = create_model("alexnet", 3).eval()
    images, labels = torch.randn(2, 3, 63, 63), torch.tensor([0, 2])
    torch._dynamo.reset()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    parameters = list(network.parameters())
    wanted = torch.autograd.grad(F.cross_entropy(network(images), labels), parameters)
    network.to(memory_format=torch.channels_last)
    layouts: list[bool] = []
    for module in network.get_submodule("features").children():
        module.register_forward_hook(
            lambda _, __, y: layouts.append(y.is_contiguous(memory_format=torch.channels_last))
        )
    network(images.to(memory_format=torch.channels_last))
    assert len(layouts) == 13
    assert all(layouts)
    gradients = torch.autograd.grad(
        F.cross_entropy(compiled(images.to(memory_format=torch.channels_last)), labels), parameters
    )
    for a, b in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


class TestHead:
    @pytest.mark.parametrize("name", [*CLASSICS, "resnet18"])
    def test_it_is_the_layer_of_the_classes(self, name: str) -> None:
        with torch.device("meta"):
            network = create_model(name, 7)
        head = network.get_submodule(head_prefix(network).rstrip("."))
        assert isinstance(head, nn.Linear)
        assert head.out_features == 7

    @pytest.mark.parametrize("name", CLASSICS)
    def test_it_learns_at_its_own_rate_and_alone_while_the_rest_is_frozen(self, name: str) -> None:
        network, _ = pair(name)
        names = {id(p): key for key, p in network.named_parameters()}
        groups = parameter_groups(network, TrainConfig(lr=0.01, head_lr=0.1))
        assert {names[id(p)] for group in groups if group[LR_SCALE] == 10 for p in group["params"]} == HEAD
        freeze(network, frozen=True)
        assert {key for key, p in network.named_parameters() if p.requires_grad} == HEAD
        assert not network.training
        freeze(network, frozen=False)
        assert all(p.requires_grad for p in network.parameters())

    def test_it_stays_where_the_rest_is_read_from_a_file(self, tmp_path: Path) -> None:
        ours, theirs = pair("alexnet")
        weights = drawn(theirs)
        torch.save(weights, tmp_path / "weights.pth")
        ours = create_model("alexnet", 5)
        fresh = {name: ours.state_dict()[name].clone() for name in HEAD}
        load_pretrained(ours, opened(tmp_path / "weights.pth", name="alexnet"))
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, (weights | fresh)[name]), name


@pytest.mark.parametrize("name", CLASSICS)
class TestOptions:
    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("shortcut", "A"),
            ("bottleneck_stride", "1x1"),
            ("zero_init_gamma", True),
            ("norm", "triton"),
            ("sync_norm", True),
        ],
    )
    def test_without_effect_are_refused(self, name: str, option: str, value: object) -> None:
        with pytest.raises(UserError, match=f"model.{option} .*has no effect on {name}, .*: leave it out"):
            create_model(name, 10, **{option: value})  # type: ignore[arg-type]
        config = build({"model": {"name": name, option: value}}, "test")
        with torch.device("meta"), pytest.raises(UserError, match=f"model.{option} .*has no effect on {name}, "):
            build_network(config.model, 3, seed=0, device=torch.device("meta"), ranks=Ranks())

    @pytest.mark.parametrize("norm", ["auto", "torch"])
    def test_norm_may_be_left_to_torch(self, name: str, norm: str) -> None:
        config = build({"model": {"name": name, "norm": norm}}, "test")
        with torch.device("meta"):
            build_network(config.model, 3, seed=0, device=torch.device("meta"), ranks=Ranks())

    def test_the_learning_rate_is_their_papers(self, name: str) -> None:
        assert resolve(build({"model": {"name": name}}, "test")).train.lr == 0.01
        assert resolve(Config()).train.lr == 0.1


@pytest.mark.slow
def test_alexnet_trains_resumes_and_is_evaluated_as_commands(small: Path, tmp_path: Path) -> None:
    def train(run: Path, *options: object) -> None:
        geometry = ["--data.crop", 64, "--data.scale", 64, 72, "--data.val_resize", 66]
        training = ["--model.name", "alexnet", "--train.batch_size", 16, "--train.ema", 0.9]
        folders = ["--config", PLAIN, "--data.root", small, "--run", run]  # no recipe
        result = fastflower("train", *folders, *geometry, *training, *options)
        assert result.code == 0, result.err

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(whole, "--train.epochs", 2, "--train.freeze_epochs", 1)
    train(stopped, "--train.epochs", 2, "--train.freeze_epochs", 1, "--train.max_steps", 4)  # within the second epoch
    assert fastflower("train", "--resume", stopped, "--train.max_steps", 6).code == 0
    saved: list[Any] = [load_checkpoint(run / "checkpoints/last.pt") for run in (whole, stopped)]
    for kind in ("model", "ema"):
        for name, tensor in saved[0][kind].items():
            assert torch.equal(tensor, saved[1][kind][name]), name
    assert yaml.safe_load((whole / "config.yaml").read_text())["train"]["lr"] == 0.01
    assert fastflower("eval", whole, "--json").code == 0
    refused = fastflower("eval", whole, "--scales", 64)
    assert refused.code == 2
    assert "which alexnet does not: give --crops 10." in refused.err
    assert fastflower("eval", whole, "--crops", 10).code == 0


@pytest.mark.parametrize("name", CLASSICS)
def test_cross_validation_refuses_scales_before_it_trains(name: str, small: Path, tmp_path: Path) -> None:
    options = ["--data.root", small, "--run", tmp_path / "cv", "--model.name", name, "--scales", 256]
    refused = fastflower("cv", *options)
    assert refused.code == 2
    assert f"which {name} does not: give --crops 10." in refused.err
    assert not (tmp_path / "cv").exists()
