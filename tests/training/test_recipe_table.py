"""No default diverges: real networks on tiny pictures, from few to many of them and from two to 104 classes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml

from tests.conftest import fastflower, write_dataset

STEPS = 60  # of each run: a whole schedule of short epochs, or the warm-up and more of a long one


@pytest.mark.slow
@pytest.mark.parametrize(
    ("classes", "pictures"),
    [
        *((2, 40), (5, 40), (20, 40), (2, 220), (5, 220), (104, 220)),
        *((2, 1000), (104, 1000), (20, 5000), (2, 20_000), (104, 20_000)),
    ],
)
def test_no_default_diverges(classes: int, pictures: int, tmp_path: Path) -> None:
    root, run = tmp_path / "pictures", tmp_path / "run"
    write_dataset(root, {"train": pictures, "val": max(40, classes)}, classes=classes)
    fitted = yaml.safe_load(fastflower("train", root, "--print-config").out)
    steps = pictures // fitted["train"]["batch_size"]
    epochs = min(max(round(STEPS / steps), 1), fitted["train"]["epochs"])
    # fewer epochs have a shorter warm-up to the same rate, which is harder on the network
    result = fastflower("train", root, "--run", run, "--train.epochs", epochs, "--train.max_steps", STEPS)
    assert result.code == 0, result.err
    last = json.loads(fastflower("eval", run / "checkpoints/last.pt", "--json").out)
    assert last["loss"] < 1.5 * math.log(classes), f"guessing has {math.log(classes):.3f}"
