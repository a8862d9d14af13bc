"""Every test of the kernels runs twice: by Triton and by plain torch."""

from __future__ import annotations

import pytest
import torch

from tests.poison import poisoned  # noqa: F401  # the stage of gpu_check.py that tests the kernels has no other


@pytest.fixture(params=("triton", "plain"))
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where a test's tensors are. Triton's kernels run on a GPU or, without one, in its interpreter on the CPU."""
    if request.param == "plain":
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        return torch.device("cpu")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
