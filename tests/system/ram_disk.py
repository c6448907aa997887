# SPDX-License-Identifier: Apache-2.0
"""A plugin of nbdkit: a disk in memory that begins as a copy of a file."""

from __future__ import annotations

from pathlib import Path

API_VERSION = 2

content = bytearray()


def config(key: str, value: str) -> None:
    if key != "image":
        raise ValueError(f"unknown parameter {key}")
    content[:] = Path(value).read_bytes()


def open(readonly: bool) -> int:
    return 1


def get_size(handle: int) -> int:
    return len(content)


def can_fua(handle: int) -> int:
    return 2


def pread(handle: int, buffer: memoryview, offset: int, flags: int) -> None:
    buffer[:] = content[offset : offset + len(buffer)]


def pwrite(handle: int, data: memoryview, offset: int, flags: int) -> None:
    content[offset : offset + len(data)] = data


def flush(handle: int, flags: int) -> None:
    """Nothing is kept back."""
    check(len(content))


def check(size: int) -> None:
    if size % 512:
        raise OSError("half a sector")
