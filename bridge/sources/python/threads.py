# SPDX-License-Identifier: Apache-2.0
"""Numbers for the threads that run lines, in the memory of the lines.

Each thread of each process that writes to a :class:`.lines.LineMemory` has a *number* there, which
it stores for a block that it runs. So the reader learns which thread ran a block last, and the
threads need no more than one store. A number is a byte: some 250 threads are told apart at a time,
all others have :data:`OTHER`. The number of a thread that has ended is given to another one, the
longest unused number first.

A process that was killed gives no number back. If none is free, those of threads that no longer
exist are taken.
"""

from __future__ import annotations

import _thread
import fcntl
import os
import sys
import time

from . import faults

MYPY = False
if MYPY:
    # Spelled so that nothing of typing is imported.
    import mmap
    from collections.abc import Iterator

    from .lines import LineMemory

__all__ = [
    "BY_THREAD",
    "NUMBER_SHIFT",
    "OTHER",
    "PC_MASK",
    "TABLE_END",
    "forked",
    "give_back",
    "parse",
    "read",
    "take",
]

BY_THREAD = 12
"""Offset of a byte: 1 while the reader wants the thread of each block."""
OTHER = 1
"""The number of a thread that is not told apart from others."""
_LAST = 254
"""The highest number; 255 in a PC's highest byte means that no thread is given."""
NUMBER_SHIFT = 56
"""With ``BY_THREAD``, a drained PC has the number in its highest byte, which is 255 in every PC."""
PC_MASK = (1 << NUMBER_SHIFT) - 1

# An entry: u32 process, u32 thread, u8 state, u8 length of the name, name.
_ENTRY = 64
_STATE = 8
_LENGTH = 9
_NAME = 10
_NAME_LIMIT = _ENTRY - _NAME
_FREE, _USED, _ENDED = 0, 1, 2
_NEXT = 13
"""Offset of a byte: the number after the last one that was given."""
_TABLE = faults.TEXT + faults.TEXT_LIMIT
TABLE_END = _TABLE + _ENTRY * (_LAST + 2)

_LOCK_SECONDS = 0.02
"""How long a thread waits for its number; it goes on as :data:`OTHER` then."""

# Threads of this process exclude each other by this lock, processes by one on the file.
_lock = _thread.allocate_lock()


def forked() -> None:
    """Replace the lock, which another thread of the parent may have held."""
    global _lock
    _lock = _thread.allocate_lock()


def take(memory: LineMemory, name: str | None = None) -> int:
    """Return a number for this thread; :data:`OTHER` if there is none.

    Args:
        memory: the memory to which the thread writes.
        name: the thread's name; None for the one that ``threading`` knows.
    """
    try:
        return _take(memory, name if name is not None else _name())
    except Exception:
        # Which thread ran a line is not worth a failure of the target.
        return OTHER


def give_back(memory: LineMemory, number: int) -> None:
    """Let another thread have the number; what was run with it keeps its name until then."""
    if number != OTHER:
        memory.buffer[_entry(number) + _STATE] = _ENDED


def read(buffer: mmap.mmap, number: int) -> bytes:
    """Return the entry of a number as bytes, for :func:`parse`."""
    at = _entry(number)
    return buffer[at : at + _ENTRY] if OTHER < number <= _LAST else b""


def parse(entry: bytes) -> tuple[int, int, str] | None:
    """Return process, thread and name of an entry; None if no thread ever had the number."""
    if len(entry) != _ENTRY or entry[_STATE] not in (_USED, _ENDED):
        return None
    process = int.from_bytes(entry[:4], "little")
    thread = int.from_bytes(entry[4:8], "little")
    length = min(entry[_LENGTH], _NAME_LIMIT)
    return process, thread, entry[_NAME : _NAME + length].decode("utf-8", "replace")


def _take(memory: LineMemory, name: str) -> int:
    process, thread = os.getpid(), _thread.get_native_id()
    text = name.encode("utf-8", "replace")[:_NAME_LIMIT]
    head = process.to_bytes(4, "little") + thread.to_bytes(4, "little")
    lock = _lock
    if not lock.acquire(timeout=_LOCK_SECONDS):
        return OTHER
    try:
        if not _lock_file(memory.descriptor):
            return OTHER
        try:
            buffer = memory.buffer
            number = _known(buffer, head) or _free(buffer)
            if number != OTHER:
                at = _entry(number)
                buffer[at : at + _ENTRY] = (
                    head + bytes((_USED, len(text))) + text.ljust(_NAME_LIMIT, b"\0")
                )
                buffer[_NEXT] = number + 1
            return number
        finally:
            fcntl.lockf(memory.descriptor, fcntl.LOCK_UN)
    finally:
        lock.release()


def _lock_file(descriptor: int) -> bool:
    """Exclude other processes; return False if that takes long, as one of them may be stopped."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.0002)
        else:
            return True


def _known(buffer: mmap.mmap, head: bytes) -> int:
    """Return the number that a thread has already, whose tracer was replaced; 0 for none."""
    at = buffer.find(head, _TABLE, TABLE_END)
    while at >= 0:
        number, rest = divmod(at - _TABLE, _ENTRY)
        if not rest and OTHER < number <= _LAST:
            return number
        at = buffer.find(head, at + 1, TABLE_END)
    return 0


def _free(buffer: mmap.mmap) -> int:
    for number in _numbers(buffer[_NEXT]):
        if buffer[_entry(number) + _STATE] != _USED:
            return number
    for number in _numbers(buffer[_NEXT]):
        at = _entry(number)
        process = int.from_bytes(buffer[at : at + 4], "little")
        thread = int.from_bytes(buffer[at + 4 : at + 8], "little")
        # Not pathlib, which the program may not have imported.
        if not os.path.exists(f"/proc/{process}/task/{thread}"):  # noqa: PTH110
            return number
    return OTHER


def _numbers(first: int) -> Iterator[int]:
    """Yield all numbers but OTHER, from ``first`` on."""
    first = min(max(first, OTHER + 1), _LAST)
    yield from range(first, _LAST + 1)
    yield from range(OTHER + 1, first)


def _entry(number: int) -> int:
    return _TABLE + _ENTRY * number


def _name() -> str:
    # Not threading.current_thread(), which enters a thread that it does not know into its list.
    known = getattr(sys.modules.get("threading"), "_active", {})
    thread = known.get(_thread.get_ident())
    name = getattr(thread, "name", "")
    return name if type(name) is str else ""
