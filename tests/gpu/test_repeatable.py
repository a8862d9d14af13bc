"""train.deterministic on a GPU: the same bits from one run to the next."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastflower.runtime.checkpoint import load_checkpoint
from tests.conftest import fastflower, train_arguments

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "options",
    [
        "--model.name resnet18 --model.norm torch",
        "--model.name resnet18 --model.norm triton",
        "--model.name resnet18 --amp --train.compile on",
        "--model.name alexnet --data.crop 64 --data.scale 64 80 --data.val_resize 64",
    ],
)
def test_two_runs_and_one_with_decoded_pictures_are_the_same(small: Path, tmp_path: Path, options: str) -> None:
    weights: list[dict[str, torch.Tensor]] = []
    for cache in ("off", "off", "gpu"):
        torch._dynamo.reset()
        run = tmp_path / str(len(weights))
        arguments = ("--train.compile", "off", *options.split(), "--train.epochs", 2, "--data.cache", cache)
        result = fastflower(*train_arguments(small, run), *arguments, "--train.deterministic")
        assert result.code == 0, result.err
        assert "cuda" in result.out
        weights.append(load_checkpoint(run / "checkpoints" / "last.pt")["model"])
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name
        assert torch.equal(tensor, weights[2][name]), name
