"""Whether all works on this GPU and how fast: stages, the most telling first, in at most ten minutes.

    make gpu-check
    python bench/gpu_check.py --only resnet50 kernel_rates
    python bench/gpu_check.py --minutes 8
    python bench/gpu_check.py --device cpu        # tries the script, with tiny sizes

Each stage runs in a process of its own with a limit of time; after a failure the others go on. A stage whose packages
are missing here says so and is left out; most need torch alone. Rows are written as they come, so that a check that is
killed loses nothing, and slices of a check (--only) add up in one file. The exit code is 1 where a stage failed.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import FrameType

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where `bench` lies

from bench.gpu.child import FAILED, MISSING
from bench.gpu.results import Results, conclusions
from bench.gpu.runner import look_around, run_stage
from bench.gpu.stages import STAGES
from bench.gpu.task import Stage
from fastflower.errors import UserError

RESULTS = Path(__file__).parent / "results"
LEAST_S = 10  # that a stage is started for
PATIENCE = {"cuda": 1, "cpu": 4}  # times the limit of a stage: a CPU compiles slowly


def main(argv: Sequence[str] | None = None, stages: Sequence[Stage] = STAGES) -> int:
    """Entry point; the exit code: 1 where a stage failed, 2 for a user's mistake, 130 or 143 after a signal."""
    options, began = parse(argv, stages), time.monotonic()
    try:
        chosen = choose(options.only, stages)
        if options.minutes <= 0:
            raise UserError(f"--minutes is {options.minutes:g}: give more than 0.")
        around = look_around(options.device)
        if "error" in around:
            raise UserError(around["error"])
        results = Results(options.out or RESULTS / f"gpu_check-{slug(around['machine']['gpu'])}.jsonl", around)
        return check(chosen, stages, options.device, began + 60 * options.minutes, results)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parse(argv: Sequence[str] | None, stages: Sequence[Stage]) -> argparse.Namespace:
    """The command line; argparse, since nothing but torch need be installed."""
    listed = "\n".join(f"  {stage.name:14} {stage.what} (at most {stage.limit_s:.0f} s)" for stage in stages)
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"stages:\n{listed}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="run these stages alone, in their order")
    parser.add_argument("--minutes", type=float, default=10, help="time for all stages together (default: 10)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the script (tiny sizes)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE",
        help="results file, JSON lines, with a table beside it as .md (default: bench/results/gpu_check-GPU.jsonl)",
    )  # fmt: skip
    return parser.parse_args(argv)


def choose(names: Sequence[str] | None, stages: Sequence[Stage]) -> list[Stage]:
    """The stages of these names, or all; UserError for a name that none has."""
    offered = [stage.name for stage in stages]
    if unknown := [name for name in names or () if name not in offered]:
        raise UserError(f"there is no stage {', '.join(unknown)}: choose from {', '.join(offered)}.")
    return [stage for stage in stages if names is None or stage.name in names]


def slug(gpu: str | None) -> str:
    """A GPU's name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") if gpu else "cpu"


def check(chosen: Sequence[Stage], stages: Sequence[Stage], kind: str, end: float, results: Results) -> int:
    """Run the stages one after another, write and show what each ended as, and what follows; the exit code.

    All end at `end` of time.monotonic(): what that cuts short has not failed, and is not written.
    """
    machine = results.around["machine"]
    left_min = (end - time.monotonic()) / 60
    say(f"{machine['gpu'] or machine['cpu']}, stages: {len(chosen)}, at most {left_min:.1f} minutes")
    failed: list[str] = []
    late: list[str] = []
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        for stage in chosen:
            whole_s = stage.limit_s * PATIENCE[kind]
            limit_s = min(whole_s, end - time.monotonic())
            if limit_s < min(LEAST_S, whole_s):
                late.append(stage.name)
                show(stage, MISSING, "no time was left", 0)
                continue
            say(f"{stage.name}: {stage.what}")
            ended = run_stage(stage, kind, limit_s, partial(results.add, stage), lambda line: say(f"    {line}"))
            if not ended.in_time and limit_s < whole_s:
                late.append(stage.name)
                show(stage, MISSING, f"not done in the {limit_s:.0f} s that were left", ended.seconds)
                continue
            results.end(stage, ended, stages)
            show(stage, ended.result, ended.figure, ended.seconds)
            if ended.result == FAILED:
                failed.append(stage.name)
                say("".join(f"    | {line}\n" for line in ended.said).rstrip("\n"))
    except KeyboardInterrupt as stop:
        say(f"Stopped; what was measured is in {results.out}.")
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
    for sentence in conclusions(results.rows) if results.rows else ():
        say(sentence)
    if late:
        say(f"No time was left for {', '.join(late)}: --only {' '.join(late)}")
    say(f"Results: {results.out} and {results.table}.")
    if failed:
        say(f"{len(failed)} of {len(chosen)} stages failed: {', '.join(failed)}.")
    return 1 if failed else 0


def show(stage: Stage, result: str, figure: str, seconds: float) -> None:
    """The line of a stage's result."""
    say(f"{stage.name:14} {result:8} {seconds:4.0f} s  {figure}")


def say(text: str) -> None:
    """Print at once, so that a check that is killed has said how far it was."""
    if text:
        print(text, flush=True)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    sys.exit(main())
