"""A trained run: what tells its weights from others."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from fastflower.config import Config
from fastflower.data.view import IMAGENET
from fastflower.evaluation.trained_run import Trained, weights_digest


def trained(weights: dict[str, torch.Tensor]) -> Trained:
    return Trained(Config(), ["a", "b"], Path("best.pt"), IMAGENET, weights)


def test_the_digest_is_of_names_and_bytes_in_their_order() -> None:
    weights = {
        "conv": torch.arange(24, dtype=torch.float32).view(2, 3, 4).permute(2, 0, 1),
        "half": torch.tensor([1.5, -2], dtype=torch.bfloat16),
        "tracked": torch.tensor(7),
        "none": torch.empty(0, 3),
    }
    expected = hashlib.blake2b(digest_size=8)
    for name, tensor in weights.items():
        raw = tensor.to(torch.float32) if tensor.dtype == torch.bfloat16 else tensor
        values = raw.numpy().tobytes("C")
        expected.update(name.encode())
        # bfloat16 is the upper half of float32
        expected.update(b"".join(values[i + 2 : i + 4] for i in range(0, 8, 4)) if name == "half" else values)
    assert weights_digest(trained(weights)) == expected.hexdigest()


@pytest.mark.parametrize("changed", [{"a": torch.ones(2)}, {"b": torch.zeros(2)}, {"a": torch.zeros(3)}])
def test_other_weights_have_another_digest(changed: dict[str, torch.Tensor]) -> None:
    assert weights_digest(trained({"a": torch.zeros(2)})) != weights_digest(trained(changed))
