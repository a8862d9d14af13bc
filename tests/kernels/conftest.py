"""Every test of the kernels runs twice: by Triton and by plain torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(params=("triton", "plain"))
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where a test's tensors are. Triton's kernels run on a GPU or, without one, in its interpreter on the CPU."""
    if request.param == "plain":
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        return torch.device("cpu")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that is handed out uninitialized holds NaN and 255."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    assert (torch.empty(3, dtype=torch.uint8) == 255).all()
    yield
    torch.use_deterministic_algorithms(False)
