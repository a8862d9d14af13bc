"""A finished run to work on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import fastflower, train_arguments


@pytest.fixture
def finished(small: Path, tmp_path: Path, tiny_net: None) -> Path:
    """A run of two epochs."""
    run = tmp_path / "finished"
    assert fastflower(*train_arguments(small, run), "--train.epochs", "2").code == 0
    return run
