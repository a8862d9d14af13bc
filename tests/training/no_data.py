"""A setup for tests of single training steps, which bring their own batches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from fastflower.config import Config
from fastflower.runtime.device import Precision
from fastflower.runtime.distributed import Ranks
from fastflower.training.loss import Criterion
from fastflower.training.state import Setup


def setup_without_data(config: Config, global_batch: int) -> Setup:
    """In fp32 on the CPU, for steps of so many pictures."""
    train: Any = SimpleNamespace(global_batch=global_batch)
    provenance: Any = None
    return Setup(
        config, torch.device("cpu"), Precision(None), Ranks(), Criterion(), train, val=None, provenance=provenance
    )
