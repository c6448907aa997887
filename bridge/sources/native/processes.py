# SPDX-License-Identifier: Apache-2.0
"""What the bridge has to know of a program's file and of its process."""

from __future__ import annotations

import contextlib
import os
import struct
from pathlib import Path
from typing import Final

from bridge.errors import SourceError
from bridge.sources.native.memory import Range

__all__ = ["descendants", "read_code", "shares"]

_LOAD: Final = 1
_EXECUTABLE: Final = 1
_SEGMENT: Final = struct.Struct("<IIQQQQQQ")
"""``Elf64_Phdr``: type, flags, offset, address, physical address, bytes in file and in memory."""


def descendants(process: int) -> list[int]:
    """Return a process and those that it and its children have started and that still run."""
    found, todo = [], [process]
    while todo:
        found.append(todo.pop())
        with contextlib.suppress(OSError, ValueError):
            for task in Path(f"/proc/{found[-1]}/task").iterdir():
                todo += map(int, (task / "children").read_text(encoding="ascii").split())
    return found


def read_code(path: Path, start: int) -> bytes:
    """Return the segment of an ELF file with code that lies at the address ``start``.

    Raises:
        SourceError: the file is gone, or has no such segment.
    """
    try:
        with path.open("rb") as file:
            header = file.read(64)
            if header[:6] != b"\x7fELF\x02\x01":
                raise SourceError(f"{path} is no ELF file of 64 bits")
            (offset,) = struct.unpack_from("<Q", header, 32)
            size, count = struct.unpack_from("<HH", header, 54)
            for index in range(count):
                file.seek(offset + index * size)
                kind, flags, at, address, _, in_file, _, _ = _SEGMENT.unpack(
                    file.read(_SEGMENT.size)
                )
                if kind == _LOAD and flags & _EXECUTABLE and address == start:
                    file.seek(at)
                    return file.read(in_file)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error
    except struct.error as error:
        raise SourceError(f"{path} is damaged: {error}") from error
    raise SourceError(f"{path} has no code at {start:#x}: it is another file now")


def shares(found: Range, descriptor: int) -> bool:
    """Return whether a process has mapped the memory of a descriptor, and has such counters.

    They must lie in a mapping that it can write and that is its own alone.
    """
    status = os.fstat(descriptor)
    inode = str(status.st_ino)
    mapped = inside = False
    try:
        with Path(f"/proc/{found.process}/maps").open(encoding="utf-8", errors="replace") as maps:
            for line in maps:
                words = line.split(maxsplit=5)
                start, end = (int(each, 16) for each in words[0].split("-"))
                if words[4] == inode and "memfd:kcov-bridge-native" in words[-1]:
                    mapped = True
                if words[1].startswith("rw-p") and start <= found.address < end:
                    inside = found.count <= end - found.address
    except (OSError, ValueError, IndexError):
        return False
    return mapped and inside
