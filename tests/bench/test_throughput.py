"""The throughput benchmark from its options to its results, in each mode."""

from __future__ import annotations

import csv
import json
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from bench.contenders import loaders, networks
from bench.contenders.launches import FEED, MORE
from bench.contenders.loaders import CACHED, DECODE, LIMIT, OURS
from bench.harness.missing import MissingError
from bench.harness.timing import Contender
from bench.rates.options import LOCAL
from bench.throughput import main
from fastflower.data import reading
from fastflower.runtime.device import choose_precision
from tests.conftest import ROOT, TinyNet, fastflower, train_arguments
from tests.processes import torchrun

pytestmark = pytest.mark.usefixtures("on_a_small_cpu")
KEYS = {"mode", "name", "images_per_s", "spread", "ms_per_step", "pictures", "machine", "versions", "commit", "date"}
KEYS |= {"batch", "world_size", "peak_memory_mb", "peak_memory_of", "first_step_s", "settings"}
COMPUTED = {"macs", "flops", "flops_per_s", "mfu", "ceiling_flops_per_s"}
GEOMETRY = ["--crop", "32", "--scale", "36", "48"]
SHORT = ["--steps", "2", "--warmup", "1", "--repeats", "1"]


def rows(out: Path) -> list[dict[str, Any]]:
    """The lines of --out, checked for what each must have."""
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    for row in lines:
        if "missing" in row:
            continue
        assert row.keys() >= KEYS
        assert row["spread"][0] <= row["images_per_s"] <= row["spread"][1]
        assert row["machine"]["cores"] >= 1
        assert row["machine"]["gpu"] is None
        assert row["versions"]["torch"] == torch.__version__
        assert row["peak_memory_of"] == "process"
        if row["mode"] != "loader":
            assert row.keys() >= COMPUTED
            assert row["flops_per_s"] == pytest.approx(row["images_per_s"] * row["flops"])
            assert row["mfu"] == pytest.approx(row["flops_per_s"] / row["ceiling_flops_per_s"])
    return lines


def measure(out: Path, *arguments: object) -> list[dict[str, Any]]:
    """The rows of one run."""
    assert main([*map(str, arguments), "--out", str(out)]) == 0
    return rows(out)


def test_loader_counts_pictures_and_appends_lines(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    options = ["loader", "--data.root", small, *GEOMETRY, "--batch", 20, "--steps", 4, "--warmup", 1, "--repeats", 2]
    measure(out, *options)
    results = measure(out, *options)
    assert [row["name"] for row in results] == ["fastflower", DECODE, LIMIT] * 2
    assert {row["pictures"] for row in results} == {2 * 4 * 20}
    first, *_, limit = results
    assert first["mode"] == "loader"
    assert first["settings"]["scale"] == [36, 48]
    assert first["settings"]["root"] == ["small"]  # no paths of one machine
    assert first["share_of_limit"] == pytest.approx(results[0]["images_per_s"] / results[2]["images_per_s"])
    assert limit["share_of_limit"] == 1
    assert [row["role"] for row in results] == ["ours", "decoder", "limit"] * 2
    assert first["bottleneck"].startswith("Bottleneck: ")


def test_decoded_pictures_are_measured_beside_the_others(small: Path, tmp_path: Path) -> None:
    results = measure(
        tmp_path / "out", "loader", "--data.root", small, *GEOMETRY, "--batch", 8, *SHORT, "--cache", "ram"
    )
    assert [row["name"] for row in results] == ["fastflower", DECODE, CACHED, LIMIT]
    assert results[2]["pictures"] == results[0]["pictures"] == 16
    assert [row["role"] for row in results] == ["ours", "decoder", "decoded", "limit"]


def test_default_data_are_the_builtin_flowers(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastflower.data.dataset.ensure_builtin", lambda progress: small)
    monkeypatch.setattr("fastflower.data.dataset.builtin_root", lambda: small)
    first, *_ = measure(tmp_path / "out.jsonl", "loader", "--batch", 8, *SHORT)
    assert first["settings"]["root"] == ["small"]
    assert (first["settings"]["crop"], first["settings"]["scale"]) == (56, [64, 96])


def test_peers_stand_beside_the_loader(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loaders, "dataloader", lambda work, batch, *_: Contender(loaders.ours(work, batch).start))
    monkeypatch.setitem(sys.modules, "timm", None)
    results = measure(
        tmp_path / "out.jsonl", "loader", "--data.root", small, *GEOMETRY, "--batch", 8, *SHORT, "--peers"
    )
    assert len(results) == 7
    assert [results[place]["role"] for place in (0, 1, 2, 3, 5)] == ["ours", "decoder", "limit", "baseline", "peer"]
    assert results[-1]["missing"] == "not installed (pip install timm)"
    shown = capsys.readouterr().out
    assert f"{results[3]['images_per_s'] / results[0]['images_per_s']:.2f}" in shown
    assert "missing: DataLoader, timm's: not installed (pip install timm)" in shown
    assert results[0]["bottleneck"] in shown


def test_launches_stand_beside_the_loader_at_its_rate_at_another_and_feeding_alone(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    options = ["loader", "--data.root", small, *GEOMETRY, "--batch", 8, "--steps", 4, "--warmup", 1, "--repeats", 2]
    assert main([*map(str, options), "--launches", "--rate", "200", "--out", str(out)]) == 0
    results = [json.loads(line) for line in out.read_text().splitlines()]
    full, paced, fed = results
    assert [row["name"] for row in results] == [OURS, f"{OURS}, 200 images/s", FEED]
    assert [row["pictures"] for row in results] == [2 * 4 * 8, 2 * 4 * 8, MORE * 2 * 4 * 8]
    assert paced["spread"][1] <= 200
    assert full["spread"][0] <= full["images_per_s"] <= full["spread"][1]
    for row in results:
        assert row["launches_per_s"] > 0
        assert row["launches_alone_per_s"] == full["launches_alone_per_s"] > 0
        assert 0 < row["lock_us"] < 1e6 / row["images_per_s"]
    assert fed["lock_us"] < full["lock_us"], "which also takes what is decoded"
    shown = capsys.readouterr().out
    assert f"{full['lock_us']:.1f}" in shown
    assert not [thread for thread in threading.enumerate() if thread.name in ("launches", "loader")]
    assert reading.read_pieces is reading.read_without_lock, "what notes its time is gone"
    assert main(["--compare", str(out), str(out)]) == 0


def test_launches_are_of_one_process_at_a_rate(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["loader", "--data.root", str(small), "--launches", "--rate", "0", "--out", "None"]) == 2
    assert "--rate is 0" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny_net")
def test_model_measures_three_passes_of_each_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []

    def compile_(network: nn.Module, **_: bool) -> nn.Module:
        compiled.append(network)
        return network

    monkeypatch.setattr(torch, "compile", compile_)
    options = ["--models", "resnet18", "plain18", "--batch", 4, "--size", 32, *SHORT, "--csv", tmp_path / "out.csv"]
    results = measure(tmp_path / "out.jsonl", "model", *options)
    passes = ["forward", "forward + backward", "step"]
    names = [
        f"{net}, {how}, {what}" for net in ("resnet18", "plain18") for how in ("eager", "compiled") for what in passes
    ]
    assert [row["name"] for row in results] == names
    assert {row["pictures"] for row in results} == {2 * 4}
    assert len(compiled) == 6
    assert {row["role"] for row in results} == {"ours"}
    assert [f"{row['compiled']}, {row['part']}" for row in results[:6]] == [
        f"{how}, {what}" for how in (False, True) for what in passes
    ]
    forward, both, step = results[:3]
    assert (forward["flops"], both["flops"], step["flops"]) == tuple(k * 2 * forward["macs"] for k in (1, 3, 3))
    assert [row["name"] for row in results if "bottleneck" in row] == [name for name in names if name.endswith("step")]
    with (tmp_path / "out.csv").open(newline="") as file:
        csv_rows = list(csv.DictReader(file))
    assert [float(line["images_per_s"]) for line in csv_rows] == [row["images_per_s"] for row in results]
    assert {line["settings.size"] for line in csv_rows} == {"32"}


def test_peers_of_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = ModuleType("timm")
    vars(timm).update(is_model=lambda name: True, create_model=TinyNet)
    monkeypatch.setitem(sys.modules, "timm", timm)
    options = ["--models", "plain18", "--batch", 4, "--size", 32, "--compile", "off", *SHORT, "--peers"]
    results = measure(tmp_path / "out.jsonl", "model", *options)
    assert {row["name"]: row["missing"] for row in results if "missing" in row} == {
        f"plain18 of torchvision, eager, {what}": "has no such network"
        for what in ("forward", "forward + backward", "step")
    }
    assert [row["name"] for row in results if "of timm" in row["name"] and row["images_per_s"] > 0] == [
        f"plain18 of timm, eager, {what}" for what in ("forward", "forward + backward", "step")
    ]
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingError, match="not installed"):
        networks.timms("resnet18")
    assert isinstance(networks.torchvisions("resnet18"), nn.Module)


def test_only_steps_change_the_weights() -> None:
    precision = choose_precision(False, "auto", torch.device("cpu"))
    work = networks.Work(
        2, torch.device("cpu"), precision, lambda network: torch.optim.SGD(network.parameters(), lr=0.1)
    )
    for what, trained in (("forward", False), ("forward + backward", False), ("step", True)):
        linear = nn.Linear(12, networks.CLASSES)
        network, before = nn.Sequential(nn.Flatten(), linear), linear.weight.detach().clone()
        contender = networks.one_pass(work, "ours", lambda network=network: network, what, False, 4)  # type: ignore[arg-type,misc]
        assert [len(images) for images in contender.start(3)] == [4, 4, 4]
        assert torch.equal(before, linear.weight) is not trained
        assert (linear.weight.grad is None) is (what == "forward")


@pytest.mark.usefixtures("tiny_net")
def test_train_and_eval_run_the_products_loops(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    options = ["--data.root", small, *GEOMETRY, "--models", "resnet18", "--batch", 16, *SHORT, "--dtype", "bf16"]
    measure(out, "train", *options)
    trained, evaluated = measure(out, "eval", *options, "--val_resize", 36)
    assert [trained["mode"], evaluated["mode"]] == ["train", "eval"]
    assert trained["name"] == evaluated["name"] == "resnet18, eager"
    assert trained["pictures"] == 2 * 16
    assert trained["flops"] == 3 * evaluated["flops"] == 3 * 2 * evaluated["macs"]
    for row in (trained, evaluated):
        assert 0 <= row["data_wait"] <= 1
        assert row["bottleneck"].startswith("Bottleneck: ")
        assert row["settings"]["dtype"] == "bf16"
    # passes of 20 records: batches of 16, 4, 16, ...; how many steps lie ahead decides where the clock starts
    assert evaluated["pictures"] == 20


@pytest.mark.usefixtures("tiny_net")
def test_settings_and_accuracy_come_from_a_run(small: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out.jsonl"
    assert fastflower(*train_arguments(small, run), "--train.epochs", 2).code == 0
    best = max(json.loads(line)["val_accuracy"] for line in (run / "metrics.jsonl").read_text().splitlines())
    options = ["--run", run, "--batch", 8, *SHORT]
    measure(out, "train", *options)
    measure(out, "eval", *options)
    trained, evaluated, *passes = measure(out, "model", *options, "--compile", "off")
    for row in (trained, evaluated, *passes):
        assert row["val_accuracy"] == best
        assert row["settings"]["models"] == ["resnet18"]
        assert row["settings"]["dtype"] == "fp32"
    assert trained["settings"]["crop"] == evaluated["settings"]["crop"] == passes[0]["settings"]["size"] == 32
    assert evaluated["settings"]["val_resize"] == 36


@pytest.mark.usefixtures("tiny_net")
@pytest.mark.parametrize("cache", ["off", "ram"])
def test_a_starving_loop_is_told_from_what_the_loader_does_alone(
    cache: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.rates.bottleneck.is_loader", lambda row: True)
    options = ["--data.root", small, *GEOMETRY, "--models", "resnet18", "--batch", 16, *SHORT, "--cache", cache]
    (row,) = measure(tmp_path / "out.jsonl", "train", *options)
    assert "ms a picture" in row["bottleneck"]
    assert row["settings"]["cache"] == cache
    if cache == "ram":  # nothing is left to decode
        assert row["bottleneck"].startswith("Bottleneck: augmentation")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["loader", "model", "train"])
def test_processes_are_summed(mode: str, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    options: list[object] = [mode, "--batch", 4, "--steps", 2, "--warmup", 1, "--repeats", 1, "--out", out]
    options += ["--size", 48] if mode == "model" else ["--data.root", small, "--size", 40, "--scale", 40, 48]
    options += ["--models", "resnet18", "--compile", "off"] if mode != "loader" else []
    result = torchrun(ROOT / "bench" / "throughput.py", *options, limit_s=200, environment={"CUDA_VISIBLE_DEVICES": ""})
    assert result.returncode == 0, result.stderr
    lines = rows(out)
    assert len(lines) == {"loader": 3, "model": 3, "train": 1}[mode]  # written once
    for row in lines:
        assert row["world_size"] == 2
        assert row["pictures"] == 2 * 2 * 4
        assert row["images_per_s"] * row["ms_per_step"] / 1000 == pytest.approx(2 * 4)


@pytest.mark.slow
def test_peers_in_worker_processes(small: Path, tmp_path: Path) -> None:
    options = ["loader", "--data.root", small, *GEOMETRY, "--batch", 8, *SHORT, "--peers", "--output", "uint8"]
    results = measure(tmp_path / "out.jsonl", *options)
    assert {row["pictures"] for row in results if "missing" not in row} == {2 * 8}


@pytest.mark.slow
def test_compiled_first_step_is_not_in_the_figure(tmp_path: Path) -> None:
    options = ["--compile", "on", "--batch", 4, "--size", 32, "--steps", 3, "--warmup", 1, "--repeats", 1]
    _, both, step = measure(tmp_path / "out.jsonl", "model", *options)
    assert both["first_step_s"] * 1000 > 5 * both["ms_per_step"]
    assert step["first_step_s"] < both["first_step_s"]  # the same code, which is compiled already


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--steps 5 --warmup 5", "--warmup 5 is not below --steps 5"),
        ("--warmup 0", "--warmup is 0"),
        ("--threads 0", "--threads is 0"),
        ("--batch 49", "48 training records, fewer than --batch 49"),
        ("--crop 64 --scale 48 80", "data.scale starts at 48 pixels, below data.crop (64)"),
        ("--sizes 41", "has no size 41"),
        ("--batch 8 --steps 2 --warmup 1 --repeats 1 --out .", "--out . cannot be written"),
        ("--batch 8 --steps 2 --warmup 1 --repeats 1 --out None --csv .", "--csv . cannot be written"),
    ],
)
def test_mistakes_end_with_a_sentence(
    small: Path, options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["loader", "--data.root", str(small), *GEOMETRY, *options.split()]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("model --models resnet18 resnet19", "model.name is resnet19: it takes plain18"),
        ("model --models resnet18 vgg16 --size 16", "vgg16"),
        ("train --run {root}/none", "none/config.yaml cannot be read"),
        ("train --data.root {root}/small --crop 32 --scale 36 48 --batch 49", "the training split has 48 records"),
        ("eval --data.root {root}/small --crop 32 --scale 36 48 --batch 21", "the validation split has 20 records"),
    ],
)
@pytest.mark.usefixtures("tiny_net")
def test_mistakes_of_the_other_modes(
    arguments: str, message: str, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments.format(root=small.parent).split()) == 2
    assert message in capsys.readouterr().err


def test_results_go_where_git_does_not_look() -> None:
    name = LOCAL.relative_to(ROOT).as_posix()
    assert name.startswith("bench/results/")
    assert name in (ROOT / ".gitignore").read_text().splitlines()
