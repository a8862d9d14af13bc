"""Costs against published figures and a count by hand; the same for every way to compute, and nothing is changed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from fastflower.errors import UserError
from fastflower.flops import Cost, count, variants
from fastflower.models import NETWORKS, create_model
from tests.conftest import TinyNet, fastflower

# 10^9 multiply-adds by "Deep Residual Learning", table 1 and figure 3.
PAPER = {
    "plain34": 3.6,
    "resnet34": 3.6,
    "resnet50-v1": 3.8,
    "resnet101-v1": 7.6,
    "resnet152-v1": 11.3,
    "plain18": 1.8,
    "resnet18": 1.8,
}
# By torchvision's documentation.
TORCHVISION = {
    "resnet18": 1.81,
    "resnet34": 3.66,
    "resnet50": 4.09,
    "resnet101": 7.80,
    "resnet152": 11.51,
    "vgg16": 15.47,
    "vgg19": 19.63,
    "alexnet": 0.71,
}
PROJECTIONS = 64 * 128 + 2 * 128 + 128 * 256 + 2 * 256 + 256 * 512 + 2 * 512  # of shortcuts, weights and norms
PARAMETERS = {
    "plain18": 11_689_512 - PROJECTIONS,
    "plain34": 21_797_672 - PROJECTIONS,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet50-v1": 25_557_032,
    "resnet101": 44_549_160,
    "resnet101-v1": 44_549_160,
    "resnet152": 60_192_808,
    "resnet152-v1": 60_192_808,
    "vgg16": 138_357_544,
    "vgg19": 143_667_240,
    "alexnet": 61_100_840,
}


@pytest.fixture(scope="module")
def costs() -> dict[str, Cost]:
    return {name: count(name) for name in variants()}


def test_multiply_adds_are_the_published_ones(costs: dict[str, Cost]) -> None:
    for name, published in PAPER.items():
        assert costs[name].macs / 1e9 == pytest.approx(published, rel=0.02), name
    for name, published in TORCHVISION.items():
        assert round(costs[name].macs / 1e9, 2) == published, name


def test_parameters_are_the_published_ones_to_the_digit(costs: dict[str, Cost]) -> None:
    assert {name: costs[name].params for name in PARAMETERS} == PARAMETERS


def test_flops_are_twice_the_macs_and_layers_add_up(costs: dict[str, Cost]) -> None:
    for name, cost in costs.items():
        assert (cost.model, cost.size, cost.flops) == (name, 224, 2 * cost.macs)
        assert sum(layer.macs for layer in cost.layers) == cost.macs
        assert sum(layer.params for layer in cost.layers) == cost.params
        assert {layer.kind for layer in cost.layers if layer.macs} == {"Conv2d", "Linear"}
        assert cost.layers[-1].shape == [1000]


@pytest.mark.parametrize("size", [224, 225, 97])
@pytest.mark.parametrize("name", ["plain34", "resnet50", "vgg16", "alexnet"])
def test_layers_are_those_of_a_count_by_hand(name: str, size: int) -> None:
    with torch.device("meta"):
        network = create_model(name, 1000).eval()
    by_hand: dict[str, tuple[int, list[int]]] = {}

    def note(layer: str, module: nn.Module, output: torch.Tensor) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):  # each output takes as many multiply-adds as it has weights
            by_hand[layer] = (output.numel() * module.weight[0].numel(), list(output.shape[1:]))

    for layer, module in network.named_modules():
        module.register_forward_hook(lambda module, _, output, layer=layer: note(layer, module, output))
    network(torch.empty(1, 3, size, size, device="meta"))
    cost = count(name, size)
    assert {layer.name: (layer.macs, layer.shape) for layer in cost.layers if layer.macs} == by_hand
    assert cost.macs == sum(macs for macs, _ in by_hand.values())


def test_torchvisions_networks_cost_the_same(costs: dict[str, Cost]) -> None:
    for name in TORCHVISION:
        with torch.device("meta"):
            theirs = count(torchvision.models.get_model(name))
        assert (theirs.params, theirs.macs) == (costs[name].params, costs[name].macs), name


@pytest.mark.parametrize("name", ["plain18", "resnet18", "resnet50"])
def test_every_implementation_and_type_costs_the_same(name: str) -> None:
    with torch.device("meta"):
        plain, kernels = create_model(name, 10), create_model(name, 10, norm="triton", sync_norm=True)
        half = create_model(name, 10).half()
    wanted = count(plain, 64)
    assert wanted.model == "ResNet"
    for network in (kernels, half, torch.compile(plain), torch.compile(kernels)):
        assert count(network, 64) == wanted  # type: ignore[arg-type]


def state_of(network: nn.Module) -> dict[str, Any]:
    hooks = [name for name in vars(network) if name.endswith("_hooks")]
    return {
        "pointers": [tensor.data_ptr() for tensor in network.state_dict().values()],
        "modes": [module.training for module in network.modules()],
        "hooks": [len(getattr(module, name)) for module in network.modules() for name in hooks],
        "requires_grad": [p.requires_grad for p in network.parameters()],
        "norms": [getattr(module, "norm", None) for module in network.modules()],
        "random": torch.get_rng_state().tolist(),
    }


@pytest.mark.parametrize("norm", ["torch", "triton"])
def test_counting_changes_nothing(norm: Any) -> None:
    network = TinyNet("", 3, norm=norm)
    network.bn2.eval().requires_grad_(False)
    compiled = torch.compile(network, backend="aot_eager")
    for module in (network, compiled):
        before, values = state_of(network), {name: value.clone() for name, value in network.state_dict().items()}
        cost = count(module, 32)  # type: ignore[arg-type]
        assert cost.macs == 16 * 16 * 8 * (3 + 8) * 9 + 8 * 3
        assert state_of(network) == before
        for name, value in network.state_dict().items():
            assert torch.equal(value, values[name]), name
    network.train()(torch.randn(2, 3, 8, 8)).sum().backward()  # it trains on
    assert network.bn1.num_batches_tracked == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("resnet51",), "there is no network resnet51 (did you mean resnet50?): give some of plain18, plain34, "),
        (("resnet34-v1",), "there is no network resnet34-v1 (did you mean "),
        (("alexnet", 62), "--size is 62 pixels, but alexnet needs at least 63: raise it."),
        (("vgg19", 31), "--size is 31 pixels, but vgg19 needs at least 32: raise it."),
        (("resnet50-v1", 0), "--size is 0 pixels, but resnet50-v1 needs at least 1: raise it."),
    ],
)
def test_unknown_names_and_small_images_are_a_sentence(arguments: tuple[Any, ...], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        count(*arguments)
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize(("name", "size"), [("resnet152", 1), ("vgg16", 32), ("alexnet", 63), ("plain18", 1000)])
def test_sizes_from_the_smallest_on(name: str, size: int) -> None:
    assert count(name, size).macs > 0


class TestCommand:
    def test_all_networks_are_a_table_that_says_what_is_counted(self) -> None:
        result = fastflower("flops")
        assert result.code == 0
        for part in (*NETWORKS, "resnet50 (v1.5)", "resnet152-v1", "FLOPs: 2 x MACs", "not counted"):
            assert part in " ".join(result.out.split()), part
        row = next(line for line in result.out.splitlines() if "resnet50-v1" in line)
        assert row.replace("│", " ").split() == ["resnet50-v1", "25.56", "3.86", "7.72"]

    def test_json_is_a_list_of_objects(self) -> None:
        result = fastflower("flops", "resnet50", "alexnet", "--size", 64, "--json")
        assert result.code == 0
        rows = json.loads(result.out)
        assert [list(row) for row in rows] == [["model", "size", "params", "macs", "flops"]] * 2
        assert [(row["model"], row["size"]) for row in rows] == [("resnet50", 64), ("alexnet", 64)]
        assert rows[1]["macs"] == count("alexnet", 64).macs

    def test_layers(self) -> None:
        (row,) = json.loads(fastflower("flops", "plain18", "--layers", "--json").out)
        first = {"name": "conv1", "kind": "Conv2d", "shape": [64, 112, 112], "params": 9408, "macs": 118013952}
        assert row["layers"][0] == first
        result = fastflower("flops", "resnet18", "--layers")
        line = next(line for line in result.out.splitlines() if "layer4.1.conv2" in line)
        assert " ".join(line.replace("│", " ").split()) == "layer4.1.conv2 Conv2d 512 x 7 x 7 2,359,296 115.61"

    def test_mistakes_end_with_exit_code_2(self) -> None:
        for arguments, part in ((("vgg17",), "did you mean vgg1"), (("alexnet", "--size", 40), "at least 63")):
            result = fastflower("flops", *arguments)
            assert result.code == 2
            assert part in result.err
            assert result.out == ""
