# SPDX-License-Identifier: Apache-2.0
"""The guest's serial console: a bounded record on disk, its end in memory, and what it tells.

The guest writes what it likes, as much as it likes: the file stops growing at a limit, and what
people are shown has no control characters left.
"""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import BinaryIO

__all__ = ["FILE_LIMIT", "TAIL_LIMIT", "ConsoleLog", "find_panic", "plain_text", "tail_of_file"]

FILE_LIMIT = 16 * 1024 * 1024
"""Bytes of console output that are written to the file as they come."""

TAIL_LIMIT = 64 * 1024
"""Bytes of console output that are kept in memory, and looked at in a file: the last ones."""

_ESCAPES = re.compile(
    r"\x1b\][^\x07\x1b]{0,256}(?:\x07|\x1b\\)?"  # operating system command: titles
    r"|\x1b\[[0-?]{0,32}[ -/]{0,8}[@-~]?"  # control sequence: colours, cursor
    r"|\x1b[ -/]{0,4}[0-~]?"  # any other escape
)
_CONTROLS = re.compile(r"[^\n\t\x20-\x7e\xa0-\U0010ffff]")
_PANIC = re.compile(r"Kernel panic - not syncing:? ?([^\n]*)")


def plain_text(raw: bytes) -> str:
    """Console output without escape sequences and control characters, lines ended by newlines."""
    text = raw.decode(errors="replace").replace("\r\n", "\n").replace("\r", "\n")
    return _CONTROLS.sub("", _ESCAPES.sub("", text))


def _last_lines(raw: bytes, lines: int) -> str:
    kept = [line.rstrip() for line in plain_text(raw).splitlines()]
    return "\n".join([line for line in kept if line][-lines:])


def tail_of_file(path: Path, lines: int = 20) -> str:
    """The last lines of a console file that are not blank; "" when there is no such file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL_LIMIT))
            return _last_lines(file.read(TAIL_LIMIT), lines)
    except FileNotFoundError:
        return ""


def find_panic(text: str) -> str | None:
    """The reason that the guest kernel gave for a panic, None when there was none in the text."""
    match = _PANIC.search(text)
    return (match.group(1).strip() or "no reason given") if match else None


class ConsoleLog:
    """What the guest wrote to its console, on disk and, the end of it, in memory.

    Any thread may call any method. ``path`` None keeps no file.
    """

    def __init__(self, path: Path | None, *, limit: int = FILE_LIMIT) -> None:
        self.path = path
        self._limit = limit
        self._lock = threading.Lock()  # guards all fields below
        self._file: BinaryIO | None = path.open("wb", buffering=0) if path is not None else None
        self._tail = bytearray()
        self._size = 0
        self._panic: str | None = None

    def feed(self, chunk: bytes) -> None:
        """Take what the guest wrote. A full disk loses the file's end, not the run."""
        with self._lock:
            if self._panic is None:
                # The words may have come in two pieces: look at the last line's start as well.
                self._panic = find_panic(plain_text(bytes(self._tail[-256:]) + chunk))
            room = max(0, self._limit - self._size)
            self._size += len(chunk)
            self._tail[:] = (self._tail + chunk)[-TAIL_LIMIT:]
            self._write(chunk[:room])

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
        """The reason of the guest kernel's panic, if the console told of one."""
        with self._lock:
            if self._panic is None:
                return None
            # It was perhaps seen before its line was complete.
            return find_panic(plain_text(bytes(self._tail))) or self._panic

    def tail(self, lines: int = 20) -> str:
        """The last lines that are not blank."""
        with self._lock:
            return _last_lines(bytes(self._tail), lines)

    def close(self) -> None:
        """Close the file; of one that was cut, the end follows a line that says so. Idempotent."""
        with self._lock:
            left_out = self._size - self._limit
            if left_out > 0:
                end = bytes(self._tail[-left_out:])
                note = f"\n[kcov-bridge: {left_out - len(end)} bytes of console left out]\n"
                self._write(note.encode() + end)
            if self._file is not None:
                self._file.close()
                self._file = None
