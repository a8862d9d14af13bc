"""Two processes on this machine, over gloo."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch._inductor import config as inductor

from fastflower import machine
from fastflower.data.sources.tfrecord import write_tfrecord
from fastflower.errors import UserError
from fastflower.runtime.checkpoint import load_checkpoint
from fastflower.runtime.distributed import Ranks, _limit_threads, processes
from tests.conftest import ROOT, TinyNet, example, fastflower, train_arguments, write_dataset
from tests.processes import in_ranks, torchrun
from tests.training import tiny_worker
from tests.training.test_choices import EVERYTHING
from tests.training.test_left_out import checked, spoil
from tests.training.test_run import assert_same_run, rows

LIMIT_S = 150


def train_by_torchrun(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    worker = Path(__file__).with_name("tiny_worker.py")
    return torchrun(worker, *arguments, limit_s=LIMIT_S, environment=environment)


def trained_in_ranks(*arguments: object, **environment: str) -> str:
    """What two processes print that train to the end."""
    result = in_ranks(tiny_worker.main, *arguments, **environment)
    assert result.code == 0, result.err
    assert "Grad strides" not in result.err
    return result.out


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    """21 validation records, which two ranks cannot share evenly, of so many classes that top-5 does not find all."""
    return write_dataset(tmp_path / "data", {"train": 48, "val": 21}, classes=8)


def test_two_ranks_train_as_one_run_stop_together_and_go_on(uneven: Path, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    options = ("--train.epochs", "2", "--train.schedule", "plateau", "--train.patience", "0", "--train.lr", "0.3")
    shown = trained_in_ranks(*train_arguments(uneven, whole), *options)
    assert "2 processes" in shown
    assert [row["step"] for row in rows(whole)] == [6, 12]
    assert shown.count("epoch") <= 4, "only one rank speaks"

    # every rank ends with the same weights, statistics and learning rate
    ends = [json.loads((whole / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert ends[0] == ends[1]

    # the logged figures are those of every record once: one process finds the same
    best = min(rows(whole), key=lambda row: row["val_loss"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastflower.training.network.create_model", TinyNet)
        metrics = json.loads(fastflower("eval", whole, "--json").out)
    assert metrics["n"] == 21
    for key in ("loss", "accuracy", "top5", "macro_f1"):
        assert metrics[key] == pytest.approx(best[f"val_{key}"], abs=1e-5)

    # a signal to one rank stops both at the same step
    result = train_by_torchrun(*train_arguments(uneven, stopped), *options, TINY_SIGNAL="1:8:10")
    assert "Stopped by SIGUSR1 and saved" in result.stdout
    assert f"exitcode  : {128 + 10}" in result.stderr
    assert load_checkpoint(stopped / "checkpoints/last.pt")["step"] == 10  # on the next one all had agreed before
    trained_in_ranks("train", "--resume", stopped)
    assert_same_run(whole, stopped)

    # and one process can go on from two
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastflower.training.network.create_model", TinyNet)
        assert fastflower("train", "--resume", whole, "--train.epochs", "3").code == 0
    assert len(rows(whole)) == 3


def test_two_ranks_with_common_statistics_train_as_one_process_does(uneven: Path, tmp_path: Path) -> None:
    alone, both = tmp_path / "alone", tmp_path / "both"
    options = ("--train.epochs", "2", "--model.sync_norm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastflower.training.network.create_model", TinyNet)
        patch.delenv("TRITON_INTERPRET", raising=False)
        assert fastflower(*train_arguments(uneven, alone), *options).code == 0
    trained_in_ranks(*train_arguments(uneven, both), *options, TRITON_INTERPRET="0")
    saved = [load_checkpoint(run / "checkpoints/last.pt")["model"] for run in (alone, both)]
    for name, tensor in saved[0].items():
        torch.testing.assert_close(saved[1][name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    for a, b in zip(rows(alone), rows(both), strict=True):
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-3)


@pytest.mark.parametrize("choice", ["off", pytest.param("on", marks=pytest.mark.slow)])
def test_ranks_stay_alike_with_every_choice_on_and_go_on_after_a_signal(
    uneven: Path, tmp_path: Path, choice: str
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    options = (*EVERYTHING, "--train.epochs", "2", "--train.compile", choice)
    trained_in_ranks(*train_arguments(uneven, whole), *options)
    ends = [json.loads((whole / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert ends[0] == ends[1]
    result = in_ranks(tiny_worker.main, *train_arguments(uneven, stopped), *options, TINY_SIGNAL="0:7")  # just unfrozen
    assert result.code == 128 + signal.SIGTERM
    assert "Stopped by SIGTERM and saved" in result.out
    trained_in_ranks("train", "--resume", stopped)
    assert_same_run(whole, stopped)


def test_statistics_that_travel_before_each_step_change_nothing(uneven: Path, tmp_path: Path) -> None:
    """Those of the main rank count, and it has them."""
    options = (*EVERYTHING, "--train.epochs", "2")
    for name, environment in (("seldom", {}), ("always", {"TINY_BROADCAST": "1"})):
        trained_in_ranks(*train_arguments(uneven, tmp_path / name), *options, **environment)
        ends = [json.loads((tmp_path / name / f"rank{rank}.json").read_text()) for rank in range(2)]
        assert [end["broadcast"] for end in ends] == [2 * len(environment)] * 2, "frozen and let go"
    assert_same_run(tmp_path / "seldom", tmp_path / "always")
    averages = [load_checkpoint(tmp_path / name / "checkpoints/last.pt")["ema"] or {} for name in ("seldom", "always")]
    assert averages[0].keys() == averages[1].keys() != set()
    assert all(torch.equal(tensor, averages[1][name]) for name, tensor in averages[0].items())


def cut_tiff() -> bytes:
    """A picture with a sound header, of which only the decoder can tell that it is no whole one."""
    buffer = BytesIO()
    Image.new("RGB", (40, 40)).save(buffer, "TIFF")
    return buffer.getvalue()[:2000]


def test_a_bad_record_on_one_rank_stops_all(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "data", {"train": 48, "val": 4})
    records = [example(i, 0) for i in range(4)]
    records[1]["image"] = cut_tiff()  # record 1 of the split is rank 1's
    write_tfrecord(root / "tfrecords-jpeg-40x40/val/00-40x40-4.tfrec", records)
    result = train_by_torchrun(*train_arguments(root, tmp_path / "run"), "--train.epochs", "1")
    assert result.returncode != 0
    assert result.stderr.count("record 1 (id 000001) cannot be decoded") == 1
    assert "exitcode  : 2" in result.stderr


def test_a_validation_record_that_fails_on_one_rank_leaves_the_epoch_saved_for_all(tmp_path: Path) -> None:
    root = spoil(write_dataset(tmp_path / "data", {"train": 48, "val": 1}), "val", 9, 3)
    run = tmp_path / "run"
    result = in_ranks(tiny_worker.main, *train_arguments(root, run), "--train.epochs", "1")
    assert result.code == 2
    assert result.err.count("Epoch 1 is saved up to step 6") == 1
    trained_in_ranks("train", "--resume", run, "--data.skip", checked(root, tmp_path / "bad.json"))
    assert [row["step"] for row in rows(run)] == [6]


def test_a_run_goes_from_one_process_to_two_and_back_in_mid_epoch(uneven: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastflower.training.network.create_model", TinyNet)
        options = ("--train.epochs", "2", "--train.schedule", "cosine", "--train.max_steps", "3")
        assert fastflower(*train_arguments(uneven, run), *options).code == 0
    trained_in_ranks("train", "--resume", run, "--train.batch_size", "12", "--train.max_steps", "6")
    last = load_checkpoint(run / "checkpoints/last.pt")
    assert (last["step"], last["position"]) == (6, 12)  # 3 of 8, 2 of 12; one of 12
    assert [pictures for _, _, pictures in last["sums"]] == [6, 6]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastflower.training.network.create_model", TinyNet)
        assert fastflower("train", "--resume", run, "--train.max_steps", "None").code == 0
    assert [row["step"] for row in rows(run)] == [5, 9]
    for row in rows(run):
        hits = row["train_accuracy"] * 48  # of all pictures, whoever trained them
        assert hits == pytest.approx(round(hits), abs=1e-9)


def test_a_rank_that_dies_does_not_leave_the_other_waiting(uneven: Path, tmp_path: Path) -> None:
    result = train_by_torchrun(*train_arguments(uneven, tmp_path / "run"), "--train.epochs", "1", TINY_CRASH="1:2")
    assert result.returncode != 0
    assert "crash for the test" in result.stderr


ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}


def test_a_port_that_is_taken_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in (ALONE | {"MASTER_PORT": port}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"localhost:{port} .*address"), processes(torch.device("cpu")):
            pass


def test_a_signal_ends_a_process_that_waits_for_others() -> None:
    program = """
import torch
from fastflower.runtime.distributed import processes
from fastflower.runtime.signals import handling, interrupt
with handling(interrupt):
    print("waiting", flush=True)
    with processes(torch.device("cpu")):
        print("met", flush=True)
"""
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | ALONE | {"PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "MASTER_PORT": port}
    with subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "waiting\n"
        while True:  # until it listens, and so waits
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("localhost", int(port))):
                break
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(LIMIT_S) == -signal.SIGTERM
        finally:
            process.kill()
        assert process.stdout.read() == ""


def test_a_batch_that_cannot_be_split_is_refused_with_what_fits() -> None:
    with pytest.raises(UserError, match="batch_size 10 cannot be split over 4 processes: 8 or 12 would fit"):
        Ranks(world_size=4).share_of(10)
    with pytest.raises(UserError, match="4 would fit"):
        Ranks(world_size=4).share_of(3)
    assert Ranks(world_size=4).share_of(12) == 3


def test_torch_and_its_compiler_keep_to_the_share_of_the_quota_and_the_processors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, compile_before = torch.get_num_threads(), inductor.compile_threads
    processors = set(range(12))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(processors))
    monkeypatch.setattr(machine, "cpu_quota", lambda _: 2.5)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "9")
    inductor.compile_threads = 9
    try:
        torch.set_num_threads(6)
        _limit_threads(Ranks())
        assert (torch.get_num_threads(), inductor.compile_threads) == (6, 9), "the user has said how many"
        monkeypatch.delenv("OMP_NUM_THREADS")
        monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS")
        for share, expected in ((1, 3), (2, 1), (8, 1)):
            torch.set_num_threads(6)
            _limit_threads(Ranks(world_size=share, local_world_size=share))
            assert (torch.get_num_threads(), inductor.compile_threads) == (expected, expected)
        torch.set_num_threads(6)
        with processes(torch.device("cpu")):
            assert torch.get_num_threads() == 3
        monkeypatch.setattr(machine, "cpu_quota", lambda _: None)
        for sharing, expected, compiling in ((1, 6, 12), (3, 4, 4), (4, 3, 3), (20, 1, 1)):
            torch.set_num_threads(6)
            _limit_threads(Ranks(world_size=4, local_world_size=4, sharing=sharing))
            assert (torch.get_num_threads(), inductor.compile_threads) == (expected, compiling)
    finally:
        torch.set_num_threads(before)
        inductor.compile_threads = compile_before


@pytest.mark.slow
def test_compiled_ddp_trains_as_eager_ddp_does(uneven: Path, tmp_path: Path) -> None:
    saved = []
    for name, choice in (("eager", "off"), ("compiled", "on")):
        options = ("--train.epochs", "1", "--train.lr", "0.01", "--train.compile", choice)
        trained_in_ranks(*train_arguments(uneven, tmp_path / name), *options)
        saved.append(load_checkpoint(tmp_path / name / "checkpoints/last.pt")["model"])
    for name, tensor in saved[0].items():
        torch.testing.assert_close(saved[1][name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    assert saved[1]["bn1.num_batches_tracked"] == 6


@pytest.mark.slow
def test_two_jobs_at_once_and_a_run_that_goes_from_one_process_to_two(uneven: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastflower.training.network.create_model", TinyNet)
        assert fastflower(*train_arguments(uneven, alone), "--train.epochs", "1").code == 0
    jobs = (
        ("train", "--resume", alone, "--train.epochs", "2"),
        (*train_arguments(uneven, tmp_path / "other"), "--train.epochs", "2"),
    )
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(lambda job: train_by_torchrun(*job), jobs))
    assert [result.returncode for result in results] == [0, 0], [result.stderr for result in results]
    for run in (alone, tmp_path / "other"):
        assert [row["step"] for row in rows(run)] == [6, 12]
