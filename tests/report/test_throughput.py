"""Results of bench/throughput.py as pictures: which bars are drawn, and which files are refused."""

from __future__ import annotations

import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from bench.harness.timing import Role
from fastflower.errors import UserError
from fastflower.report.page import write_report
from fastflower.report.throughput import KINDS, plot_throughput, read_throughput
from tests.report.test_history import row, write_run


def result(name: str, rate: float, role: str = "ours", mode: str = "loader", **more: Any) -> dict[str, Any]:
    machine = {"cpu": "a CPU", "gpu": None, "cores": 2}
    settings = {"batch": 64} | more.pop("settings", {})
    rates = {"images_per_s": rate, "spread": [rate - 10, rate + 20]}
    return {"mode": mode, "name": name, "role": role, **rates, "settings": settings, "machine": machine} | more


def bars(axes: Axes) -> dict[str, float]:
    """Width of each bar by the label that stands at its place."""
    labels = {place: text.get_text() for place, text in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)}
    patches = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    return {labels[round(patch.get_y() + patch.get_height() / 2)]: patch.get_width() for patch in patches}


def test_throughput_is_drawn_where_there_are_results(tmp_path: Path) -> None:
    small, large = (partial(result, settings={"sizes": [size]}) for size in (192, 512))
    results = [small("theirs", 100, "peer"), small("fastflower", 900), large("fastflower", 500)]
    results += [small("theirs", 300, "peer")]
    networks = [(who, role, how) for who, role in (("a", "ours"), ("a of b", "peer")) for how in ("eager", "compiled")]
    results += [
        result(f"{who}, {how}, step", 50 + place, role, "model", part="step")
        for place, (who, role, how) in enumerate(networks)
    ]
    missing = {"mode": "loader", "name": "others", "missing": "not installed"}
    file = tmp_path / "throughput.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in [missing, *results]))
    assert read_throughput(file) == results
    figure = plot_throughput(read_throughput(file))
    assert {axes.get_title(): bars(axes) for axes in figure.axes} == {
        "loader: a CPU, 2 cores, sizes 192": {"theirs": 300, "fastflower": 900},  # the later result of the same
        "loader: a CPU, 2 cores, sizes 512": {"fastflower": 500},
        "model: a CPU, 2 cores, step": {f"{who}, {how}": 50 + place for place, (who, _, how) in enumerate(networks)},
        "": {},  # of the grid
    }
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["fastflower", "others"]
    run = write_run(tmp_path / "run", [row(1)])
    write_report([run], tmp_path / "out", file)
    assert (tmp_path / "out" / "throughput.svg").is_file()


LOADERS = {"ours": ["we"], "decoded": ["we, decoded"], "limit": ["limit"], "decoder": ["d"], "baseline": ["most"]}
LOADERS["peer"] = ["one", "another", "a third"]


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_loaders_are_compared_at_each_size_with_the_best_peer_of_it(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(16, 999), min_size=2, max_size=4, unique=True))
    outputs = data.draw(st.sampled_from([["float32"], ["float32", "uint8"]]))
    names = [(role, name) for role, of_role in LOADERS.items() for name in of_role]
    rates = {
        key: data.draw(st.integers(100, 9999)) for key in itertools.product(outputs, sizes, [name for _, name in names])
    }
    results = [
        result(name, rates[output, size, name], role, settings={"sizes": [size], "output": output})
        for output, size, (role, name) in itertools.product(outputs, sizes, names)
    ]
    figure = plot_throughput(data.draw(st.permutations(results)))
    panels = {axes.get_title(): axes for axes in figure.axes}
    assert panels.keys() == ({"output float32", "output uint8"} if len(outputs) == 2 else {""})
    for output, axes in zip(outputs, (panels[title] for title in sorted(panels)), strict=True):
        patches = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
        expected = {
            size: [rates[output, size, "limit"], rates[output, size, "we"], best, rates[output, size, "most"]]
            for size in sizes
            if (best := max(rates[output, size, name] for name in LOADERS["peer"]))
        }
        drawn = [patch.get_width() for patch in patches]
        groups = [drawn[start : start + 4] for start in range(0, len(drawn), 4)]
        assert sorted(groups) == sorted(expected.values())
        named = {text.get_text() for text in axes.texts if " " in text.get_text()}
        assert len(named) == len({text for text in named if text.split(" ", 1)[1] in LOADERS["peer"]})
    first = figure.axes[0]
    labels = [text.get_text() for text in first.get_yticklabels()]
    assert {label for label in labels if label.startswith("stored")} == {f"stored at {size} pixels" for size in sizes}
    assert {label for label in labels if not label.startswith("stored")} == {
        *("decoder alone, whole pictures", "we", "best other loader", "most"),
    }


def test_loaders_are_compared_without_what_was_not_measured() -> None:
    results = [result("fastflower", 100 * size, settings={"sizes": [size]}) for size in (2, 3)]
    (axes,) = plot_throughput(results).axes
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        *("stored at 2 pixels", "fastflower", "stored at 3 pixels", "fastflower"),
    ]
    assert [patch.get_width() for patch in axes.patches if isinstance(patch, Rectangle)] == [200, 300]


def test_every_role_of_a_contender_has_a_look() -> None:
    assert get_args(Role) == tuple(KINDS)


@pytest.mark.parametrize("line", ["{", "[]", '{"mode": "loader"}', json.dumps(result("ours", 900, "unheard of"))])
def test_other_files_than_results_are_named(line: str, tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text(f"{json.dumps(result('ours', 900))}\n{line}\n")
    with pytest.raises(UserError, match=r"results.jsonl: line 2 is no result of bench/throughput.py"):
        read_throughput(file)
    with pytest.raises(UserError, match="none cannot be read"):
        read_throughput(tmp_path / "none")
    file.write_text("")
    with pytest.raises(UserError, match=r"results.jsonl holds no results"):
        read_throughput(file)
