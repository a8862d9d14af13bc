"""What a run waits for at the beginning of each pass."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from bench.passes import main


def test_both_ways_use_every_batch_and_say_what_they_waited(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    out = tmp_path / "out.jsonl"
    few = ["--crop", "32", "--batch", "8", "--epochs", "3", "--repeats", "2", "--step_s", "0.125"]
    assert main(["--root", str(small), *few, "--out", str(out)]) == 0
    assert slept == 2 * 2 * 3 * (48 // 8 + 3) * [0.125]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["way"] for row in rows] == ["made ahead", "made when asked for"]
    for row in rows:
        for split in ("training", "validation"):
            low, high = row[f"{split}_range_ms"]
            assert 0 < low <= row[f"{split}_ms"] <= high
        assert row["settings"]["root"] == "small"
        assert row["machine"]["cores"] > 0
    printed = capsys.readouterr().out
    assert all(row["way"] in printed for row in rows)


def test_a_single_epoch_is_refused(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--root", str(small), "--epochs", "1"]) == 2
    assert "--epochs must be at least 2" in capsys.readouterr().err
