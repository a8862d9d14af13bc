"""The variables of a launcher: complete, in part, empty or wrong."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from fastflower.errors import UserError
from fastflower.runtime import launcher
from tests.conftest import fastflower

NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
COMPLETE = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"} | {
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in COMPLETE:
        monkeypatch.delenv(name, raising=False)


def give(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_all_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launcher.place() is None
    assert launcher.is_main()
    assert launcher.local_rank() == 0
    give(monkeypatch, {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"})  # as some clusters set them everywhere
    assert launcher.place() is None
    give(monkeypatch, dict.fromkeys(NUMBERS, ""))
    assert launcher.place() is None
    give(monkeypatch, COMPLETE)
    assert launcher.place() == (5, 8, 1, 4)
    assert not launcher.is_main()
    assert launcher.local_rank() == 1
    monkeypatch.setenv("RANK", "0")
    assert launcher.is_main()


@pytest.mark.parametrize("empty", [False, True])
def test_what_is_missing_is_named(empty: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for count in range(1, len(COMPLETE)):
        for given in itertools.combinations(COMPLETE, count):
            if not set(given) & set(NUMBERS):
                continue
            missing = [name for name in COMPLETE if name not in given]
            with monkeypatch.context() as patch:
                give(patch, {name: COMPLETE[name] for name in given})
                if empty:
                    give(patch, dict.fromkeys(missing, " "))
                with pytest.raises(UserError, match="torchrun") as error:
                    launcher.place()
                assert f" without {', '.join(missing)}: " in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("RANK", "8", "ranks are below"),
        ("RANK", "-1", "not whole numbers"),
        ("RANK", "0.0", "not whole numbers"),
        ("WORLD_SIZE", "two", "not whole numbers"),
        ("WORLD_SIZE", "0", "ranks are below"),
        ("LOCAL_RANK", "4", "ranks are below"),
        ("LOCAL_WORLD_SIZE", "9", "ranks are below"),
        ("MASTER_PORT", "http", "not whole numbers"),
        ("MASTER_PORT", "0", "ports are"),
        ("MASTER_PORT", "65536", "ports are"),
    ],
)
def test_what_is_wrong_is_a_sentence(name: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, COMPLETE | {name: value})
    with pytest.raises(UserError, match=words) as error:
        launcher.place()
    assert f"{name}={value}" in str(error.value)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_every_process_says_it_and_nobody_else_cares(
    rank: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give(monkeypatch, {"RANK": rank, "WORLD_SIZE": "2"})
    result = fastflower("train", "--data.root", small, "--run", tmp_path / "run", "--model.name", "resnet18")
    assert result.code == 2
    assert "without LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT" in result.err
    assert not (tmp_path / "run").exists()
    assert json.loads(fastflower("flops", "resnet18", "--json").out)
    assert "No problems." in fastflower("data", "check", small).out
    failed = fastflower("data", "check", tmp_path / "none")
    assert (failed.code, str(tmp_path / "none") in failed.err) == (2, True)


def test_a_mistake_of_one_process_alone_is_said_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, COMPLETE | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"})
    result = fastflower("eval", tmp_path / "none")
    assert result.code == 2
    assert str(tmp_path / "none") in result.err
