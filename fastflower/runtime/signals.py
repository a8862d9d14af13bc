"""Being asked to stop: by Ctrl-C, `kill`, a scheduler, or a terminal that closes."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

# SIGHUP comes when the terminal closes; SIGUSR1 is what schedulers are told to send when time is nearly up.
ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Interrupted(KeyboardInterrupt):
    """A signal asked this process to stop. A command ends with 128 + its number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Stopped(Interrupted):
    """A signal asked some process of a run to stop, and all of them do so between the same two batches."""


@contextlib.contextmanager
def handling(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> Iterator[None]:
    """Have `handler` called for each of these signals until the block ends; SIG_DFL = the system ends the process.

    One that is ignored already stays so, as SIGHUP under nohup; but Ctrl-C's, which shells have their background jobs
    ignore, is still meant where it is sent by `kill`. Only Python's main thread can choose handlers: in another thread
    this changes nothing.
    """
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in ASKING:
            present = signal.getsignal(number)  # None: a handler that is not Python's
            if present is not None and (present != signal.SIG_IGN or number == signal.SIGINT):
                previous[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def interrupt(number: int, _: FrameType | None) -> None:
    """The handler that ends whatever runs."""
    raise Interrupted(number)


class Signals:
    """Notes such signals while its `with` block runs; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> Signals:
        self._handling = handling(self._note)
        self._handling.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._handling.__exit__(None, None, None)

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise Interrupted(number)  # in this process only, which therefore saves nothing
        self.received = number
