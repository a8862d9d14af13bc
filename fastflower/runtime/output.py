"""What is said on screen or into a file, in any encoding, where a pipe is closed or a terminal is gone."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO, TextIO, cast

import rich.console

from fastflower.runtime import decoder_lines

WAIT_S = 1  # at most, for lines that are on their way


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
    """Have standard output and error be tolerant until the block ends; one that was never open leads nowhere."""
    _occupy_descriptors()
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        sys.stdout, sys.stderr = (cast(TextIO, Tolerant(stream or nowhere)) for stream in before)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before


def _occupy_descriptors() -> None:
    """Have those of standard input, output and error lead somewhere.

    The next file that is opened, such as a run's, would get a free one, and in it what libraries write to the screen.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


@contextlib.contextmanager
def without_decoders() -> Iterator[None]:
    """Leave out what decoders write to standard error until the block ends: no line names a file, as our sentences do.

    They cannot all be told not to write. So what libraries write there goes through a process, which passes all else
    on. A thread would not do: the last words of a crash would be lost with it. Python's own text goes where it went.
    """
    try:
        real = os.dup(2)
        # in a session of its own, so that the terminal's signals do not end it first
        program = [sys.executable, "-I", "-S", decoder_lines.__file__]
        process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=real, start_new_session=True)
    except OSError:  # there is no standard error, or there may be no more processes: nothing is left out
        yield
        return
    before = sys.stderr
    if _descriptor(before) == 2:
        before.flush()
        direct = open(os.dup(real), "w", buffering=1, encoding=before.encoding, errors=before.errors)  # noqa: SIM115
        sys.stderr = cast(TextIO, Tolerant(direct))
    pipe = cast(BinaryIO, process.stdin)
    os.dup2(pipe.fileno(), 2)
    pipe.close()
    try:
        yield
    finally:
        if sys.stderr is not before:
            sys.stderr.close()
            sys.stderr = before
        os.dup2(real, 2)
        os.close(real)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process that was started meanwhile still writes there
            process.wait(WAIT_S)


def _descriptor(stream: TextIO | None) -> int | None:
    try:
        return stream.fileno() if stream else None
    except OSError:  # it has none
        return None


class Console(rich.console.Console):
    """Rich's, which says by an exception that its pipe is closed, and not by exit code 1."""

    def on_broken_pipe(self) -> None:
        """Called while rich handles the exception."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
