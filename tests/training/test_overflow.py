"""A step whose gradients overflow in fp16 changes no weight and nothing that the optimizer remembers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastflower.config import Config, TrainConfig
from fastflower.data.loader import Batch
from fastflower.runtime.device import Precision
from fastflower.training.ema import Ema
from fastflower.training.optimizer import freeze, load_optimizer, new_optimizer, parameter_groups
from fastflower.training.state import State, new_state
from fastflower.training.step import training_step
from tests.conftest import TinyNet, fastflower, train_arguments
from tests.training.no_data import setup_without_data

CPU = torch.device("cpu")
STEPS, PICTURES, CLASSES = 6, 6, 3

pytestmark = pytest.mark.usefixtures("poisoned")


def network_of(seed: int) -> TinyNet:
    torch.manual_seed(seed)
    return TinyNet("", CLASSES).to(memory_format=torch.channels_last)


def pictures(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [N, 3, 8, 8] and labels [N] of a step."""
    random = torch.Generator().manual_seed(step)
    images = torch.randn(PICTURES, 3, 8, 8, generator=random).contiguous(memory_format=torch.channels_last)
    return images, torch.randint(CLASSES, (PICTURES,), generator=random)


@dataclass
class Case:
    """How to train, and in which steps the gradients overflow."""

    train: TrainConfig
    overflows: list[bool]
    frozen: int  # so many steps at first


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sgd = draw(st.integers(0, 2)) > 0
    train = TrainConfig(
        optimizer="sgd" if sgd else "adamw",
        lr=0.1 if sgd else 0.01,
        momentum=draw(st.sampled_from([0.9, 0.5])),
        nesterov=draw(st.booleans()),
        weight_decay=draw(st.sampled_from([0.0, 0.05])),
        clip_grad=draw(st.sampled_from([None, 0.5])),
        accumulate=draw(st.sampled_from([1, 2])),
        ema=draw(st.sampled_from([0.0, 0.9])),
    )
    overflows = draw(st.lists(st.booleans(), min_size=STEPS, max_size=STEPS))
    return Case(train, overflows, draw(st.integers(0, STEPS - 1)))


def by_hand(case: Case) -> tuple[TinyNet, torch.optim.Optimizer, Ema | None]:
    """The same training by torch's own optimizer, one operator after another, which is not asked where it overflows."""
    train, network = case.train, network_of(0)
    groups = parameter_groups(network, train)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=train.peak_lr, foreach=False, fused=False)
    if train.optimizer == "sgd":
        options: Any = {"momentum": train.momentum, "nesterov": train.nesterov}
        optimizer = torch.optim.SGD(groups, lr=train.peak_lr, **options, foreach=False, fused=False)
    ema = Ema(network, train.ema) if train.ema else None
    for step, overflows in enumerate(case.overflows):
        freeze(network, frozen=step < case.frozen)
        images, labels = pictures(step)
        optimizer.zero_grad()
        for piece, wanted in zip(images.chunk(train.accumulate), labels.chunk(train.accumulate), strict=True):
            (torch.nn.functional.cross_entropy(network(piece), wanted) / train.accumulate).backward()
        if train.clip_grad:
            torch.nn.utils.clip_grad_norm_(network.parameters(), train.clip_grad)
        if not overflows:
            optimizer.step()
        if ema:
            ema.update(step + 1)
    return network, optimizer, ema


def by_us(case: Case, device: torch.device = CPU, resumed_at: int | None = None) -> State:
    """The same training as it is done; in between resumed from a checkpoint that holds what has learned, and no more.

    So it was written of a frozen backbone before its momentum was made in advance.
    """
    config = replace(Config(), train=case.train)
    setup = replace(setup_without_data(config, PICTURES), device=device)
    state = new_state(network_of(0).to(device), config, device, Precision(torch.float16))
    assert state.scaler.is_enabled()
    scaling = state.scaler.state_dict()
    for step, overflows in enumerate(case.overflows):
        if step == resumed_at:
            saved: Any = state.optimizer.state_dict()
            learned = {
                k: memory for k, memory in saved["state"].items() if any(value.any() for value in memory.values())
            }
            state.optimizer = new_optimizer(state.network, case.train, device)
            load_optimizer(state.optimizer, saved | {"state": learned}, keep_lr=True)
        freeze(state.network, frozen=step < case.frozen)
        state.scaler.load_state_dict(scaling | {"scale": np.inf if overflows else 1024.0})
        images, labels = (tensor.to(device) for tensor in pictures(step))
        training_step(setup, state, state.network, Batch(images, labels, np.arange(PICTURES)))
    return state


def assert_as_by_hand(state: State, case: Case) -> None:
    """Weights, statistics, averages and what the optimizer remembers are what torch's own operations give."""
    network, optimizer, ema = by_hand(case)
    pairs = [(state.network.state_dict(), network.state_dict())]
    if state.ema and ema:
        pairs.append((state.ema.network.state_dict(), ema.network.state_dict()))
    for ours, parameter in zip(state.network.parameters(), network.parameters(), strict=True):
        pairs.append(({**state.optimizer.state[ours]}, {**optimizer.state[parameter]}))
    for actual, expected in pairs:
        for name, tensor in expected.items():
            torch.testing.assert_close(actual[name].cpu(), tensor, rtol=1e-4, atol=1e-5, msg=name)
    for memory in state.optimizer.state.values():
        assert all(tensor.isfinite().all() for tensor in memory.values())
    assert (state.step, state.position) == (len(case.overflows), len(case.overflows) * PICTURES)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cases())
def test_steps_that_overflow_leave_everything_as_it_was(case: Case) -> None:
    assert_as_by_hand(by_us(case), case)


# A backbone that is let go in a step that overflows, and in the next one again.
LET_GO = [
    Case(train, [False, False, True, True, False, False], frozen=2)
    for train in (TrainConfig(lr=0.1), TrainConfig(lr=0.1, nesterov=True), TrainConfig(optimizer="adamw", lr=0.01))
]


@pytest.mark.parametrize("resumed_at", [None, 1, 2])
@pytest.mark.parametrize("case", LET_GO, ids=lambda case: case.train.optimizer + "+nesterov" * case.train.nesterov)
def test_a_backbone_is_let_go_in_a_step_that_overflows(case: Case, resumed_at: int | None) -> None:
    assert_as_by_hand(by_us(case, resumed_at=resumed_at), case)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay", [0.0, 5e-4])
@pytest.mark.parametrize("frozen", [0, 2])
def test_without_overflow_a_momentum_of_zeros_is_torchs_own_bit_for_bit(
    nesterov: bool, decay: float, frozen: int
) -> None:
    train = TrainConfig(lr=0.1, nesterov=nesterov, weight_decay=decay)
    mine, theirs = network_of(1), network_of(1)
    ours = new_optimizer(mine, train, CPU)
    torchs = torch.optim.SGD(
        parameter_groups(theirs, train), lr=0.1, momentum=train.momentum, nesterov=nesterov, fused=True
    )
    for step in range(5):
        for network, optimizer in ((mine, ours), (theirs, torchs)):
            freeze(network, frozen=step < frozen)
            images, labels = pictures(step)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)
            assert ours.state[a]["momentum_buffer"].stride() == a.stride()
            if b.grad is not None:
                assert torch.equal(ours.state[a]["momentum_buffer"], torchs.state[b]["momentum_buffer"])


def test_what_a_checkpoint_lacks_is_zero_and_what_it_has_is_kept() -> None:
    """Of a frozen backbone, or of a run without momentum; a momentum from before it was off is not taken up again."""
    network, train = network_of(2), TrainConfig(lr=0.1)
    saved: Any = new_optimizer(network, train, CPU).state_dict()
    parameters = [p for group in parameter_groups(network, train) for p in group["params"]]
    saved["state"] = {k: {"momentum_buffer": torch.randn_like(p)} for k, p in enumerate(parameters)}
    for lacks in (set(), {0, 1}, set(saved["state"])):
        partial = saved | {"state": {k: memory for k, memory in saved["state"].items() if k not in lacks}}
        optimizer = new_optimizer(network, train, CPU)
        load_optimizer(optimizer, partial, keep_lr=True)
        for k, parameter in enumerate(parameters):
            kept = torch.zeros_like(parameter) if k in lacks else saved["state"][k]["momentum_buffer"]
            assert torch.equal(optimizer.state[parameter]["momentum_buffer"], kept)
    off = new_optimizer(network, replace(train, momentum=0.0), CPU)
    load_optimizer(off, saved, keep_lr=True)
    assert not off.state_dict()["state"]


def test_a_run_in_fp16_gets_over_a_first_step_that_overflows(
    small: Any, tmp_path: Any, tiny_net: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss scaling begins at 2 ** 16 and finds its way down."""
    monkeypatch.setattr(TinyNet, "forward", lambda self, x: 3e3 * self.fc(self.features(x).mean((2, 3))))
    options = ("--amp", "--amp_dtype", "fp16", "--train.lr", "1e-8", "--train.epochs", "2")
    result = fastflower(*train_arguments(small, tmp_path / "run"), *options)
    assert result.code == 0, result.err
    saved = torch.load(tmp_path / "run/checkpoints/last.pt", weights_only=True)
    assert saved["scaler"]["scale"] < 2.0**16
