# SPDX-License-Identifier: Apache-2.0
"""The guest's serial console: a bounded file, the last part in memory, and the reason of a panic.

The guest is not trusted: the file stops growing at a limit, and control characters are removed
from text that people are shown.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

__all__ = ["FILE_LIMIT", "TAIL_LIMIT", "ConsoleLog", "find_panic", "plain_text", "tail_of_file"]

FILE_LIMIT = 16 * 1024 * 1024
"""Bytes of console output that are written to the file as they come."""

TAIL_LIMIT = 64 * 1024
"""Bytes at the end of the console output that are kept in memory, and read from a file."""

_ESCAPES = re.compile(
    r"\x1b\][^\x07\x1b]{0,256}(?:\x07|\x1b\\)?"  # operating system command: titles
    r"|\x1b\[[0-?]{0,32}[ -/]{0,8}[@-~]?"  # control sequence: colours, cursor
    r"|\x1b[ -/]{0,4}[0-~]?"  # any other escape
)
_CONTROLS = re.compile(r"[^\n\t\x20-\x7e\xa0-\U0010ffff]")
_PANIC = re.compile(r"Kernel panic - not syncing:? ?([^\n]*)")


def plain_text(raw: bytes) -> str:
    """Return console output without escape sequences and control characters."""
    text = raw.decode(errors="replace").replace("\r\n", "\n").replace("\r", "\n")
    return _CONTROLS.sub("", _ESCAPES.sub("", text))


def _last_lines(raw: bytes, lines: int) -> str:
    kept = [line.rstrip() for line in plain_text(raw).splitlines()]
    return "\n".join([line for line in kept if line][-lines:])


def tail_of_file(path: Path, lines: int = 20) -> str:
    """Return the last non-blank lines of a console file; "" if there is no such file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL_LIMIT))
            return _last_lines(file.read(TAIL_LIMIT), lines)
    except FileNotFoundError:
        return ""


def find_panic(text: str) -> str | None:
    """Return the reason of a kernel panic in the text; None if there is no panic."""
    match = _PANIC.search(text)
    return (match.group(1).strip() or "no reason given") if match else None


class ConsoleLog:
    """The guest's console output: in a file if there is a ``path``, its end in memory.

    Any thread may call any method.
    """

    def __init__(self, path: Path | None, *, limit: int = FILE_LIMIT) -> None:
        self.path = path
        self._limit = limit
        self._lock = threading.Lock()  # guards all fields below
        self._file: BinaryIO | None = path.open("wb", buffering=0) if path is not None else None
        self._tail = bytearray()
        self._size = 0
        self._panic: str | None = None
        self._listener: Callable[[bytes], None] | None = None

    def listen(self, listener: Callable[[bytes], None]) -> None:
        """Have all further output passed on as it comes, without a limit; not to raise."""
        with self._lock:
            self._listener = listener

    def feed(self, chunk: bytes) -> None:
        """Add what the guest wrote. On a full disk the file ends early, and the run continues."""
        with self._lock:
            if self._panic is None:
                # The message may have come in two pieces, so search the previous piece as well.
                self._panic = find_panic(plain_text(bytes(self._tail[-256:]) + chunk))
            room = max(0, self._limit - self._size)
            self._size += len(chunk)
            self._tail[:] = (self._tail + chunk)[-TAIL_LIMIT:]
            self._write(chunk[:room])
            listener = self._listener
        if listener is not None:
            listener(chunk)

    def _write(self, chunk: bytes) -> None:
        """Must be called with the lock held."""
        if self._file is None or not chunk:
            return
        try:
            self._file.write(chunk)
        except OSError:
            self._file.close()
            self._file = None

    @property
    def size(self) -> int:
        """Bytes that the guest has written."""
        with self._lock:
            return self._size

    @property
    def panic(self) -> str | None:
        """The reason of the guest kernel's panic; None if the console shows no panic."""
        with self._lock:
            if self._panic is None:
                return None
            # Its line may have been incomplete when it was found.
            return find_panic(plain_text(bytes(self._tail))) or self._panic

    def tail(self, lines: int = 20) -> str:
        """Return the last non-blank lines."""
        with self._lock:
            return _last_lines(bytes(self._tail), lines)

    def since(self, start: int) -> str:
        """Return what the guest wrote after its first ``start`` bytes, if memory still has it."""
        with self._lock:
            wanted = self._size - start
            return plain_text(bytes(self._tail[-wanted:])) if wanted > 0 else ""

    def close(self) -> None:
        """Close the file; if it was cut, append a note and the last output first. Idempotent."""
        with self._lock:
            left_out = self._size - self._limit
            if left_out > 0:
                end = bytes(self._tail[-left_out:])
                note = f"\n[kcov-bridge: {left_out - len(end)} bytes of console left out]\n"
                self._write(note.encode() + end)
            if self._file is not None:
                self._file.close()
                self._file = None
