"""The slow tier's hardships: kills at any moment, and a disk that is full."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastflower.runtime.checkpoint import load_checkpoint
from tests.conftest import fastflower, train_arguments, write_dataset
from tests.training.test_run import assert_same_run, rows

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def start(*arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("tiny_worker.py")), *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def test_kills_at_any_moment_leave_a_whole_checkpoint_and_the_same_result(small: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = ["--train.epochs", 40]
    process = start(*train_arguments(small, whole), *arguments)
    assert process.wait(300) == 0

    moments = random.Random(0)
    kills = 0
    while kills < 6:
        process = start(*train_arguments(small, killed), *arguments, "--resume", "auto")
        while process.poll() is None and not (killed / "metrics.jsonl").exists():
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.8))
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        kills += 1
        if (killed / "checkpoints/last.pt").exists():
            load_checkpoint(killed / "checkpoints/last.pt")
        for line in (killed / "metrics.jsonl").read_text().splitlines()[:-1]:
            json.loads(line)
    assert kills, "the run ended before it could be killed"
    process = start(*train_arguments(small, killed), *arguments, "--resume", "auto")
    assert process.wait(300) == 0, process.stderr.read() if process.stderr else ""
    assert_same_run(whole, killed)


@pytest.fixture
def little_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 20 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.usefixtures("tiny_net")
def test_a_full_disk_leaves_a_run_that_goes_on(little_disk: Path, tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", {"train": 24, "val": 8})
    run = little_disk / "run"
    assert fastflower(*train_arguments(data, run), "--train.epochs", "1").code == 0
    last = (run / "checkpoints/last.pt").read_bytes()
    filler = little_disk / "filler"
    with filler.open("wb") as file:
        free = os.statvfs(little_disk)
        file.write(b"\0" * (free.f_bavail * free.f_frsize - 16384))
    result = fastflower("train", "--resume", run, "--train.epochs", "3")
    assert result.code == 2
    assert "No space left" in result.err
    assert (run / "checkpoints/last.pt").read_bytes() == last
    filler.unlink()
    assert fastflower("train", "--resume", run, "--train.epochs", "3").code == 0
    assert [row["epoch"] for row in rows(run)] == [1, 2, 3]


@pytest.mark.usefixtures("tiny_net")
def test_data_on_a_read_only_mount_and_an_unwritable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_dataset(tmp_path / "data", {"train": 24, "val": 8})
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    commands = (["mount", "--bind", str(data), str(mounted)], ["mount", "-o", "remount,ro,bind", str(mounted)])
    if any(subprocess.run(c, capture_output=True, check=False).returncode for c in commands):
        pytest.skip("needs the right to mount a file system")
    try:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("FASTFLOWER_CACHE", str(tmp_path / "file" / "cache"))  # cannot be made
        assert fastflower(*train_arguments(mounted, tmp_path / "run"), "--train.epochs", "1").code == 0
    finally:
        subprocess.run(["umount", "--lazy", str(mounted)], check=True)
