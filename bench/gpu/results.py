"""The check's results: one JSON line for each row and for each stage, one Markdown table, and what follows from them.

A results file is added to, so that slices of a check make one: of a stage the last run counts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.gpu.child import FAILED, MISSING, PASSED
from bench.gpu.runner import Ended
from bench.gpu.task import Stage
from fastflower.errors import UserError
from fastflower.files import to_json
from fastflower.models.names import Norm

Row = dict[str, Any]
KNOWN = ("machine", "versions", "commit", "date")  # of what each row depends on
BEGIN = '{"stage": "'  # of each row
TRAINING = "training step"  # kind of the rows from which it follows whether the kernels win
LEAST_NETWORKS = 2  # on which the kernels must win
TORCHS: Norm = "torch"
KERNELS: Norm = "triton"


class Results:
    """The results file and the table beside it."""

    def __init__(self, out: Path, around: Mapping[str, Any]) -> None:
        """Begin to add to a file; UserError where it cannot be read or written, or is about another GPU."""
        self.out, self.around = out, around
        if out.suffix == ".md":
            raise UserError(f"--out {out} is where the table would be: name a file that ends in .jsonl.")
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            with out.open("a", encoding="utf-8"):
                pass
            self.rows = read(out)
            self.table = out.with_suffix(".md")
            with self.table.open("a", encoding="utf-8"):
                pass
        except OSError as error:
            raise UserError(f"--out {out} cannot be written ({error.strerror}): name another file.") from error
        except ValueError as error:
            raise UserError(f"--out {out} holds something else than results: name another file.") from error
        if others := {row["machine"]["gpu"] for row in self.rows} - {around["machine"]["gpu"]}:
            raise UserError(f"--out {out} holds results of {others.pop() or 'a CPU'}: name another file.")

    def add(self, stage: Stage, row: Mapping[str, Any]) -> None:
        """Add a row of a stage."""
        new = {"stage": stage.name, **row, **self.around}
        self.rows.append(new)
        try:
            with self.out.open("a", encoding="utf-8") as file:
                file.write(to_json(new) + "\n")
        except OSError as error:
            raise UserError(f"--out {self.out} cannot be written ({error.strerror}): make room.") from error

    def end(self, stage: Stage, ended: Ended, stages: Sequence[Stage]) -> None:
        """Add how a stage ended, and write the table anew."""
        said = {"said": ended.said} if ended.said else {}
        told = {"result": ended.result, "figure": ended.figure, "seconds": round(ended.seconds, 1)}
        self.add(stage, told | {"quotes": ended.quotes} | said)
        try:
            self.table.write_text(markdown(self.rows, stages), encoding="utf-8")
        except OSError as error:
            raise UserError(f"{self.table} cannot be written ({error.strerror}): make room.") from error


def read(out: Path) -> list[Row]:
    """The rows of a results file; a line that a kill left without its end is taken away. ValueError for other files."""
    text = out.read_text(encoding="utf-8")
    whole, newline, rest = text.rpartition("\n")
    rows: list[Row] = [json.loads(line) for line in whole.splitlines()]
    if not all(isinstance(row, dict) and {"stage", *KNOWN} <= row.keys() for row in rows):
        raise ValueError("no rows of a check")
    if rest and not rest.startswith(BEGIN):
        raise ValueError("no row of a check")
    if rest:
        os.truncate(out, len((whole + newline).encode()))
    return rows


def last_runs(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """By stage, in order: the rows of its last run that ended, the end last."""
    runs: dict[str, list[Row]] = {}
    unended: dict[str, list[Row]] = {}
    for row in rows:
        of_stage = unended.setdefault(row["stage"], [])
        if of_stage and of_stage[0]["date"] != row["date"]:
            of_stage.clear()  # of a run that was killed
        of_stage.append(row)
        if "result" in row:
            run = unended.pop(row["stage"])
            if row["result"] != MISSING or row["stage"] not in runs:  # what was left out this time may have run before
                runs[row["stage"]] = run
    return runs


def markdown(rows: Sequence[Row], stages: Sequence[Stage]) -> str:
    """All stages that have run, and what follows."""
    runs = last_runs(rows)
    machine, versions = rows[-1]["machine"], rows[-1]["versions"]
    where = machine["gpu"] or machine["cpu"]
    listed = ", ".join(
        f"{name} {versions.get(key) or 'missing'}"
        for name, key in {"torch": "torch", "Triton": "triton", "DALI": "dali", "CUDA": "cuda"}.items()
    )
    lines = [
        f"# GPU check on {where}",
        "",
        f"By `make gpu-check`: driver {machine.get('driver') or 'none'}, "
        f"{listed}, {machine['cpu']}, {machine['cores']} cores.",
        "",
        "| stage | result | figure | seconds | date | commit |",
        "|---|---|---|---:|---|---|",
    ]
    for stage in stages:
        if stage.name in runs:
            end = runs[stage.name][-1]
            cells = (
                stage.name,
                end["result"],
                end["figure"],
                f"{end['seconds']:.0f}",
                end["date"],
                end["commit"] or "",
            )
            lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    lines += ["", *(f"- {sentence}" for sentence in conclusions(rows)), ""]
    return "\n".join(lines)


def conclusions(rows: Sequence[Row]) -> list[str]:
    """What the documents may now quote, what not, and whether TRITON_WINS should name this GPU."""
    ends = [run[-1] for run in last_runs(rows).values()]
    machine = rows[-1]["machine"]
    if not machine["gpu"]:
        return ["Nothing here may be quoted: this was a trial on a CPU."]
    quotes = [f"May be quoted ({end['stage']}): {quote}" for end in ends for quote in end["quotes"]]
    failed = [end["stage"] for end in ends if end["result"] == FAILED]
    unquoted = [f"Not to be quoted, since it failed: {', '.join(failed)}."] if failed else []
    return [*quotes, *unquoted, triton_wins(rows)]


def triton_wins(rows: Sequence[Row]) -> str:
    """Whether the kernels train faster than torch compiled, by the ranges of the repeats on each network."""
    gpu, compared = rows[-1]["machine"]["gpu"], []
    wins = True
    runs = last_runs(rows)
    for run in runs.values():
        trained = {
            (row["network"], row["norm"]): row for row in run if row.get("kind") == TRAINING and "missing" not in row
        }
        for network in dict.fromkeys(network for network, _ in trained):
            if (ours := trained.get((network, KERNELS))) and (torchs := trained.get((network, TORCHS))):
                compared.append(f"{network} {ours['images_per_s'] / torchs['images_per_s']:.3f} of torch's rate")
                wins = wins and run[-1]["result"] == PASSED and min(ours["spread"]) > max(torchs["spread"])
    if not compared:
        return f"TRITON_WINS stays as it is: training with and without the kernels was not compared on {gpu}."
    if wins and len(compared) < LEAST_NETWORKS:
        return f"TRITON_WINS stays as it is until another network is compared on {gpu}: {', '.join(compared)}."
    verdict = f'should name "{gpu}"' if wins else f'should not name "{gpu}"'
    return f"TRITON_WINS (fastflower/models/layers.py) {verdict}: with the kernels {', '.join(compared)}."
