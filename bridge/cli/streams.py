# SPDX-License-Identifier: Apache-2.0
"""The standard streams that the command was started with.

A target runs in the command's process and may do anything to ``sys.stdout``, ``sys.stderr`` and
the descriptors behind them: replace, close, redirect. What the command itself has to say goes where
it was started to go, through descriptors of its own.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TextIO

from bridge.errors import InfrastructureError
from bridge.util.descriptors import write_all

__all__ = ["Streams", "own_streams", "reserve_descriptors"]


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


@dataclass(frozen=True)
class Streams:
    """Standard output and standard error, as they were at the command's start."""

    out: TextIO
    err: TextIO

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


@contextlib.contextmanager
def own_streams() -> Iterator[Streams]:
    """Keep the standard streams while inside; afterwards ``sys`` has them again."""
    before = sys.stdout, sys.stderr
    with ExitStack() as stack:
        streams = Streams(_duplicate(before[0], stack), _duplicate(before[1], stack))
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
    try:
        write_all(descriptor, data)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise InfrastructureError(
            f"the command's output cannot be written to {name}: {error.strerror}"
        ) from error
