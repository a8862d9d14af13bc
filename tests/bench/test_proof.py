"""The proof that a change left training as it was: it sees any difference, and none where there is none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.proof import TIMES, differences, main
from tests.conftest import fastflower, train_arguments


def test_runs_are_compared_in_all_but_their_times(small: Path, tmp_path: Path, tiny_net: None) -> None:
    one, again, other = tmp_path / "one", tmp_path / "again", tmp_path / "other"
    for run, lr in ((one, 0.02), (again, 0.02), (other, 0.021)):
        assert fastflower(*train_arguments(small, run), "--train.epochs", 2, "--train.lr", lr).code == 0
    assert differences(one, again) == []
    assert any(sentence.startswith("epoch 1: train_loss is ") for sentence in differences(one, other))
    assert any(sentence.startswith("conv1.weight differs by at most ") for sentence in differences(one, other))

    log, weights = again / "metrics.jsonl", again / "checkpoints/best.safetensors"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text(
        "".join(json.dumps(row | {"epoch": row["epoch"] - 1} | dict.fromkeys(TIMES, 0)) + "\n" for row in rows)
    )
    assert differences(one, again) == []
    log.write_text("".join(json.dumps(row | {"val_top5": 0.5}) + "\n" for row in rows))
    assert [sentence.partition(" is ")[0] for sentence in differences(one, again)] == [
        "epoch 1: val_top5",
        "epoch 2: val_top5",
    ]
    shutil.copy(one / "metrics.jsonl", log)
    tensors = load_file(weights)
    tensors["fc.bias"][0] = torch.nextafter(tensors["fc.bias"][0], torch.tensor(1e9))
    save_file(tensors | {"more": torch.zeros(1)}, weights)
    assert len(sentences := differences(one, again)) == 2
    assert sentences[0].startswith("fc.bias differs by at most ")
    assert sentences[1] == "more is in one of them only"


def test_without_a_revision_it_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "make proof BASE=REVISION" in capsys.readouterr().out
