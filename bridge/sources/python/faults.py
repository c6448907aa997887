# SPDX-License-Identifier: Apache-2.0
"""Faults of the tracer, kept in the shared memory where the source finds them.

A fault is an exception on which a line may have been lost. It happens inside a trace function, on
any thread of any process, so it can neither be raised nor logged there. Its first text and a count
stay in the memory, whose layout is in :mod:`.lines`; the source raises them to the bridge.

Besides ``lines``, a program that a target started uses this when nothing else can be imported. So
this module imports only what the interpreter has imported itself.
"""

from __future__ import annotations

import _thread
import os
import sys

MYPY = False
if MYPY:
    # Spelled so that nothing of typing is imported.
    import mmap

__all__ = [
    "ACTIVE",
    "CHANGED",
    "FAULTED",
    "FAULTS",
    "MAGIC",
    "REPORTED",
    "TEXT",
    "TEXT_LIMIT",
    "UNREPORTED",
    "Faulted",
    "count",
    "describe",
    "keep",
    "note_in",
    "read",
    "report",
]

MAGIC = b"kcovln04"
ACTIVE = 8
CHANGED = 9
FAULTED = 11
"""Offset of a byte: 0 for no fault, else :data:`UNREPORTED` or :data:`REPORTED`."""
UNREPORTED, REPORTED = 1, 2
FAULTS = 32
"""Offset of a u64: the number of faults."""
_LENGTH = 40
TEXT = 64
"""Offset of the first fault's text."""
TEXT_LIMIT = 448
"""Bytes of the text that are kept."""


class Faulted(Exception):
    """A look found the first fault; the next look goes on as if there were none."""


def count(buffer: mmap.mmap) -> None:
    """Count a fault; two processes that count at the same moment may count as one."""
    faults = int.from_bytes(buffer[FAULTS : FAULTS + 8], "little") + 1
    buffer[FAULTS : FAULTS + 8] = faults.to_bytes(8, "little")


def keep(buffer: mmap.mmap, text: str) -> None:
    """Keep the text of a fault if it is the first one."""
    if not int.from_bytes(buffer[_LENGTH : _LENGTH + 2], "little"):
        data = text.encode("utf-8", "backslashreplace")[:TEXT_LIMIT]
        buffer[TEXT : TEXT + len(data)] = data
        buffer[_LENGTH : _LENGTH + 2] = len(data).to_bytes(2, "little")


def report(buffer: mmap.mmap) -> None:
    """Have the next look raise :class:`Faulted`, unless one did already."""
    if not buffer[FAULTED]:
        buffer[FAULTED] = UNREPORTED
    buffer[CHANGED] = 1


def note_in(path: str, text: str) -> None:
    """Note a fault in a process that could not attach to the memory; raise what that raises."""
    from mmap import mmap

    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        with mmap(descriptor, 0) as buffer:
            # Anything else may have the path of a source that has ended.
            if buffer[: len(MAGIC)] == MAGIC and buffer[ACTIVE]:
                count(buffer)
                keep(buffer, text)
                report(buffer)
    finally:
        os.close(descriptor)


def read(buffer: mmap.mmap) -> tuple[int, str]:
    """Return the number of faults, and the text of the first one."""
    faults = int.from_bytes(buffer[FAULTS : FAULTS + 8], "little")
    length = min(int.from_bytes(buffer[_LENGTH : _LENGTH + 2], "little"), TEXT_LIMIT)
    return faults, bytes(buffer[TEXT : TEXT + length]).decode("utf-8", "replace")


def describe(error: BaseException, filename: object = None, line: int = 0) -> str:
    """Return what happened, in which thread, and at which line.

    Args:
        error: the exception; its text comes from foreign code.
        filename: of the code object that ran; None for no place.
        line: in that file.
    """
    try:
        text = str(error)
    except BaseException:
        text = ""
    what = type(error).__name__ + (": " + text if text else "")
    # Not threading.current_thread(), which enters a thread that it does not know into its list.
    known = getattr(sys.modules.get("threading"), "_active", {})
    thread = known.get(_thread.get_ident())
    name = f"thread {thread.name}" if thread is not None else "a thread"
    # str's own method: the name may be of a subclass.
    file = str.__str__(filename) if isinstance(filename, str) else None
    place = f" at {file}:{line}" if file is not None else ""
    return f"{what}{place}, in {name} of process {os.getpid()}"
