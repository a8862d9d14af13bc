"""What the benchmarks share: what a figure depends on, the results file, and the way they end."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastflower.environment import environment
from fastflower.errors import UserError
from fastflower.files import to_json
from fastflower.machine import cpus

if TYPE_CHECKING:
    from rich.console import Console

CORES = cpus()


def circumstances(command: object, device: torch.device, versions: Mapping[str, Any]) -> dict[str, Any]:
    """What a figure depends on: settings, machine and its load before the run, versions, commit, date.

    `versions` are added to those of `fastflower.environment.environment`.
    """
    surroundings = environment(device)
    machine = {name: surroundings.pop(name) for name in ("cpu", "gpu", "cores")}
    git = shlex.join(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"])
    failed, commit = subprocess.getstatusoutput(git)
    return {
        "settings": {key: _without_paths(value) for key, value in vars(command).items()},
        "machine": machine | {"threads": surroundings.pop("torch_threads"), "load": os.getloadavg()[0]},
        "versions": {**surroundings, **versions},
        "commit": None if failed else commit,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _without_paths(value: Any) -> Any:
    """Folders by their names alone: paths are of one machine."""
    if isinstance(value, tuple):
        return [_without_paths(item) for item in value]
    return value.name if isinstance(value, Path) else value


def describe(machine: Mapping[str, Any]) -> str:
    """The machine of `circumstances` in words."""
    return f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, load {machine['load']:.1f} before the run"


def append(out: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add one JSON line a row to the file; UserError where it cannot be written."""
    try:
        with out.open("a", encoding="utf-8") as file:
            file.writelines(to_json(row) + "\n" for row in rows)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}): name another file.") from error


def require_positive(command: object, *options: str) -> None:
    """UserError for one of these options that is below 1; None is fine."""
    for option in options:
        value = getattr(command, option)
        if value is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')} is {value}: give at least 1.")


def start(
    commands: Any, run: Callable[[Any, Console], int], description: str | None, argv: Sequence[str] | None
) -> int:
    """Parse the command line and run it; the exit code, 2 for a user's mistake."""
    # imported here: what is measured by gpu_check.py needs torch alone
    from rich.console import Console

    from bench.harness.words import FlagCreatePairsOff, OmitSubcommandPrefixes, tyro

    conf = (OmitSubcommandPrefixes, FlagCreatePairsOff)
    try:
        return run(tyro.cli(commands, description=description, args=argv, config=conf), Console())
    except UserError as error:
        if not error.said_elsewhere:
            Console(stderr=True).print(f"error: {error}", markup=False, soft_wrap=True)
        return 2
