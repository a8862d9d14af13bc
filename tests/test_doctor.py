"""The doctor: what it finds here, and that nothing that is broken or missing stops it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from nvidia import dali

from fastflower import doctor, machine
from fastflower.doctor import Finding, Probe, examine, findings_table, is_ready
from fastflower.errors import UserError
from tests.conftest import fastflower

ROOT = Path(__file__).parents[1]


def run(cwd: Path, path: Path | None = None) -> tuple[int, dict[str, dict[str, Any]]]:
    """`fastflower doctor --json` in a process of its own, which imports from `path` first; what it says by item."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, filter(None, (path, ROOT))))}
    command = [sys.executable, "-m", "fastflower", "doctor", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=120, check=False)
    assert result.stderr == ""
    return result.returncode, {finding["item"]: finding for finding in json.loads(result.stdout)}


def test_it_says_what_is_here_in_little_processor_time(tmp_path: Path) -> None:
    before = os.times()
    code, findings = run(tmp_path)
    after = os.times()
    assert after.children_user - before.children_user + after.children_system - before.children_system < 10
    assert code == 0
    assert findings["torch"]["value"] == torch.__version__
    assert findings["DALI"]["value"] == dali.__version__
    assert findings["cores"]["value"].startswith(f"{machine.cpus()} of")
    assert findings["memory"]["value"].count("GiB") >= 2
    assert findings["this folder"]["value"].startswith(str(tmp_path))
    assert findings["cache folder"]["value"].startswith(os.environ["FASTFLOWER_CACHE"])
    assert (findings["GPU"]["value"] is None) == (not torch.cuda.is_available())
    assert findings["device"]["value"] == ("cuda:0" if torch.cuda.is_available() else "cpu")
    for finding in findings.values():
        assert bool(finding["value"]) != bool(finding["mend"])  # one or the other
    assert list(findings["torch"]) == ["section", "item", "value", "mend", "essential"]


@pytest.mark.parametrize("broken", ["torch", "nvidia/dali"])
def test_a_broken_package_hides_nothing_else(broken: str, tmp_path: Path) -> None:
    package = tmp_path / "packages" / broken
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("")  # of nvidia
    (package / "__init__.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')\n")
    code, findings = run(tmp_path, tmp_path / "packages")
    item, other = ("torch", "DALI") if broken == "torch" else ("DALI", "torch")
    assert code == 1
    assert findings[item]["value"] is None
    assert findings[item]["mend"].startswith("Install it: pip install ")
    assert "libcudart.so.12" in findings[item]["mend"]
    assert findings[other]["value"]
    for name in ("processor", "memory", "this folder", "cache folder", "Python", "Triton"):
        assert findings[name]["value"]
    assert "find_apex" not in findings["apex"]["mend"]
    assert findings["decoding"]["mend"].startswith("It follows from torch and DALI")


def test_a_strangers_apex_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="not NVIDIA's.*pip uninstall apex"):
        doctor._apex()


def test_folders_that_do_not_serve_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTFLOWER_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"file/cache cannot be written: .* or name another folder by FASTFLOWER_CACHE"):
        doctor._cache()
    monkeypatch.setenv("FASTFLOWER_CACHE", str(tmp_path / "new" / "cache"))
    assert doctor._cache().startswith(f"{tmp_path}/new/cache, ")
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(doctor, "LOW_DISK_GIB", float("inf"))
    with pytest.raises(UserError, match=r"has only .* GiB left: make room"):
        doctor._cache()


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 580.95.05; echo 580.95.05", "580.95.05"),
        ("echo NVIDIA-SMI has failed; exit 9", "Mend the NVIDIA driver: nvidia-smi says NVIDIA-SMI has failed"),
        ("exec sleep 60", "Mend the NVIDIA driver. (TimeoutExpired"),
        (None, "install its driver"),
    ],
)
def test_the_driver_is_asked(
    script: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin" if script else str(tmp_path))
    monkeypatch.setattr(doctor, "LOOK_S", 0.5)
    (probe,) = (probe for probe in doctor.PROBES if probe.item == "NVIDIA driver")
    finding = probe()
    assert expected in (finding.value or finding.mend or "")


def test_what_is_missing_has_a_mend_and_decides_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise UserError("Get one.")

    def broken() -> str:
        raise ValueError("two\nlines")

    probes = (Probe("machine", "sun", lambda: "yes"), Probe("machine", "rain", missing))
    monkeypatch.setattr(doctor, "PROBES", probes)
    assert examine() == [
        Finding("machine", "sun", "yes", None, essential=False),
        Finding("machine", "rain", None, "Get one.", essential=False),
    ]
    assert fastflower("doctor").code == 0
    monkeypatch.setattr(doctor, "PROBES", (*probes, Probe("software", "wind", broken, "Wait.", essential=True)))
    result = fastflower("doctor")
    assert result.code == 1
    assert "Wait. (ValueError: two lines)" in " ".join(result.out.replace("│", " ").split())
    assert not is_ready(examine())
    assert findings_table(examine()).row_count == 3


@pytest.mark.gpu
def test_a_gpu_is_described() -> None:
    findings = {finding.item: finding for finding in examine()}
    assert torch.cuda.get_device_name() in (findings["GPU"].value or "")
    assert findings["NVIDIA driver"].value
    assert findings["CUDA"].value
    assert findings["decoding"].value is not None
    assert findings["decoding"].value.startswith("DALI on the GPU")
    is_hopper = torch.cuda.get_device_capability() == (9, 0)
    assert not is_hopper or findings["hardware JPEG decoder"].value
