"""What the check runs on, found in a process of its own: what is broken here must not hang the script.

python -m bench.gpu.survey cuda
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

from bench.harness.common import circumstances
from fastflower.environment import package_versions
from fastflower.files import to_json

LOOK_S = 10  # that a foreign program may take


def survey(kind: str) -> dict[str, Any]:
    """Machine, versions, commit and date, as all benchmarks write them, with the GPU's driver and how many there are.

    An `error` stands beside nothing else where there is no GPU.
    """
    import torch

    if kind == "cuda" and not torch.cuda.is_available():
        return {"error": "torch finds no GPU here: run it where there is one (--device cpu tries the script)."}
    device = torch.device(kind)
    found = circumstances(SimpleNamespace(), device, package_versions("torchvision", "nvidia-cudnn-frontend"))
    del found["settings"]  # each row says its own
    if kind == "cuda":
        found["machine"] |= {"gpus": torch.cuda.device_count(), "driver": driver()}
        found["versions"]["cudnn"] = torch.backends.cudnn.version()
    return found


def driver() -> str | None:
    """The version of NVIDIA's driver; None where nobody tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if not shutil.which(command[0]):
        return None
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=LOOK_S, check=True)
    except (subprocess.SubprocessError, OSError):
        return None
    return next(iter(result.stdout.split()), None)


if __name__ == "__main__":
    print(to_json(survey(sys.argv[1])))
