"""What `python bench/throughput.py` does with nothing else: one table of loader, training step and both together."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import throughput
from bench.contenders import loops
from bench.contenders.loaders import DECODE, LIMIT, OURS, reads_ahead
from bench.rates import bottleneck
from bench.rates.options import LOCAL, OverviewCommand
from bench.throughput import main
from fastflower.flops import count
from fastflower.runtime.device import cpu_has_bf16
from fastflower.training.state import Setup, State
from tests.conftest import TinyNet

pytestmark = pytest.mark.usefixtures("on_a_small_cpu", "tiny_net")
STEP, WHOLE = "resnet18, eager, step", "resnet18, eager, end to end"
TINY = ["overview", "--batch", "8", "--steps", "2", "--warmup", "1", "--repeats", "2"]


@pytest.fixture(autouse=True)
def _flowers(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few of the built-in pictures, and no runs."""
    monkeypatch.setattr("fastflower.data.dataset.ensure_builtin", lambda progress: small)
    monkeypatch.setattr("fastflower.data.dataset.builtin_root", lambda: small)
    monkeypatch.chdir(tmp_path)


def overview(tmp_path: Path, *options: str) -> dict[str, dict[str, Any]]:
    """The rows of one run, by name."""
    out = tmp_path / "out.jsonl"
    assert main([*TINY, *options, "--out", str(out)]) == 0
    return {row["name"]: row for row in map(json.loads, out.read_text().splitlines())}


def cells(shown: str, name: str) -> list[str]:
    """What the table on screen holds behind the name of a row."""
    (line,) = (line for line in shown.splitlines() if line.strip().startswith(f"{name}  "))
    return line.strip().removeprefix(name).split()


def test_nothing_else_means_the_overview(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[Any] = []

    def noted(command: Any, _: Any) -> int:
        asked.append(command)
        return 0

    monkeypatch.setattr(throughput, "run_mode", noted)
    assert main([]) == main(["overview"]) == 0
    assert asked == [OverviewCommand()] * 2
    assert asked[0].out == LOCAL
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "With nothing else it is the overview" in shown


def test_figures_agree_with_their_definitions_and_with_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared: list[tuple[Setup, State]] = []

    def noted(*arguments: Any) -> tuple[Setup, State]:
        prepared.append(original(*arguments))
        return prepared[-1]

    original = loops.prepared
    monkeypatch.setattr(loops, "prepared", noted)
    rows = overview(tmp_path)
    shown = capsys.readouterr().out
    assert list(rows) == [OURS, DECODE, LIMIT, STEP, WHOLE]
    loader, step, whole = rows[OURS], rows[STEP], rows[WHOLE]
    decoder = max((rows[DECODE], rows[LIMIT]), key=lambda row: row["images_per_s"])
    assert loader["share_of_limit"] == pytest.approx(loader["images_per_s"] / decoder["images_per_s"])
    cost = count(TinyNet("resnet18", 3), 56)
    for row in (step, whole):
        assert row["macs"] == cost.macs
        assert row["flops"] == 3 * cost.flops
        assert row["flops_per_s"] == pytest.approx(row["images_per_s"] * 3 * cost.flops)
        assert row["share_of_limit"] == pytest.approx(row["flops_per_s"] / row["ceiling_flops_per_s"])
        assert row["settings"]["dtype"] == ("bf16" if cpu_has_bf16() else "fp32")
        assert (row["settings"]["crop"], row["stored_px"], row["pictures"]) == (56, [40], 2 * 2 * 8)

    # the accuracy after all steps of both repeats, computed here once more
    setup, state = prepared[-1]
    steps = 2 * (2 + 2 * reads_ahead(setup.train.loader))
    assert whole["accuracy_of"] == f"{steps} steps"
    network = state.network.eval()
    assert setup.val
    with torch.no_grad(), setup.precision.autocast(setup.device):
        hits = [network(batch.images).argmax(1) == batch.labels for batch in setup.val.once()]
    assert whole["val_accuracy"] == pytest.approx(torch.cat(hits).double().mean().item())
    assert f"Accuracy: of validation, after the {steps} steps that were trained here." in shown

    headings = [line.split() for line in shown.splitlines()]
    assert ["images/s", "forward", "forward", "step", "GFLOP/s", "the", "limit", str(steps), "steps"] in headings
    assert cells(shown, "loader") == [f"{loader['images_per_s']:.1f}", f"{loader['share_of_limit']:.1%}"]
    for name, row in ((STEP, step), (WHOLE, whole)):
        giga = [f"{value / 1e9:.3f}" for value in (cost.macs, 2 * cost.macs, 6 * cost.macs)]
        wanted = [
            f"{row['images_per_s']:.1f}",
            *giga,
            f"{row['flops_per_s'] / 1e9:.1f}",
            f"{row['share_of_limit']:.1%}",
        ]
        assert cells(shown, name) == wanted + ([f"{row['val_accuracy']:.1%}"] if row is whole else [])
    assert "Pictures: small, stored at 40 x 40 pixels; 56 x 56 are cut out" in shown
    assert "Batches of 8, " in shown
    assert f"loader {decoder['images_per_s']:.1f} images/s ({decoder['name']})" in shown
    assert f"step and end to end {step['ceiling_flops_per_s'] / 1e9:.1f} GFLOP/s" in shown
    assert whole["bottleneck"] in shown


def test_accuracy_of_the_latest_run_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("model: {name: plain34}\ndata: {root: [/somewhere/roses]}\n")
    (run / "metrics.jsonl").write_text('{"val_accuracy": 0.625}\n')
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setattr(bottleneck, "is_loader", lambda row: True)
    rows = overview(tmp_path)
    shown = capsys.readouterr().out
    assert rows[WHOLE]["val_accuracy"] == 0.625
    assert cells(shown, WHOLE)[-1] == "62.5%"
    assert re.search(r"the limit +latest run *\n", shown)
    assert "Accuracy: the highest of validation in the latest run, runs/mine (plain34 on roses)." in shown
    # what the limit is by is not installed here, and the loop is taken to wait for data
    assert rows[LIMIT]["missing"] == "not installed (pip install torchvision)"
    rates = [rows[name]["images_per_s"] for name in (OURS, DECODE)]
    assert rows[OURS]["share_of_limit"] == pytest.approx(rates[0] / rates[1])
    assert f"loader {rates[1]:.1f} images/s ({DECODE})" in shown
    assert "of the loader's" in rows[WHOLE]["bottleneck"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "49"], "48 training records, fewer than --batch 49"),
        (["--run", "runs/none"], "none/config.yaml cannot be read"),
        (["--out", "."], "--out . cannot be written"),
    ],
)
def test_mistakes_end_with_a_sentence(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, *options]) == 2
    assert message in capsys.readouterr().err
