"""Processes that tests start: real ones by torchrun, and forked ones, which need not import torch and DALI.

A forked process is as good as a real one for all but the start and the end of Python itself: it has an environment,
output, signals and an exit code of its own. It finds no GPU: what CUDA has begun cannot be forked.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection, forkserver, get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

from torch._C._distributed_c10d import TCPStore

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = dict(os.environ)  # before any test has changed it
GRACE_S = 30  # what torchrun leaves the others when one has failed


@dataclass(frozen=True)
class Result:
    """What a command left behind; what several processes write comes one after the other."""

    code: int
    out: str
    err: str


def in_process(main: Callable[[], object], *words: object, **environment: str) -> Result:
    """Run a program's main function, which takes `words` from the command line, in a process of its own."""
    return _run(main, words, [environment])


def in_ranks(main: Callable[[], object], *words: object, **environment: str) -> Result:
    """Run it in two processes, which find each other as those that torchrun starts do.

    The exit code is the first that is not 0. Where one fails, the other has as long as with torchrun to end too.
    """
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    common |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    ranks = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return _run(main, words, [rank | environment for rank in ranks])


def torchrun(
    script: Path, *arguments: object, limit_s: int, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a script in two processes of one thread each on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*command, "--", str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=limit_s,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
        check=False,
    )


def _run(main: Callable[[], object], words: Sequence[object], environments: Sequence[Mapping[str, str]]) -> Result:
    _start_server()
    with TemporaryDirectory() as folder:
        streams = [[Path(folder, f"{name}{number}") for name in ("out", "err")] for number in range(len(environments))]
        processes = [
            get_context("forkserver").Process(
                target=_child, args=(main, list(map(str, words)), os.environ | environment, files)
            )
            for environment, files in zip(environments, streams, strict=True)
        ]
        try:
            for process in processes:
                process.start()
            while running := [process for process in processes if process.exitcode is None]:
                failed = any(process.exitcode for process in processes)
                if not connection.wait([process.sentinel for process in running], GRACE_S if failed else None):
                    break  # the other waits in vain
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
        codes = [process.exitcode for process in processes if process.exitcode]
        out, err = (
            "".join(path.read_text(errors="replace") for path in files if path.is_file())
            for files in zip(*streams, strict=True)
        )
        return Result(codes[0] if codes else 0, out, err)


def _start_server() -> None:
    """Start the process that is forked, unless it runs; it stays until the tests end."""
    forkserver.set_forkserver_preload(["tests.preloaded"])
    changed = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with mock.patch.dict(os.environ, ENVIRONMENT | changed, clear=True):
        forkserver.ensure_running()


def _child(main: Callable[[], object], words: list[str], environment: dict[str, str], files: Sequence[Path]) -> None:
    assert "tests.preloaded" in sys.modules, "each process imports everything anew"
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in enumerate(files, 1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    sys.argv = [main.__module__, *words]
    sys.exit(main())  # type: ignore[arg-type]
