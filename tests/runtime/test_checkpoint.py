"""Checkpoints that others have changed: prefixed, missing, extra and wrongly shaped keys, entries of other kinds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastflower.errors import UserError
from fastflower.runtime.checkpoint import FORMAT, load_checkpoint, plain_names
from tests.conftest import fastflower, train_arguments
from tests.processes import Result
from tests.training.test_run import assert_same_run

pytestmark = pytest.mark.usefixtures("tiny_net")

WRAPPERS = st.lists(st.sampled_from(["module", "_orig_mod"]), max_size=3)


@st.composite
def wrapped(draw: st.DrawFn, name: str) -> str:
    """The name with wrappers before each of its parts, as of a network whose modules are wrapped too."""
    parts = [[*draw(WRAPPERS), part] for part in name.split(".")]
    return ".".join(part for several in parts for part in several)


@given(st.data())
def test_wrappers_of_any_nesting_leave_the_names(data: st.DataObject) -> None:
    names = ["conv1.weight", "bn1.running_var", "layer1.0.downsample.0.weight", "fc.bias", "submodule.module2.weight"]
    tensors = {name: torch.full((1,), float(place)) for place, name in enumerate(names)}
    given_names = {data.draw(wrapped(name)): tensor for name, tensor in tensors.items()}
    assert plain_names(given_names, Path("w.pt")) == tensors


def test_two_tensors_of_one_name_are_refused() -> None:
    with pytest.raises(UserError, match=r"w\.pt holds two tensors fc\.bias, one of them as module\.fc\.bias: keep"):
        plain_names({"fc.bias": torch.zeros(1), "module.fc.bias": torch.ones(1)}, Path("w.pt"))


def saved(run: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(run / "checkpoints/last.pt", weights_only=True)
    return checkpoint


def renamed(weights: dict[str, torch.Tensor], rename: Callable[[str], str]) -> dict[str, torch.Tensor]:
    return {rename(name): tensor for name, tensor in weights.items()}


@pytest.mark.parametrize(
    "rename",
    [lambda n: f"module.{n}", lambda n: f"module._orig_mod.{n}", lambda n: "_orig_mod." + n.replace(".", ".module.")],
)
def test_a_wrapped_network_is_evaluated_and_gone_on_with_as_itself(
    small: Path, tmp_path: Path, rename: Callable[[str], str]
) -> None:
    runs = [tmp_path / name for name in ("plain", "wrapped")]
    for run in runs:
        assert fastflower(*train_arguments(small, run), "--train.epochs", 1, "--train.ema", "0.9").code == 0
    state = saved(runs[1])
    changed = {key: renamed(state[key], rename) for key in ("model", "ema")}
    for name in ("last", "best"):
        torch.save(state | changed, runs[1] / f"checkpoints/{name}.pt")
    metrics = [json.loads(fastflower("eval", run, "--json").out) for run in runs]
    assert metrics[0] == metrics[1]
    for run in runs:
        result = fastflower("train", "--resume", run, "--train.epochs", "2")
        assert result.code == 0, result.err
    assert_same_run(*runs)
    average = load_checkpoint(runs[1] / "checkpoints/last.pt")["ema"]
    assert average
    assert average.keys() == saved(runs[0])["ema"].keys()


def commands(checkpoint: Path, picture: Path) -> Iterator[Result]:
    """Everything that puts a checkpoint's weights into a network."""
    yield fastflower("eval", checkpoint, "--json")
    yield fastflower("predict", checkpoint, picture)
    yield fastflower("train", "--resume", checkpoint, "--train.epochs", "3")


def refused(result: Result, *parts: str) -> None:
    assert result.code == 2, (result, parts)
    sentence = result.err.splitlines()[-1]
    assert sentence.startswith("error: ")
    assert "Traceback" not in result.err
    for part in parts:
        assert part in sentence


def test_keys_that_do_not_fit_are_one_sentence_for_every_command(
    finished: Path, tmp_path: Path, odd_images: Path
) -> None:
    state, file = saved(finished), finished / "checkpoints/changed.pt"
    lacking = {name: tensor for name, tensor in state["model"].items() if not name.startswith("bn1.")}
    shaped = state["model"] | {"fc.bias": torch.zeros(4), "conv2.weight": torch.zeros(8, 8, 1, 1)}
    for model, part in (
        (lacking, f"5 missing ({', '.join(name for name in state['model'] if name.startswith('bn1.'))})"),
        (state["model"] | {"head.bias": torch.zeros(1)}, "1 unexpected (head.bias)"),
        (shaped, "2 of another shape (conv2.weight [8, 8, 1, 1], not [8, 8, 3, 3], fc.bias [4], not [3])"),
    ):
        for key in ("model", "ema"):
            torch.save(state | {key: model}, file)
            for result in commands(file, odd_images / "gray.jpg"):
                refused(result, f"{file} does not fit the network of its settings, keys: {part};")


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where each entry is, those inside others too; of many alike, the first of them."""
    if isinstance(value, dict):
        for key in list(value)[: None if not at else 3]:
            yield (*at, key)
            yield from places(value[key], (*at, key))
    elif isinstance(value, list) and value:
        yield (*at, 0)
        yield from places(value[0], (*at, 0))


def changed(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value at a place, or without it where `new` is `places`."""
    if not at:
        return new
    copy = value.copy()
    if len(at) == 1 and new is places:
        del copy[at[0]]
    else:
        copy[at[0]] = changed(value[at[0]], at[1:], new)
    return copy


OTHERS = [
    *(places, None, "x", -1, 10**30, math.nan, [], {}, [[0.0]], {"x": 1}),
    *(torch.zeros(2), torch.zeros(1, dtype=torch.complex64), torch.zeros(8, device="meta")),
]


@pytest.mark.parametrize(
    ("options", "all_kinds"),
    [
        ((), False),
        *(pytest.param(options, True, marks=pytest.mark.slow) for options in ((), ("--amp", "--amp_dtype", "fp16"))),
    ],
)
def test_entries_of_other_kinds_are_never_a_traceback(
    small: Path, tmp_path: Path, options: tuple[str, ...], all_kinds: bool
) -> None:
    """Every entry, in turn, becomes something else: it is refused with a sentence, or makes no difference."""
    run = tmp_path / "run"
    assert fastflower(*train_arguments(small, run), "--train.epochs", "1", *options).code == 0
    state, file = saved(run), run / "checkpoints/changed.pt"
    spots = [place for place in places(state) if place[0] != "config"]
    assert len(spots) > 30
    named = []
    for number, place in enumerate(spots):
        one = OTHERS[1 + number // 2 % (len(OTHERS) - 1)] if number % 2 else places
        for new in OTHERS if all_kinds else (one,):
            torch.save(changed(state, place, new), file)
            result = fastflower("train", "--resume", file, "--train.epochs", "2")
            assert "Traceback" not in result.err, (place, new)
            if result.code:
                refused(result)
            named.append(str(file) in result.err)
    assert sum(named) > len(spots) / 2


@pytest.mark.parametrize(
    ("place", "new"),
    [
        (("format",), torch.zeros(2)),
        (("model",), {}),
        (("ema",), {}),
        (("position",), 10**9),  # of an epoch of which nothing was summed
        (("step",), 10**30),
        (("optimizer", "param_groups", 0, "lr"), 10**30),
        (("optimizer", "param_groups", 0, "lr"), torch.zeros(1)),
        (("best",), torch.zeros(1)),
        (("rng", "cpu"), torch.zeros(3, dtype=torch.uint8)),
        (("val_records", "names"), 3),
        (("train_records", "left_out"), [-1]),
    ],
)
def test_numbers_that_are_none_are_refused(finished: Path, place: tuple[Any, ...], new: Any) -> None:
    file = finished / "checkpoints/changed.pt"
    torch.save(changed(saved(finished), place, new), file)
    refused(fastflower("train", "--resume", file, "--train.epochs", "3"), str(file))


def test_a_part_of_what_adamw_remembers_is_refused(small: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ("--train.epochs", "1", "--train.optimizer", "adamw", "--train.lr", "0.001")
    assert fastflower(*train_arguments(small, run), *options).code == 0
    state, file = saved(run), run / "checkpoints/changed.pt"
    remembered = state["optimizer"]["state"]
    last = max(remembered)  # alone in its group
    for new in (
        {name: tensor for name, tensor in remembered[last].items() if name != "exp_avg"},
        remembered[last] | {"exp_avg_sq": None},
        remembered[last] | {"exp_avg": torch.zeros(2)},
    ):
        torch.save(changed(state, ("optimizer", "state", last), new), file)
        refused(fastflower("train", "--resume", file, "--train.epochs", "2"), f"{file}: what it holds of the optimizer")
    torch.save(state, file)
    assert fastflower("train", "--resume", file, "--train.epochs", "2").code == 0


@pytest.mark.parametrize("key", ["optimizer", "rng", "sums", "best_epoch", "train_records"])
def test_what_only_going_on_needs_may_be_missing_elsewhere(finished: Path, key: str) -> None:
    state, file = saved(finished), finished / "checkpoints/changed.pt"
    del state[key]
    torch.save(state, file)
    assert json.loads(fastflower("eval", file, "--json").out)["n"] == 20
    refused(fastflower("train", "--resume", file), f"{file} lacks its entry {key}")


@pytest.mark.parametrize("key", ["model", "ema", "classes", "normalization", "config"])
def test_what_a_trained_network_needs_must_be_there(finished: Path, key: str) -> None:
    state, file = saved(finished), finished / "checkpoints/changed.pt"
    del state[key]
    torch.save(state, file)
    for result in (fastflower("eval", file), fastflower("train", "--resume", file)):
        refused(result, f"{file} lacks its entry {key}")
    assert state["format"] == FORMAT
