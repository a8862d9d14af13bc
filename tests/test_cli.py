"""The command itself, in processes of its own: start-up time, help, foreign packages, folders."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from fastflower.cli import main, parse
from fastflower.data.sources.kaggle import load_split
from fastflower.data.stats import pixel_statistics
from fastflower.data.view import Engine
from fastflower.options import TrainCommand
from fastflower.runtime.checkpoint import load_checkpoint
from tests.conftest import fastflower, train_arguments
from tests.processes import in_process

ROOT = Path(__file__).parents[1]


def command(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastflower", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env=os.environ | environment,
        check=False,
    )


def test_help_takes_less_than_a_second_of_processor_time() -> None:
    before = os.times()
    result = command("--help")
    after = os.times()
    assert result.returncode == 0
    assert "train" in result.stdout
    assert after.children_user - before.children_user + after.children_system - before.children_system < 1


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["train", "--help"], ["fitted to the data", "(pixels)", "--amp, --no-amp", "--train.epochs", "--resume"]),
        (["eval", "--help"], ["--data.root", "(default: val)", "--json"]),
        (["flops", "--help"], ["(pixels)", "(default: 224)", "--layers", "--json", "resnet50-v1", "2 x MACs"]),
        (["data", "demo", "--help"], ["(default: 2400)", "(pixels)"]),
        (["data", "check", "--help"], ["--json"]),
        (["data", "stats", "--help"], ["--sizes", "(default: auto)", "--split", "train+val"]),
        (["data", "--help"], ["demo", "check", "stats"]),
    ],
)
def test_help_shows_defaults_and_units(words: list[str], parts: list[str]) -> None:
    result = command(*words)
    assert result.returncode == 0
    for part in parts:
        assert part in result.stdout


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_what_answers_at_once_does_not_import_torch_or_dali(option: str) -> None:
    code = (
        f"import sys; sys.argv[1:] = ['{option}']\nfrom fastflower.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
    )
    code += "print(sorted({'torch', 'nvidia.dali', 'numpy', 'triton'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_version_is_that_of_the_package_and_of_what_it_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"fastflower": "7.8.9", "torch": "3.1", "nvidia-dali-cuda120": "4.1"}

    def version(name: str) -> str:
        try:
            return installed[name]
        except KeyError:
            raise importlib.metadata.PackageNotFoundError(name) from None

    monkeypatch.setattr(importlib.metadata, "version", version)
    answer = fastflower("--version")
    assert (answer.code, answer.err) == (0, "")
    assert answer.out.startswith("fastflower 7.8.9: torch 3.1, DALI 4.1, Triton missing, Python 3.")
    assert len(answer.out.splitlines()) == 1
    installed["nvidia-dali-cuda130"] = installed.pop("nvidia-dali-cuda120")
    del installed["fastflower"]
    assert fastflower("--version").out.startswith(
        f"fastflower (not installed, from {ROOT / 'fastflower'}): torch 3.1, DALI 4.1,"
    )


def test_a_strangers_apex_breaks_nothing(tmp_path: Path) -> None:
    """The package of that name on PyPI has nothing to do with NVIDIA's."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").write_text("raise ImportError('a web toolkit for Pyramid')\n")
    code = (
        "import fastflower.training.setup, fastflower.models.resnet, fastflower.kernels, sys\n"
        "from fastflower.environment import find_apex\n"
        "assert 'apex' not in sys.modules\nprint(find_apex())"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "another package"


def test_nvidias_apex_is_recognized_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastflower.environment import find_apex

    (tmp_path / "apex/optimizers").mkdir(parents=True)
    (tmp_path / "apex/__init__.py").write_text("raise ImportError('its CUDA extension was not built')\n")
    (tmp_path / "apex/optimizers/fused_sgd.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_apex() == "nvidia"
    assert "apex" not in sys.modules


def test_kernels_and_configs_are_found_from_the_checkout_and_elsewhere(tmp_path: Path) -> None:
    code = (
        "import fastflower.kernels, importlib.resources as r; "
        "print((r.files('fastflower.configs') / 'demo.yaml').is_file())"
    )
    for folder in (ROOT, tmp_path):
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=False)
        assert result.stdout == "True\n", result.stderr


def test_output_that_is_cut_off_is_no_mistake() -> None:
    line = f"{sys.executable} -m fastflower cv --help | head -n 1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert result.stdout.startswith("usage: fastflower cv")
    assert (result.returncode, result.stderr) in ((0, ""), (128 + 13, ""))  # 0: it was faster than head


def test_a_users_mistake_has_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = in_process(main, "train", "--data.root", tmp_path / "none")
    assert result.code == 2
    assert result.err.startswith("error: ")
    assert "Traceback" not in result.err
    assert len(result.err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_cannot_be_made_is_a_sentence(small: Path, tmp_path: Path, tiny_net: None) -> None:
    (tmp_path / "file").write_text("")
    result = fastflower(*train_arguments(small, tmp_path / "file" / "run"), "--train.epochs", "1")
    assert result.code == 2
    assert "Not a directory" in result.err
    assert len(result.err.splitlines()) == 1


def test_an_option_without_its_value_is_named() -> None:
    for option in ("--config", "--resume", "--data.root"):
        result = fastflower("train", option)
        assert result.code == 2
        assert option in result.err


def test_data_demo_writes_a_set_that_trains(tmp_path: Path, tiny_net: None) -> None:
    root = tmp_path / "drawn"
    counts = ("--train", "24", "--val", "12", "--test", "12", "--sizes", "40", "48")
    result = fastflower("data", "demo", root, *counts)
    assert result.code == 0
    assert str(root) in result.out
    assert {path.name for path in root.iterdir()} == {
        *("tfrecords-jpeg-40x40", "tfrecords-jpeg-48x48", "class_names.json"),
    }
    assert fastflower(*train_arguments(root, tmp_path / "run"), "--train.epochs", "1").code == 0
    again = fastflower("data", "demo", root, *counts)
    assert again.code == 2
    assert str(root) in again.err


def test_data_stats_prints_a_configuration_with_the_covariance_as_a_comment(small: Path, tmp_path: Path) -> None:
    printed = fastflower("data", "stats", small).out
    settings = yaml.safe_load(printed)
    assert {key: len(value) for key, value in settings["data"].items()} == {"mean": 3, "std": 3}
    (tmp_path / "mine.yaml").write_text(printed)
    command = parse(["train", "--config", str(tmp_path / "mine.yaml")])
    assert isinstance(command, TrainCommand)
    assert command.settings.data.std == tuple(settings["data"]["std"])
    comments = "\n".join(line.partition("# ")[2] for line in printed.splitlines() if line.lstrip().startswith("# -"))
    covariance = np.array(yaml.safe_load(comments))
    np.testing.assert_allclose(np.sqrt(np.diag(covariance)), settings["data"]["std"], rtol=1e-12)
    both = yaml.safe_load(fastflower("data", "stats", small, "--split", "train+val").out)["data"]["mean"]
    val = pixel_statistics(load_split(small, "val"), Engine()).normalization.mean
    # 48 pictures in train and 20 in val, all of one size
    np.testing.assert_allclose(both, (48 * np.array(settings["data"]["mean"]) + 20 * np.array(val)) / 68, rtol=1e-12)


def test_data_stats_prints_what_training_uses(small: Path, tmp_path: Path, tiny_net: None) -> None:
    printed = yaml.safe_load(fastflower("data", "stats", small).out)["data"]
    run = tmp_path / "run"
    assert fastflower(*train_arguments(small, run), "--train.epochs", "1").code == 0
    assert load_checkpoint(run / "checkpoints/last.pt")["normalization"] == printed
    given = ("--data.mean", 0.1, 0.2, 0.3, "--data.std", 0.4, 0.5, 0.6)
    assert fastflower(*train_arguments(small, run), "--train.epochs", "1", "--overwrite", *given).code == 0
    assert load_checkpoint(run / "checkpoints/last.pt")["normalization"] == {
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
    }
