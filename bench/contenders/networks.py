"""Networks on one synthetic batch: forward pass, forward and backward pass, training step; ours and others'."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn

from bench.harness.missing import MissingError, need
from bench.harness.timing import Contender, Make, Role
from fastflower.flops import count
from fastflower.runtime.device import Precision

CLASSES = 104  # of the networks: as many as the Kaggle flowers have
Pass = Literal["forward", "forward + backward", "step"]


@dataclass(frozen=True)
class Work:
    """What all contenders do."""

    size: int  # side of the pictures (pixels)
    device: torch.device
    precision: Precision
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]  # of a network's parameters


def contenders(
    work: Work, name: str, ours: Callable[[], nn.Module], compiles: Mapping[str, bool], *, peers: bool
) -> dict[str, Make]:
    """Each pass of our network and, with `peers`, of others' networks of the same name.

    `compiles` says for each label, such as "eager", whether torch.compile is used.
    """
    builders: dict[str, tuple[Role, Callable[[], nn.Module]]] = {name: ("ours", ours)}
    if peers:
        builders |= {f"{name} of {package}": ("peer", partial(build, name)) for package, build in OTHERS.items()}
    return {
        f"{who}, {label}, {what}": partial(one_pass, work, role, builder, what, compiled)
        for who, (role, builder) in builders.items()
        for label, compiled in compiles.items()
        for what in get_args(Pass)
    }


def one_pass(
    work: Work,
    role: Role,
    build: Callable[[], nn.Module],
    what: Pass,
    compiled: bool,
    batch: int,
    mode: str = "default",
) -> Contender:
    """Passes of a network over one batch [N, 3, S, S], channels-last; `mode` is torch.compile's."""
    size = work.size
    torch.manual_seed(0)
    images = torch.randn(batch, 3, size, size, device=work.device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (batch,), device=work.device)
    network = build().to(work.device).to(memory_format=torch.channels_last).train(what != "forward")
    optimizer = work.optimizer(network)
    scaler = torch.amp.GradScaler(work.device.type, enabled=work.precision.dtype == torch.float16)
    called = torch.compile(network, mode=mode, dynamic=False) if compiled else network

    def forward() -> torch.Tensor:
        with work.precision.autocast(work.device):
            logits: torch.Tensor = called(images)
            return logits

    def train() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(forward().float(), labels)
        scaler.scale(loss).backward()
        if what == "step":
            scaler.step(optimizer)
            scaler.update()

    def start(steps: int) -> Iterator[torch.Tensor]:
        for _ in range(steps):
            if what == "forward":
                with torch.no_grad():
                    forward()
            else:
                train()
            yield images

    cost, passes = count(network, size), 1 if what == "forward" else 3
    return Contender(start, role, macs=cost.macs, passes=passes, compiled=compiled, part=what)


def torchvisions(name: str) -> nn.Module:
    """Torchvision's network of that name; MissingError where there is none."""
    models = need("torchvision.models")
    if name not in models.list_models(models):
        raise MissingError("has no such network")
    network: nn.Module = models.get_model(name, num_classes=CLASSES)
    return network


def timms(name: str) -> nn.Module:
    """Timm's network of that name; MissingError where there is none."""
    timm = need("timm")
    if not timm.is_model(name):
        raise MissingError("has no such network")
    network: nn.Module = timm.create_model(name, num_classes=CLASSES)
    return network


OTHERS: dict[str, Callable[[str], nn.Module]] = {"torchvision": torchvisions, "timm": timms}
