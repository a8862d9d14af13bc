"""What is best in a resumed run: by another figure, on other validation records, with another early stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastflower.config import Config, DataConfig, TrainConfig
from fastflower.data.view import IMAGENET
from fastflower.runtime.checkpoint import load_checkpoint
from fastflower.runtime.entries import Identity, TrainRecords
from fastflower.settings import to_plain
from fastflower.training import step
from fastflower.training.metrics import Evaluation
from fastflower.training.provenance import Provenance
from fastflower.training.resume import adapt
from fastflower.training.state import State
from tests.conftest import fastflower, train_arguments, write_dataset
from tests.training.test_run import rows

FIGURES = ("loss", "accuracy", "macro_f1")
figures_of_epochs = st.lists(st.tuples(*[st.sampled_from([0.1, 0.2, 0.3, 0.4])] * 3), min_size=1, max_size=8)


def evaluation(loss: float, accuracy: float, macro_f1: float = 0.5) -> Evaluation:
    return Evaluation(20, loss, accuracy, 1.0, macro_f1)


def see(state: State, epochs: Sequence[tuple[float, float, float]], figure: str) -> None:
    """Validate some epochs with these figures."""
    for row in epochs:
        state.see(evaluation(*row), figure)
        state.epoch += 1


def new_state() -> State:
    nothing: Any = None
    return State(nothing, nothing, nothing, nothing, nothing)


def resumed(state: State, configs: Sequence[Config], epochs: Sequence[tuple[float, ...]], val: str) -> list[str]:
    """Let `adapt` follow the second settings after the first, and validation records; its sentences."""
    before, now = configs
    names = ("position", "epoch", "best", "best_epoch", "improved_epoch", "comparable_from")
    train = TrainRecords(count=8, names="a", content="b", whole="a", left_out=[])
    first, second = (Identity(count=4, names=names, content="b") for names in ("first", val))
    saved: Any = {name: getattr(state, name) for name in names} | {
        "config": to_plain(before),
        "train_records": train,
        "val_records": {**first, "of a later version": 1},  # which notes more
        "step": 0,
    }
    setup: Any = SimpleNamespace(config=now, provenance=Provenance(["rose"], IMAGENET, train, second), val=1)
    logged = [
        {"epoch": e + 1} | {f"val_{k}": v for k, v in zip(FIGURES, row, strict=True)} for e, row in enumerate(epochs)
    ]
    adapted, sentences = adapt(saved, setup, logged, (state.best_epoch, 0))
    for name in names:
        setattr(state, name, adapted[name])  # type: ignore[literal-required]
    return sentences


def sign(figure: str) -> int:
    return 1 if figure == "loss" else -1


@given(figures_of_epochs, figures_of_epochs, st.sampled_from(FIGURES), st.sampled_from(FIGURES))
def test_later_epochs_must_beat_what_the_kept_best_has_of_the_new_figure(
    first: list[tuple[float, float, float]], second: list[tuple[float, float, float]], before: str, now: str
) -> None:
    state = new_state()
    see(state, first, before)
    configs = [Config(train=TrainConfig(lr=0.1, best=figure)) for figure in (before, now)]  # type: ignore[arg-type]
    resumed(state, configs, first, "first")
    column = FIGURES.index(now)
    values = [sign(now) * row[column] for row in first]
    old = [sign(before) * row[FIGURES.index(before)] for row in first]
    kept = old.index(min(old))
    assert state.best_epoch == kept
    assert state.improved_epoch == values.index(min(values))  # early_stop counts from there
    see(state, second, now)
    values += [sign(now) * row[column] for row in second]
    for epoch in range(len(first), len(values)):
        kept = epoch if values[epoch] < values[kept] else kept
    assert state.best_epoch == kept
    assert sign(now) * (state.best or 0) == values[kept]


@given(figures_of_epochs, figures_of_epochs, st.sampled_from(FIGURES))
def test_on_other_records_what_is_best_begins_anew(
    first: list[tuple[float, float, float]], second: list[tuple[float, float, float]], figure: str
) -> None:
    state = new_state()
    see(state, first, "loss")
    config = Config(train=TrainConfig(lr=0.1, best=figure))  # type: ignore[arg-type]
    (sentence,) = resumed(state, (Config(train=TrainConfig(lr=0.1)), config), first, "other")
    assert "Validation is on other records" in sentence
    assert state.epoch - 1 - state.improved_epoch == 0  # early_stop counts anew
    see(state, second, figure)
    values = [sign(figure) * row[FIGURES.index(figure)] for row in second]
    assert state.best_epoch == len(first) + values.index(min(values))
    # and by another figure only those are compared that are of the same records
    for other in FIGURES:
        if other != figure:
            configs = [Config(train=TrainConfig(lr=0.1, best=name)) for name in (figure, other)]  # type: ignore[arg-type]
            again = new_state()
            again.__dict__.update(state.__dict__)
            resumed(again, configs, [*first, *second], "first")
            values = [sign(other) * row[FIGURES.index(other)] for row in second]
            assert again.improved_epoch == len(first) + values.index(min(values))


@pytest.mark.parametrize("data", [DataConfig(val_resize=240), DataConfig(crop=192)])
def test_another_view_of_the_same_records_is_not_compared(data: DataConfig) -> None:
    state, epochs = new_state(), [(0.1, 0.2, 0.3)]
    see(state, epochs, "loss")
    train = TrainConfig(lr=0.1)
    (sentence,) = resumed(state, (Config(train=train), Config(train=train, data=data)), epochs, "first")
    assert "Validation is of another data.crop or data.val_resize" in sentence
    assert (state.best, state.best_epoch) == (None, -1)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets the next validations have these losses and accuracies."""
    coming: list[tuple[float, float]] = []

    def evaluate(network: Any, batches: Any, **_: Any) -> Evaluation:
        for _batch in batches:
            pass
        return evaluation(*coming.pop(0))

    monkeypatch.setattr(step, "evaluate", evaluate)
    return lambda *validations: coming.extend(validations)


@pytest.mark.usefixtures("tiny_net")
def test_the_kept_best_is_replaced_by_better_epochs_alone(
    small: Path, tmp_path: Path, scripted: Callable[..., None]
) -> None:
    run = tmp_path / "run"
    best = run / "checkpoints/best.pt"
    scripted((0.9, 0.5), (0.5, 0.6), (0.7, 0.8))
    assert fastflower(*train_arguments(small, run), "--train.epochs", 3).code == 0
    assert load_checkpoint(best)["epoch"] == 2
    scripted((0.8, 0.55))
    resume = ("train", "--resume", run, "--train.best", "accuracy", "--train.early_stop", 1, "--train.epochs")
    result = fastflower(*resume, 9)
    assert result.code == 0
    assert "The best checkpoint is of epoch 2, whose validation accuracy is 60.0%" in result.out
    assert "No better validation accuracy in 1 epochs: stopped early" in result.out  # 0.55 after 0.8
    assert len(rows(run)) == 4
    assert load_checkpoint(best)["epoch"] == 2
    # nothing is trained now, nor written
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    result = fastflower(*resume, 8)
    assert result.code == 0
    assert "stopped early; give a larger --train.early-stop, or none" in result.out
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    scripted((0.8, 0.7))
    assert fastflower("train", "--resume", run, "--train.early_stop", 2, "--train.epochs", 5).code == 0
    assert load_checkpoint(best)["epoch"] == 5
    # without the figures of earlier epochs nothing can be compared
    (run / "metrics.jsonl").unlink()
    scripted((0.6, 0.1))
    result = fastflower("train", "--resume", run, "--train.best", "loss", "--train.epochs", 6)
    assert "metrics.jsonl lacks epochs: what is best by another train.best begins anew" in result.out
    assert load_checkpoint(best)["epoch"] == 6


@pytest.mark.usefixtures("tiny_net")
def test_other_validation_records_are_said_and_best_begins_anew(
    small: Path, tmp_path: Path, scripted: Callable[..., None]
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    scripted((0.5, 0.6), (0.6, 0.6))
    arguments = [*train_arguments(small, run), "--train.patience", 1, "--train.early_stop", 2]
    assert fastflower(*arguments, "--train.epochs", 2).code == 0
    small.rename(other)
    split = other / "tfrecords-jpeg-40x40/val"
    for path in split.iterdir():
        path.unlink()
    write_dataset(other, {"val": 20}, first=500)
    scripted((0.9, 0.1), (0.95, 0.1))
    result = fastflower("train", "--resume", run, "--data.root", other, "--train.epochs", 4)
    assert result.code == 0
    assert "Validation is on other records than before: what is best, train.early_stop and plateau begin" in result.out
    assert len(rows(run)) == 4
    assert load_checkpoint(run / "checkpoints/best.pt")["epoch"] == 3
    last = load_checkpoint(run / "checkpoints/last.pt")
    assert last["schedule"]["best"] == 0.9
    assert rows(run)[3]["lr"] == 0.02  # the rate is lowered after two worse epochs, of the same records
    assert last["val_records"]
    assert last["val_records"]["count"] == 20
    scripted((0.95, 0.1))
    result = fastflower("train", "--resume", run, "--train.epochs", 5)
    assert "other records" not in result.out


def three_epochs(data: Path, run: Path, scripted: Callable[..., None], steps: int) -> Path:
    """A run of three epochs of six steps, of which the second is the best; its checkpoint after so many steps."""
    scripted((0.9, 0.5), (0.5, 0.6), (0.7, 0.8))
    arguments = [*train_arguments(data, run), "--train.epochs", 3, "--train.max_steps", steps]
    assert fastflower(*arguments).code == 0
    older = run / "checkpoints/older.pt"
    older.write_bytes((run / "checkpoints/last.pt").read_bytes())
    assert fastflower("train", "--resume", run, "--train.max_steps", "None").code == 0
    assert load_checkpoint(run / "checkpoints/best.pt")["step"] == 12
    return older


@pytest.mark.usefixtures("tiny_net")
def test_an_older_checkpoint_from_which_nothing_is_trained_changes_nothing(
    small: Path, tmp_path: Path, scripted: Callable[..., None]
) -> None:
    run = tmp_path / "run"
    older = three_epochs(small, run, scripted, 6)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    result = fastflower("train", "--resume", older, "--train.epochs", 1)
    assert "All 1 epochs are done" in result.out
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.usefixtures("tiny_net")
@pytest.mark.parametrize("steps", [3, 8, 15])
def test_best_is_never_of_an_epoch_that_was_taken_back(
    small: Path, tmp_path: Path, scripted: Callable[..., None], steps: int
) -> None:
    run = tmp_path / "run"
    older = three_epochs(small, run, scripted, steps)
    scripted(*[(0.95, 0.1)] * (3 - steps // 6))  # worse than all before
    limit = ("--train.max_steps", "None")
    result = fastflower("train", "--resume", older, *limit)
    assert result.code == 0, result.err
    assert ("what is best begins anew" in result.out) == (steps == 8)
    best = load_checkpoint(run / "checkpoints/best.pt")
    assert best["best"] == rows(run)[best["epoch"] - 1]["val_loss"]
    assert best["epoch"] == {3: 1, 8: 2, 15: 2}[steps]


@pytest.mark.usefixtures("tiny_net")
def test_where_the_best_checkpoint_is_gone_the_best_epoch_to_come_is_kept(
    small: Path, tmp_path: Path, scripted: Callable[..., None]
) -> None:
    run = tmp_path / "run"
    three_epochs(small, run, scripted, 6)
    (run / "checkpoints/best.pt").unlink()
    scripted((0.8, 0.1), (0.85, 0.1))
    result = fastflower("train", "--resume", run, "--train.epochs", 5)
    assert "The best checkpoint is not of epoch 2, which was the best: what is best begins anew." in result.out
    assert load_checkpoint(run / "checkpoints/best.pt")["epoch"] == 4
