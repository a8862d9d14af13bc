"""The check of a GPU: what becomes of stages that fail, crash and hang, what is written, and what follows from it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_check
from bench.gpu.results import conclusions, last_runs, markdown
from bench.gpu.runner import ROOT
from bench.gpu.stages import STAGES
from bench.gpu.task import FailedError, Stage, Task, attempt
from bench.gpu_check import main
from bench.harness.missing import MissingError
from tests.bench.gpu.stand_ins import stage

ALONE = {"exact", "steps", "resnet50", "resnet18", "kernel_rates", "idle", "graphs", "two_gpus"}
AROUND = {
    "machine": {"cpu": "A CPU", "gpu": None, "cores": 2},
    "versions": {"torch": "2.11", "triton": "3.6", "dali": None},
    "commit": "abc",
    "date": "2026-01-01T00:00:00+00:00",
}


@pytest.fixture
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is known already, which takes seconds to find out."""
    monkeypatch.setattr(gpu_check, "look_around", lambda kind: AROUND)


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def run(out: Path, stages: Sequence[Stage], *options: str) -> int:
    return main(["--device", "cpu", "--out", str(out), *options], stages)


def is_there(pid: int) -> bool:
    """Whether a process runs; one that is dead and not yet buried does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.usefixtures("_known")
def test_all_go_on_whatever_becomes_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    out = tmp_path / "new" / "out.jsonl"
    stages = [stage("fails"), stage("crashes"), stage("leaves"), stage("raises"), stage("hangs", 0.5), stage("lacks")]
    stages += [stage("floods"), stage("works", needs=("no_such_module", "json", "nor_this")), stage("works")]
    stages[-2] = Stage("needy", "", "tests.bench.gpu.stand_ins:works", 60, ("no_such_module", "json", "nor_this"))
    assert run(out, stages) == 1
    ends = {row["stage"]: row for row in rows(out) if "result" in row}
    assert {name: row["result"] for name, row in ends.items()} == {
        **dict.fromkeys(("fails", "crashes", "leaves", "raises", "hangs"), "failed"),
        **dict.fromkeys(("lacks", "needy"), "left out"),
        **dict.fromkeys(("floods", "works"), "passed"),
    }
    figures = {name: row["figure"] for name, row in ends.items()}
    assert figures["fails"] == "dx is wrong | by 3"
    assert figures["crashes"] == "killed by SIGSEGV: last words"
    assert figures["leaves"] == "ended with code 3"
    assert figures["raises"] == "ended with code 1: ValueError: nobody expected this"
    assert any("in raises" in line for line in ends["raises"]["said"])  # the traceback
    assert figures["hangs"] == "not done after 2 s, its limit"
    assert figures["lacks"] == "needs two GPUs"
    assert figures["needy"] == "needs no_such_module, nor_this, which cannot be imported here"
    assert ends["works"]["quotes"] == ["A network: 42 images/s."]
    # what was measured before the end is kept, with what it depends on
    assert [row["value"] for row in rows(out) if "value" in row] == [2, 3, 1.5]
    assert [row["interpreted"] for row in rows(out) if "interpreted" in row] == [None]
    assert all(row.items() >= AROUND.items() for row in rows(out))
    (pids,) = (row["pids"] for row in rows(out) if "pids" in row)
    assert len(pids) == 2
    assert not any(map(is_there, pids))
    shown = capsys.readouterr().out
    assert re.search(r"^works +passed +\d+ s  42 images/s$", shown, re.MULTILINE)
    assert "    half way\n" in shown
    assert "5 of 9 stages failed: fails, crashes, leaves, raises, hangs." in shown
    table = out.with_suffix(".md").read_text()
    assert r"| fails | failed | dx is wrong \| by 3 | " in table
    assert table.count("\n| ") == 1 + len(stages)
    assert "torch 2.11, Triton 3.6, DALI missing" in table


@pytest.mark.usefixtures("_known")
def test_only_and_slices_add_up(tmp_path: Path) -> None:
    out, stages = tmp_path / "out.jsonl", [stage("works"), stage("fails"), stage("lacks")]
    assert run(out, stages, "--only", "lacks", "works") == 0
    assert [row["stage"] for row in rows(out) if "result" in row] == ["works", "lacks"]
    assert "| fails |" not in out.with_suffix(".md").read_text()
    assert run(out, stages, "--only", "fails") == 1
    table = out.with_suffix(".md").read_text()
    assert re.findall(r"^\| (\w+) \| ", table, re.MULTILINE) == ["stage", "works", "fails", "lacks"]


@pytest.mark.usefixtures("_known")
def test_time_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A stage has no more than is left, and is not begun for next to nothing; what that cuts short has not failed."""
    monkeypatch.setattr(gpu_check, "LEAST_S", 1)
    out = tmp_path / "out.jsonl"
    assert run(out, [stage("works")]) == 0
    before = out.with_suffix(".md").read_text()
    assert run(out, [stage("hangs"), stage("works")], "--minutes", str(2 / 60)) == 0
    assert [row["result"] for row in rows(out) if "result" in row] == ["passed"]
    assert out.with_suffix(".md").read_text() == before
    shown = capsys.readouterr().out
    assert re.search(r"^hangs +left out +\d+ s  not done in the 2 s that were left$", shown, re.MULTILINE)
    assert "No time was left for hangs, works: --only hangs works" in shown


def test_looking_around_takes_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def look_around(kind: str) -> dict[str, Any]:
        time.sleep(1)
        return AROUND

    monkeypatch.setattr(gpu_check, "look_around", look_around)
    assert run(tmp_path / "out.jsonl", [stage("works")], "--minutes", str(1 / 60)) == 0
    assert "No time was left for works: --only works" in capsys.readouterr().out


@pytest.mark.usefixtures("_known")
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--only", "works", "wroks", "nor"], "there is no stage wroks, nor: choose from works, fails."),
        (["--minutes", "0"], "--minutes is 0: give more than 0."),
        (["--out", "."], "--out . cannot be written (Is a directory): name another file."),
        (["--out", "{folder}/other.txt"], "other.txt holds something else than results: name another file."),
        (["--out", "{folder}/others.jsonl"], "others.jsonl holds something else than results: name another file."),
        (["--out", "{folder}/taken.jsonl"], "taken.jsonl cannot be written"),
        (["--out", "{folder}/fast.jsonl"], "fast.jsonl holds results of Fast GPU: name another file."),
        (["--out", "{folder}/out.md"], "out.md is where the table would be: name a file that ends in .jsonl."),
    ],
)
def test_mistakes_end_with_a_sentence(
    options: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.txt").write_text("no results\n")
    (tmp_path / "others.jsonl").write_text('{"mode": "loader"}\n')
    (tmp_path / "taken.md").mkdir()
    (tmp_path / "fast.jsonl").write_text(json.dumps(end("passed")) + "\n")
    given = [option.format(folder=tmp_path) for option in options]
    assert (
        main(["--device", "cpu", "--out", str(tmp_path / "out.jsonl"), *given], [stage("works"), stage("fails")]) == 2
    )
    assert sentence in capsys.readouterr().err
    assert (tmp_path / "other.txt").read_text() == "no results\n"
    written = [row for path in tmp_path.glob("*.jsonl") for row in rows(path) if "stage" in row]
    assert [row["stage"] for row in written] == ["passed"]  # as before


@pytest.mark.usefixtures("_known")
@pytest.mark.parametrize("cut", [12, 40, 200])
def test_a_line_that_a_kill_left_without_its_end_is_taken_away(cut: int, tmp_path: Path) -> None:
    out, stages = tmp_path / "out.jsonl", [stage("works"), stage("lacks")]
    assert run(out, stages, "--only", "works") == 0
    before = out.read_text()
    out.write_text(before + before[:cut])
    assert run(out, stages, "--only", "lacks") == 0
    assert out.read_text().startswith(before)
    assert [row["stage"] for row in rows(out) if "result" in row] == ["works", "lacks"]


def test_no_gpu_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["--out", str(tmp_path / "out.jsonl")], [stage("works")]) == 2
    assert "error: torch finds no GPU here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


SCRIPT = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell leaves out in the background
from bench import gpu_check
from tests.bench.gpu.stand_ins import stage
from tests.bench.gpu.test_gpu_check import AROUND
gpu_check.look_around = lambda kind: AROUND
sys.exit(gpu_check.main(["--device", "cpu", "--out", sys.argv[1]], [stage("works"), stage("hangs"), stage("fails")]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_and_loses_nothing(number: signal.Signals, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-c", SCRIPT, str(out)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not (out.is_file() and any("pids" in row for row in rows(out))):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        shown, said = process.communicate()
    assert process.returncode == 128 + number, said
    assert f"Stopped; what was measured is in {out}." in shown
    assert [row["result"] for row in rows(out) if "result" in row] == ["passed"]
    assert "| works | passed |" in out.with_suffix(".md").read_text()
    (pids,) = (row["pids"] for row in rows(out) if "pids" in row)
    assert not any(map(is_there, pids))


def test_a_check_that_is_killed_leaves_nothing_behind(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with subprocess.Popen([sys.executable, "-c", SCRIPT, str(out)], cwd=ROOT, stdout=subprocess.PIPE) as process:
        while not (out.is_file() and any("pids" in row for row in rows(out))):
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    (pids,) = (row["pids"] for row in rows(out) if "pids" in row)
    while any(map(is_there, pids)):
        time.sleep(0.05)
    assert [row["result"] for row in rows(out) if "result" in row] == ["passed"]


def test_of_a_stage_the_last_run_that_ended_counts() -> None:
    def row(stage: str, date: str, **more: Any) -> dict[str, Any]:
        return {"stage": stage, "date": date, **more}

    first = [row("a", "1", value=1), row("a", "1", result="failed")]
    killed = [row("a", "2", value=2)]
    last = [row("a", "3", value=3), row("a", "3", value=4), row("a", "3", result="passed")]
    other = [row("b", "1", result="passed")]
    without = [row("a", "4", result="left out")]
    assert last_runs([*first, *other, *killed]) == {"a": first, "b": other}
    assert last_runs([*first, *other, *killed, *last]) == {"a": last, "b": other}
    assert last_runs([*last, *without]) == {"a": last}
    assert last_runs(without) == {"a": without}


def end(stage: str, result: str = "passed", quotes: Sequence[str] = (), gpu: str = "Fast GPU") -> dict[str, Any]:
    around = AROUND | {"machine": AROUND["machine"] | {"gpu": gpu}}  # type: ignore[operator]
    return {"stage": stage, "result": result, "figure": "f", "seconds": 1.0, "quotes": list(quotes), **around}


def trained(network: str, norm: str, low: float, high: float, stage: str) -> dict[str, Any]:
    return {
        "kind": "training step", "network": network, "norm": norm, "spread": [low, high],
        "images_per_s": (low + high) / 2, "stage": stage, "date": AROUND["date"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "result", "named"),
    [
        ((110, 112), "passed", True),
        ((99, 112), "passed", False),
        ((90, 95), "passed", False),
        ((110, 112), "failed", False),
    ],
)
def test_triton_wins_follows_from_ranges_that_do_not_overlap(
    ours: tuple[float, float], result: str, named: bool
) -> None:
    first = [trained("resnet50", "torch", 100, 104, "x"), trained("resnet50", "triton", 110, 114, "x"), end("x")]
    second = [trained("resnet18", "torch", 100, 101, "y"), trained("resnet18", "triton", *ours, "y"), end("y", result)]
    *_, sentence = conclusions(first + second)
    assert ('should name "Fast GPU"' in sentence) is named
    assert "resnet50 1.098 of torch's rate" in sentence
    assert conclusions([end("x")])[-1].startswith("TRITON_WINS stays as it is")
    sentence = (
        "TRITON_WINS stays as it is until another network is compared on Fast GPU: resnet50 1.098 of torch's rate."
    )
    assert conclusions(first)[-1] == sentence


def test_what_may_be_quoted() -> None:
    sentences = conclusions([end("a", quotes=["12 images/s."]), end("b", "failed"), end("c", "left out")])
    assert sentences[:2] == ["May be quoted (a): 12 images/s.", "Not to be quoted, since it failed: b."]
    trial = end("a", quotes=["12 images/s."])
    trial["machine"] = AROUND["machine"]
    assert conclusions([trial]) == ["Nothing here may be quoted: this was a trial on a CPU."]
    assert "12 images/s" not in markdown([trial], STAGES)


def test_cells_end_when_time_does_and_one_failure_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    done: list[str] = []

    def cell(name: str, seconds: float, error: Exception | None = None) -> Any:
        def work() -> None:
            nonlocal now
            now += seconds
            done.append(name)
            if error:
                raise error

        return work

    cells = {
        "a": cell("a", 10), "b": cell("b", 2, FailedError("wrong")), "c": cell("c", 2, ValueError("bad\nmore")),
        "d": cell("d", 30), "e": cell("e", 1),
    }  # fmt: skip
    task = Task("cpu", tmp_path / "rows", deadline=70)
    with pytest.raises(FailedError, match=r"^b: wrong; c: ValueError: bad$"):
        attempt(task, cells)
    assert done == ["a", "b", "c", "d"]
    assert [row["cell"] for row in rows(task.rows)] == ["b", "c"]
    many = {str(number): cell(str(number), 0, FailedError("wrong")) for number in range(5)}
    with pytest.raises(FailedError, match=r"^0: wrong; 1: wrong; 2: wrong; and 2 more$"):
        attempt(task, many)
    assert attempt(task, {"f": cell("f", 1)}) == 1
    with pytest.raises(MissingError, match="no time was left"):
        attempt(Task("cpu", task.rows, deadline=now + 1), {"g": cell("g", 1)})
    assert done[-1] == "f"


def test_stages_are_in_order_and_known() -> None:
    names = [stage.name for stage in STAGES]
    assert len(set(names)) == len(names)
    assert all(stage.limit_s <= 180 for stage in STAGES)
    first_needy = next(number for number, stage in enumerate(STAGES) if "nvidia.dali" in stage.needs)
    assert set(names[:first_needy]) == ALONE, "what needs torch alone comes first"
    assert sum(stage.limit_s for stage in STAGES[:first_needy]) <= 540, "of ten minutes some are left"


def test_make_runs_it() -> None:
    command = ["make", "--dry-run", "gpu-check", "PYTHON=python3.99", "CHECK=--minutes 8"]
    # An outer make, as that of `make test`, speaks through these variables and would add lines of its own.
    outside = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=outside).stdout
    assert shown.splitlines() == ["python3.99 bench/gpu_check.py --minutes 8"]
