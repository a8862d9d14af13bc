"""What torch.compile makes anew is counted, and what it has already is not."""

from __future__ import annotations

import torch
from torch._dynamo.callback import CallbackTrigger, callback_handler

from fastflower.runtime.compilations import counted_compilations


def test_each_new_shape_is_counted_once() -> None:
    function = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    function(torch.ones(2))
    with counted_compilations() as counted:
        function(torch.ones(2))
        assert (counted.compiled, counted.recorded) == (0, 0)
        for size in (3, 4, 3, 2):
            function(torch.ones(size))
        assert (counted.compiled, counted.recorded) == (2, 0)
    function(torch.ones(5))
    assert counted.compiled == 2, "the block is over"


def test_recordings_of_cuda_graphs_are_counted() -> None:
    """As torch announces them; there are none without a GPU."""
    with counted_compilations() as counted:
        for _ in range(3):
            with callback_handler.install_callbacks(CallbackTrigger.CUDAGRAPH_RECORDING, "0/0"):
                pass
        with callback_handler.install_callbacks(CallbackTrigger.LAZY_BACKWARD, "0/0"):
            pass
        torch.compiler.reset()
    assert (counted.compiled, counted.recorded) == (0, 3)
