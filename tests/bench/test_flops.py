"""The table of costs beside torchvision's and published figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench.flops import PUBLISHED, main
from fastflower.flops import variants


def test_what_is_published_is_of_networks_that_there_are() -> None:
    assert PUBLISHED.keys() <= set(variants())


def test_counts_agree_with_torchvision_and_with_what_is_published(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    assert main(["--out", str(out)]) == 0
    rows = {row["model"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert rows.keys() == set(variants())
    compared = 0
    for name, row in rows.items():
        if name in PUBLISHED:
            assert row["ratio"] == pytest.approx(1, abs=0.02), name
        else:
            assert row["ratio"] is None
        assert row["flops"] == 2 * row["macs"]
        assert row["versions"].keys() >= {"torch", "torchvision"}
        if row["torchvision_macs"]:
            compared += 1
            assert (row["torchvision_params"], row["torchvision_macs"]) == (row["params"], row["macs"])
    assert compared == 8
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if "resnet50 (v1.5)" in line)
    assert " ".join(line.replace("│", " ").split()) == "resnet50 (v1.5) 25.56 4.09 8.18 4.09 4.09* 1.000"


def test_other_sizes_have_no_published_figure(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    for size in (64, 128):
        assert main(["--models", "resnet18", "plain18", "--size", str(size), "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["model"], row["size"], row["ratio"]) for row in rows] == [
        (name, size, None) for size in (64, 128) for name in ("resnet18", "plain18")
    ]


def test_mistakes_are_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--models", "resnet51"]) == 2
    assert "did you mean resnet50?" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert main(["--models", "resnet50"]) == 2
    assert "pip install torchvision" in capsys.readouterr().err
