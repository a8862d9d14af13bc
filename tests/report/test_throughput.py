"""Results of bench/throughput.py as pictures: which bars are drawn, and which files are refused."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fastflower.errors import UserError
from fastflower.report.page import write_report
from fastflower.report.throughput import plot_throughput, read_throughput
from tests.report.test_history import row, write_run


def throughput(name: str, rate: float, mode: str = "loader", **settings: Any) -> dict[str, Any]:
    machine = {"cpu": "a CPU", "gpu": None, "cores": 2}
    figures = {"images_per_s": rate, "spread": [rate - 10, rate + 20]}
    return {"mode": mode, "name": name, "settings": {"batch": 64} | settings, "machine": machine} | figures


def test_throughput_is_drawn_where_there_are_results(tmp_path: Path) -> None:
    small, large = (partial(throughput, sizes=[size]) for size in (192, 512))
    results = [small("theirs", 100), small("fastflower", 900), large("fastflower", 500), small("theirs", 300)]
    steps = [f"{who}, {label}, step" for who in ("vgg16", "vgg16 of timm") for label in ("eager", "compiled")]
    results += [throughput(name, 50 + place, "model") for place, name in enumerate(steps)]
    missing = {"mode": "loader", "name": "others", "missing": "not installed"}
    file = tmp_path / "throughput.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in [missing, *results]))
    assert read_throughput(file) == results
    found = {}
    for axes in plot_throughput(read_throughput(file)).axes:
        labels = [text.get_text() for text in axes.get_yticklabels()]
        widths = [patch.get_width() for patch in axes.patches]  # type: ignore[attr-defined]
        found[axes.get_title()] = dict(zip(labels, widths, strict=False))
    assert found == {
        "loader: a CPU, 2 cores, sizes 192": {"theirs": 300, "fastflower": 900},  # the later result of the same
        "loader: a CPU, 2 cores, sizes 512": {"fastflower": 500},
        "model: a CPU, 2 cores, step": {name.removesuffix(", step"): 50 + place for place, name in enumerate(steps)},
        "": {},  # of the grid
    }
    run = write_run(tmp_path / "run", [row(1)])
    write_report([run], tmp_path / "out", file)
    assert (tmp_path / "out" / "throughput.svg").is_file()


@pytest.mark.parametrize("line", ["{", "[]", '{"mode": "loader"}'])
def test_other_files_than_results_are_named(line: str, tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text(f"{json.dumps(throughput('ours', 900))}\n{line}\n")
    with pytest.raises(UserError, match=r"results.jsonl: line 2 is no result of bench/throughput.py"):
        read_throughput(file)
    with pytest.raises(UserError, match="none cannot be read"):
        read_throughput(tmp_path / "none")
    file.write_text("")
    with pytest.raises(UserError, match=r"results.jsonl holds no results"):
        read_throughput(file)
