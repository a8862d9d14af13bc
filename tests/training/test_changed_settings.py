"""Every setting that may change when a run is resumed: at an epoch's end and in its middle."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastflower.runtime.checkpoint import load_checkpoint
from fastflower.runtime.progress import Display
from fastflower.training import loop as training
from fastflower.training.schedule import Moment, Schedule
from fastflower.training.step import training_step
from tests.conftest import TinyNet, fastflower, train_arguments, write_dataset
from tests.processes import Result
from tests.training.test_run import assert_same_run, rows

COUNT, BATCH = 50, 8  # six steps and two pictures more
PLACES = {"end": 6, "middle": 3}  # steps that are done when the settings change
FP16, BF16, FP32 = "--amp --amp_dtype fp16", "--amp --amp_dtype bf16", "--no-amp"
CURVE = "--train.warmup_epochs 0.5 --train.schedule"


@dataclass
class Trained:
    """What steps were made of."""

    pictures: dict[int, list[int]] = field(default_factory=dict)  # by epoch from 0, in turn
    times: list[float] = field(default_factory=list)  # epochs done, as the schedule sees them
    bars: list[list[int]] = field(default_factory=list)  # of each progress bar: its length, and where it came to


@dataclass(frozen=True)
class Begun:
    """A run that stopped after some steps."""

    folder: Path
    trained: Trained


def record(patch: pytest.MonkeyPatch) -> Trained:
    """What is trained from here on."""
    trained = Trained()
    before = Schedule.before_step

    def recorded(setup: Any, state: Any, network: Any, batch: Any) -> None:
        trained.pictures.setdefault(state.epoch, []).extend(batch.indices.tolist())
        assert state.epoch < trained.times[-1] < state.epoch + 1
        training_step(setup, state, network, batch)

    def noted(self: Schedule, now: Moment, closing_s: float) -> None:
        trained.times.append(now.epochs)
        before(self, now, closing_s)

    def begun(self: Display, description: str, total: int, completed: int = 0) -> None:
        trained.bars.append([total, completed])

    def advanced(self: Display, steps: int = 1) -> None:
        trained.bars[-1][1] += steps

    patch.setattr(training, "training_step", recorded)
    patch.setattr(Display, "task", begun)
    patch.setattr(Display, "advance", advanced)
    patch.setattr(Schedule, "before_step", noted)
    return trained


@pytest.fixture(scope="module")
def begin(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Begun]:
    """Trains up to a place, or to the end (""), with some options; the same ones once."""
    folder = tmp_path_factory.mktemp("begun")
    data = write_dataset(folder / "data", {"train": COUNT, "val": 20})
    made: dict[tuple[str, str], Begun] = {}

    def begun(place: str, options: str) -> Begun:
        if (place, options) not in made:
            run = folder / f"run{len(made)}"
            limit = ["--train.max_steps", PLACES[place]] if place else []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("fastflower.training.network.create_model", TinyNet)
                patch.setenv("FASTFLOWER_CACHE", str(folder / "cache"))
                patch.delenv("TRITON_INTERPRET", raising=False)
                trained = record(patch)
                arguments = [*train_arguments(data, run), "--train.epochs", 2, *limit, *options.split()]
                result = fastflower(*arguments)
            assert result.code == 0, result.err
            made[place, options] = Begun(run, trained)
        return made[place, options]

    return begun


def go_on(begun: Begun, folder: Path, options: str) -> tuple[Result, Trained]:
    """Resume a copy of a run in `folder`."""
    shutil.copytree(begun.folder, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastflower.training.network.create_model", TinyNet)
        patch.delenv("TRITON_INTERPRET", raising=False)  # the interpreter takes a second for a step of our norm
        trained = record(patch)
        return fastflower("train", "--resume", folder, "--train.max_steps", "None", *options.split()), trained


# Settings before and after
CHANGES = {
    "fp32 to bf16": (FP32, BF16),
    "fp32 to fp16": (FP32, FP16),
    "bf16 to fp32": (BF16, FP32),
    "bf16 to fp16": (BF16, FP16),
    "fp16 to fp32": (FP16, FP32),
    "fp16 to bf16": (FP16, BF16),
    "plateau to cosine": ("", f"{CURVE} cosine"),
    "cosine to plateau": (f"{CURVE} cosine", "--train.schedule plateau"),
    "onecycle to step": (f"{CURVE} onecycle", "--train.schedule step --train.milestones 1"),
    "step to onecycle": ("--train.schedule step", f"{CURVE} onecycle"),
    "a longer curve": (f"{CURVE} cosine", "--train.epochs 3"),
    "a shorter curve": (f"{CURVE} cosine", "--train.epochs 1"),
    "lr": ("", "--train.lr 0.01 --train.head_lr 0.03"),
    "twice the batch": (f"{CURVE} cosine", "--train.batch_size 16"),
    "half the batch": (f"{CURVE} onecycle", "--train.batch_size 4"),
    "another batch": (f"{CURVE} cosine", "--train.batch_size 5"),
    "half of the split as a batch": (f"{CURVE} cosine", "--train.batch_size 26"),
    "a batch larger than the split": (f"{CURVE} cosine", "--train.batch_size 64"),
    "accumulate": ("", "--train.accumulate 2"),
    "our norm": ("--model.norm torch", "--model.norm triton"),
    "torch's norm": ("--model.norm triton", "--model.norm torch"),
    "an average": ("", "--train.ema 0.9"),
    "no average": ("--train.ema 0.9", "--train.ema 0"),
    "frozen longer": ("--train.freeze_epochs 0", "--train.freeze_epochs 1"),
    "frozen no longer": ("--train.freeze_epochs 1", "--train.freeze_epochs 0"),
    "what is learned": ("", "--train.label_smoothing 0.1 --train.mixup 0.2 --train.class_weights balanced"),
    "the optimizer's options": ("", "--train.momentum 0.5 --train.nesterov --train.weight_decay 0 --train.clip_grad 1"),
    "no momentum": ("", "--train.momentum 0"),
    "from no momentum": ("--train.momentum 0", "--train.momentum 0.9"),
    "best": ("", "--train.best accuracy --train.early_stop 1"),
    "views": ("", "--data.crop 36 --data.scale 40 60 --data.val_resize 40"),
    "balanced classes": ("", "--data.sampling balanced"),
    "each once": ("--data.sampling balanced", "--data.sampling uniform"),
    "seed": ("", "--seed 1"),
}
EPOCHS = {"a longer curve": 3, "a shorter curve": 1}  # in all, where not 2
# with these an epoch begins anew, since its order is another
ANEW = ("balanced classes", "each once", "seed")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_setting_goes_on_to_the_end_with_each_picture_once(
    begin: Callable[[str, str], Begun], tmp_path: Path, place: str, change: str
) -> None:
    before, after = CHANGES[change]
    begun, run = begin(place, before), tmp_path / "run"
    result, trained = go_on(begun, run, after)
    assert result.code == 0, result.err
    state = load_checkpoint(run / "checkpoints/last.pt")
    epochs = EPOCHS.get(change, 2)
    assert [row["epoch"] for row in rows(run)] == list(range(1, epochs + 1))
    assert (state["epoch"], state["position"]) == (epochs, 0)
    batch = min(state["config"]["train"]["batch_size"], COUNT)
    for epoch in range(place == "end", epochs):
        earlier = begun.trained.pictures.get(epoch, []) if change not in ANEW else []
        pictures = earlier + trained.pictures.get(epoch, [])
        assert COUNT - batch < len(pictures) <= COUNT
        assert change == "balanced classes" or len(set(pictures)) == len(pictures)
    assert trained.times == sorted(trained.times)
    assert all(total == reached for total, reached in trained.bars)
    assert ("begins anew, since its records come in another order" in result.out) == (
        change in ANEW and place == "middle"
    )


def test_an_undisturbed_epochs_times_are_the_middles_of_its_steps(begin: Callable[[str, str], Begun]) -> None:
    assert begin("", "").trained.times == [epoch + (step + 0.5) / 6 for epoch in range(2) for step in range(6)]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "options",
    [
        "--data.threads 3 --data.prefetch 1",
        "--data.cache ram",
        "--data.decode whole",
        "--train.deterministic",
        "--train.log_every 1",
        "--train.best macro_f1 --train.early_stop 9",
        pytest.param("--train.compile on", marks=pytest.mark.slow),
    ],
)
def test_settings_that_do_not_matter_leave_the_run_as_it_was(
    begin: Callable[[str, str], Begun], tmp_path: Path, place: str, options: str
) -> None:
    whole, run = begin("", "").folder, tmp_path / "run"
    assert go_on(begin(place, ""), run, options)[0].code == 0
    if "compile" in options or "best" in options:
        pictures = [load_checkpoint(folder / "checkpoints/last.pt")["model"] for folder in (whole, run)]
        for name, tensor in pictures[0].items():
            np.testing.assert_allclose(pictures[1][name], tensor, rtol=1e-4, atol=1e-5)
    else:
        assert_same_run(whole, run)
