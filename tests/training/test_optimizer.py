"""Which parameter learns how: groups, frozen backbone, average, clipping and accumulation."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastflower.config import Config, TrainConfig, resolve
from fastflower.data.loader import Batch
from fastflower.errors import UserError
from fastflower.runtime.device import Precision
from fastflower.training import optimizer as module
from fastflower.training.ema import Ema
from fastflower.training.optimizer import freeze, load_optimizer, new_optimizer
from fastflower.training.schedule import Moment, Schedule
from fastflower.training.state import State, new_state
from fastflower.training.step import training_step
from tests.conftest import TinyNet
from tests.training.no_data import setup_without_data

CPU = torch.device("cpu")


def options_by_name(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of each parameter."""
    of = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    return {name: of[id(p)] for name, p in network.named_parameters()}


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_every_parameter_has_its_rate_and_decay(name: Any) -> None:
    network = TinyNet("", 3)
    train = TrainConfig(lr=0.2, head_lr=1.0, weight_decay=0.01, decay_norm_and_bias=False, optimizer=name)
    optimizer = new_optimizer(network, train, CPU)
    assert optimizer.defaults["fused"]
    options = options_by_name(network, optimizer)
    assert options == {
        "conv1.weight": (0.2, 0.01),
        "conv2.weight": (0.2, 0.01),
        "bn1.weight": (0.2, 0.0),
        "bn1.bias": (0.2, 0.0),
        "bn2.weight": (0.2, 0.0),
        "bn2.bias": (0.2, 0.0),
        "fc.weight": (1.0, 0.01),
        "fc.bias": (1.0, 0.0),
    }
    plain = options_by_name(
        network, new_optimizer(network, TrainConfig(lr=0.2, weight_decay=0.01, optimizer=name), CPU)
    )
    assert set(plain.values()) == {(0.2, 0.01)}


@pytest.mark.parametrize("schedule", ["plateau", "step", "cosine", "onecycle"])
def test_the_head_follows_the_schedule_at_its_own_rate(schedule: Any) -> None:
    train = TrainConfig(
        lr=0.2, head_lr=1.0, schedule=schedule, epochs=10, warmup_epochs=1, milestones=(2, 4), patience=0, factor=0.5
    )
    network = TinyNet("", 3)
    optimizer = new_optimizer(network, train, CPU)
    curve, seen = Schedule(optimizer, train), set()
    for epoch in range(9):
        curve.before_step(Moment(epoch + 0.5))
        options = options_by_name(network, optimizer)
        assert options["fc.weight"][0] == pytest.approx(5 * options["conv1.weight"][0])
        seen.add(options["conv1.weight"][0])
        curve.after_epoch(1.0)
    assert len(seen) > 2


def test_step_lowers_the_rate_after_its_milestones() -> None:
    train = TrainConfig(lr=0.4, schedule="step", milestones=(30, 60), factor=0.1)
    optimizer = new_optimizer(TinyNet("", 3), train, CPU)
    schedule = Schedule(optimizer, train)
    for epochs_done, rate in ((0, 0.4), (29.99, 0.4), (30, 0.04), (59.9, 0.04), (60.1, 0.004), (500, 0.004)):
        schedule.before_step(Moment(epochs_done))
        assert schedule.lr == pytest.approx(rate)


def test_restored_options_are_those_of_the_configuration_and_rates_as_wanted() -> None:
    network = TinyNet("", 3)
    saved: Any = new_optimizer(network, TrainConfig(lr=0.2, momentum=0.5, weight_decay=0.1), CPU).state_dict()
    for group in saved["param_groups"]:
        group["lr"] = 0.02  # as plateau left it
    now = TrainConfig(lr=0.2, momentum=0.9, weight_decay=0.0, nesterov=True)
    for keep, rate in ((True, 0.02), (False, 0.2)):
        optimizer = new_optimizer(network, now, CPU)
        load_optimizer(optimizer, saved, keep_lr=keep)
        for group in optimizer.param_groups:
            assert (group["lr"], group["momentum"], group["weight_decay"]) == (rate, 0.9, 0.0)
            assert group["nesterov"]


def test_apex_is_refused_where_it_cannot_be_and_used_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    train = TrainConfig(optimizer="apex_sgd", lr=0.1)
    with pytest.raises(UserError, match="runs on a GPU only"):
        new_optimizer(TinyNet("", 3), train, CPU)
    for package, sentence in ((None, "not installed"), ("another package", "another package of that name")):
        monkeypatch.setattr(module, "find_apex", lambda package=package: package)
        with pytest.raises(UserError, match=sentence):
            new_optimizer(TinyNet("", 3), train, torch.device("cuda"))
    monkeypatch.setattr(module, "find_apex", lambda: "nvidia")
    stand_in = SimpleNamespace(FusedSGD=torch.optim.SGD)  # takes the same arguments
    monkeypatch.setitem(sys.modules, "apex", SimpleNamespace(optimizers=stand_in))
    monkeypatch.setitem(sys.modules, "apex.optimizers", stand_in)
    assert new_optimizer(TinyNet("", 3), train, torch.device("cuda")).param_groups[0]["momentum"] == 0.9


def test_a_frozen_backbone_keeps_weights_and_statistics() -> None:
    network = TinyNet("", 3)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    optimizer = new_optimizer(network, TrainConfig(lr=0.5), CPU)
    for frozen in (True, False):
        freeze(network, frozen=frozen)
        network(torch.randn(4, 3, 8, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
        assert changed == ({"fc.weight", "fc.bias"} if frozen else set(before))


def test_the_average_follows_the_weights_statistics_and_counters() -> None:
    network = TinyNet("", 3)
    ema = Ema(network, 0.9)
    wanted = {name: tensor.double() for name, tensor in network.state_dict().items()}
    for step in range(1, 200):
        with torch.no_grad():
            for tensor in network.state_dict().values():
                tensor.add_(1 if tensor.dtype == torch.int64 else torch.randn_like(tensor))
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        wanted = {n: decay * wanted[n] + (1 - decay) * t.double() for n, t in network.state_dict().items()}
    for name, tensor in ema.network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert tensor == network.state_dict()[name] == 199
        else:
            torch.testing.assert_close(tensor.double(), wanted[name], rtol=1e-4, atol=1e-4)
    assert not any(p.requires_grad for p in ema.network.parameters())
    assert not ema.network.training


class Plain(nn.Module):
    """A network without BatchNorm, whose gradient is a mean over pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] to [N, 4]."""
        logits: torch.Tensor = self.fc(x.mean((2, 3)))
        return logits


def step_once(train: TrainConfig, pictures: int = 10) -> State:
    """The state after one step on random pictures."""
    torch.manual_seed(0)
    config = replace(Config(), train=train)
    precision = Precision(None)
    state = new_state(Plain(), config, CPU, precision)
    setup = setup_without_data(config, pictures)
    images = torch.randn(pictures, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    batch = Batch(images, torch.arange(pictures) % 4, np.arange(pictures))
    training_step(setup, state, state.network, batch)
    return state


@pytest.mark.parametrize("pieces", [2, 5, 3])  # 3: pieces of 4, 3 and 3
def test_pieces_give_the_gradient_and_figures_of_the_whole(pieces: int) -> None:
    whole, parts = step_once(TrainConfig(lr=0.3)), step_once(TrainConfig(lr=0.3, accumulate=pieces))
    for a, b in zip(whole.network.parameters(), parts.network.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert parts.sums.means() == pytest.approx(whole.sums.means())
    assert (parts.step, parts.position) == (1, 10)


def test_the_gradients_norm_is_clipped() -> None:
    free, clipped = step_once(TrainConfig(lr=1.0)), step_once(TrainConfig(lr=1.0, clip_grad=0.01))
    norms = [
        torch.cat([p.grad.flatten() for p in s.network.parameters() if p.grad is not None]).norm()
        for s in (free, clipped)
    ]
    assert norms[0] > 0.1
    assert norms[1] == pytest.approx(0.01, rel=1e-3)


def test_the_learning_rate_that_stands_for_none() -> None:
    assert resolve(Config()).train.lr == 0.1
    pretrained = replace(Config(), model=replace(Config().model, pretrained="IMAGENET1K_V1"))
    assert resolve(pretrained).train.lr == 0.01
    given = replace(pretrained, train=TrainConfig(lr=0.5))
    assert resolve(given).train.lr == 0.5
