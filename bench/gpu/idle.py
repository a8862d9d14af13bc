"""A stage that looks at a step through torch's profiler: how long the GPU waits between kernels."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.gpu.networks import network, step
from bench.gpu.results import TORCHS
from bench.gpu.task import FailedError, Outcome, Task, attempt

STEPS = 5


def gaps(task: Task) -> Outcome:
    """The share of training steps in which no kernel runs, of large and of small batches."""
    name, shares = "resnet18" if task.tiny else "resnet50", {}

    def look(batch: int) -> None:
        contender = step(task, partial(network, name, TORCHS), ours=True)(batch)
        for _ in contender.start(5):
            pass
        activity = ProfilerActivity.CPU if task.tiny else ProfilerActivity.CUDA
        if not task.tiny:
            torch.cuda.synchronize()
        for _ in range(2):  # the first time the profiler takes its own time
            with profile(activities=[activity]) as recorded:
                for _ in contender.start(STEPS):
                    pass
                if not task.tiny:
                    torch.cuda.synchronize()
        kind = DeviceType.CPU if task.tiny else DeviceType.CUDA
        spans = [
            (event.time_range.start, event.time_range.end)
            for event in recorded.events() or ()
            if event.device_type == kind and not event.is_user_annotation  # which span kernels and gaps
        ]
        if not spans:
            raise FailedError("the profiler has recorded no kernels")
        busy_us, whole_us = busy_and_whole(spans)
        shares[batch] = 1 - busy_us / whole_us
        task.row(
            network=name,
            batch=batch,
            kernels=len(spans) / STEPS,
            idle=shares[batch],
            ms_per_step=whole_us / STEPS / 1e3,
        )

    attempt(task, {f"batch {batch}": partial(look, batch) for batch in ((2,) if task.tiny else (256, 32))})
    said = ", ".join(f"{share:.1%} of a step of {batch}" for batch, share in shares.items())
    return Outcome(
        f"the GPU idles {said}", (f"{name}, compiled, bf16: between kernels the GPU idles {said} pictures.",)
    )


def busy_and_whole(spans: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """How long at least one of the spans (begin, end) runs, and from the first's begin to the last's end."""
    ordered = sorted(spans)
    busy, reached = 0.0, ordered[0][0]
    for begin, end in ordered:
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return busy, reached - ordered[0][0]
