"""Runs on class folders and on several folders, from the command line."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastflower.data.sources.tfrecord import write_tfrecord
from fastflower.runtime.checkpoint import load_checkpoint
from fastflower.training.metrics import TrainingSums
from tests.conftest import example, fastflower, jpeg, train_arguments, write_dataset, write_folders
from tests.training.test_resume import signal_at
from tests.training.test_run import assert_same_run, rows

pytestmark = pytest.mark.usefixtures("tiny_net")

ONE_EPOCH = ("--train.epochs", "1")


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Two classes without val: 36 of their pictures train, 4 validate."""
    return write_folders(tmp_path / "folders", {"rose": 20, "tulip": 20})


def evaluated(run: Path, *options: object) -> dict[str, Any]:
    result = fastflower("eval", run, *options, "--json")
    assert result.code == 0, result.err
    metrics: dict[str, Any] = json.loads(result.out)
    return metrics


def assert_logged(run: Path, metrics: dict[str, Any]) -> None:
    for key in ("loss", "accuracy", "top5", "macro_f1"):
        assert metrics[key] == pytest.approx(rows(run)[-1][f"val_{key}"], abs=1e-5)


def test_a_folder_without_val_trains_and_is_evaluated_to_the_logged_figures(folders: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = fastflower(*train_arguments(folders, run), *ONE_EPOCH, "--seed", 3)
    assert result.code == 0, result.err
    assert "train: 36 pictures, 36 records\n" in result.out
    assert "val: 4 pictures, 4 records\n" in result.out
    assert load_checkpoint(run / "checkpoints/best.pt")["classes"] == ["rose", "tulip"]
    assert_logged(run, evaluated(run))
    assert evaluated(run, "--split", "train")["n"] == 36
    refused = fastflower("eval", run, "--split", "test")
    assert f"{folders} has no folder test" in refused.err


def test_what_check_finds_can_be_left_out(folders: Path, tmp_path: Path) -> None:
    (folders / "rose/page.jpg").write_bytes(b"<html>")
    (folders / "rose/cut.png").write_bytes(jpeg(40, 40)[:300])
    assert fastflower(*train_arguments(folders, tmp_path / "a"), *ONE_EPOCH).code == 2
    checked = fastflower("data", "check", folders, "--json")
    assert checked.code == 1
    (tmp_path / "skip.json").write_text(checked.out)
    result = fastflower(*train_arguments(folders, tmp_path / "b"), *ONE_EPOCH, "--data.skip", tmp_path / "skip.json")
    assert result.code == 0, result.err
    assert "Left out 2 records" in result.out


def test_resuming_keeps_the_split_and_refuses_another(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert fastflower(*train_arguments(folders, whole), "--train.epochs", "2").code == 0
    with monkeypatch.context() as patch:
        signal_at(patch, TrainingSums, 6, signal.SIGINT)
        assert fastflower(*train_arguments(folders, stopped), "--train.epochs", "2").code == 128 + signal.SIGINT
    for other in (["--seed", 1], ["--data.val_share", 0.2]):
        refused = fastflower("train", "--resume", stopped, *other)
        assert refused.code == 2
        assert "was trained on other training records" in refused.err
    moved = folders.rename(tmp_path / "moved")
    assert fastflower("train", "--resume", stopped, "--data.root", moved).code == 0
    assert_same_run(whole, stopped)


def test_a_val_folder_that_lacks_a_class_shifts_nothing(tmp_path: Path) -> None:
    run, counts = tmp_path / "run", {"train/aster": 8, "train/rose": 8, "train/tulip": 8, "val/rose": 5, "val/tulip": 3}
    assert fastflower(*train_arguments(write_folders(tmp_path / "a", counts), run), *ONE_EPOCH).code == 0
    metrics = evaluated(run)
    assert metrics["n"] == 8
    assert_logged(run, metrics)
    # the same pictures under their right numbers, from a layout that cannot shift
    labelled = [example(i, label) for i, label in zip(range(24, 32), [1] * 5 + [2] * 3, strict=True)]
    write_tfrecord(tmp_path / "b/val/0.tfrec", labelled)
    assert evaluated(run, "--data.root", tmp_path / "b") == pytest.approx(metrics, abs=1e-5)
    stranger = write_folders(tmp_path / "c", {"val/rose": 2, "val/zinnia": 2})
    refused = fastflower("eval", run, "--data.root", stranger)
    assert refused.code == 2
    assert f"{stranger} has pictures of class 'zinnia' in val" in refused.err


def test_several_folders_train_and_are_evaluated(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, run = write_dataset(tmp_path / "records", {"train": 12, "val": 6}, first=100), tmp_path / "run"
    (records / "class_names.json").write_text(json.dumps(["tulip", "lily", "rose"]))
    monkeypatch.chdir(tmp_path)
    *before, root = (arguments := train_arguments(folders, run))[:5]
    assert root == folders
    result = fastflower(*before, "folders", "records", *arguments[5:], *ONE_EPOCH)
    assert result.code == 0, result.err
    assert "train: 48 pictures, 48 records (40x40)\n" in result.out
    saved = load_checkpoint(run / "checkpoints/last.pt")
    assert saved["classes"] == ["tulip", "lily", "rose"]
    assert saved["config"]["data"]["root"] == yaml.safe_load((run / "config.yaml").read_text())["data"]["root"]
    assert saved["config"]["data"]["root"] == [str(folders), str(records)]
    monkeypatch.chdir("/")
    assert_logged(run, evaluated(run))
    assert [evaluated(run, "--data.root", *some)["n"] for some in ([folders], [records], [records, folders])] == [
        4,
        6,
        10,
    ]
    printed = yaml.safe_load(fastflower("data", "stats", folders, records).out)["data"]
    assert printed == saved["normalization"]


def test_listed_records_neither_train_nor_validate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_folders(tmp_path / "data", {"train/rose": 9, "train/tulip": 9, "val/rose": 4, "val/tulip": 4})
    bad = [root / "train/rose/000003.jpg", root / "val/tulip/000022.jpg"]
    bad[0].write_bytes(jpeg(40, 40)[:300])
    bad[1].write_bytes(b"")
    run = tmp_path / "run"
    refused = fastflower(*train_arguments(root, run), *ONE_EPOCH)
    assert refused.code == 2
    assert f"{bad[0]} (300 bytes); {bad[1]} (0 bytes)." in refused.err
    problems = [{"kind": "image", "file": str(path), "record": 0, "id": "", "split": ""} for path in bad]
    (tmp_path / "skip.json").write_text(json.dumps({"problems": problems[:1]}))
    monkeypatch.chdir(tmp_path)
    arguments = [*train_arguments(root, run), *ONE_EPOCH, "--overwrite", "--data.skip", "skip.json"]
    refused = fastflower(*arguments)
    assert f"error: {bad[1]} cannot be decoded as a picture (0 bytes)" in refused.err
    (tmp_path / "skip.json").write_text(json.dumps({"problems": problems}))
    result = fastflower(*arguments)
    assert result.code == 0, result.err
    assert "Left out 2 records" in result.out
    assert "train: 17 pictures, 17 records\n" in result.out
    monkeypatch.chdir("/")
    metrics = evaluated(run)
    assert metrics["n"] == 7
    assert_logged(run, metrics)
    (tmp_path / "skip.json").unlink()  # it belongs to the run's own folders
    assert "data.skip" in fastflower("eval", run).err
    other = write_folders(tmp_path / "other", {"val/rose": 3})
    assert evaluated(run, "--data.root", other)["n"] == 3


def test_a_folder_is_named_when_it_is_missing_or_no_data(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, part in (
        ([tmp_path / "none"], f"--data.root {tmp_path / 'none'} is not a folder: a data folder holds"),
        ([tmp_path / "empty"], f"{tmp_path / 'empty'} holds no pictures"),
        ([], "--data.root has no value"),
    ):
        result = fastflower("train", "--run", tmp_path / "run", "--data.root", *arguments)
        assert result.code == 2
        assert part in result.err
    assert not (tmp_path / "run").exists()
