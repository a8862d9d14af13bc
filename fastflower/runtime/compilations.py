"""How often torch.compile begins anew, which it should not after the first steps of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch._dynamo.callback import CallbackArgs


@dataclass
class Compilations:
    """What was made anew while it was counted."""

    compiled: int = 0  # functions, also those that were compiled before for other shapes or layouts
    recorded: int = 0  # CUDA graphs


@contextlib.contextmanager
def counted_compilations() -> Iterator[Compilations]:
    """Count them until the block ends; the count may be read before."""
    from torch._dynamo.callback import CallbackTrigger, callback_handler  # takes a second, unless torch.compile has run

    counted = Compilations()

    def note(what: CallbackArgs) -> None:
        counted.compiled += what.callback_trigger == CallbackTrigger.DYNAMO
        counted.recorded += what.callback_trigger == CallbackTrigger.CUDAGRAPH_RECORDING

    callback_handler.register_start_callback(note)
    try:
        yield counted
    finally:
        with contextlib.suppress(ValueError):  # torch.compiler.reset may have removed it already
            callback_handler.remove_start_callback(note)
