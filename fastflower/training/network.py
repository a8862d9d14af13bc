"""The configured network, as training, evaluation and the benchmarks build it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from fastflower.models import architecture, create_model, find_network
from fastflower.models.layers import choose_norm
from fastflower.runtime.distributed import Ranks

if TYPE_CHECKING:
    from fastflower.config import ModelConfig


def build_network(
    model: ModelConfig, classes: int, *, seed: int, device: torch.device, ranks: Ranks
) -> torch.nn.Module:
    """The network with seeded weights, channels-last, on `device`; model.pretrained is not loaded.

    Args:
        model: the settings.
        classes: outputs.
        seed: of the weights.
        device: where the network runs.
        ranks: the processes, over whose pictures model.sync_norm takes statistics.

    Raises:
        UserError: a setting that has no effect on this network, or that cannot be had on this machine.
    """
    torch.manual_seed(seed)
    options = {**architecture(asdict(model)), **_norm_options(model, device, ranks)}
    network = create_model(num_classes=classes, zero_init_gamma=model.zero_init_gamma, **options)
    return network.to(device).to(memory_format=torch.channels_last)


def _norm_options(model: ModelConfig, device: torch.device, ranks: Ranks) -> dict[str, Any]:
    """How BatchNorm is computed, as `create_model` takes it."""
    if not find_network(model.name).batch_norm:  # nothing is chosen for it, and what the user chose is refused
        return {"norm": "torch" if model.norm == "auto" else model.norm, "sync_norm": model.sync_norm}
    norm = choose_norm(model.norm, device, sync=model.sync_norm)
    return {"norm": norm, "sync_norm": model.sync_norm and ranks.world_size > 1}
