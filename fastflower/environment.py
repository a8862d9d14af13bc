"""What a run ran on: written beside its results, so that its figures can be read later."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastflower import machine

if TYPE_CHECKING:
    import torch

_DALI = ("nvidia-dali-cuda120", "nvidia-dali-cuda130")  # one for each CUDA; the first is installed with fastflower


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, processor, GPU and threads."""
    import torch  # here, so that `find_apex` can be asked where these are broken

    return {
        "python": platform.python_version(),
        **package_versions("fastflower", "triton", "numpy"),
        "torch": torch.__version__,
        "dali": next((version for version in package_versions(*_DALI).values() if version), None),
        "apex": find_apex(),
        "cpu": torch.cpu.get_capabilities().get("cpu_name", platform.processor()),
        "cores": machine.cpus(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
    }


def package_versions(*names: str) -> dict[str, str | None]:
    """Versions of packages by their names; None where one is not installed."""
    installed: dict[str, str | None] = {}
    for name in names:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = None
    return installed


def versions() -> str:
    """One line: the versions of fastflower and of what it runs on, as installed; nothing is imported for them."""
    installed = package_versions("fastflower", "torch", "triton", *_DALI)
    own = installed["fastflower"] or f"(not installed, from {Path(__file__).parent})"
    dali = next((installed[name] for name in _DALI if installed[name]), None)
    others = {"torch": installed["torch"], "DALI": dali, "Triton": installed["triton"]}
    others["Python"] = platform.python_version()
    return f"fastflower {own}: " + ", ".join(f"{name} {version or 'missing'}" for name, version in others.items())


def find_apex() -> Literal["nvidia", "another package"] | None:
    """Whether a package named apex is installed, and whether it is NVIDIA's.

    The one on PyPI is an unrelated project. Nothing is imported, so that it cannot do harm here.
    """
    try:
        spec = importlib.util.find_spec("apex")
    except (ImportError, ValueError):
        return "another package"
    if spec is None:
        return None
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    is_nvidias = any((folder / "optimizers" / "fused_sgd.py").is_file() for folder in folders)
    return "nvidia" if is_nvidias else "another package"
