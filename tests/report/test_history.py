"""Logs as the report reads them: run folders and TensorBoard events, whole, resumed and cut off."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from fastflower.config import resolve
from fastflower.errors import UserError
from fastflower.report.history import History, last, median, read_histories, read_history
from fastflower.runtime.run_folder import RunFolder, RunLog, read_rows
from fastflower.settings import build, to_yaml
from fastflower.training.schedule import Moment, learning_rate

BATCH = 64


def row(epoch: int, **values: float | None) -> dict[str, float | None]:
    """A line of metrics.jsonl: 10 steps of 64 pictures in 8 s, 2 s of validation, 1 s of waiting."""
    progress: dict[str, float | None] = {"epoch": epoch, "step": 10 * epoch, "lr": 0.1}
    losses: dict[str, float | None] = {"train_loss": 2.0, "train_accuracy": 0.4, "val_loss": 3.0, "val_accuracy": 0.3}
    times: dict[str, float | None] = {"images_per_s": 80.0, "epoch_s": 10.0, "data_wait": 0.1}
    return progress | losses | {"val_top5": 0.6, "val_macro_f1": 0.2} | times | values


def write_run(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """A run folder without checkpoints."""
    path.mkdir(parents=True)
    RunFolder(path).config.write_text(to_yaml(resolve(build({"train": {"batch_size": BATCH}}, "test"))))
    RunFolder(path).metrics.write_text("".join(json.dumps(fields) + "\n" for fields in rows))
    return path


def with_accuracies(path: Path, accuracies: Sequence[float | None]) -> History:
    """A run with these validation accuracies."""
    write_run(path, [row(epoch, val_accuracy=value) for epoch, value in enumerate(accuracies, start=1)])
    return read_history(path, path.name)


def test_a_run_folder_gives_its_figures_by_epoch_from_1(tmp_path: Path) -> None:
    run = with_accuracies(tmp_path / "run", [0.2, 0.5, 0.5, 0.4])
    assert run.epochs.tolist() == [1, 2, 3, 4]
    assert run.best == (0.5, 2)
    assert [run.first_at(level) for level in (0.2, 0.3, 0.5, 0.51)] == [1, 2, 2, None]
    assert last(run.val_accuracy) == 0.4
    assert (median(run.epoch_s), median(run.training_s), median(run.waited_s)) == (10, 8, 1)


def test_a_log_of_an_earlier_version_counts_from_0(tmp_path: Path) -> None:
    rows = [row(epoch, val_accuracy=value) | {"epoch": epoch - 1} for epoch, value in ((1, 0.2), (2, 0.5))]
    run = read_history(write_run(tmp_path / "run", rows), "run")
    assert (run.epochs.tolist(), run.best, median(run.training_s)) == ([1, 2], (0.5, 2), 8)


def test_epochs_of_another_batch_size_have_no_training_time(tmp_path: Path) -> None:
    halves = [row(1, step=20), row(2, step=40)]  # of 32 pictures a step, before a resumed run's were 64
    folder = write_run(tmp_path / "run", [*halves, row(3, step=50), row(4, step=60)])
    assert np.isnan(read_history(folder, "run").training_s).tolist() == [True, True, False, False]


def test_what_was_not_measured_is_nan(tmp_path: Path) -> None:
    run = with_accuracies(tmp_path / "final", [None, None])
    assert np.isnan(run.val_accuracy).all()
    assert (run.best, run.first_at(0.1), last(run.val_accuracy), median(run.val_accuracy)) == (None,) * 4
    assert run.train_accuracy.tolist() == [0.4, 0.4]


def test_an_epoch_that_was_resumed_in_its_middle_has_no_training_time(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [row(1), row(2, epoch_s=5.0), row(3)])  # 8 s of training are not in 5
    assert np.isnan(read_history(folder, "run").training_s).tolist() == [False, True, False]


@pytest.mark.parametrize("rest", ['{"epoch": 3, "tra', "\0\0\0", "\n"])
def test_lines_that_were_cut_off_are_left_out(rest: str, tmp_path: Path) -> None:
    folder = RunFolder(write_run(tmp_path / "run", [row(1), row(2)]))
    folder.metrics.write_text(folder.metrics.read_text() + rest)
    assert read_history(folder.path, "run").epochs.tolist() == [1, 2]


NO_ROWS = [
    *("5", "null", "[]", '"epoch"', "{}", '{"epoch": 1}', '{"epoch": 1, "step": null}', '{"epoch": "3", "step": 30}'),
    *('{"epoch": [3], "step": 30}', '{"epoch": 2.5, "step": 25}', '{"epoch": -3, "step": 30}'),
    '{"epoch": 2, "step": 20, "val_accuracy": "high"}',
]


@pytest.mark.parametrize("line", NO_ROWS)
def test_lines_that_are_no_rows_are_left_out(line: str, tmp_path: Path) -> None:
    folder = RunFolder(write_run(tmp_path / "run", [row(1), row(2)]))
    folder.metrics.write_text(f"{line}\n{folder.metrics.read_text()}{line}\n")
    assert read_rows(folder.metrics) == [row(1), row(2)]
    assert read_history(folder.path, "run").val_accuracy.tolist() == [0.3, 0.3]


def test_figures_that_a_row_lacks_or_has_as_nan_were_not_measured(tmp_path: Path) -> None:
    folder = RunFolder(write_run(tmp_path / "run", [row(1, val_loss=math.nan), {"epoch": 2, "step": 20}]))
    assert read_rows(folder.metrics) == [row(1, val_loss=None), {"epoch": 2, "step": 20}]
    history = read_history(folder.path, "run")
    for series in (history.val_loss, history.lr[1:], history.waited_s[1:], history.epoch_s[1:]):
        assert np.isnan(series).all()
    assert history.waited_s[0] == 1


def learning_rates(tmp_path: Path, lrs: Sequence[float]) -> History:
    folder = write_run(
        tmp_path / f"{len(list(tmp_path.iterdir()))}", [row(e, lr=lr) for e, lr in enumerate(lrs, start=1)]
    )
    return read_history(folder, "run")


def test_drops_of_the_learning_rate_are_found(tmp_path: Path) -> None:
    assert learning_rates(tmp_path, [0.1] * 3 + [0.01] * 2 + [0.001]).drops() == [4, 6]
    assert learning_rates(tmp_path, [0.1, 0.1, 0.05, 0.01, 0.01]).drops() == [3, 4]  # one after another
    assert learning_rates(tmp_path, [0.1, 0.1, 0.06, 0.06, 0.1, 0.1]).drops() == []  # less than half; up
    assert learning_rates(tmp_path, [0.1]).drops() == []
    assert learning_rates(tmp_path, [0.1, 0.08, 0.0, 0.0]).drops() == [3]


@pytest.mark.parametrize("schedule", ["cosine", "onecycle"])
@pytest.mark.parametrize("epochs", [3, 6, 40])
def test_a_smooth_schedule_has_no_drops(schedule: str, epochs: int, tmp_path: Path) -> None:
    train = resolve(build({"train": {"schedule": schedule, "epochs": epochs}}, "test")).train
    lrs = [learning_rate(train, Moment(epoch + 0.95)) for epoch in range(epochs)]  # of each epoch's last step, of ten
    assert min(later / earlier for earlier, later in pairwise(lrs)) < 0.5  # it falls as steeply as a drop
    assert learning_rates(tmp_path, lrs).drops() == []


def test_events_give_the_same_as_the_run_folder_that_wrote_them(tmp_path: Path) -> None:
    folder = RunFolder(write_run(tmp_path / "run", []))
    log = RunLog(folder, 0)
    for epoch in range(1, 4):
        log.write(row(epoch, lr=0.1 / 10**epoch, val_accuracy=0.25 * epoch))

    expected = read_history(folder.path, "run")
    folder.metrics.unlink()
    events = read_history(folder.path, "run")
    assert events.epochs.tolist() == expected.epochs.tolist()
    for figure in ("lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "images_per_s"):
        np.testing.assert_allclose(getattr(events, figure), getattr(expected, figure), rtol=1e-6)
    # all of an epoch's figures are written at one moment, which tells nothing about its parts
    assert np.isnan(events.training_s).all()


def write_events(path: Path, values: Mapping[int, float], *, purge: int | None = None, **options: Any) -> None:
    """An event file of validation accuracies by step, an epoch of 100 s each with 20 s of validation."""
    with SummaryWriter(str(path), purge_step=purge) as writer:
        for step, value in values.items():
            writer.add_scalar("loss/train", 1.0, step, walltime=100.0 * step + 80, **options)
            writer.add_scalar("accuracy/val", value, step, walltime=100.0 * step + 100, **options)


@pytest.mark.parametrize("purge", [None, 2])
def test_of_two_events_of_an_epoch_the_later_counts(purge: int | None, tmp_path: Path) -> None:
    write_events(tmp_path, {0: 0.1, 1: 0.2, 2: 0.3})
    write_events(tmp_path, {2: 0.5, 3: 0.6}, purge=purge)
    assert len(list(tmp_path.glob("*tfevents*"))) == 2
    run = read_history(tmp_path, "run")
    np.testing.assert_allclose(run.val_accuracy, [0.1, 0.2, 0.5, 0.6], rtol=1e-6)
    np.testing.assert_allclose(run.epoch_s, [np.nan, 100, 100, 100])
    np.testing.assert_allclose(run.training_s, [np.nan, 80, 80, 80])


@pytest.mark.parametrize("new_style", [False, True])  # as TensorFlow 1 and 2 write them
def test_events_of_others_may_count_epochs_from_1(new_style: bool, tmp_path: Path) -> None:
    write_events(tmp_path, {1: 0.1, 2: 0.7}, new_style=new_style)
    run = read_history(tmp_path, "run")
    assert run.epochs.tolist() == [1, 2]
    assert run.best == pytest.approx((0.7, 2))
    assert run.first_at(0.7) == 2  # though float32 makes it 0.69999999


def test_an_event_file_that_was_cut_off_is_read_so_far(tmp_path: Path) -> None:
    write_events(tmp_path, {0: 0.1, 1: 0.2, 2: 0.3})
    (file,) = tmp_path.glob("*tfevents*")
    file.write_bytes(file.read_bytes()[:-20])
    run = read_history(tmp_path, "run")
    assert run.epochs.tolist() == [1, 2, 3]
    np.testing.assert_allclose(run.val_accuracy, [0.1, 0.2, np.nan], rtol=1e-6)


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "begun", [])
    with SummaryWriter(str(tmp_path / "other")) as writer:
        writer.add_scalar("fid", 1, 1)
    for name in ("none", "begun", "other"):
        with pytest.raises(UserError, match=rf"{name} holds no metrics.jsonl .* loss/train.*: give the folder"):
            read_histories([tmp_path / name])


def test_names_are_as_long_as_tells_them_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [write_run(tmp_path / name, [row(1)]) for name in ("a/x/run", "b/x/run", "b/other")]
    monkeypatch.chdir(paths[2])
    runs, without = read_histories([*paths[:2], Path("."), paths[0] / ".." / "run"])
    assert not without
    assert [run.name for run in runs] == ["a/x/run", "b/x/run", "other"]
