"""The throughput benchmark: what it counts, what it leaves out, and that the contenders do the same work."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench import throughput
from bench.throughput import Contender, LoaderCommand, ModelCommand, main, time_steps

CPU = torch.device("cpu")
KEYS = {"mode", "name", "images_per_s", "spread", "ms_per_step", "pictures", "machine", "versions", "commit", "date"}


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny pictures; more threads wait for each other on a busy machine
    yield
    torch.set_num_threads(threads)


def rows(out: Path) -> list[dict]:
    """The lines of --out, checked for what each must have."""
    found = [json.loads(line) for line in out.read_text().splitlines()]
    for row in found:
        assert row.keys() >= KEYS
        assert row["spread"][0] <= row["images_per_s"] <= row["spread"][1]
        assert row["machine"]["cores"] >= 1
        assert row["versions"]["torch"] == torch.__version__
    return found


def test_only_the_steps_between_warmup_and_work_ahead_are_timed() -> None:
    done: list[int] = []

    def start(steps: int) -> Iterator[torch.Tensor]:
        for step in range(steps):
            time.sleep(0.2 if step == 0 else 0.1 if step < 4 or step >= 10 else 0.01)  # slow outside 4..9
            done.append(step)
            yield torch.zeros(3 + step, 3, 1, 1)

    timing = time_steps(Contender("stub", start, ahead=4), warmup=2, steps=6, device=CPU)
    assert done == list(range(4 + 6 + 4))  # warm-up grows to the work ahead, and that is waited for at the end
    assert timing.pictures == sum(3 + step for step in range(4, 10))  # counted, not batch x steps
    assert timing.first_s >= 0.2
    assert 0.06 <= timing.seconds < 0.1 + 0.06  # one slow step more would pass it


def test_loader_counts_pictures_and_appends_a_line(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    options = "--crop 32 --scale 36 48 --batch 20 --steps 4 --warmup 1 --repeats 2"
    for _ in range(2):
        assert main(["loader", "--data.root", str(small), "--out", str(out), *options.split()]) == 0
    first, second = rows(out)
    assert first["mode"] == "loader"
    assert first["pictures"] == second["pictures"] == 2 * 4 * 20
    assert first["settings"]["scale"] == [36, 48]
    assert first["settings"]["root"] == ["small"]  # no paths of one machine
    assert first["machine"]["gpu"] is None


def test_default_data_are_the_builtin_flowers(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "ensure_builtin", lambda: small)
    (ours,) = throughput.loader_contenders(throughput.with_defaults(LoaderCommand(batch=8)), CPU)
    assert [images.shape for images in ours.start(2)] == [(8, 3, 56, 56)] * 2


def test_peer_hands_over_the_same_pictures(small: Path) -> None:
    # shorter side = crop, and the pictures are square: nothing is random but the flip
    command = LoaderCommand(root=(small,), crop=36, scale=(36, 36), batch=20, peers=True)
    ours, peer = throughput.loader_contenders(command, CPU)
    for _ in range(2):  # the workers serve a second repeat
        batches = list(zip(ours.start(5), peer.start(5), strict=True))
        assert len(batches) == 5  # over the end of two epochs of 48 // 20 batches
        for a, b in batches:
            assert a.shape == b.shape == (20, 3, 36, 36)
            assert a.dtype == b.dtype == torch.float32
            straight, flipped = ((a - view).abs().amax(dim=(1, 2, 3)) for view in (b, b.flip(3)))
            # the resizers round apart by at most two levels of 255: 2 / 255 / 0.224 = 0.0350 after normalization
            assert torch.minimum(straight, flipped).max() < 0.0351
            assert (straight - flipped).abs().min() > 0.1  # so the flip was told apart


def test_loader_with_peers_reports_both(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    options = "--crop 32 --scale 36 48 --batch 8 --steps 3 --warmup 1 --repeats 1 --peers"
    assert main(["loader", "--data.root", str(small), "--out", str(out), *options.split()]) == 0
    ours, peer = rows(out)
    assert ours["pictures"] == peer["pictures"] == 3 * 8
    table = capsys.readouterr().out
    assert f"{peer['images_per_s'] / ours['images_per_s']:.2f}" in table
    assert "1.00" in table


def test_model_trains_every_contender(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[torch.nn.Module] = []

    def compile_(network: torch.nn.Module, **_: bool) -> torch.nn.Module:
        compiled.append(network)
        return network

    monkeypatch.setattr(torch, "compile", compile_)
    out = tmp_path / "out.jsonl"
    options = "--models resnet18 plain18 --batch 4 --size 32 --steps 2 --warmup 1 --repeats 1 --peers"
    assert main(["model", "--out", str(out), *options.split()]) == 0
    found = rows(out)
    names = ["resnet18, eager", "resnet18, compiled", "resnet18, torchvision", "plain18, eager", "plain18, compiled"]
    assert [row["name"] for row in found] == names
    assert {row["pictures"] for row in found} == {2 * 4}
    assert len(compiled) == 2


@pytest.mark.parametrize(("given", "wanted"), [({"eager": True}, ["eager"]), ({"compile": True}, ["compiled"])])
def test_one_of_eager_and_compile(given: dict[str, bool], wanted: list[str]) -> None:
    found = throughput.model_contenders(ModelCommand(batch=4, size=32, **given), CPU)  # type: ignore[arg-type]
    assert [contender.name.split(", ")[1] for contender in found] == wanted


def test_steps_change_the_weights() -> None:
    linear = torch.nn.Linear(12, throughput.CLASSES)
    network = torch.nn.Sequential(torch.nn.Flatten(), linear)
    before = linear.weight.clone()
    contender = throughput.training("tiny", network, torch.ones(4, 3, 2, 2), torch.zeros(4, dtype=torch.int64))
    assert [len(images) for images in contender.start(3)] == [4, 4, 4]
    assert not torch.equal(before, linear.weight)


@pytest.mark.slow
def test_compiled_first_step_is_not_in_the_figure(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    options = "--compile --batch 4 --size 32 --steps 3 --warmup 1 --repeats 1"
    assert main(["model", "--out", str(out), *options.split()]) == 0
    (row,) = rows(out)
    assert row["first_step_s"] * 1000 > 5 * row["ms_per_step"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--steps 5 --warmup 5", "--warmup 5 is not below --steps 5"),
        ("--warmup 0", "--warmup is 0"),
        ("--batch 49", "48 training records, fewer than --batch 49"),
        ("--crop 64 --scale 48 80", "data.scale starts at 48 pixels, below data.crop (64)"),
        ("--sizes 41", "has no size 41"),
        ("--batch 8 --steps 2 --warmup 1 --repeats 1 --out .", "--out . cannot be written"),
    ],
)
def test_mistakes_end_with_a_sentence(
    small: Path, options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["loader", "--data.root", str(small), "--crop", "32", "--scale", "36", "48", *options.split()]) == 2
    assert message in capsys.readouterr().err


def test_peers_without_torchvision(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert main(["loader", "--data.root", str(small), "--batch", "8", "--peers"]) == 2
    assert "--peers needs torchvision: pip install" in capsys.readouterr().err
