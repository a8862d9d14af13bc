"""Runs whose settings a recipe fits to the pictures: positional folders, what is recorded, and what is refused."""

from __future__ import annotations

import hashlib
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import fastflower as library
from fastflower.cli import parse
from fastflower.errors import UserError
from fastflower.models import NETWORKS
from fastflower.options import TrainCommand
from fastflower.runtime.run_folder import RunFolder
from fastflower.training import fit, pretrained, recipe
from tests.conftest import fastflower, write_dataset, write_folders
from tests.models.test_pretrained import tiny_weights
from tests.processes import in_ranks
from tests.training import tiny_worker

pytestmark = pytest.mark.usefixtures("tiny_net")


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Pictures of 40 pixels, of two classes, in folders."""
    counts = {"train/rose": 20, "train/tulip": 20, "val/rose": 4, "val/tulip": 4}
    return write_folders(tmp_path / "pictures", counts)


def printed(*arguments: object) -> dict[str, Any]:
    """The settings that a run would have."""
    result = fastflower("train", *arguments, "--print-config")
    assert result.code == 0, result.err
    settings: dict[str, Any] = yaml.safe_load(result.out)
    return settings


def recorded(run: Path) -> dict[str, Any]:
    """The settings that a run has had."""
    settings: dict[str, Any] = yaml.safe_load(RunFolder(run).config.read_text())
    return settings


def test_a_folder_alone_is_enough_and_its_recipe_is_recorded_as_if_typed(folders: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = fastflower("train", folders, "--run", run, "--train.epochs", 2)
    assert result.code == 0, result.err
    (line,) = [line for line in result.out.splitlines() if line.startswith("Recipe: ")]
    assert "from scratch, 40 pictures of 2 classes in batches of 8 (5 steps an epoch), 2 epochs of onecycle" in line
    assert "Training from scratch, since " in result.out
    assert "5 steps an epoch, of 8 pictures each." in result.out
    settings = recorded(run)
    assert settings == printed("--data.root", folders, "--train.epochs", 2)
    assert (settings["data"]["crop"], settings["train"]["warmup_epochs"]) == (32, 0.5)

    going_on = fastflower("train", "--resume", run, "--train.epochs", 3)
    assert going_on.code == 0, going_on.err
    assert "Recipe" not in going_on.out
    assert recorded(run) == settings | {"train": settings["train"] | {"epochs": 3}}
    assert fastflower("eval", run).code == 0


def test_the_folder_is_named_once(folders: Path, tmp_path: Path) -> None:
    assert printed(folders) == printed("--data.root", folders) == printed(folders, "--data.root", folders)
    other = fastflower("train", folders, "--data.root", tmp_path)
    assert (other.code, other.err.count("\n")) == (2, 1)
    assert f"{folders} and --data.root {tmp_path} both name the pictures: give one." in other.err
    assert printed(folders, "--config", "resnet34")["data"]["root"] == [str(folders)]


def test_recipes_have_names_and_a_file_may_name_one_beside_settings(folders: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("recipe: scratch\ntrain: {epochs: 9, lr: 0.003}\n")
    settings = printed(folders, "--config", mine, "--train.lr", 0.004)
    assert (settings["train"]["epochs"], settings["train"]["lr"]) == (9, 0.004)
    assert settings["train"]["schedule"] == "onecycle"
    assert printed(folders, "--config", "scratch") == printed(folders)
    refused = fastflower("train", "--config", "finetune", folders)
    assert refused.code == 2
    assert "--config finetune needs weights for ImageNet, and " in refused.err
    assert "FASTFLOWER_WEIGHTS" in refused.err


def test_the_demo_fits_other_pictures(folders: Path) -> None:
    settings, demo = printed("--config", "demo", folders), printed("--config", "demo")
    assert (settings["train"]["batch_size"], demo["train"]["batch_size"]) == (8, 64)
    assert settings["train"]["lr"] < demo["train"]["lr"] == 0.05
    assert settings["train"]["epochs"] == demo["train"]["epochs"]


def test_a_dry_run_and_python_have_the_same_recipe(folders: Path) -> None:
    result = fastflower("train", folders, "--dry-run")
    assert result.code == 0, result.err
    assert "Recipe: resnet18 from scratch, 40 pictures of 2 classes" in result.out
    config = library.fit_config(folders, quiet=True)
    assert config.train.batch_size == printed(folders)["train"]["batch_size"]
    assert library.fit_config([folders], {"train": {"epochs": 7}}, quiet=True).train.epochs == 7
    with pytest.raises(UserError, match="fit_config"):
        library.load_config("scratch")
    with pytest.warns(UserWarning, match="warmup_epochs 1.5 → 0.25, to fit train.epochs 1"):
        assert library.load_config("demo", {"train": {"epochs": 1}}).train.warmup_epochs == 0.25


def test_folds_keep_the_recipe_of_the_first_call(folders: Path, tmp_path: Path) -> None:
    words = ("cv", folders, "--folds", 2, "--run", tmp_path / "cv", "--train.epochs", 1)
    first = fastflower(*words)
    assert first.code == 0, first.err
    assert first.out.count("Recipe: ") == 1
    again = fastflower(*words)
    assert again.code == 0, again.err
    assert "Recipe: " not in again.out


def test_stored_sizes_decide_the_size_of_training(tmp_path: Path) -> None:
    small = write_dataset(tmp_path / "small", {"train": 48, "val": 12}, size=40)
    settings = printed(small)
    assert settings["data"]["crop"] == 32
    assert settings["data"]["scale"] == [37, 69]


def publish(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """A TinyNet's weights as resnet18's in a folder of torchvision's files."""
    folder.mkdir()
    torch.save(tiny_weights(), folder / "w.pth")
    digest = hashlib.sha256((folder / "w.pth").read_bytes()).hexdigest()
    file = (folder / "w.pth").rename(folder / f"tiny-{digest[:8]}.pth")
    network = replace(NETWORKS["resnet18"], weights={"IMAGENET1K_V1": file.name})
    monkeypatch.setitem(NETWORKS, "resnet18", network)
    return file


def test_weights_are_taken_from_the_folder_that_is_named_once_they_are_whole(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = publish(monkeypatch, tmp_path / "weights")
    monkeypatch.setenv("FASTFLOWER_WEIGHTS", str(file.parent))
    run = tmp_path / "run"
    result = fastflower("train", folders, "--run", run, "--train.epochs", 1)
    assert result.code == 0, result.err
    assert "Recipe: resnet18 from ImageNet's weights" in result.out
    assert f"Starting from {file}" in result.out
    assert recorded(run)["model"]["pretrained"] == "IMAGENET1K_V1"
    assert printed(folders, "--config", "scratch")["model"]["pretrained"] is None
    assert printed(folders, "--model.name", "plain18")["model"]["pretrained"] is None
    file.write_bytes(file.read_bytes()[:-1])
    damaged = fastflower("train", folders)
    assert damaged.code == 2
    assert f"{file} (FASTFLOWER_WEIGHTS) is damaged" in damaged.err


def test_weights_come_from_torch_hubs_folder_or_the_network_and_else_it_goes_on_without(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = publish(monkeypatch, tmp_path / "server")
    monkeypatch.delenv("FASTFLOWER_WEIGHTS")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(pretrained, "URL", f"file://{file.parent}")
    result = fastflower("train", folders, "--print-config")
    assert "pretrained: IMAGENET1K_V1" in result.out
    assert f"Downloading file://{file}" in result.err
    file.unlink()
    assert "Downloading" not in fastflower("train", folders, "--print-config").err
    shutil.rmtree(tmp_path / "home")
    without = fastflower("train", folders, "--print-config")
    assert without.code == 0
    assert "pretrained: null" in without.out
    assert f"Training from scratch, since file://{file} cannot be downloaded" in without.err


def test_a_server_that_does_not_answer_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.delenv("FASTFLOWER_WEIGHTS")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(pretrained, "ANSWER_S", 0.2)
    with socket.socket() as silent:  # takes connections, and never says a word
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(pretrained, "URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        names, why = pretrained.at_hand(("resnet18",), "IMAGENET1K_V1", lambda _: None)
    assert names == ()
    assert "cannot be downloaded" in why


def test_a_run_of_ours_brings_its_network(finished: Path, folders: Path) -> None:
    settings = printed(folders, "--model.pretrained", finished)
    assert settings["model"]["name"] == "resnet18"
    assert settings["train"]["epochs"] <= 20


def test_what_may_take_more_than_an_hour_is_measured_by_real_steps(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(recipe.SLOW, "cpu", 1e3)
    result = fastflower("train", folders, "--print-config")
    assert "Measuring how fast" in result.err
    assert re.search(r"about [\d.e-]+ h at [\d,]+ G multiply-adds/s as measured", result.err)
    monkeypatch.setattr(fit, "_rate", lambda *_: 5e7)  # at which an hour is a few epochs
    slow = printed(folders)
    assert slow["train"]["epochs"] < 60
    assert slow["train"]["warmup_epochs"] < slow["train"]["epochs"]


@pytest.mark.slow
def test_all_processes_have_the_same_recipe(folders: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    environment = {"FASTFLOWER_WEIGHTS": str(tmp_path)}
    result = in_ranks(tiny_worker.main, "train", folders, "--run", run, "--train.epochs", 1, **environment)
    assert result.code == 0, result.err
    assert result.out.count("Recipe: ") == 1
    assert recorded(run)["train"]["batch_size"] % 2 == 0


def test_few_steps_are_said_with_what_to_lower(folders: Path, tmp_path: Path) -> None:
    result = fastflower("train", folders, "--run", tmp_path / "run", "--train.epochs", 1, "--train.batch_size", 40)
    assert result.code == 0, result.err
    assert "1 step an epoch, of 40 pictures each, which are few" in result.out
    assert "--train.batch_size 8" in result.out


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--data.folds", 3, "--data.fold", 3], "data.fold is 3, not below data.folds (3)"),
        (["--model.name", "vgg16", "--data.crop", 16], "data.crop is 16 pixels, but vgg16 needs at least 32"),
        (["--train.epochs", 2, "--train.freeze_epochs", 2], "train.freeze_epochs is 2, not below train.epochs (2)"),
    ],
)
def test_two_that_are_named_and_do_not_fit_are_refused_before_the_recipe(
    folders: Path, tmp_path: Path, words: list[object], wanted: str
) -> None:
    result = fastflower("train", folders, "--run", tmp_path / "run", *words)
    assert result.code == 2
    assert result.err.startswith(f"error: command line: {wanted}")
    assert "Recipe: " not in result.out
    assert not (tmp_path / "run").exists()


def test_a_network_named_later_than_a_crop_raises_it(folders: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("{recipe: scratch, data: {crop: 16}}")
    result = fastflower("train", folders, "--config", own, "--model.name", "vgg16", "--print-config")
    assert "data.crop 16 → 32, to fit model.name vgg16." in result.err
    assert yaml.safe_load(result.out)["data"]["crop"] == 32


def test_the_next_command_can_be_copied_where_names_have_spaces(folders: Path, tmp_path: Path) -> None:
    run, fitted = tmp_path / "my run", tmp_path / "final fit"
    result = fastflower("train", folders, "--run", run, "--train.epochs", 1)
    assert shlex.split(result.out.splitlines()[-1]) == ["Next:", "fastflower", "eval", str(run)]
    refused = fastflower("train", folders, "--run", run)
    assert f"give --resume '{run}', --overwrite" in refused.err
    with pytest.raises(UserError, match=r'give fastflower.resume\(".*/my run"\), overwrite=True'):
        library.train({"data.root": str(folders)}, run)
    final = fastflower("train", folders, "--run", fitted, "--train.epochs", 1, "--data.train_on", "train+val")
    assert final.out.splitlines()[-1] == f"Next: fastflower predict '{fitted}' NEWPICTURES --out names.csv"
    assert "Trained for 1 epoch, " in final.out


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_a_folder_with_other_files_is_refused_for_a_run(folders: Path, tmp_path: Path, overwrite: list[str]) -> None:
    for name in ("thesis.txt", "config.yaml"):
        full = tmp_path / name.partition(".")[0]
        full.mkdir()
        (full / name).write_text("mine: 1")
        (full / "notes.md").write_text("")
        refused = fastflower("train", folders, "--run", full, *overwrite)
        assert refused.code == 2
        assert f"--run {full} holds no run, but " in refused.err
        assert (full / name).read_text() == "mine: 1"
        folds = fastflower("cv", folders, "--run", full, *overwrite)
        assert folds.code == 2
    pictures = fastflower("train", folders, "--run", folders, *overwrite)
    assert "holds no run, but train, val" in pictures.err
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / ".gitkeep").write_text("")
    assert fastflower("train", folders, "--run", empty, "--train.epochs", 1, *overwrite).code == 0


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--train.lr", "1"], {"train.lr"}),
        (["--train.batch-size=4", "--data.val_resize", "None"], {"train.batch_size", "data.val_resize"}),
        (["--no-amp", "--train.no-nesterov"], {"amp", "train.nesterov"}),
        (["--no-train.nesterov", "--train.no_compile"], {"train.nesterov", "train.compile"}),
        (["--train.compile=off", "--run", "x"], {"train.compile"}),
        (["--train.no_decay_norm_and_bias"], {"train.decay_norm_and_bias"}),
    ],
)
def test_named_settings_are_found_in_all_spellings(words: list[str], named: set[str]) -> None:
    command = parse(["train", "PICTURES", *words])
    assert isinstance(command, TrainCommand)
    assert command.layers.keys == named | {"data.root"}
