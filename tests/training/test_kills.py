"""What a kill or a full disk leaves, at whatever instant: `--resume auto` goes on or starts anew, to the same end."""

from __future__ import annotations

import io
import json
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastflower.runtime.checkpoint import load_checkpoint
from fastflower.training.metrics import TrainingSums
from tests.conftest import fastflower, train_arguments, write_dataset
from tests.processes import Result
from tests.training.test_resume import signal_at
from tests.training.test_run import assert_same_run, rows

pytestmark = pytest.mark.usefixtures("tiny_net")


class KilledError(BaseException):
    """The process is gone."""


class Kill:
    """Counts what changes files below a folder, and from a given operation on lets none happen, as after a kill."""

    def __init__(self, folder: Path, at: int | None, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.at, self.done = str(folder), at, 0
        for name in ("replace", "unlink", "mkdir", "rmdir", "fsync", "open"):
            patch.setattr(os, name, self._guarded(getattr(os, name)))
        patch.setattr(io, "open", self._guarded(io.open))

    def _guarded(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(target: Any, *args: Any, **kwargs: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.fspath(target)
            if str(path).startswith(self.folder) and self._writes(original, *args):
                if self.at is not None and self.done >= self.at:
                    raise KilledError
                self.done += 1
            return original(target, *args, **kwargs)

        return guarded

    @staticmethod
    def _writes(original: Callable[..., Any], how: Any = "r", *_: Any) -> bool:
        if original.__name__ != "open":
            return True
        return bool(how & (os.O_WRONLY | os.O_RDWR)) if isinstance(how, int) else how[:1] != "r"


def killed(arguments: list[object], folder: Path, at: int | None) -> int | None:
    """Run a command, killed before its operation number `at`; how many there were if it came to its end."""
    with pytest.MonkeyPatch.context() as patch:
        kill = Kill(folder, at, patch)
        try:
            result = fastflower(*arguments)
        except KilledError:
            return None
    assert result.code == 0, result.err
    return kill.done


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data", {"train": 16, "val": 6}, files=1)


def arguments(data: Path, run: Path) -> list[object]:
    return [*train_arguments(data, run), "--train.epochs", 2, "--resume", "auto"]


def assert_whole(run: Path, other: Path) -> None:
    """The run is as the other one in all that it leaves."""
    assert_same_run(run, other)
    for name in ("best.pt", "last.pt"):
        a, b = (load_checkpoint(folder / "checkpoints" / name) for folder in (run, other))
        assert (a["step"], a["best"]) == (b["step"], b["best"])
        assert all(torch.equal(tensor, b["model"][key]) for key, tensor in a["model"].items())
    one, two = (load_file(folder / "checkpoints/best.safetensors") for folder in (run, other))
    assert all(torch.equal(tensor, two[key]) for key, tensor in one.items())
    events = EventAccumulator(str(run))
    events.Reload()
    assert [scalar.step for scalar in events.Scalars("loss/val")] == [row["epoch"] for row in rows(run)]
    for line in (run / "environment.jsonl").read_text().splitlines():
        json.loads(line)
    assert list(run.rglob("*.tmp")) == []


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_instant_a_run_comes_to_the_same_end(data: Path, tmp_path: Path, every: int) -> None:
    whole, moments = tmp_path / "whole", random.Random(0)
    instants = killed(arguments(data, whole), whole, None)
    assert instants
    assert instants > 30
    assert load_checkpoint(whole / "checkpoints/best.pt")["step"] == 4, "both epochs write the best"
    for at in range(0, instants, every):
        run = tmp_path / f"run{at}"
        assert killed(arguments(data, run), run, at) is None
        if moments.random() < 0.5:  # and once more while it goes on
            killed(arguments(data, run), run, moments.randrange(instants - at))
        result = fastflower(*arguments(data, run))
        assert result.code == 0, (at, result.err)
        assert_whole(run, whole)


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_while_it_clears_an_earlier_run_it_starts_anew(data: Path, tmp_path: Path, every: int) -> None:
    earlier, whole = tmp_path / "earlier", tmp_path / "whole"
    assert fastflower(*train_arguments(data, earlier), "--train.epochs", 3).code == 0
    assert fastflower(*arguments(data, whole)).code == 0
    anew = 0
    for at in range(0, 20, every):
        run = tmp_path / f"run{at}"
        shutil.copytree(earlier, run)
        assert killed([*arguments(data, run)[:-2], "--overwrite"], run, at) is None
        result = fastflower(*arguments(data, run))
        assert result.code == 0, (at, result.err)
        if "All 2 epochs are done" in result.out:  # nothing of the earlier run is gone yet
            assert_whole(run, earlier)
            assert not anew
        else:
            assert_whole(run, whole)
            anew += every
    assert anew > 10


def test_a_row_that_was_cut_off_is_written_anew(data: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert fastflower(*arguments(data, whole)).code == 0
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, TrainingSums, 4, signal.SIGTERM)  # in the second epoch
        assert fastflower(*arguments(data, cut)).code == 128 + signal.SIGTERM
    row = (whole / "metrics.jsonl").read_text().splitlines()[-1]
    with (cut / "metrics.jsonl").open("a") as file:
        file.write(row[: random.Random(0).randrange(1, len(row))])
    assert fastflower(*arguments(data, cut)).code == 0
    assert_whole(cut, whole)


def test_a_run_of_which_only_best_is_there_goes_on(data: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert fastflower(*arguments(data, whole)).code == 0
    for given in ("auto", run):
        assert fastflower(*train_arguments(data, run), "--train.epochs", 1, "--overwrite").code == 0
        (run / "checkpoints/last.pt").unlink()
        (run / "checkpoints/best.safetensors").unlink()
        result = fastflower(*arguments(data, run)[:-1], given)
        assert f"Resuming {run.absolute()}/checkpoints/best.pt" in result.out.replace("\n", "")
        assert_whole(run, whole)


def test_a_log_whose_checkpoints_are_gone_is_not_cleared_unasked(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert fastflower(*arguments(data, run)).code == 0
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    log = (run / "metrics.jsonl").read_bytes()
    for refused in (fastflower(*arguments(data, run)), fastflower(*arguments(data, run)[:-2])):
        assert refused.code == 2
        assert f"{run} already holds a run, but none of its checkpoints: give --overwrite or another" in refused.err
        assert (run / "metrics.jsonl").read_bytes() == log
    assert fastflower(*arguments(data, run)[:-2], "--overwrite").code == 0


def test_the_results_of_a_run_of_one_epoch_are_not_cleared_unasked(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert fastflower(*train_arguments(data, run), "--train.epochs", 1).code == 0
    assert fastflower("predict", run, "--split", "val").code == 0
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    assert fastflower(*arguments(data, run)).code == 2
    assert (run / "predictions-val.parquet").is_file()


def test_where_nothing_was_saved_resume_says_how_to_start(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def die(*_: Any) -> None:
        raise KilledError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(TrainingSums, "add", die)
        fastflower(*arguments(data, run))
    refused = fastflower("train", "--resume", run)
    assert refused.code == 2
    advice = f"--config {run}/config.yaml --run {run}"
    assert f"nothing was saved there yet; start again with {advice}." in refused.err
    assert fastflower("train", *advice.split()).code == 0
    assert len(rows(run)) == 2


def test_an_older_checkpoint_takes_best_back(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert fastflower(*train_arguments(data, run), "--train.epochs", 1).code == 0
    older = run / "checkpoints/after1.pt"
    older.write_bytes((run / "checkpoints/last.pt").read_bytes())
    assert fastflower("train", "--resume", run, "--train.epochs", 2).code == 0
    assert load_checkpoint(run / "checkpoints/best.pt")["step"] == 4
    # so high a rate that the second epoch is no better
    assert fastflower("train", "--resume", older, "--train.epochs", 2, "--train.lr", 3).code == 0
    assert load_checkpoint(run / "checkpoints/best.pt")["step"] == 2


@pytest.mark.parametrize("every", [9, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_as_it_goes_on_from_an_older_checkpoint_a_run_keeps_its_log(
    data: Path, tmp_path: Path, every: int
) -> None:
    whole, instants = tmp_path / "whole", 0
    assert fastflower(*train_arguments(data, whole), "--train.epochs", 1).code == 0
    shutil.copy(whole / "checkpoints/last.pt", whole / "checkpoints/older.pt")
    assert fastflower("train", "--resume", whole, "--train.epochs", 2).code == 0
    for at in range(0, 120, every):
        run = tmp_path / f"run{at}"
        shutil.copytree(whole, run)
        instants = at
        if killed(["train", "--resume", run / "checkpoints/older.pt", "--train.epochs", 2], run, at):
            break
        result = fastflower("train", "--resume", run, "--train.epochs", 2)
        assert result.code == 0, (at, result.err)
        assert_whole(run, whole)
    assert 30 < instants < 116


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file grows beyond so many bytes: the system refuses it in the midst of a write, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def refused_by_the_disk(result: Result) -> str:
    assert result.code == 2, result
    assert "Traceback" not in result.err
    sentences = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1
    return sentences[0]


def test_a_disk_that_is_full_at_any_byte_is_a_sentence_and_the_run_goes_on(data: Path, tmp_path: Path) -> None:
    whole, draw = tmp_path / "whole", random.Random(0)
    assert fastflower(*arguments(data, whole)).code == 0
    files = [path for path in whole.rglob("*") if path.is_file() and path.name != ".lock"]
    ends = sorted({path.stat().st_size for path in files})
    sizes = [draw.randrange(low, high) for low, high in zip([1, *ends], ends, strict=False)]
    for size in (*sizes, *(draw.randrange(ends[-1]) for _ in range(5))):
        run = tmp_path / f"run{size}"
        with largest_file(size):
            sentence = refused_by_the_disk(fastflower(*arguments(data, run)))
        assert "cannot be written (File too large); nothing was saved before. Make room and start again." in sentence
        assert list(run.rglob("*.tmp")) == []
        assert fastflower(*arguments(data, run)[:-2]).code == 0  # as the sentence says
        assert_whole(run, whole)


def test_a_disk_that_is_full_in_a_later_epoch_leaves_the_run_as_it_was(data: Path, tmp_path: Path) -> None:
    whole, run, draw = tmp_path / "whole", tmp_path / "run", random.Random(0)
    assert fastflower(*arguments(data, whole)).code == 0
    assert fastflower(*train_arguments(data, run), "--train.epochs", 1).code == 0
    kept = {path: path.read_bytes() for path in (run / "checkpoints").iterdir()}
    least = max(path.stat().st_size for path in run.glob("*.*"))
    for size in (draw.randrange(least, len(kept[run / "checkpoints/last.pt"])) for _ in range(5)):
        with largest_file(size):
            sentence = refused_by_the_disk(fastflower(*arguments(data, run)))
        assert f"what was saved before is whole. Make room and go on with --resume {run}." in sentence
        assert {path: path.read_bytes() for path in (run / "checkpoints").iterdir()} == kept
    assert fastflower("train", "--resume", run, "--train.epochs", 2).code == 0
    assert_whole(run, whole)


def test_a_trace_for_which_there_is_no_room_is_said_and_the_run_goes_on(tmp_path: Path) -> None:
    data, runs = write_dataset(tmp_path / "data", {"train": 64, "val": 6}, files=1), [tmp_path / "a", tmp_path / "b"]
    profiled = ["--train.epochs", 1, "--train.profile"]
    assert f": {runs[0] / 'trace.json'}" in fastflower(*train_arguments(data, runs[0]), *profiled).out
    size = (runs[0] / "trace.json").stat().st_size
    for limit in (size // 2, size * 9 // 10):
        with largest_file(limit):
            result = fastflower(*train_arguments(data, runs[1]), *profiled, "--overwrite")
        assert result.code == 0, result.err
        assert f"train.profile: {runs[1] / 'trace.json'} cannot be written; make room" in result.out
        assert not list(runs[1].glob("trace*"))
        assert (runs[1] / "checkpoints/last.pt").is_file()


def test_what_later_commands_write_is_whole_or_as_it_was(data: Path, tmp_path: Path) -> None:
    run, draw = tmp_path / "run", random.Random(0)
    assert fastflower(*train_arguments(data, run), "--train.epochs", 1, "--train.lr", 1e-6).code == 0
    report = tmp_path / "report"
    for command, folder in (
        (("eval", run), run / "eval-val"),
        (("predict", run, "--split", "val", "--submission", run / "submission.csv"), run),
        (("report", run, "--out", report), report),
    ):
        assert fastflower(*command).code == 0
        written = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        largest, refusals = max(map(len, written.values())), 0
        for size in (1, *(draw.randrange(largest) for _ in range(4))):
            with largest_file(size):
                result = fastflower(*command)
            if result.code:
                assert str(folder) in refused_by_the_disk(result)
                refusals += 1
            now = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            assert now == written, "each file is as it was, or written anew with the same content"
        assert refusals
