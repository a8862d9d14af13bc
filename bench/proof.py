"""Whether two states of the code train the same: a short run of each, compared bit for bit.

    python bench/proof.py REVISION [OPTION...]
    make proof BASE=REVISION

The run is `fastflower train --config demo` for two epochs of the built-in flowers, or with other options of training.
What is compared is each epoch's figures, but for times, and all weights. Exit code 1 where anything differs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fastflower.runtime.run_folder import RunFolder, read_rows

CHECKOUT = Path(__file__).resolve().parents[1]
TIMES = ("images_per_s", "epoch_s", "data_wait")
SHORT = ("--train.epochs", "2", "--train.warmup-epochs", "0.5")


def train(code: Path, run: Path, options: Sequence[str]) -> None:
    """Train the demo into the folder `run` by the code that lies in the folder `code`."""
    command = [sys.executable, "-m", "fastflower", "train", "--config", "demo", *SHORT, *options, "--run", str(run)]
    subprocess.run(command, check=True, cwd=code, env=os.environ | {"PYTHONPATH": str(code)}, stdout=sys.stderr)


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two run folders, a sentence each."""
    sentences = []
    for number, (a, b) in enumerate(zip(_rows(one), _rows(other), strict=True), start=1):
        sentences += [f"epoch {number}: {key} is {a.get(key)} and {b.get(key)}" for key in a if a[key] != b.get(key)]
    ours, theirs = (load_file(RunFolder(run).best_weights) for run in (one, other))
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs:
            sentences.append(f"{name} is in one of them only")
        elif not torch.equal(ours[name], theirs[name]):
            largest = (ours[name].double() - theirs[name].double()).abs().max()
            sentences.append(f"{name} differs by at most {largest:.3g}")
    return sentences


def _rows(run: Path) -> list[dict[str, Any]]:
    """The figures of each epoch, without times."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(RunFolder(run).metrics)]


def main(arguments: Sequence[str]) -> int:
    """Compare the checkout with a revision of it; the exit code."""
    if not arguments or arguments[0].startswith("-"):
        print(__doc__)
        return 2
    revision, *options = arguments
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder, "code")
        git = ["git", "-C", str(CHECKOUT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(before), revision], check=True, stdout=sys.stderr)
        try:
            for code, name in ((before, "before"), (CHECKOUT, "now")):
                train(code, Path(folder, name), options)
        finally:
            subprocess.run([*git, "remove", "--force", str(before)], check=True)
        differing = differences(Path(folder, "before"), Path(folder, "now"))
    for sentence in differing:
        print(sentence)
    print(f"{len(differing)} differences from {revision}." if differing else f"The same as {revision}, bit for bit.")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
