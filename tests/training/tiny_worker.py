"""The command line with a TinyNet, for processes of their own; says afterwards what each rank ended with.

TINY_SIGNAL="rank:step:number" sends that rank the signal in that step, SIGTERM without a number; TINY_CRASH="rank:step"
raises there.
TINY_CLOCK="10:70" lets only steps take time: so many seconds of each rank's clock.
TINY_BROADCAST=1 gives all the main rank's statistics before each step, as DDP does where it is not told otherwise.
TINY_WEIGHTS=URL is where IMAGENET1K_V1 of resnet18 comes from.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.nn.parallel import DistributedDataParallel

from fastflower import cli
from fastflower.models import NETWORKS
from fastflower.training import loop, pretrained, step
from fastflower.training.metrics import TrainingSums
from tests.conftest import TinyNet

original_add, original_train = TrainingSums.add, loop.train
clock: Any = SimpleNamespace(now_s=0.0, monotonic=lambda: clock.now_s)
networks: list[DistributedDataParallel] = []


def own_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def at_step(variable: str) -> int:
    rank, step, *_ = os.environ.get(variable, "-1:-1").split(":")
    return int(step) if int(rank) == own_rank() else -1


def add(self: TrainingSums, loss: Any, logits: Any, labels: Any, step: int, lr: float) -> None:
    if step == at_step("TINY_SIGNAL"):
        _, _, *number = os.environ["TINY_SIGNAL"].split(":")
        os.kill(os.getpid(), int(number[0]) if number else signal.SIGTERM)
    if step == at_step("TINY_CRASH"):
        raise RuntimeError("crash for the test")
    if "TINY_CLOCK" in os.environ:
        clock.now_s += float(os.environ["TINY_CLOCK"].split(":")[own_rank()])
    original_add(self, loss, logits, labels, step, lr)


def train(setup: Any, state: Any, folder: Any, display: Any) -> None:
    original_train(setup, state, folder, display)
    weights = b"".join(
        tensor.numpy().tobytes() for net in (state.network, state.validated) for tensor in net.state_dict().values()
    )
    broadcast = sum(network.broadcast_buffers for network in networks)
    end = {
        "broadcast": broadcast,
        "lr": state.schedule.lr,
        "weights": hashlib.sha256(weights).hexdigest(),
        "step": state.step,
    }
    (Path(folder.path) / f"rank{own_rank()}.json").write_text(json.dumps(end))


def training_network(setup: Any, state: Any) -> Any:
    network = step.training_network(setup, state)
    if isinstance(network, DistributedDataParallel):
        network.broadcast_buffers |= "TINY_BROADCAST" in os.environ
        networks.append(network)
    return network


def main() -> None:
    patch = pytest.MonkeyPatch()
    patch.setattr(TrainingSums, "add", add)
    patch.setattr("fastflower.training.run.train", train)
    patch.setattr("fastflower.training.loop.training_network", training_network)
    patch.setattr("fastflower.training.network.create_model", TinyNet)
    if "TINY_CLOCK" in os.environ:
        patch.setattr("fastflower.runtime.clock.time", clock)
    if "TINY_WEIGHTS" in os.environ:
        pretrained.URL, _, name = os.environ["TINY_WEIGHTS"].rpartition("/")
        NETWORKS["resnet18"] = replace(NETWORKS["resnet18"], weights={"IMAGENET1K_V1": name})
    cli.main()


if __name__ == "__main__":
    main()
