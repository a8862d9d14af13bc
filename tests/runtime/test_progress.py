"""What a run says on screen fits into 80 columns, whatever its figures are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from io import StringIO
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fastflower.runtime.progress import Display, StepMetrics, clock
from fastflower.tables import written

SHARES = ("train_accuracy", "val_accuracy", "val_top5")
ORDER = ("epoch", "lr", "train_loss", "train_accuracy", "val_loss", *SHARES[1:], "val_macro_f1")
VALIDATION = ("val_loss", "val_accuracy", "val_top5", "val_macro_f1")


def shown(row: Mapping[str, float | None]) -> list[str]:
    """The lines that an epoch's row is shown by."""
    stream = StringIO()
    Display(Console(file=stream, width=80), shown=True).row(row)
    return stream.getvalue().splitlines()


def rows() -> st.SearchStrategy[dict[str, float | None]]:
    share, loss = st.floats(0, 1), st.floats(0, 1e300)
    figures: dict[str, st.SearchStrategy[Any]] = {
        "epoch": st.integers(1, 99_999),
        "step": st.integers(1, 10**9),
        "lr": st.floats(1e-99, 100),
        "train_loss": loss,
        "val_loss": loss,
        **dict.fromkeys((*SHARES, "val_macro_f1", "data_wait"), share),
        "images_per_s": st.none() | st.floats(0.1, 9e6),
        "epoch_s": st.floats(0, 3.59e6),
    }
    whole = st.fixed_dictionaries(figures)
    return whole | whole.map(lambda row: {**row, **dict.fromkeys(VALIDATION)})


@given(rows())
def test_the_epoch_table_has_79_characters(row: dict[str, float | None]) -> None:
    above, headings, line = shown(row)
    assert max(map(len, (above, headings, line))) <= 79
    words = line.split()
    assert len(words) == len(headings.split()) == 11
    by_name = dict(zip(ORDER, words, strict=False))
    assert by_name["epoch"] == str(row["epoch"])
    for name in (*SHARES, "val_macro_f1"):
        assert by_name[name] == written(name, row[name])  # as every other table writes it
    for name in ("lr", "train_loss", "val_loss"):
        if (value := row[name]) is not None:
            assert float(by_name[name]) == pytest.approx(value, rel=0.5, abs=5e-5)


def test_columns_are_under_their_headings() -> None:
    row = dict.fromkeys((*ORDER, "data_wait"), 0.5) | {
        "epoch": 3,
        "step": 9,
        "images_per_s": 12345.6,
        "epoch_s": 83.2,
    }
    above, headings, line = shown(row)
    assert above.split() == ["training", "validation"]
    ends = [[match.end() for match in re.finditer(r"\S+", text)] for text in (headings, line)]
    assert ends[0] == ends[1]
    assert line.split() == ["3", "0.5", "0.5000", "50.0%", "0.5000", "50.0%", "50.0%", "0.500", "12,346", "50%", "1:23"]


@pytest.mark.parametrize(
    ("loss", "text"),
    [(0.5, "0.5000"), (99.99991, "99.9999"), (99.99999, "100.000"), (338.0705, "338.070"), (7352.1, "7352.10"),
     (1234567.8, "1234568"), (12345678.9, "1e+07")],
)  # fmt: skip
def test_a_large_loss_loses_decimals(loss: float, text: str) -> None:
    row = dict.fromkeys((*ORDER, "data_wait", "images_per_s", "epoch_s"), 0.5) | {"epoch": 1, "val_loss": loss}
    assert shown(row)[2].split()[4] == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (35999, "9:59:59"), (36000, "10h00m"),
     (360_000, "100h00m")],
)  # fmt: skip
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


metrics = st.builds(
    StepMetrics,
    loss=st.floats(0, 1e300),
    images_per_s=st.floats(0.1, 99_999),
    data_wait=st.floats(0, 1),
    eta_s=st.floats(0, 1e6),
)


@given(metrics, st.integers(1, 999), st.integers(1, 999))
def test_lines_of_a_log_file_fit(state: StepMetrics, epoch: int, step: int) -> None:
    stream = StringIO()
    display = Display(Console(file=stream, width=80), shown=True)
    display.step(f"epoch {epoch}/999", step, 999, state)
    (line,) = stream.getvalue().splitlines()
    assert len(line) <= 80
    assert line.startswith(f"epoch {epoch}/999 step {step}/999  ETA ")


@given(metrics, st.integers(1, 999), st.integers(1, 9999))
def test_the_moving_line_fits_and_shows_when_the_run_ends(state: StepMetrics, epoch: int, step: int) -> None:
    stream = StringIO()
    console = Console(file=stream, width=80, force_terminal=True, color_system=None, legacy_windows=False)
    display = Display(console, shown=True)
    display.task(f"epoch {epoch}/999 train", 9999, step)
    display.step(f"epoch {epoch}/999", step, 9999, state)
    console.print(display._progress.get_renderable())
    (line,) = stream.getvalue().splitlines()
    assert len(line) <= 80
    assert f"{step}/9999" in line
    assert f"ETA {clock(state.eta_s)} loss " in line
