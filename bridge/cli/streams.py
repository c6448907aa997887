# SPDX-License-Identifier: Apache-2.0
"""The standard streams that the command was started with.

A target runs in the command's process and may do anything to ``sys.stdout``, ``sys.stderr`` and
the descriptors behind them: replace, close, redirect. What the command itself has to say goes where
it was started to go, through descriptors of its own.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TextIO

from bridge.errors import InfrastructureError
from bridge.util.descriptors import write_all

__all__ = [
    "StandardInput",
    "Streams",
    "check_stdout",
    "own_streams",
    "reserve_descriptors",
    "writing",
]

_BACKGROUND_SECONDS = 0.25
"""How often a job in the background looks whether it has the terminal."""


def reserve_descriptors() -> None:
    """Give /dev/null to each standard stream that the process was started without.

    Else the next file that is opened takes its number, and gets what was meant for the stream.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError as error:
            if error.errno != errno.EBADF:
                continue
            # The lowest number that is free is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name, descriptor, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        if getattr(sys, name) is None:
            stream = open(descriptor, mode, encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


class _Output(io.TextIOWrapper):
    """Standard output; an error names it."""

    def write(self, text: str, /) -> int:
        with writing("stdout"):
            return super().write(text)

    def flush(self) -> None:
        with writing("stdout"):
            super().flush()


@contextlib.contextmanager
def writing(stream: str) -> Iterator[None]:
    """Raise :class:`InfrastructureError` for what cannot be written to ``stream``."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise InfrastructureError(f"{stream} cannot be written: {error.strerror}") from error


def _encode_anyway(error: UnicodeError) -> tuple[str | bytes, int]:
    """Give back the bytes of a path as they are, and escape what the encoding has no room for."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


def check_stdout() -> None:
    """Have ``sys.stdout`` raise :class:`InfrastructureError` when it cannot be written.

    It takes any text, whatever the encoding of the locale. A reader that goes away stays a
    BrokenPipeError.
    """
    codecs.register_error("kcov-bridge", _encode_anyway)
    before = sys.stdout
    sys.stdout = _Output(
        open(before.fileno(), "wb", closefd=False),  # noqa: SIM115
        encoding=before.encoding,
        errors="kcov-bridge",
        # PYTHONUNBUFFERED sets the second one alone.
        line_buffering=bool(before.line_buffering or getattr(before, "write_through", False)),
    )


@dataclass(frozen=True)
class Streams:
    """The standard streams, as they were at the command's start.

    ``input`` is the descriptor of standard input; None where it is no file.
    """

    out: TextIO
    err: TextIO
    input: int | None = None

    @property
    def stdin(self) -> StandardInput | bytes:
        """What a command in the guest may read."""
        return StandardInput(self.input) if self.input is not None else b""

    def write_out(self, data: bytes) -> None:
        """Write bytes to standard output, past Python's buffers and encodings.

        Raises:
            BrokenPipeError: whoever read it went away.
            InfrastructureError: it cannot be written.
        """
        _write(self.out, "stdout", data)

    def write_err(self, data: bytes) -> None:
        """As :meth:`write_out`, to standard error."""
        _write(self.err, "stderr", data)


class StandardInput:
    """Reads standard input past Python's buffers: what is there, as soon as it is there.

    A job in the background waits for its terminal, and is not stopped by reading from it.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def read(self, size: int, /) -> bytes:
        """Return up to ``size`` bytes, none at the end.

        Raises:
            OSError: it cannot be read, for example because it is a directory.
        """
        if threading.current_thread() is not threading.main_thread():
            # So that read() fails in the background, where the signal would stop the process.
            signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTTIN,))
        while True:
            try:
                return os.read(self._descriptor, size)
            except BlockingIOError:
                select.select([self._descriptor], [], [])
            except OSError as error:
                if error.errno == errno.EBADF:
                    # nohup gives a file that can only be written.
                    return b""
                if error.errno != errno.EIO or not os.isatty(self._descriptor):
                    raise
                if not self._in_background():
                    return b""
                threading.Event().wait(_BACKGROUND_SECONDS)

    def _in_background(self) -> bool:
        """Return whether another job has the terminal; False for one that is gone or not ours."""
        try:
            return os.tcgetpgrp(self._descriptor) not in (0, os.getpgrp())
        except OSError:
            return False


@contextlib.contextmanager
def own_streams() -> Iterator[Streams]:
    """Keep the standard streams while inside; afterwards ``sys`` has them again."""
    before = sys.stdout, sys.stderr
    with ExitStack() as stack:
        streams = Streams(
            _duplicate(before[0], stack), _duplicate(before[1], stack), _duplicate_input(stack)
        )
        try:
            yield streams
        finally:
            sys.stdout, sys.stderr = before


def _duplicate(stream: TextIO, stack: ExitStack) -> TextIO:
    """A stream of our own to the same file; the same stream where it is none of a file."""
    try:
        stream.flush()
        descriptor = os.dup(stream.fileno())
    except (OSError, ValueError, AttributeError):
        return stream
    own = open(  # noqa: SIM115, PTH123
        descriptor,
        "w",
        buffering=1,
        encoding=stream.encoding or "utf-8",
        errors=stream.errors or "backslashreplace",
    )
    stack.callback(_close, own)
    return own


def _duplicate_input(stack: ExitStack) -> int | None:
    """Return a duplicate of the descriptor of standard input; None if that is no file."""
    try:
        descriptor = os.dup(sys.stdin.fileno())
    except (OSError, ValueError, AttributeError):
        return None
    stack.callback(os.close, descriptor)
    return descriptor


def _close(stream: TextIO) -> None:
    # What could not be written was reported when it was written.
    with contextlib.suppress(OSError, ValueError):
        stream.close()


def _write(stream: TextIO, name: str, data: bytes) -> None:
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError, AttributeError):
        stream.write(data.decode(errors="backslashreplace"))
        return
    with writing(name):
        write_all(descriptor, data)
