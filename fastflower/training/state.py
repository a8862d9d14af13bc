"""What training changes, what it leaves as it is, and where both come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from fastflower.runtime.clock import Clock
from fastflower.runtime.device import Precision
from fastflower.runtime.distributed import Ranks
from fastflower.training.ema import Ema
from fastflower.training.loss import Criterion
from fastflower.training.metrics import Evaluation, TrainingSums
from fastflower.training.optimizer import load_optimizer, new_optimizer
from fastflower.training.schedule import Schedule

if TYPE_CHECKING:
    from fastflower.config import Config, TrainConfig
    from fastflower.data.batches import EvaluationBatches, TrainingBatches
    from fastflower.runtime.entries import Checkpoint
    from fastflower.training.provenance import Provenance

CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")  # of torch.compile, which captures CUDA graphs in these


@dataclass(frozen=True)
class Setup:
    """What stays the same while training."""

    config: Config
    device: torch.device
    precision: Precision
    ranks: Ranks
    criterion: Criterion
    train: TrainingBatches
    val: EvaluationBatches | None  # None in a final fit
    provenance: Provenance

    @property
    def compiles(self) -> bool:
        """Whether the network is compiled: as configured, or on a GPU only."""
        choice = self.config.train.compile
        return self.device.type == "cuda" if choice is None else choice

    @property
    def in_cuda_graphs(self) -> bool:
        """Whether what is compiled for a GPU runs as CUDA graphs, each call of which overwrites what the last one gave.

        Torch begins anew with each call of a compiled function unless a backward pass is pending, which none is then:
        a step's pieces go forward and backward one after the other, and validation has no backward pass.
        """
        return self.compiles and self.config.train.compile_mode in CUDA_GRAPH_MODES


@dataclass
class State:
    """All that changes while training, and what a checkpoint therefore holds."""

    network: torch.nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler
    sums: TrainingSums
    ema: Ema | None = None
    epoch: int = 0  # the epoch in progress, from 0
    position: int = 0  # pictures of its order that are done, over all ranks
    step: int = 0  # optimizer steps since the start
    best: float | None = None  # what the kept best has of the validation figure that decides
    best_epoch: int = -1  # the epoch that it is of
    improved_epoch: int = -1  # the last one that was better than those before it
    comparable_from: int = 0  # the first epoch that was validated as they are now
    clock: Clock = field(default_factory=Clock)
    closing_s: float = 0.0  # the longest time that what follows an epoch's last step took: validation, log and save

    @property
    def validated(self) -> torch.nn.Module:
        """The network that is validated and kept as the best: the average, where there is one."""
        return self.ema.network if self.ema else self.network

    def see(self, evaluation: Evaluation | None, figure: str) -> bool:
        """Whether the epoch's `figure` is the best so far, which is then noted; without validation the last one is."""
        value = getattr(evaluation, figure) if evaluation else None
        better = value is None or self.best is None or is_better(value, self.best, figure)
        if better:
            self.best, self.best_epoch, self.improved_epoch = value, self.epoch, self.epoch
        return better

    def to_dict(self, setup: Setup) -> Checkpoint:
        """For `save_checkpoint`, with what the state was trained by; every rank must ask."""
        from fastflower.settings import to_plain  # here: what only takes steps does without what checks settings

        optimizer, provenance = self.optimizer.state_dict(), setup.provenance
        return {
            "model": _to_cpu(self.network),
            "ema": _to_cpu(self.ema.network) if self.ema else None,
            "optimizer": {"state": optimizer["state"], "param_groups": optimizer["param_groups"]},
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": {"cpu": torch.get_rng_state(), "cuda": _cuda_rng_states()},
            "sums": self.sums.state(setup.ranks),
            "epoch": self.epoch,
            "position": self.position,
            "step": self.step,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "improved_epoch": self.improved_epoch,
            "comparable_from": self.comparable_from,
            "spent_s": self.clock.agreed_s,
            "closing_s": self.closing_s,
            "classes": provenance.classes,
            "normalization": provenance.normalization.to_dict(),
            "train_records": provenance.train_records,
            "val_records": provenance.val_records,
            "config": to_plain(setup.config),
        }

    def load(self, saved: Checkpoint, ranks: Ranks, config: Config) -> None:
        """Go on from what `fastflower.training.resume.adapt` makes of a checkpoint."""
        self.network.load_state_dict(saved["model"])
        if self.ema:
            self.ema.network.load_state_dict(saved["ema"] or saved["model"])
        load_optimizer(self.optimizer, saved["optimizer"], keep_lr=_keeps_lr(saved["config"]["train"], config.train))
        self.schedule.load_state_dict(saved["schedule"])
        if saved["scaler"]:  # it is empty of a run that was not in fp16
            self.scaler.load_state_dict({**saved["scaler"]})
        if saved["sums"]:
            self.sums.load_state(saved["sums"], ranks)
        torch.set_rng_state(saved["rng"]["cpu"])
        if len(saved["rng"]["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(saved["rng"]["cuda"])
        self.epoch, self.position, self.step = saved["epoch"], saved["position"], saved["step"]
        self.best, self.best_epoch = saved["best"], saved["best_epoch"]
        self.improved_epoch, self.comparable_from = saved["improved_epoch"], saved["comparable_from"]
        self.clock.go_on_from(saved["spent_s"])
        self.closing_s = saved["closing_s"]


def is_better(value: float, other: float, figure: str) -> bool:
    """Whether a value of a validation figure is better than another one: a lower loss, or a higher share."""
    return value < other if figure == "loss" else value > other


def makes_best(saved: Checkpoint) -> bool:
    """Whether a checkpoint is of the best epoch's end, so that the best one can be made from it."""
    return saved["position"] == 0 and 0 <= saved["best_epoch"] == saved["epoch"] - 1


def new_state(network: torch.nn.Module, config: Config, device: torch.device, precision: Precision) -> State:
    """The state before the first step; loss scaling where fp16 needs it.

    Raises:
        UserError: the optimizer cannot be had.
    """
    optimizer = new_optimizer(network, config.train, device)
    return State(
        network=network,
        optimizer=optimizer,
        schedule=Schedule(optimizer, config.train),
        scaler=torch.amp.GradScaler(device.type, enabled=precision.dtype == torch.float16),
        sums=TrainingSums(device),
        ema=Ema(network, config.train.ema) if config.train.ema else None,
    )


def _keeps_lr(before: dict[str, Any], train: TrainConfig) -> bool:
    """Whether the learning rates go on as they were: plateau's, if they began the same; a curve sets its own."""
    same = (before["schedule"], before["lr"], before["head_lr"]) == (train.schedule, train.lr, train.head_lr)
    return train.schedule != "plateau" or same


def _to_cpu(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in network.state_dict().items()}


def _cuda_rng_states() -> list[torch.Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
