"""The gate against regressions, and the picture of results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.throughput import main

SETTINGS = {"batch": 64, "crop": 224, "steps": 30, "repeats": 3, "out": "a.jsonl", "dtype": "fp32", "models": ["x"]}


def result(name: str, rate: float, mode: str = "loader", **settings: Any) -> dict[str, Any]:
    return {"mode": mode, "name": name, "images_per_s": rate, "settings": SETTINGS | settings}


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("rate", "options", "code"),
    [(100.0, [], 0), (95.1, [], 0), (94.9, [], 1), (94.9, ["--max_loss", "10"], 0), (99, ["--max_loss", "0"], 1)],
)
def test_fails_beyond_the_loss(
    rate: float, options: list[str], code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = write(tmp_path / "before.jsonl", result("ours", 100.0), result("faster", 100.0))
    # how long it was measured and where it was written do not matter
    after = write(tmp_path / "after.jsonl", result("ours", rate, steps=9, out="b.jsonl"), result("faster", 200.0))
    assert main(["--compare", before, after, *options]) == code
    shown = capsys.readouterr().out
    assert f"{rate / 100:.3f}" in shown
    assert "2.000" in shown
    assert ("Lost more than" in shown) == bool(code)
    if code:
        assert f"loader: ours ({rate / 100:.3f})" in shown
        assert "loader: faster (" not in shown


def test_only_equal_settings_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = write(
        tmp_path / "before.jsonl",
        result("ours", 50.0),  # measured again below
        result("ours", 100.0),
        result("ours", 300.0, crop=64),
        result("gone", 1.0),
        {"mode": "loader", "name": "timm's", "missing": "not installed"},
    )
    after = write(tmp_path / "after.jsonl", result("ours", 98.0), result("ours", 9.0, mode="train"), result("new", 1.0))
    assert main(["--compare", before, after]) == 0
    shown = capsys.readouterr().out
    assert "0.980" in shown
    only = [line.removeprefix(f"only in {tmp_path}/") for line in shown.splitlines() if line.startswith("only in")]
    assert [line[:35] for line in only] == [
        'before.jsonl: loader: ours {"batch"',  # with the settings, since there are two of that name
        "before.jsonl: loader: gone",
        "after.jsonl: train: ours",
        "after.jsonl: loader: new",
    ]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, [], "cannot be read (No such file or directory)"),
        ("no json\n", [], "holds no rows of this benchmark"),
        ("[1]\n", [], "holds no rows of this benchmark"),
        ('{"mode": "loader"}\n', [], "holds no rows of this benchmark"),
        (json.dumps(result("other", 1.0)), [], "no measurement with the same settings in common"),
        (json.dumps(result("ours", 1.0)), ["--max_loss", "100"], "--max-loss is 100"),
        (json.dumps(result("ours", 1.0)), ["loader"], "--compare reads results and measures nothing"),
    ],
)
def test_mistakes_end_with_a_sentence(
    content: str | None, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = write(tmp_path / "before.jsonl", result("ours", 100.0))
    after = tmp_path / "after.jsonl"
    if content is not None:
        after.write_text(content)
    assert main(["--compare", before, str(after), *options]) == 2
    assert message in capsys.readouterr().err


def test_results_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    around = {"role": "ours", "machine": {"cpu": "a CPU", "gpu": None, "cores": 2}, "spread": [9.0, 11.0]}
    results = write(tmp_path / "results.jsonl", result("fastflower", 10.0) | around)
    picture = tmp_path / "pictures" / "rates"
    assert main(["--plot", results, str(picture)]) == 0
    assert (tmp_path / "pictures" / "rates.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "pictures" / "rates.svg").is_file()
    assert main(["--plot", str(tmp_path / "none"), str(picture)]) == 2
    assert "none cannot be read" in capsys.readouterr().err
    assert main(["--plot", results, str(picture), "loader"]) == 2
    assert "--plot reads results and measures nothing" in capsys.readouterr().err
