"""The configured network: weights by the seed alone, and BatchNorm computed as the settings say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastflower.config import ModelConfig
from fastflower.errors import UserError
from fastflower.models import create_model
from fastflower.models.layers import BNReLU, uses_kernels
from fastflower.runtime.distributed import Ranks
from fastflower.training.network import build_network

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize("name", ["plain18", "resnet18"])
def test_weights_are_those_of_the_seed_whatever_computes_them(name: str) -> None:
    torch.manual_seed(7)
    expected = create_model(name, 5).state_dict()
    for norm in ("torch", "triton"):
        torch.rand(3)  # what was drawn before has no say
        model = ModelConfig(name=name, norm=norm, pretrained="IMAGENET1K_V1")
        network = build_network(model, 5, seed=7, device=CPU, ranks=Ranks())
        assert network.state_dict().keys() == expected.keys()
        for key, tensor in network.state_dict().items():
            assert torch.equal(tensor, expected[key]), key
            assert tensor.ndim < 4 or tensor.is_contiguous(memory_format=torch.channels_last), key


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["plain18", "resnet18", "resnet50"]),
    st.sampled_from(["auto", "torch", "triton"]),
    st.booleans(),
    st.integers(1, 3),
)
def test_batch_norm_is_computed_as_the_settings_say(name: str, norm: str, sync: bool, world_size: int) -> None:
    model = ModelConfig(name=name, norm=norm, sync_norm=sync)  # type: ignore[arg-type]
    if sync and norm == "torch":
        with pytest.raises(UserError, match=r"model\.sync_norm needs the kernels"):
            build_network(model, 3, seed=0, device=META, ranks=Ranks(0, world_size))
        return
    with META:
        network = build_network(model, 3, seed=0, device=META, ranks=Ranks(0, world_size))
    norms = [module for module in network.modules() if isinstance(module, BNReLU)]
    kernels = norm == "triton" or sync
    assert uses_kernels(network) == kernels
    assert {module.norm for module in norms} == {"triton" if kernels else "torch"}
    assert {module.sync for module in norms} == {sync and world_size > 1}


def test_a_network_without_batch_norm_uses_no_kernels() -> None:
    with META:
        assert not uses_kernels(build_network(ModelConfig(name="alexnet"), 3, seed=0, device=META, ranks=Ranks()))
