"""The kernels' benchmark: what it measures and counts, that it notices wrong results, and what it writes and draws."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from bench import kernels
from bench.batch_norm import measure as layer_timing
from bench.batch_norm import peers, report
from bench.batch_norm.layers import DTYPES, Layer, Problem, find_layers
from bench.harness import compute
from bench.kernels import main
from fastflower.kernels import triton_bn  # before the interpreter's variable is taken away below
from fastflower.kernels.batch_norm import bn_relu
from fastflower.models import create_model

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
KINDS = ("bn_relu", "bn_add_relu", "fork", "dual", "dual_fork")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No GPU, no interpreter, no compiler, a cache that a few copies fill, one thread."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for module in (kernels, compute):
        monkeypatch.setattr(module, "cache_bytes", lambda device: 2**16)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def a_layer(kind: str, shape: tuple[int, int, int, int] = (3, 24, 5, 4)) -> Layer:
    return Layer(kind, shape)  # type: ignore[arg-type]


def norms(layers: Counter[Layer]) -> int:
    return sum(n * (2 if layer.dual else 1) for layer, n in layers.items())


@pytest.mark.parametrize("model", ["resnet18", "resnet34", "resnet50", "resnet152", "plain34"])
def test_every_norm_of_a_network_is_in_one_layer(model: str) -> None:
    layers = find_layers(model, 2, 64)
    modules = [m for m in create_model(model, 10).modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms(layers) == len(modules)
    channels: Counter[int] = Counter()
    for layer, n in layers.items():
        channels[layer.shape[1]] += n * (2 if layer.dual else 1)
    assert channels == Counter(module.num_features for module in modules)


def test_kinds_and_shapes_of_resnet50() -> None:
    layers = find_layers("resnet50", 8, 224)
    kinds: Counter[str] = Counter()
    for layer, n in layers.items():
        kinds[layer.kind] += n
    # 16 blocks: 4 begin with a projection, the others have none, and the very last output is used once
    assert kinds == {"bn_relu": 33, "dual_fork": 4, "fork": 11, "bn_add_relu": 1}
    assert layers[a_layer("bn_relu", (8, 64, 112, 112))] == 1
    assert layers[a_layer("fork", (8, 1024, 14, 14))] == 5
    assert layers[a_layer("bn_add_relu", (8, 2048, 7, 7))] == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_that_the_kernels_are_handed(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kernel goes once over each activation and mask that it gets; the rest is small."""
    problem = Problem(a_layer(kind), dtype, CPU)
    data = problem.data()
    m, channels = 3 * 5 * 4, 24
    moved = [0]

    class Counting:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return self.launch

        def launch(self, *arguments: object, **_: object) -> None:
            tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
            moved[-1] += sum(t.nbytes for t in tensors if t.numel() in (m * channels, m * channels // 8))

    for name in ("partial_moments", "normalize_relu", "reduce_gradient", "input_gradient"):
        monkeypatch.setattr(triton_bn, name, Counting())
    for name in ("finish_statistics", "finish_gradient"):
        monkeypatch.setattr(triton_bn, name, Counting())
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # takes the launchers
    outputs = peers.ours(problem, data)(data)
    moved.append(0)
    problem.backward(data, outputs)
    assert tuple(moved) == problem.layer.bytes_moved(dtype)


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The results file of a small run, and what it printed."""
    folder = tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setattr(torch, "compile", lambda function, **_: function)
        for module in (kernels, compute):
            patch.setattr(module, "cache_bytes", lambda device: 2**16)
        out, text = folder / "kernels.jsonl", folder / "table.txt"
        with text.open("w") as file:
            patch.setattr("rich.console.Console", lambda **_: Console(file=file, width=90))
            options = ["--models", "resnet18", "plain18", "--dtypes", "fp32", "bf16", "--repeats", "2"]
            assert main([*options, "--out", str(out), "--plot", str(folder / "kernels.png")]) == 0
    return out, text.read_text()


def test_rows_of_a_run(results: tuple[Path, str]) -> None:
    rows = rows_of(results[0])
    layers = {model: find_layers(model, 2, 64) for model in ("resnet18", "plain18")}
    names = ["eager", "compile", "ours", "cudnn", "apex groupbn"]
    layer_counts: dict[tuple[str, str], Counter[Layer]] = {}
    for row in rows:
        layer = Layer(row["kind"], tuple(row["shape"]))
        for model, number in row["layers"].items():
            if row["contender"] == "ours":
                layer_counts.setdefault((model, row["dtype"]), Counter())[layer] += number
        assert row["date"] == rows[0]["date"]
        assert row["machine"]["gpu"] is None
        assert row["versions"]["torch"] == torch.__version__
        assert row["settings"]["batch"] == 2
        assert "commit" in row
        if row["contender"] in ("cudnn", "apex groupbn"):
            assert row["missing"] == "runs on CUDA only"
            continue
        moved = layer.bytes_moved(DTYPES[row["dtype"]])
        for direction, bytes_ in zip(("forward", "backward"), moved, strict=True):
            timing = row[direction]
            assert 0 < timing["p20"] <= timing["ms"] <= timing["p80"]
            assert timing["bytes"] == bytes_
            assert timing["gb_per_s"] == pytest.approx(bytes_ / timing["ms"] / 1e6)
            assert timing["share"] == pytest.approx(timing["gb_per_s"] / row["copy_gb_per_s"])
        assert all(0 <= error < 0.2 for error in row["errors"].values())
        inputs = np.prod(layer.shape) * DTYPES[row["dtype"]].itemsize * (1 + layer.added + 1 + layer.fork)
        assert 2 <= row["copies"] <= layer_timing.MAX_COPIES
        assert row["copies"] in (2, layer_timing.MAX_COPIES) or row["copies"] * inputs >= 3 * 2**16
    assert [row["contender"] for row in rows] == names * (len(rows) // 5)
    for (model, _), counted in layer_counts.items():
        assert counted == layers[model]
    assert len(layer_counts) == 4


def test_tables_of_a_run(results: tuple[Path, str]) -> None:
    out, text = results
    rows = [row for row in rows_of(out) if row["dtype"] == "bf16"]
    sums = report.network_sums(rows)
    assert sums.keys() == {"resnet18", "plain18"}
    assert sums["plain18"].keys() == {"eager", "compile", "ours"}
    by_hand = sum(
        row["layers"]["plain18"] * (row["forward"]["ms"] + row["backward"]["ms"])
        for row in rows
        if row["contender"] == "ours" and "plain18" in row["layers"]
    )
    assert sums["plain18"]["ours"] == pytest.approx(by_hand)
    assert f"{by_hand:.2f}" in text
    assert f"{by_hand / sums['plain18']['compile']:.2f}" in text
    assert "20 norms" in text  # resnet18
    assert "17 norms" in text  # plain18
    assert "2/4 bn_relu 2x64x16x16" in text
    assert "No activation above 40 MB was measured" in text
    assert text.count("missing: cudnn, fp32, bf16: runs on CUDA only") == 1


def goal_row(shape: tuple[int, ...], forward: float, backward: float, contender: str = "ours") -> dict[str, Any]:
    shares = {"forward": {"share": forward}, "backward": {"share": backward}}
    return {"contender": contender, "shape": list(shape), "dtype": "bf16", **shares}


@pytest.mark.parametrize(
    ("elements", "forward", "backward", "reached"),
    [
        (20_000_001, 0.85, 0.9, True),
        (20_000_001, 0.849, 0.9, False),
        (20_000_001, 0.9, 0.8, False),
        (20_000_000, 0.1, 0.1, None),
    ],
)
def test_the_goal_is_of_both_directions_and_of_large_activations(
    elements: int, forward: float, backward: float, reached: bool | None
) -> None:
    row = goal_row((elements, 1, 1, 1), forward, backward)
    assert layer_timing.reaches_goal(row) is reached
    assert layer_timing.reaches_goal(row | {"missing": "why"}) is None


def test_the_verdict_counts_ours() -> None:
    large = (256, 256, 56, 56)
    rows = [goal_row(large, 0.9, 0.9), goal_row(large, 0.5, 0.9), goal_row(large, 0.9, 0.9, "compile")]
    rows += [goal_row((1, 1, 1, 1), 0.9, 0.9)]
    assert layer_timing.verdict(rows) == "ours: 1 of 2 layers above 40 MB reach the goal of 85% of a copy."
    assert layer_timing.verdict(rows[3:]).startswith("No activation above 40 MB was measured")


def test_a_contender_that_failed_somewhere_has_no_sum() -> None:
    def row(contender: str, number: int, ms: float | None) -> dict[str, Any]:
        times = {"missing": "failed"} if ms is None else {"forward": {"ms": ms}, "backward": {"ms": 2 * ms}}
        return {"contender": contender, "layers": {"net": number}, "kind": "bn_relu", **times}

    rows = [row("a", 2, 1.0), row("b", 2, 1.0), row("a", 3, 10.0), row("b", 3, None)]
    assert report.network_sums(rows) == {"net": {"a": 2 * 3 + 3 * 30}}


def test_picture_is_gray_and_can_be_drawn_again(results: tuple[Path, str], tmp_path: Path) -> None:
    out, _ = results
    again = tmp_path / "again.png"
    assert main(["--from", str(out), "--plot", str(again)]) == 0
    pixels = np.asarray(Image.open(again).convert("RGB")).astype(int)
    assert np.array_equal(pixels, np.asarray(Image.open(out.with_suffix(".png")).convert("RGB")))
    assert pixels.shape[0] > 800  # two types
    assert np.ptp(pixels, axis=2).max() == 0
    assert len(np.unique(pixels)) > 20
    svg = tmp_path / "again.svg"
    assert main(["--from", str(out), "--plot", str(svg)]) == 0
    assert svg.read_text().count("<use ") > 4 * 2 * 12  # the points
    assert "GB/s" in svg.read_text()


def test_from_takes_the_last_run(results: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(results[0])
    last = copy.deepcopy([row for row in rows if row["dtype"] == "fp32"])
    for row in last:
        row["date"] = "2100-01-01T00:00:00+00:00"
    file = tmp_path / "both.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows + last))
    assert report.last_run(file) == last
    assert main(["--from", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "fp32: resnet18, plain18" in shown
    assert "bf16" not in shown


def run_tiny(*options: str) -> int:
    return main(["--layers", "2", "--repeats", "1", *options])


@pytest.mark.parametrize("wrong", ["dx", "y", "nan"])
def test_a_wrong_result_ends_with_code_1(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(x: Tensor, *arguments: Any, **options: Any) -> Any:
        if wrong == "dx" and x.requires_grad:
            x = x * 1.0
            x.register_hook(lambda gradient: gradient * 1.001)
        output = bn_relu(x, *arguments, **options)
        if wrong == "dx":
            return output
        factor = 1.001 if wrong == "y" else torch.nan
        return tuple(factor * y for y in output) if isinstance(output, tuple) else factor * output

    monkeypatch.setattr(peers, "bn_relu", broken)
    out = tmp_path / "out.jsonl"
    assert run_tiny("--out", str(out)) == 1
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence.startswith(f"error: {'y' if wrong == 'nan' else wrong} of ours has a relative error of ")
    assert "at bn_relu [2, 64, 32, 32] torch.float32" in sentence
    assert len(rows_of(out)) == 2 * 5  # what was measured is kept


def test_contenders_that_fail_are_listed_and_ours_are_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("no such thing\nand more")

    monkeypatch.setattr(torch, "compile", fail)
    out = tmp_path / "out.jsonl"
    assert run_tiny("--out", str(out)) == 0
    reasons = {row["contender"]: row.get("missing") for row in rows_of(out)}
    assert reasons["compile"] == "failed: ValueError: no such thing"
    assert reasons["ours"] is None
    monkeypatch.setattr(peers, "bn_relu", fail)
    with pytest.raises(ValueError, match="no such thing"):
        run_tiny()


@pytest.mark.parametrize(("fits", "copies"), [(12, 12), (5, 3), (1, 1), (0, None)])
def test_fewer_copies_where_memory_is_short(
    fits: int, copies: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    enough = layer_timing.time_in_turns

    def short(problem: Problem, ready: Any, pool: Any, repeats: int) -> Any:
        if len(pool) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return enough(problem, ready, pool, repeats)

    monkeypatch.setattr(layer_timing, "time_in_turns", short)
    monkeypatch.setattr(kernels, "cache_bytes", lambda device: 2**22)  # 12 copies of the largest layer's x and dy
    out = tmp_path / "out.jsonl"
    code = main(["--layers", "1", "--repeats", "1", "--out", str(out)])
    if copies is None:
        assert code == 2
        assert "bn_relu [2, 64, 32, 32] does not fit the GPU's memory: lower --batch" in capsys.readouterr().err
    else:
        assert code == 0
        assert rows_of(out)[0]["copies"] == copies


def test_contenders_take_turns_and_each_graph_is_used_once() -> None:
    problem = Problem(a_layer("bn_relu"), torch.float32, CPU)
    pool = [problem.data() for _ in range(3)]
    calls: list[tuple[str, int]] = []

    def contender(name: str) -> tuple[peers.Contender, Any]:
        ours = peers.ours(problem, pool[0])

        def forward(data: Any) -> Any:
            calls.append((name, [data is one for one in pool].index(True)))
            return ours(data)

        return peers.Contender(name, peers.ours), forward

    times = layer_timing.time_in_turns(problem, dict([contender("a"), contender("b")]), pool, repeats=4)
    assert calls == [(name, copy) for _ in range(2 + 4) for name in "ab" for copy in range(3)]
    assert [len(seconds) for seconds in times.values()] == [4, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--models resnet51", "'resnet51', which is unknown"),
        ("--batch 0", "--batch is 0: give at least 1"),
        ("--layers 0", "--layers is 0"),
        ("--repeats 0", "--repeats is 0"),
        ("--batch 1 --size 32", "raise --batch or --size"),
        ("--tiles 32x64x4", "--tiles needs a GPU"),
        ("--plot picture.jpg", "--plot picture.jpg does not end in one of .png, .svg, .pdf"),
        ("--out .", "--out . cannot be written"),
        ("--from nothing.jsonl", "--from nothing.jsonl cannot be read"),
        ("--from nothing.jsonl --out out.jsonl", "leave --out out"),
    ],
)
def test_mistakes_end_with_a_sentence(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options.split()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "no json\n", '{"mode": "loader", "date": "2026"}\n', "3\n"])
def test_files_that_hold_no_results(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text(content)
    assert main(["--from", str(file)]) == 2
    assert "name a results file" in capsys.readouterr().err


def test_plot_without_matplotlib_and_to_a_bad_place(
    results: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--from", str(results[0]), "--plot", "/nowhere/picture.png"]) == 2
    assert "--plot /nowhere/picture.png cannot be written" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["--plot", "picture.png"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def script(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "bench" / "kernels.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", timeout=280, check=False)


def test_runs_as_a_script_from_anywhere(results: tuple[Path, str], tmp_path: Path) -> None:
    done = script("--from", str(results[0]), "--plot", str(tmp_path / "plot.pdf"))
    assert done.returncode == 0, done.stderr
    assert "bf16: whole networks" in done.stdout
    assert (tmp_path / "plot.pdf").stat().st_size > 5000


@pytest.mark.slow
def test_compiled_for_real(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    done = script("--layers", "2", "--repeats", "1", "--dtypes", "fp32", "bf16", "--out", str(out))
    assert done.returncode == 0, done.stderr
    rows = [row for row in rows_of(out) if row["contender"] == "compile"]
    assert {row["kind"] for row in rows} == {"bn_relu", "fork"}
    for row in rows:
        assert max(row["errors"].values()) < (1e-4 if row["dtype"] == "fp32" else 0.2)
