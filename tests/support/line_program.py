# SPDX-License-Identifier: Apache-2.0
"""A program that answers each line of its input with a line."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

__all__ = ["LineProgram", "line_program"]


class LineProgram:
    """A program that runs; :func:`line_program` starts one."""

    def __init__(self, process: subprocess.Popen[bytes], sock: socket.socket) -> None:
        """Take a process whose standard input and output are the other end of a socket."""
        self.process = process
        self._lines = sock.makefile("rw", encoding="utf-8")

    def read(self) -> str:
        """Return the next line of its output; "" when it has ended."""
        return self._lines.readline().rstrip("\n")

    def send(self, line: str) -> None:
        """Send a line."""
        self._lines.write(f"{line}\n")
        self._lines.flush()

    def ask(self, line: str) -> str:
        """Return the answer to a line."""
        self.send(line)
        return self.read()


@contextlib.contextmanager
def line_program(
    command: Sequence[str | Path], environment: Mapping[str, str] | None = None
) -> Iterator[LineProgram]:
    """Start a program; at the end its input ends, and it is waited for.

    Args:
        environment: further variables for it.
    """
    variables = {**os.environ, **(environment or {})}
    ours, theirs = socket.socketpair()
    with contextlib.ExitStack() as stack:
        stack.enter_context(ours)
        with theirs:
            process = subprocess.Popen(
                [str(word) for word in command],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=subprocess.DEVNULL,
                env=variables,
            )
        stack.callback(process.wait, 60)
        stack.callback(ours.shutdown, socket.SHUT_WR)
        yield LineProgram(process, ours)
