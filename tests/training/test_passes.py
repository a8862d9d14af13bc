"""Passes over the splits follow each other without a pause, and nothing but the pause is gone."""

from __future__ import annotations

import os
import queue
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastflower.api import load_config, train
from fastflower.arrays import Bytes, Ints
from fastflower.config import Config
from fastflower.data import batches
from fastflower.data.reading import Reader
from fastflower.data.records import Records
from fastflower.data.sampler import Request, kept_order
from fastflower.errors import UserError
from fastflower.runtime.checkpoint import load_checkpoint
from fastflower.runtime.signals import Stopped
from fastflower.training import loop, validate
from fastflower.training.passes import Passes, why_ended
from fastflower.training.saving import DivergenceError
from fastflower.training.state import Setup, State
from fastflower.training.step import training_step
from tests.conftest import fastflower, train_arguments, train_settings

BATCH = 4  # pictures

Event = tuple[str, str, int]  # what is done, to which pass, and a batch's number


class Recorded:
    """A pass whose batches are (name, number), and which notes what is done with it."""

    def __init__(self, name: str, numbers: range, events: list[Event]) -> None:
        self._name, self._numbers, self._events = name, iter(numbers), events
        events.append(("begin", name, 0))

    def __iter__(self) -> Recorded:
        return self

    def __next__(self) -> tuple[str, int]:
        number = next(self._numbers)
        self._events.append(("batch", self._name, number))
        return self._name, number

    def close(self) -> None:
        if ("close", self._name, 0) not in self._events:
            self._events.append(("close", self._name, 0))


@dataclass
class Lengths:
    """What decides how a run's passes follow each other."""

    train_steps: int
    val_steps: int | None
    prefetch: int
    epochs: int
    max_steps: int | None
    early_stop: int | None
    improves: list[bool]
    done: int  # steps of the first epoch

    def setup(self, events: list[Event]) -> Any:
        """What `Passes` asks of a run's setup."""

        def epoch(number: int, start: int = 0) -> Recorded:
            return Recorded(f"epoch {number}", range(start // BATCH, self.train_steps), events)

        def once() -> Recorded:
            number = sum(kind == "begin" and "validation" in name for kind, name, _ in events)
            return Recorded(f"validation {number}", range(self.val_steps or 0), events)

        loading = SimpleNamespace(engine=SimpleNamespace(prefetch=self.prefetch))
        train = replace(Config().train, epochs=self.epochs, max_steps=self.max_steps, early_stop=self.early_stop)
        return SimpleNamespace(
            config=SimpleNamespace(train=train),
            train=SimpleNamespace(
                left=lambda position: self.train_steps - position // BATCH,
                epoch=epoch,
                loader=SimpleNamespace(loading=loading),
            ),
            val=None if self.val_steps is None else SimpleNamespace(once=once, steps=self.val_steps),
        )

    def passes(self) -> Iterator[tuple[str, range, int, bool]]:
        """Name, batches, how many of them are used, and whether the next pass is sure to come while they are."""
        step, best = self.done, -1
        for epoch in range(self.epochs):
            numbers = range(self.done if epoch == 0 else 0, self.train_steps)
            used = min(len(numbers), len(numbers) if self.max_steps is None else max(self.max_steps - step, 0))
            step += used
            goes_on = epoch + 1 < self.epochs and (self.max_steps is None or step < self.max_steps)
            if self.early_stop:
                goes_on &= epoch - best < self.early_stop
            validates = self.val_steps is not None
            cut = used < len(numbers)
            yield f"epoch {epoch}", numbers, used, not cut and (validates or goes_on)
            if cut:
                return
            if self.val_steps is not None:
                yield f"validation {epoch}", range(self.val_steps), self.val_steps, goes_on
            best = epoch if self.improves[epoch] else best
            if self.early_stop and epoch - best >= self.early_stop:
                return
            if self.max_steps is not None and step >= self.max_steps:
                return

    def expected(self) -> list[Event]:
        """Each pass begins when all that is left of the one before is being made, and ends before the next is used."""
        plan, events = list(self.passes()), []
        for place, (name, numbers, used, next_is_sure) in enumerate(plan):
            if ("begin", name, 0) not in events:
                events.append(("begin", name, 0))
            for number in numbers[:used]:
                events.append(("batch", name, number))
                if next_is_sure and numbers[-1] - number < 2 * self.prefetch:
                    begin = ("begin", plan[place + 1][0], 0)
                    events += [begin] if begin not in events else []
            events.append(("close", name, 0))
        return events


@settings(deadline=None, max_examples=500)
@given(
    st.builds(
        Lengths,
        train_steps=st.integers(1, 5),
        val_steps=st.none() | st.integers(0, 5),
        prefetch=st.integers(1, 2),
        epochs=st.integers(1, 5),
        max_steps=st.none() | st.integers(1, 12),
        early_stop=st.none() | st.integers(1, 2),
        improves=st.lists(st.booleans(), min_size=5, max_size=5),
        done=st.integers(0, 5),
    )
)
def test_a_pass_begins_while_the_one_before_is_used_and_only_if_it_comes(lengths: Lengths) -> None:
    events: list[Event] = []
    setup, nothing = lengths.setup(events), cast(Any, None)
    lengths.done = min(lengths.done, lengths.train_steps)
    assume(lengths.max_steps is None or lengths.done < lengths.max_steps)
    state = State(nothing, nothing, nothing, nothing, nothing, step=lengths.done, position=BATCH * lengths.done)
    with Passes(setup, state) as passes:
        while not why_ended(setup, state):  # as the training loop, of which only the passes are left
            for _ in passes.training():
                state.step, state.position = state.step + 1, state.position + BATCH
                if state.step == lengths.max_steps:
                    break
            if setup.train.left(state.position):
                continue
            for _ in passes.validation():
                pass
            if lengths.improves[state.epoch]:
                state.improved_epoch = state.epoch
            state.epoch, state.position = state.epoch + 1, 0
    assert events == lengths.expected()


def test_the_loader_reads_for_the_next_pass_before_the_last_batch_is_used(
    small: Path, tmp_path: Path, tiny_net: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pass's last batch is held back until the loader's thread has asked for the first one of the next pass."""
    asked: queue.Queue[str] = queue.Queue()
    used: list[str] = []
    originals = {name: getattr(batches, name) for name in ("training_requests", "evaluation_requests")}

    def requests(name: str, *arguments: Any, **options: Any) -> Iterator[Request]:
        asked.put(name)
        yield from originals[name](*arguments, **options)

    def used_up(last: bool, following: str) -> None:
        if last:
            used.append(asked.get(timeout=60))
            assert used[-1] == following, used

    def step(setup: Setup, state: State, *others: Any) -> None:
        used_up(state.step == 0, "training_requests")
        used_up(setup.train.left(state.position) == 1, "evaluation_requests")
        training_step(setup, state, *others)

    def outputs(*arguments: Any, **options: Any) -> Iterator[Any]:
        for number, item in enumerate(validation_outputs(*arguments, **options), start=1):
            used_up(number == 3 and len(used) < 6, "training_requests")
            yield item

    validation_outputs = validate.outputs
    for name in originals:
        monkeypatch.setattr(batches, name, partial(requests, name))
    monkeypatch.setattr(loop, "training_step", step)
    monkeypatch.setattr(validate, "outputs", outputs)
    assert fastflower(*train_arguments(small, tmp_path / "run"), "--train.epochs", 3).code == 0


def loader_threads() -> int:
    return sum(thread.name == "loader" for thread in threading.enumerate())


@pytest.mark.parametrize("failure", [KeyboardInterrupt, DivergenceError, UserError, RuntimeError, Stopped])
@pytest.mark.parametrize("where", ["training", "validation"])
def test_no_thread_is_left_of_a_run_that_ends_while_the_next_pass_is_being_made(
    where: str,
    failure: type[BaseException],
    small: Path,
    tmp_path: Path,
    tiny_net: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> None:
        running.append(loader_threads())
        if failure is Stopped:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            raise failure("it failed")

    def step(setup: Setup, state: State, *others: Any) -> None:
        training_step(setup, state, *others)
        if where == "training" and state.step == 3:
            fail()

    def outputs(*arguments: Any, **options: Any) -> Iterator[Any]:
        for number, item in enumerate(validation_outputs(*arguments, **options), start=1):
            yield item
            if where == "validation" and number == 1:
                fail()

    running: list[int] = []
    validation_outputs = validate.outputs
    monkeypatch.setattr(loop, "training_step", step)
    monkeypatch.setattr(validate, "outputs", outputs)
    with pytest.raises(failure) as raised:
        train(load_config(None, train_settings(small, epochs=3)), tmp_path / "run", quiet=True)
    assert running[0] == 2
    assert loader_threads() == 0, raised  # which holds the frames that the failure came through, and what is in them


def unless(refuses: Callable[[Records, int], bool]) -> Callable[[Reader, Ints], list[Bytes]]:
    """What reads a batch, unless one of its records is refused."""
    original = Reader.read

    def read(self: Reader, indices: Ints) -> list[Bytes]:
        if any(refuses(self._records, index) for index in indices.tolist()):
            raise UserError("it cannot be read.")
        return original(self, indices)

    return read


@pytest.mark.parametrize("position", [0, 3])
def test_a_bad_record_of_the_next_pass_is_reported_when_its_batch_would_come(
    position: int, small: Path, tmp_path: Path, tiny_net: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the second epoch; in the third epoch all is well, and the run goes on as one without a failure."""
    order = kept_order(np.ones(48, bool), seed=0, epoch=1)
    bad = int(order[8 * position])
    reads: Counter[tuple[int, int]] = Counter()

    def refuses(records: Records, index: int) -> bool:
        reads[len(records), index] += 1
        return (len(records), index) == (48, bad) and reads[48, bad] == 2

    whole = train_arguments(small, tmp_path / "whole")
    assert fastflower(*whole, "--train.epochs", 3).code == 0
    monkeypatch.setattr(Reader, "read", unless(refuses))
    run = tmp_path / "run"
    result = fastflower(*train_arguments(small, run), "--train.epochs", 3)
    assert result.code == 2
    saved = f" Epoch 2 is saved up to step {6 + position}: then go on" if position else "\n"
    assert f"it cannot be read.{saved}" in result.err
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1
    assert load_checkpoint(run / "checkpoints/last.pt")["step"] == 6 + position
    assert fastflower("train", "--resume", run).code == 0
    one, other = (load_checkpoint(folder / "checkpoints/last.pt")["model"] for folder in (run, tmp_path / "whole"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_bad_record_of_validation_is_reported_when_training_is_done(
    small: Path, tmp_path: Path, tiny_net: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Reader, "read", unless(lambda records, _: len(records) == 20))
    result = fastflower(*train_arguments(small, tmp_path / "run"), "--train.epochs", 2)
    assert result.code == 2
    assert "it cannot be read. Epoch 1 is saved up to step 6: then go on with" in result.err
