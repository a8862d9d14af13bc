"""How the resampler is compiled: for whole pixels at once or plainly, kept for later or not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastflower.arrays import Bytes
from fastflower.data import reading, resample
from fastflower.data.compiled import compiled, is_tested
from fastflower.data.geometry import Frame
from fastflower.data.resample import _taps, resize_row, resize_row_by_vectors
from tests.conftest import ROOT
from tests.data.test_resample import resize


@given(
    size=st.integers(1, 300),
    resized=st.integers(1, 300),
    part=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=300)
def test_vectors_are_the_plain_loop_to_the_bit(size: int, resized: int, part: tuple[float, float], seed: int) -> None:
    """Of any part of a row, before anything is rounded."""
    start, end = sorted(round(share * (resized - 1)) for share in part)
    begin, stop, first, weights = _taps(size, 0.0, resized, start, end - start + 1)
    columns = 3 * len(first)
    line = np.zeros((1, 3 * (stop - begin) + 3 * weights.shape[1] + 1), np.float32)
    line[0, : 3 * (stop - begin)] = np.random.default_rng(seed).uniform(0, 255, 3 * (stop - begin))
    rows = np.full((2, 3, columns + 1), np.nan, np.float32)
    resize_row(line, first, weights, rows[0], 1)
    resize_row_by_vectors(line, first, weights, rows[1], 1)
    np.testing.assert_array_equal(rows[0, 1, :columns].view(np.uint32), rows[1, 1, :columns].view(np.uint32))
    assert np.isnan(rows[:, [0, 2]]).all()


@pytest.mark.parametrize(
    ("version", "has"),
    [
        ("0.59.1", False),
        ("0.60.0", True),
        ("0.60.0rc1", True),
        ("0.65.1", True),
        ("0.68.1", True),
        ("0.69.0", False),
        ("0.69.0dev0+12.gabc", False),
        ("0.7.0", False),
        ("0.600.0", False),
        ("1.60.0", False),
        ("0+unknown", False),
        ("", False),
    ],
)
def test_vectors_are_for_versions_of_numba_that_they_were_tested_with(version: str, has: bool) -> None:
    assert is_tested(version) == has


def some_pictures() -> list[Bytes]:
    """Parts of resized pictures, larger and smaller, mirrored or not."""
    rng, made = np.random.default_rng(0), []
    for _ in range(40):
        picture = rng.integers(0, 256, (*rng.integers(1, 90, 2), 3), np.uint8)
        height, width = rng.integers(4, 120, 2).tolist()
        kept = Frame(height, width, height // 4, width // 5, height // 2, width // 3 + 1)
        made.append(resize(picture, kept, flip=bool(rng.integers(2))))
    return made


NOWHERE = {"FASTFLOWER_CACHE": "/dev/null/cache", "NUMBA_CACHE_DIR": "/dev/null/code", "HOME": "/dev/null"}


def test_another_version_of_numba_gets_the_plain_loop_and_the_same_pictures(tmp_path: Path) -> None:
    """Where its code cannot be kept: compiled anew in each process."""
    assert is_tested(numba.__version__), "then this test sees one of them only"
    code = f"""
import numba
numba.__version__ = "99.0.0"
from fastflower.data import resample
from fastflower.data.compiled import compiled, is_tested
assert resample._resize_row is resample.resize_row
import numpy as np
from tests.data.test_resample_code import some_pictures
np.savez({str(tmp_path / "plain.npz")!r}, *some_pictures())
assert not resample.resize_row_by_vectors.signatures
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | NOWHERE
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert resample._resize_row is resize_row_by_vectors
    assert reading.read_pieces is reading.read_without_lock
    with np.load(tmp_path / "plain.npz") as plain:
        for number, picture in enumerate(some_pictures()):
            np.testing.assert_array_equal(plain[f"arr_{number}"], picture)


@pytest.mark.slow  # the test above does the same with less to compile
def test_vectors_work_where_their_code_cannot_be_kept() -> None:
    code = "import numpy as np; from tests.data.test_resample import Frame, resize"
    code += "; resize(np.zeros((4, 4, 3), np.uint8), Frame(4, 4, 0, 0, 4, 4))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | NOWHERE
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_its_code_is_kept_in_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(number: int) -> int:
        return 2 * number

    def files(folder: Path) -> int:
        return sum(path.is_file() for path in folder.rglob("*"))

    for named in ("", str(tmp_path / "named")):
        monkeypatch.setattr("numba.core.config.CACHE_DIR", named)
        monkeypatch.setenv("FASTFLOWER_CACHE", str(tmp_path / "cache"))
        assert compiled()(twice)(3) == 6
        assert vars(numba.core.config)["CACHE_DIR"] == named, "of all others, where it was"
    assert files(tmp_path / "cache" / "numba") == files(tmp_path / "named") == 2  # an index and the code
    monkeypatch.setattr("numba.core.config.CACHE_DIR", "")
    for place in (tmp_path / "cache" / "numba", tmp_path / "named"):
        shutil.rmtree(place)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTFLOWER_CACHE", str(tmp_path / "file"))
    assert compiled(error_model="numpy")(twice)(3) == 6
    assert not list(tmp_path.rglob("*.nb*"))
