"""tyro, which bench/ alone needs."""

from __future__ import annotations

import runpy
import subprocess
import sys

import pytest

from tests.conftest import ROOT

WORDS = str(ROOT / "bench/harness/words.py")


def test_without_tyro_it_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tyro", None)
    with pytest.raises(SystemExit, match=r'^error: tyro, .* is missing: pip install -e "\.\[bench\]"\.$'):
        runpy.run_path(WORDS)


def test_fastflower_starts_without_tyro() -> None:
    code = "import sys; sys.modules['tyro'] = None; from fastflower.cli import main; main()"
    command = [sys.executable, "-c", code, "train", "-h"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--train.lr NUMBER" in done.stdout
