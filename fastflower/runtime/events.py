"""TensorBoard's event files, written at once and by the thread that asks: a full disk is that thread's error."""

from __future__ import annotations

import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary

from fastflower.framing import frame


class EventFile:
    """A new file of scalars in a folder; TensorBoard reads all that are there, in the order of their names."""

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        """Begin; what earlier files say of `purge_step` and later steps is hidden.

        Raises:
            OSError: the folder cannot be written or the disk is full.
        """
        # nanoseconds, so that each start of a run has a later name than those before it
        self._path = folder / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        self._waiting = [Event(file_version="brain.Event:2", wall_time=time.time())]
        if purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._waiting.append(Event(step=purge_step, session_log=start, wall_time=time.time()))
        self.flush()

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """A figure, to be written by `flush`."""
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        self._waiting.append(Event(step=step, summary=summary, wall_time=time.time()))

    def flush(self) -> None:
        """Write what was added; OSError where that fails."""
        with self._path.open("ab") as file:
            file.write(b"".join(frame(event.SerializeToString()) for event in self._waiting))
        self._waiting = []
