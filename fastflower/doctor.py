"""What this machine gives, what fastflower will use of it, and what is missing and how to get it.

Each probe imports what it asks about by itself, so that one broken package hides nothing else.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.table import Table
from rich.text import Text

from fastflower import machine
from fastflower.config import Config
from fastflower.errors import UserError
from fastflower.files import cache_dir, existing_part, home_cache, is_writable

if TYPE_CHECKING:
    import torch

GIB = 2**30
LOW_DISK_GIB = 2  # the cached index and synthetic flowers are small; a checkpoint of resnet152 takes 0.5
LOOK_S = 5  # that a foreign program may take

Section = Literal["machine", "software", "will be used"]


@dataclass(frozen=True)
class Finding:
    """What one probe found."""

    section: Section
    item: str
    value: str | None  # None: it is not there, or cannot be used
    mend: str | None  # what to do about that
    essential: bool  # nothing runs without it


@dataclass(frozen=True)
class Probe:
    """Something to look for."""

    section: Section
    item: str
    look: Callable[[], str]  # raises UserError with the mend, or anything at all, where it is missing
    mend: str = ""  # for what `look` raises that is no UserError
    essential: bool = False

    def __call__(self) -> Finding:
        """What it finds; never raises."""
        value, mend = None, None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what matters of them is found anyway
                value = self.look()
        except UserError as error:
            mend = str(error)
        except Exception as error:  # a broken installation raises whatever it runs into
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            mend = f"{self.mend} ({reason})".strip()
        return Finding(self.section, self.item, value, mend, self.essential)


def examine() -> list[Finding]:
    """All findings about this machine, within seconds."""
    return [probe() for probe in PROBES]


def is_ready(findings: Sequence[Finding]) -> bool:
    """Whether nothing essential is missing."""
    return all(finding.value is not None for finding in findings if finding.essential)


def findings_table(findings: Sequence[Finding]) -> Table:
    """For a terminal."""
    grid = Table("", "", "what to do")
    for number, finding in enumerate(findings):
        if number and finding.section != findings[number - 1].section:
            grid.add_section()
        style = "" if finding.value else "bold red" if finding.essential else "yellow"
        value = Text(finding.value or "missing", style=style)
        grid.add_row(Text(finding.item), value, Text(finding.mend or ""))
    return grid


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _cores(sources: machine.Sources = machine.LINUX) -> str:
    quota = machine.cpu_quota(sources)
    limited = "" if quota is None else f" (affinity {len(os.sched_getaffinity(0))}, quota {quota:g})"
    nodes, bound = machine.nodes(sources), ", bound to these" if machine.is_bound(sources) else ""
    spread = f", {nodes} NUMA nodes" if nodes > 1 else ""
    return f"{machine.cpus(sources)} of {os.cpu_count()} may be used{limited}{bound}{spread}"


def _memory(sources: machine.Sources = machine.LINUX) -> str:
    memory = machine.memory(sources)
    limited = f", limited to {memory.limit / GIB:.1f} GiB" if memory.limit else ""
    return f"{memory.total / GIB:.1f} GiB{limited}, {memory.free / GIB:.1f} GiB free"


def _cpu_bf16() -> str:
    from fastflower.runtime.device import cpu_has_bf16

    if not cpu_has_bf16():
        raise UserError(
            "On this CPU --amp computes in fp32; it gains speed on a GPU, or a CPU with AVX512_BF16 or AMX."
        )
    return "yes"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if not shutil.which(command[0]):
        raise UserError("If there is an NVIDIA GPU here, install its driver (in a container: start it with the GPU).")
    result = subprocess.run(command, capture_output=True, text=True, timeout=LOOK_S, check=False)
    if result.returncode:
        raise UserError(f"Mend the NVIDIA driver: nvidia-smi says {' '.join((result.stdout + result.stderr).split())}")
    return result.stdout.splitlines()[0]


def _gpu() -> str:
    import torch

    from fastflower.runtime.device import node_of_gpu

    if not torch.version.cuda:
        raise UserError("This torch is built without CUDA: install one with it, see https://pytorch.org/get-started.")
    if not torch.cuda.is_available():
        raise UserError(
            f"torch finds no GPU: everything runs on the CPU, slowly. If there is one, its driver must support CUDA "
            f"{torch.version.cuda}, which this torch is built for."
        )
    gpus = []
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        node = node_of_gpu(number)
        near = "" if node is None else f", NUMA node {node}"
        gpus.append(f"{gpu.name}, {gpu.total_memory / GIB:.1f} GiB, compute capability {gpu.major}.{gpu.minor}{near}")
    return "\n".join(gpus)


def _cuda() -> str:
    import torch

    if not torch.version.cuda:
        raise UserError("This torch is built without CUDA: install one with it, see https://pytorch.org/get-started.")
    return f"{torch.version.cuda} (torch's)"


def _jpeg_decoder() -> str:
    """Asks nvJPEG, which DALI decodes by.

    nvjpegCreateSimple(&handle), nvjpegGetHardwareDecoderInfo(handle, &engines, &cores): nvJPEG's documentation, 2.3.1.
    """
    import nvidia

    library = next(file for folder in nvidia.__path__ for file in Path(folder).glob("*/lib/libnvjpeg.so.*"))
    nvjpeg, handle = ctypes.CDLL(str(library)), ctypes.c_void_p()
    engines, cores = ctypes.c_uint(), ctypes.c_uint()
    failed = nvjpeg.nvjpegCreateSimple(ctypes.byref(handle))
    if not failed:
        failed = nvjpeg.nvjpegGetHardwareDecoderInfo(handle, ctypes.byref(engines), ctypes.byref(cores))
        nvjpeg.nvjpegDestroy(handle)
    if failed or not engines.value:
        raise UserError("A100, H100 and later data-center GPUs have one; elsewhere the GPU's cores or the CPU decode.")
    return f"{engines.value} engines of {cores.value} cores"


def _free(path: Path) -> str:
    """A folder, which may not be there yet, and the space for it."""
    existing = existing_part(path)
    if not is_writable(path):
        raise UserError(f"{path} cannot be written: change the permissions of {existing}, or name another folder")
    free = shutil.disk_usage(existing).free / GIB
    if free < LOW_DISK_GIB:
        raise UserError(f"{path} has only {free:.1f} GiB left: make room, or name another folder")
    return f"{path}, {free:.0f} GiB free"


def _cache() -> str:
    lasting = os.environ.get("FASTFLOWER_CACHE") or home_cache()
    try:
        return _free(cache_dir()) + ("" if lasting else "; at home none can be written")
    except UserError as error:
        raise UserError(f"{error} by FASTFLOWER_CACHE.") from error


def _here() -> str:
    try:
        return _free(Path.cwd())
    except UserError as error:
        raise UserError(f"{error} by --run.") from error


def _torch() -> str:
    import torch

    return torch.__version__


def _dali() -> str:
    from nvidia import dali

    version: str = dali.__version__
    return version


def _triton() -> str:
    import triton

    version: str = triton.__version__
    return version


def _apex() -> str:
    from fastflower.environment import find_apex

    package = find_apex()
    if package == "nvidia":
        return "NVIDIA's"
    if package:
        raise UserError("The package apex that is installed is not NVIDIA's; nothing here uses it: pip uninstall apex.")
    raise UserError("Only --train.optimizer apex_sgd needs it: build it from https://github.com/NVIDIA/apex.")


def _compiler() -> str:
    compiler = next(filter(None, map(shutil.which, ("gcc", "clang", "cc"))), None)
    if not compiler:
        raise UserError("torch.compile and Triton need one on a GPU: install gcc, or train with --train.no-compile.")
    return compiler


def _device() -> str:
    from fastflower.runtime.device import choose_device

    return str(choose_device("auto"))


def _precision() -> str:
    from fastflower.runtime.device import choose_device, choose_precision

    return str(choose_precision(True, "auto", choose_device("auto")))


def _compile() -> str:
    from fastflower.runtime.device import choose_device

    return "yes" if choose_device("auto").type == "cuda" else "no: only on a GPU, or by --train.compile"


def _decoding() -> str:
    import torch

    from fastflower.data.batches import choose_engine
    from fastflower.runtime.device import choose_device, near
    from fastflower.runtime.distributed import Ranks

    device = choose_device("auto")
    with near(device):
        engine = choose_engine(Config().data, device, Ranks())
    shared = ""
    gpus = [torch.device("cuda", number) for number in range(torch.cuda.device_count() if device.type == "cuda" else 0)]
    if len(gpus) > 1:
        least = min(_threads(gpus))
        shared = f"; {least} in each of {len(gpus)} processes, one for each GPU"
    return f"DALI on the {engine.device.upper()}, {engine.threads} CPU threads{shared}"


def _threads(gpus: Sequence[torch.device]) -> list[int]:
    """What training takes in each of as many processes as there are GPUs."""
    from fastflower.data.batches import choose_engine
    from fastflower.runtime.device import near
    from fastflower.runtime.distributed import Ranks

    processors, threads = [], []
    for gpu in gpus:
        with near(gpu):
            processors.append(os.sched_getaffinity(0))
    for number, gpu in enumerate(gpus):
        sharing = sum(not own.isdisjoint(processors[number]) for own in processors)
        ranks = Ranks(number, len(gpus), number, len(gpus), sharing=sharing)
        with near(gpu):
            threads.append(choose_engine(Config().data, gpu, ranks).threads)
    return threads


def _norm() -> str:
    from fastflower.models.layers import choose_norm
    from fastflower.runtime.device import choose_device

    return {"torch": "torch's", "triton": "our Triton kernels"}[choose_norm("auto", choose_device("auto"))]


_NEEDS = "It follows from torch and DALI, which must be importable."
PROBES = (
    Probe("machine", "system", platform.platform),
    Probe("machine", "processor", _processor),
    Probe("machine", "cores", _cores),
    Probe("machine", "memory", _memory),
    Probe("machine", "bf16 on the CPU", _cpu_bf16, "Install torch, which knows."),
    Probe("machine", "NVIDIA driver", _driver, "Mend the NVIDIA driver."),
    Probe("machine", "GPU", _gpu, "Install torch, which looks for it."),
    Probe("machine", "hardware JPEG decoder", _jpeg_decoder, "Install DALI, which brings nvJPEG."),
    Probe("machine", "cache folder", _cache),
    Probe("machine", "this folder", _here),
    Probe("software", "Python", platform.python_version),
    Probe("software", "torch", _torch, "Install it: pip install torch, see https://pytorch.org/get-started.", True),
    Probe("software", "CUDA", _cuda, "Install torch, which brings it."),
    Probe("software", "DALI", _dali, "Install it: pip install nvidia-dali-cuda120.", True),
    Probe(
        "software", "Triton", _triton, "It comes with torch on Linux: pip install triton, of the version torch pins."
    ),
    Probe("software", "apex", _apex),
    Probe("software", "C compiler", _compiler),
    Probe("will be used", "device", _device, _NEEDS),
    Probe("will be used", "with --amp", _precision, _NEEDS),
    Probe("will be used", "torch.compile", _compile, _NEEDS),
    Probe("will be used", "decoding", _decoding, _NEEDS),
    Probe("will be used", "BatchNorm + ReLU", _norm, _NEEDS),
)
