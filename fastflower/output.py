"""What is said on screen or into a file, in any encoding, where a pipe is closed or a terminal is gone."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

import rich.console


class Tolerant:
    """A text stream that ends nothing for what cannot be said.

    Characters that its encoding lacks are replaced; what a terminal that is gone would have shown is dropped. Any other
    failure is raised, among them a pipe's that nobody reads any more.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._is_terminal = stream, stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text; how many characters it has."""
        with self._unless_gone():
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding
                self._stream.write(text.encode(encoding, "replace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Write what is buffered."""
        with self._unless_gone():
            self._stream.flush()

    @contextlib.contextmanager
    def _unless_gone(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not (self._is_terminal and error.errno == errno.EIO):
                raise
            discard(self._stream)  # also what is buffered, and would fail again


def discard(stream: TextIO) -> None:
    """Let all that is still written to a stream go nowhere."""
    with contextlib.suppress(OSError):  # it has no file of its own
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def tolerant_output() -> Iterator[None]:
    """Have standard output and error be tolerant until the block ends."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream and Tolerant(stream) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class Console(rich.console.Console):
    """Rich's, which says by an exception that its pipe is closed, and not by exit code 1."""

    def on_broken_pipe(self) -> None:
        """Called while rich handles the exception."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
