"""The DALI graph for a GPU, run on a CPU: the same operators, on the other device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from nvidia.dali import fn, types
from nvidia.dali.pipeline import DataNode


def run_on_the_cpu(patch: pytest.MonkeyPatch) -> None:
    """From here on, what is asked to work on a GPU works on the CPU; all that follows it does so too."""

    def on_the_cpu(operator: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *inputs, **arguments: operator(*inputs, **{**arguments, "device": "cpu"})

    for module, name in ((fn, "external_source"), (fn.decoders, "image"), (fn.decoders, "image_slice")):
        patch.setattr(module, name, on_the_cpu(getattr(module, name)))
    patch.setattr(DataNode, "gpu", lambda node: node)
    patch.setattr(types, "_get_default_stream_for_array", lambda _: None)  # of torch, which needs a GPU for it
