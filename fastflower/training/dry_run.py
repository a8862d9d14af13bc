"""A dry run: two training steps and one batch of validation, to see whether a run would work and what it takes."""

from __future__ import annotations

import itertools
import resource
import time

import torch

from fastflower.runtime.progress import Display
from fastflower.runtime.signals import Signals
from fastflower.training.state import Setup, State
from fastflower.training.step import compiled, evaluate_in, training_network, training_step

STEPS = 2  # the first compiles and allocates


def rehearse(setup: Setup, state: State, display: Display) -> None:
    """Run the steps and say how long they took and how much memory; nothing is written.

    Raises:
        UserError: a record is bad.
        Stopped: a signal came.
    """
    with Signals() as signals:
        _train(setup, state, signals, display)
        _validate(setup, state, signals, display)
    display.say(f"Peak memory of this process: {_peak_memory(setup.device)}. Dry run: no run folder was made.")


def _train(setup: Setup, state: State, signals: Signals, display: Display) -> None:
    network, steps_s = training_network(setup, state), []
    batches = setup.ranks.lockstep(itertools.islice(setup.train.epoch(0), STEPS), signals)
    display.task("two steps", STEPS)
    for batch in display.counted(batches):
        began = time.perf_counter()
        training_step(setup, state, network, batch)
        state.sums.first_bad()  # waits for the device
        steps_s.append(time.perf_counter() - began)
    display.say(
        f"First step {steps_s[0]:.2f} s; "
        + (f"second {steps_s[1]:.2f} s, " if len(steps_s) > 1 else "")
        + f"{setup.train.global_batch / steps_s[-1]:,.0f} images/s without waiting for data."
    )


def _validate(setup: Setup, state: State, signals: Signals, display: Display) -> None:
    if setup.val:
        network = compiled(setup, state.validated)
        began = time.perf_counter()
        evaluate_in(setup, network, itertools.islice(setup.val.once(), 1), signals)
        display.say(f"A batch of validation {time.perf_counter() - began:.2f} s, reading included.")


def _peak_memory(device: torch.device) -> str:
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux
    text = f"{own / 1e9:.1f} GB"
    if device.type == "cuda":
        text += f", and {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB on {torch.cuda.get_device_name(device)}"
    return text
