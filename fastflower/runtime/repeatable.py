"""Computing the same bits each time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from fastflower.errors import UserError

# With these cuBLAS has memory of a fixed size for each stream, and adds in one order ("Results reproducibility" in its
# documentation). It reads the variable when it first multiplies.
VARIABLE, WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")


@contextlib.contextmanager
def repeatable(wanted: bool, device: torch.device) -> Iterator[None]:
    """If it is `wanted`, torch gives the same bits for the same input on the same `device`, until the block ends.

    It takes no algorithm then that adds in another order each time, chooses none by its speed, compiled or not, and
    fails where it has no other one. So the block begins before anything is multiplied on a GPU.

    Raises:
        UserError: the environment's CUBLAS_WORKSPACE_CONFIG allows another order on a GPU.
    """
    if not wanted:
        yield
        return
    workspace = os.environ.setdefault(VARIABLE, WORKSPACES[0])
    if device.type == "cuda" and workspace not in WORKSPACES:
        raise UserError(
            f"train.deterministic: the environment's {VARIABLE} is {workspace}, with which a GPU's products may "
            f"differ from run to run: unset it, or set it to {' or '.join(WORKSPACES)}."
        )
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, deterministic = cudnn.benchmark, cudnn.deterministic
    torch.use_deterministic_algorithms(True)  # torch.compile then chooses by speed only what does not change the bits
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.benchmark, cudnn.deterministic = benchmark, deterministic
