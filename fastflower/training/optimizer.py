"""The optimizer: which parameters learn at which rate, and with which decay."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastflower.environment import find_apex
from fastflower.errors import UserError
from fastflower.models.layers import head_prefix

if TYPE_CHECKING:
    from fastflower.config import TrainConfig
    from fastflower.runtime.entries import OptimizerState

LR_SCALE = "lr_scale"  # of a group: what the schedule's rate is multiplied by


def new_optimizer(network: torch.nn.Module, train: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """The configured optimizer over all parameters of `network`.

    Raises:
        UserError: NVIDIA's apex is asked for and is not there, or there is no GPU for it.
    """
    groups = parameter_groups(network, train)
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=train.peak_lr, fused=True)
    if train.optimizer == "sgd":
        return with_momentum(
            torch.optim.SGD(groups, lr=train.peak_lr, momentum=train.momentum, nesterov=train.nesterov, fused=True)
        )
    if device.type != "cuda":
        raise UserError("train.optimizer apex_sgd runs on a GPU only: take sgd, which torch fuses too.")
    if (package := find_apex()) != "nvidia":
        reason = "another package of that name is installed" if package else "it is not installed"
        raise UserError(f"train.optimizer apex_sgd needs NVIDIA's apex, but {reason}: take sgd, which torch fuses too.")
    from apex.optimizers import FusedSGD

    optimizer: torch.optim.Optimizer = FusedSGD(
        groups, lr=train.peak_lr, momentum=train.momentum, nesterov=train.nesterov
    )
    return optimizer


def parameter_groups(network: torch.nn.Module, train: TrainConfig) -> list[dict[str, Any]]:
    """Backbone and head, each with and without the parameters that `decay_norm_and_bias` is about.

    The groups are the same whatever the settings, so that these may change when a run is resumed.
    """
    prefix, groups = head_prefix(network), []
    for head in (False, True):
        for vectors in (False, True):  # biases and BatchNorm's parameters have one dimension
            named = [(name, p) for name, p in network.named_parameters() if name.startswith(prefix) == head]
            rate = train.head_lr if head and train.head_lr else train.peak_lr
            groups.append(
                {
                    "params": [p for _, p in named if (p.ndim <= 1) == vectors],
                    "lr": rate,
                    LR_SCALE: rate / train.peak_lr,
                    "weight_decay": 0.0 if vectors and not train.decay_norm_and_bias else train.weight_decay,
                }
            )
    return groups


def with_momentum(optimizer: torch.optim.SGD) -> torch.optim.SGD:
    """The same, with zeros for each momentum that it does not have yet, and none where momentum is off.

    Its first step would make them of memory as it finds it, and leave them so where gradients overflow in fp16. From
    zeros that step is the same, bit for bit: momentum * 0 + gradient.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not group["momentum"]:
                optimizer.state.pop(parameter, None)
            elif optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def clear_gradients(optimizer: torch.optim.Optimizer, *, in_place: bool) -> None:
    """Forget the last step's gradients.

    With `in_place` they are zeros afterwards, in memory of their own, to which a backward pass adds. Else there are
    none, and a backward pass leaves what it has made, which costs less; but a CUDA graph makes gradients in memory that
    its next call overwrites, so that those of several pieces cannot be added up there.
    """
    optimizer.zero_grad(set_to_none=not in_place)
    if in_place:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)


def require_fitting_state(optimizer: torch.optim.Optimizer, saved: OptimizerState, source: Path) -> None:
    """Raise UserError unless what a checkpoint holds of the optimizer is about this network's parameters."""
    numbered = [group["params"] for group in optimizer.state_dict()["param_groups"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shapes = dict(zip((number for group in numbered for number in group), (p.shape for p in parameters), strict=True))
    needed = ("step", "exp_avg", "exp_avg_sq") if isinstance(optimizer, torch.optim.AdamW) else ()
    state = saved["state"]
    fits = [group["params"] for group in saved["param_groups"]] == numbered and all(
        number in shapes
        and all(remembered.get(name) is not None for name in needed)
        and all(value is None or value.shape in ((), shapes[number]) for value in remembered.values())
        for number, remembered in state.items()
    )
    for group in numbered:  # of which all are frozen, or none
        kinds = {tuple((name, type(value)) for name, value in state.get(number, {}).items()) for number in group}
        fits = fits and len(kinds) <= 1
    if not fits:
        raise UserError(
            f"{source}: what it holds of the optimizer is not about this network's parameters; give a checkpoint as "
            "training has written it."
        )


def load_optimizer(optimizer: torch.optim.Optimizer, saved: OptimizerState, *, keep_lr: bool) -> None:
    """Restore what the optimizer remembers of each parameter; its options stay those of the configuration.

    With `keep_lr` the learning rates are the saved ones.
    """
    configured = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict({**saved})
    for group, options in zip(optimizer.param_groups, configured, strict=True):
        if keep_lr:
            del options["lr"]
        group.update(options)
    if isinstance(optimizer, torch.optim.SGD):
        with_momentum(optimizer)


def freeze(network: torch.nn.Module, *, frozen: bool) -> None:
    """Let only the head learn, or all; while the rest is frozen, BatchNorm uses and keeps its running statistics.

    Dropout drops nothing then.
    """
    head = head_prefix(network)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(not frozen or name.startswith(head))
    network.train(not frozen)
