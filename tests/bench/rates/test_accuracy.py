"""Which accuracy stands beside a speed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from bench.rates.accuracy import accuracy_of_a_run, best_accuracy
from fastflower.errors import UserError


def write_run(folder: Path, model: str, accuracies: list[float | None], logged_at: int) -> None:
    """A run folder as far as its accuracy goes."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"model: {{name: {model}}}\ndata: {{root: [/somewhere/roses]}}\n")
    log = "".join(json.dumps({"epoch": i, "val_accuracy": value}) + "\n" for i, value in enumerate(accuracies))
    (folder / "metrics.jsonl").write_text(log)
    os.utime(folder / "metrics.jsonl", (logged_at, logged_at))


def latest() -> tuple[dict[str, Any], list[str]]:
    """The accuracy of the latest run, and what is said."""
    said: list[str] = []
    return accuracy_of_a_run(None, "resnet18", said.append), said


def test_a_damaged_log_of_a_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, "resnet50", [None], 0)
    assert best_accuracy(run, "resnet50") is None
    (run / "metrics.jsonl").write_text("".join(json.dumps({"val_accuracy": a}) + "\n" for a in (None, 0.5, 0.25)))
    assert best_accuracy(run, "resnet50") == 0.5
    assert best_accuracy(run, "resnet34") is None
    (run / "metrics.jsonl").unlink()
    assert best_accuracy(run, "resnet50") is None
    (run / "metrics.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be read as the log of a run"):
        best_accuracy(run, "resnet50")


def test_the_latest_run_that_has_an_accuracy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert latest() == ({}, [])
    write_run(tmp_path / "runs" / "cv" / "fold-0", "resnet34", [0.875], logged_at=1000)
    write_run(tmp_path / "runs" / "b", "plain18", [0.25, 0.75, None, 0.5], logged_at=2000)
    write_run(tmp_path / "runs" / "a", "resnet18", [0.5], logged_at=1500)
    write_run(tmp_path / "runs" / "still without one", "resnet18", [None], logged_at=3000)
    fields, said = latest()
    assert (fields["val_accuracy"], fields["accuracy_of"], said) == (0.75, "latest run", [])
    assert fields["accuracy_source"].endswith(", runs/b (plain18 on roses)")
    os.utime(tmp_path / "runs" / "cv" / "fold-0" / "metrics.jsonl", (4000, 4000))
    assert latest()[0]["accuracy_source"].endswith(", runs/cv/fold-0 (resnet34 on roses)")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("metrics.jsonl", '{"epoch": 0'),
        ("metrics.jsonl", "[1]\n"),
        ("metrics.jsonl", '{"loss": 1}\n'),
        ("metrics.jsonl", "\xff"),
        ("config.yaml", None),
        ("config.yaml", "model: {name: resnet19}"),
    ],
)
def test_what_cannot_be_read_is_passed_over_and_named(
    file: str, content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "whole", "resnet18", [0.5], logged_at=1000)
    write_run(tmp_path / "runs" / "damaged", "resnet18", [0.75], logged_at=0)
    path = tmp_path / "runs" / "damaged" / file
    path.unlink()
    if content is not None:
        path.write_text(content, encoding="latin-1")
    os.utime(tmp_path / "runs" / "damaged" / "metrics.jsonl", (2000, 2000))
    fields, said = latest()
    assert fields["val_accuracy"] == 0.5
    assert len(said) == 1
    assert f"runs/damaged/{file}" in said[0]


def test_a_named_run_counts_and_not_the_latest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "latest", "resnet18", [0.75], logged_at=2000)
    write_run(tmp_path / "mine", "resnet18", [0.5], logged_at=1000)
    fields = accuracy_of_a_run(tmp_path / "mine", "resnet18", print)
    assert (fields["val_accuracy"], fields["accuracy_of"]) == (0.5, "the run")
    assert fields["accuracy_source"].endswith("in mine")  # no paths of one machine
    assert accuracy_of_a_run(tmp_path / "mine", "resnet50", print) == {}
