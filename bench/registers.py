"""Registers, spills and width of memory accesses of every kernel, for GPUs that need not be at hand.

    python bench/registers.py --out bench/results/registers.csv
    python bench/registers.py --sms 90 --dtypes bf16 --channels 64 100

Compiles each form of each kernel ahead of time. Ends with 1 where a form spills, does not compile, or reads or writes
activations in pieces of less than 128 bits though its channels allow them.

Columns of the table (--out):
    triton           version of Triton, whose own ptxas and cuobjdump are used
    sm               compute capability x 10
    dtype, channels  of the activation [N, C, H, W]
    kernel, given    which kernel, and the optional arguments that it is given
    tile, warps      rows x channels that a program works on at once; blocks x channels where blocks are merged
    registers        of a thread
    spilled_bytes    of a thread: what did not fit into registers
    shared_bytes     of a program
    narrowest_bits   of the loads and stores of activations; empty where there are none
"""

from __future__ import annotations

import csv
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where `bench` lies

import triton
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.batch_norm.forms import ACTIVATIONS, Form, list_forms
from bench.batch_norm.layers import DTYPES
from bench.harness.common import CORES, start
from fastflower.errors import UserError
from fastflower.kernels import triton_bn


@dataclass(frozen=True)
class Command:
    """Settings of a run."""

    sms: tuple[int, ...] = (75, 80, 86, 89, 90, 100, 120)
    """Compute capabilities x 10."""
    channels: tuple[int, ...] = (64, 65, 100)
    """Channels of the activation."""
    dtypes: tuple[Literal["bf16", "fp16", "fp32"], ...] = ("bf16", "fp16", "fp32")
    """Types of the activation."""
    out: Path | None = None
    """CSV file to write."""


@dataclass(frozen=True)
class Job:
    """A form to compile for one kind of GPU."""

    sm: int
    dtype: str
    channels: int
    form: Form


@dataclass(frozen=True)
class Row:
    """A line of the table; the columns are explained above."""

    triton: str
    sm: int
    dtype: str
    channels: int
    kernel: str
    given: str
    tile: str
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    narrowest_bits: int | None

    def __str__(self) -> str:
        """For messages."""
        return f"{self.kernel} {self.given} (sm_{self.sm}, {self.dtype}, C = {self.channels}, tile {self.tile})"


def list_jobs(command: Command) -> list[Job]:
    """What to compile; a form that depends on no activation's type comes once, as fp32."""
    jobs = []
    for c in command.channels:
        for number, dtype in enumerate(command.dtypes):
            for form in list_forms(DTYPES[dtype], c):
                if form.reads_activation or number == 0:
                    name = dtype if form.reads_activation else "fp32"
                    jobs += [Job(sm, name, c, form) for sm in command.sms]
    return jobs


def compile_all(jobs: Sequence[Job]) -> list[Row | str]:
    """A row for each job, or a sentence that says why there is none."""
    results: dict[int, Row | str] = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("compiling", total=len(jobs))

        def work(share: range) -> None:
            process = _new_process()
            for number in share:
                try:
                    results[number] = process.submit(compile_form, jobs[number]).result()
                except BrokenProcessPool:
                    results[number] = _failure(jobs[number], "crashes the compiler")
                    process = _new_process()
                progress.advance(task)
            process.shutdown()

        with ThreadPoolExecutor(CORES) as threads:
            list(threads.map(work, [range(first, len(jobs), CORES) for first in range(CORES)]))
    return [results[number] for number in range(len(jobs))]


def _new_process() -> ProcessPoolExecutor:
    """One process, so that it is known which form has crashed it."""
    return ProcessPoolExecutor(1, get_context("spawn"))


def compile_form(job: Job) -> Row | str:
    """The row of the table, or a sentence with the first line of the compiler's message."""
    form = job.form
    fn = getattr(triton_bn, form.kernel)
    constants = {(fn.arg_names.index(name),): value for name, value in form.constants.items()}
    source = ASTSource(fn, form.signature, constants, form.attributes)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", job.sm, 32), options=form.options)
    except Exception as error:  # whatever the compiler's passes and ptxas raise
        return _failure(job, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    registers, spilled = _resources(compiled.asm["cubin"])
    arguments = [name for name, type_ in form.signature.items() if type_ != "constexpr"]
    accesses = list_accesses(compiled.asm["ptx"])
    return Row(
        triton=triton.__version__,
        sm=job.sm,
        dtype=job.dtype,
        channels=job.channels,
        kernel=form.kernel,
        given=form.given,
        tile=form.tile,
        warps=form.options["num_warps"],
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=compiled.metadata.shared,
        narrowest_bits=min((bits for index, bits in accesses if arguments[index] in ACTIVATIONS), default=None),
    )


def _failure(job: Job, reason: str) -> str:
    form = job.form
    return f"{form.kernel} {form.given} (sm_{job.sm}, {job.dtype}, C = {job.channels}, tile {form.tile}): {reason}"


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes that it keeps in memory for want of registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def list_accesses(ptx: str) -> list[tuple[int, int]]:
    """Loads and stores of global memory: the number of the kernel's parameter that points there, and bits at once.

    Raises:
        RuntimeError: an access cannot be read.
    """
    pointers = set(re.findall(r"\.param \.u64 \.ptr .*_param_(\d+)", ptx))
    sources = defaultdict(set)  # of each 64-bit register: registers and parameters that it is computed from
    for target, rest in re.findall(r"^\s*[a-z][\w.:]*\s+(%rd\d+), (.*);", ptx, re.MULTILINE):
        sources[target].update(re.findall(r"%rd\d+|(?<=_param_)\d+", rest))
    accesses = []
    for operation, operands in re.findall(r"^\s*(?:@!?%p\d+ )?([a-z]\S*\.global\S*)\s(.*);", ptx, re.MULTILINE):
        width = re.fullmatch(r"(?:ld|st)\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)", operation)
        address = re.search(r"\[ ?(%rd\d+)", operands)
        reached = [address[1]] if address else []
        for register in reached:  # grows: back to where the address comes from
            reached += sources[register] - pointers - set(reached)
        parameters = set().union(*(sources[register] & pointers for register in reached))
        if width is None or len(parameters) != 1:
            raise RuntimeError(f"{operation} {operands} cannot be read; it comes from parameters {sorted(parameters)}")
        accesses.append((int(parameters.pop()), int(width[1] or 1) * int(width[2])))
    return accesses


def find_faults(row: Row) -> list[str]:
    """What is wrong with a compiled form."""
    faults = []
    if row.spilled_bytes:
        faults.append(f"{row} spills {row.spilled_bytes} bytes a thread")
    vectors = row.channels * DTYPES[row.dtype].itemsize % 16 == 0  # every row begins at a multiple of 16 bytes
    if vectors and row.narrowest_bits is not None and row.narrowest_bits < 128:
        faults.append(f"{row} moves {row.narrowest_bits} bits at once")
    return faults


def run(command: Command, console: Console) -> int:
    """Compile, print, write --out.

    Raises:
        UserError: Triton's interpreter is on, which replaces the compiler, or --out cannot be written.
    """
    if knobs.runtime.interpret:
        raise UserError("TRITON_INTERPRET is set, which leaves nothing to compile: unset it.")
    results = compile_all(list_jobs(command))
    rows = [result for result in results if isinstance(result, Row)]
    console.print(make_table(rows, command))
    if command.out:
        write_csv(command.out, rows)
    faults = [result for result in results if isinstance(result, str)] + [
        fault for r in rows for fault in find_faults(r)
    ]
    for fault in faults:
        console.print(fault, markup=False, soft_wrap=True)
    return 1 if faults else 0


def make_table(rows: Sequence[Row], command: Command) -> Table:
    """The most registers of a thread by kernel and kind of GPU, over all types and channels."""
    table = Table("kernel", *(f"sm_{sm}" for sm in command.sms), title="registers of a thread, the most of all forms")
    most: defaultdict[tuple[str, int], int] = defaultdict(int)
    for row in rows:
        most[row.kernel, row.sm] = max(most[row.kernel, row.sm], row.registers)
    for kernel in dict.fromkeys(row.kernel for row in rows):
        table.add_row(kernel, *(str(most[kernel, sm]) for sm in command.sms))
    return table


def write_csv(out: Path, rows: Sequence[Row]) -> None:
    """Write the table.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        with out.open("w", encoding="utf-8") as file:
            lines = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
            lines.writeheader()
            lines.writerows(asdict(row) for row in rows)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}): name another file.") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit code, 2 for a user's mistake."""
    return start(Command, run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
