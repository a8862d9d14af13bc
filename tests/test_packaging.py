"""What an installation holds: the packages and files that setup.py names are those of the checkout."""

from __future__ import annotations

import fnmatch
import importlib.util
import os
import re
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fastflower"


@pytest.fixture(scope="module")
def declared() -> dict[str, Any]:
    """The arguments of setup.py's call, which runs with no setuptools."""
    arguments: dict[str, Any] = {}
    stand_in = ModuleType("setuptools")
    stand_in.setup = arguments.update  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "setuptools", stand_in)
        runpy.run_path(str(ROOT / "setup.py"))
    return arguments


def files() -> list[Path]:
    """The package's files, those of linked folders among them, by their path below the checkout."""
    paths = []
    for folder, below, names in os.walk(PACKAGE, followlinks=True):
        below[:] = [name for name in below if name != "__pycache__"]
        paths += [(Path(folder) / name).relative_to(ROOT) for name in names]
    assert len(paths) > 50
    return paths


def test_kernels_and_configs_are_links_within_the_checkout() -> None:
    links = {path.name: os.readlink(path) for path in PACKAGE.rglob("*") if path.is_symlink()}
    assert links == {"kernels": "../kernels", "configs": "../configs"}


def test_nothing_else_of_the_checkout_is_importable_as_part_of_the_package() -> None:
    others = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"kernels", "configs"}
    assert others >= {"tests", "bench"}
    for name in others:
        assert not name.isidentifier() or importlib.util.find_spec(f"fastflower.{name}") is None, name


def test_every_folder_of_code_is_a_package_that_is_installed(declared: dict[str, Any]) -> None:
    packages = set(declared["packages"])
    of_code = {".".join(path.parent.parts) for path in files() if path.suffix == ".py"}
    assert of_code <= packages
    for package in of_code:
        assert (ROOT / package.replace(".", "/") / "__init__.py").is_file(), f"{package} has no __init__.py"
    for package in packages:
        assert (ROOT / package.replace(".", "/")).is_dir(), f"{package} is in setup.py and not in the checkout"


def test_every_file_that_is_no_code_is_package_data(declared: dict[str, Any]) -> None:
    data = [path for path in files() if path.suffix != ".py"]
    assert {path.suffix for path in data} >= {".html", ".yaml", ".txt", ".typed"}
    used = set()
    for path in data:
        package = ".".join(path.parent.parts)
        matching = {
            (package, pattern)
            for pattern in declared["package_data"].get(package, ())
            if fnmatch.fnmatchcase(path.name, pattern)
        }
        assert matching, f"{path} would not be installed: add it to package_data in setup.py"
        used |= matching
    assert used == {
        (package, pattern) for package, patterns in declared["package_data"].items() for pattern in patterns
    }


def test_the_license_is_that_which_setup_names(declared: dict[str, Any]) -> None:
    assert declared["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert text.split()[:5] == ["Apache", "License", "Version", "2.0,", "January"]
    assert text.rstrip().endswith("limitations under the License.")


def test_before_a_commit_runs_what_ci_runs_in_the_same_versions(declared: dict[str, Any]) -> None:
    """The hooks are of the environment that `make lint` uses, whose versions setup.py fixes."""
    configuration = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repository in configuration["repos"] for hook in repository["hooks"]]
    assert {repository["repo"] for repository in configuration["repos"]} == {"local"}
    assert {hook["language"] for hook in hooks} == {"system"}
    of_hooks = {_tool(hook["entry"].removeprefix(".venv/bin/")) for hook in hooks}
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert lint
    of_ci = {_tool(line.removeprefix("\t$(BIN)/")) for line in lint[1].splitlines()}
    assert of_hooks == of_ci
    pinned = [
        requirement.partition("==")[0] for requirement in declared["extras_require"]["test"] if "==" in requirement
    ]
    assert {"ruff", "mypy"} <= set(pinned)


def _tool(command: str) -> str:
    """A command without its options and files, such as ruff check."""
    return " ".join(word for word in command.split() if not word.startswith("-") and word != ".")


@pytest.mark.slow
def test_a_wheel_holds_what_git_has_and_runs(tmp_path: Path) -> None:
    setuptools = pytest.importorskip("setuptools", minversion="77", reason="a wheel is built by setuptools >= 77")
    assert setuptools
    tracked = _run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")[:-1]
    tracked = [name for name in tracked if os.path.lexists(ROOT / name)]
    checkout, installed = tmp_path / "checkout", tmp_path / "installed"
    for name in tracked:  # a copy, for building leaves folders behind
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            (checkout / name).symlink_to(os.readlink(ROOT / name))
        else:
            (checkout / name).write_bytes((ROOT / name).read_bytes())
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(tmp_path))
    _run(sys.executable, "-m", "pip", "wheel", *options, str(checkout), cwd=tmp_path)
    (wheel,) = tmp_path.glob("fastflower-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        archive.extractall(installed)
    of_package = {name for name in held if ".dist-info/" not in name}
    expected = {name for name in tracked if name.startswith("fastflower/")} - {
        "fastflower/kernels",
        "fastflower/configs",
    }
    expected |= {f"fastflower/{name}" for name in tracked if name.startswith(("kernels/", "configs/"))}
    assert of_package == expected
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in held)
    code = (
        "import fastflower.cli, fastflower.kernels.batch_norm, pathlib\n"
        "from fastflower.settings import find_config\n"
        "print(fastflower.__file__, fastflower.kernels.__file__, pathlib.Path(find_config('demo')).is_file())"
    )
    installation = installed / "fastflower"
    printed = _run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).split()
    version = _run(sys.executable, "-m", "fastflower", "--version", cwd=tmp_path, PYTHONPATH=str(installed))
    assert version.startswith(f"fastflower {wheel.name.split('-')[1]}: torch ")
    assert printed == [str(installation / "__init__.py"), str(installation / "kernels/__init__.py"), "True"]


def _run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
