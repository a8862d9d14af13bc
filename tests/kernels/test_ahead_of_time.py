"""Every kernel compiles for GPUs that are not here, without spills and with 128-bit loads and stores.

The compiler runs in a process of its own: where there is no GPU this one has Triton's interpreter.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench.registers import Row, find_faults, list_accesses
from tests.conftest import ROOT

TABLE = ROOT / "bench" / "results" / "registers.csv"
SMS = ("75", "80", "86", "89", "90", "100", "120")
# fmt: off
ROW = Row("3.8.0", 90, "bf16", 24, "normalize_relu", "", "64x32", 4, registers=40, spilled_bytes=0, shared_bytes=0, narrowest_bits=128)  # noqa: E501
PTX = """
.visible .entry kernel(
\t.param .u64 .ptr .global .align 1 kernel_param_0,
\t.param .u64 .ptr .global .align 1 kernel_param_1,
\t.param .u32 kernel_param_2
)
{
\tld.param.b64 \t%rd4, [kernel_param_0];
\tld.param.b64 \t%rd5, [kernel_param_1];
\tmul.wide.s32 \t%rd6, %r1, 2;
\tadd.s64 \t%rd1, %rd4, %rd6;
\t@%p1 ld.global.v4.b32 { %r11, %r12, %r13, %r14 }, [ %rd1 + 0 ];
\tadd.s64 \t%rd2, %rd5, %rd6;
\tadd.s64 \t%rd2, %rd2, 64;
\t@!%p1 st.global.b16 [ %rd2 + 0 ], { %rs1 };
\tst.shared.b32 [ %r9 ], %r10;
}
"""
# fmt: on


def compile_ahead(folder: Path, **options: tuple[str, ...]) -> list[dict[str, str]]:
    """Rows of the table for these options of bench/registers.py, which must find no fault."""
    out = folder / "registers.csv"
    command = [sys.executable, str(ROOT / "bench" / "registers.py"), "--out", str(out)]
    for name, values in options.items():
        command += [f"--{name}", *values]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")  # what was compiled before counts for nothing
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return read(out)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.timeout(1800)  # the slow ones take minutes of two cores
@pytest.mark.parametrize(
    ("sms", "channels", "dtypes"),
    [
        (("75", "90"), ("64",), ("bf16",)),
        pytest.param(("75", "90"), ("65",), ("fp32",), marks=pytest.mark.slow),  # rows that begin anywhere
        pytest.param(SMS, ("64", "65", "100"), ("bf16", "fp16", "fp32"), marks=pytest.mark.slow),
        pytest.param(
            ("90",), ("1", "3", "6", "17", "24", "48", "512", "2048"), ("bf16", "fp32"), marks=pytest.mark.slow
        ),
    ],
)
def test_all_forms_compile_without_spills_and_with_wide_accesses(
    sms: tuple[str, ...], channels: tuple[str, ...], dtypes: tuple[str, ...], tmp_path: Path
) -> None:
    rows = compile_ahead(tmp_path, sms=sms, channels=channels, dtypes=dtypes)
    assert {row["sm"] for row in rows} == set(sms)
    assert {row["channels"] for row in rows} == set(channels)
    assert {row["spilled_bytes"] for row in rows} == {"0"}
    if channels == ("64",):
        assert {row["narrowest_bits"] for row in rows} == {"128", ""}
    if channels == ("65",):
        assert {row["narrowest_bits"] for row in rows} == {"32", ""}
    # the committed table is of these kernels and tiles; registers may differ with Triton's version
    forms = ("sm", "dtype", "channels", "kernel", "given", "tile", "warps")
    committed = {tuple(row[name] for name in forms) for row in read(TABLE)}
    listed = {row["channels"] for row in read(TABLE)}
    compiled = {tuple(row[name] for name in forms) for row in rows if row["channels"] in listed}
    assert compiled <= committed, "bench/results/registers.csv is out of date: python bench/registers.py --out <it>"


def test_accesses_are_followed_back_to_the_kernels_arguments() -> None:
    assert list_accesses(PTX) == [(0, 128), (1, 16)]
    with pytest.raises(RuntimeError, match="atom.global.add.f32"):
        list_accesses(PTX + "\tatom.global.add.f32 \t%f1, [ %rd1 ], %f2;\n")


def test_spills_and_narrow_accesses_are_faults() -> None:
    assert find_faults(ROW) == []
    assert find_faults(replace(ROW, channels=25, narrowest_bits=16)) == []
    assert find_faults(replace(ROW, narrowest_bits=None)) == []  # touches no activation
    (fault,) = find_faults(replace(ROW, spilled_bytes=8))
    assert fault == "normalize_relu  (sm_90, bf16, C = 24, tile 64x32) spills 8 bytes a thread"
    assert len(find_faults(replace(ROW, dtype="fp32", narrowest_bits=64, spilled_bytes=8))) == 2
