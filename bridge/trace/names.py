# SPDX-License-Identifier: Apache-2.0
"""Names of system calls, errnos and flags of x86-64 Linux, from the kernel's headers.

``make_tables.py`` has made the table ``linux_x86_64.tsv`` from them.
"""

from __future__ import annotations

import errno
import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["SystemCall", "call_name", "error_name", "error_text", "flag_values", "system_calls"]

_TABLE: Final = Path(__file__).with_name("linux_x86_64.tsv")
_MAX_ERRNO: Final = 4095
"""MAX_ERRNO in include/linux/err.h: results from -4095 to -1 are errors."""


@dataclass(frozen=True, slots=True)
class SystemCall:
    """A system call: its name, and type and name of each parameter."""

    name: str
    parameters: tuple[tuple[str, str], ...]


@functools.lru_cache(maxsize=1)
def _rows() -> tuple[tuple[str, ...], ...]:
    lines = _TABLE.read_text(encoding="ascii").splitlines()
    return tuple(tuple(line.split("\t")) for line in lines if not line.startswith("#"))


@functools.lru_cache(maxsize=1)
def system_calls() -> dict[int, SystemCall]:
    """Return the system calls of x86-64 by number."""
    found = {}
    for kind, number, name, *parameters in _rows():
        if kind == "call":
            pairs = [each.partition(":") for each in parameters]
            found[int(number)] = SystemCall(name, tuple((kind, at) for kind, _, at in pairs))
    return found


@functools.lru_cache(maxsize=1)
def _internal_errnos() -> dict[int, str]:
    return {int(number): name for kind, number, name, *_ in _rows() if kind == "errno"}


@functools.cache
def flag_values(group: str) -> dict[str, int]:
    """Return the flags of a group, ascending; ``make_tables.py`` has the groups."""
    return {name: int(value) for kind, value, name, *_ in _rows() if kind == group}


def call_name(number: int, *, ia32: bool = False) -> str:
    """Return the name of a system call; ``syscall_NUMBER`` if it has none.

    Args:
        ia32: the number is one of 32-bit programs, whose names are not known here.
    """
    if ia32:
        return f"ia32_syscall_{number}"
    call = system_calls().get(number)
    return call.name if call is not None else f"syscall_{number}"


def error_name(result: int) -> str | None:
    """Return the name of the errno that is a call's result; None if it is no error."""
    if not -_MAX_ERRNO <= result < 0:
        return None
    return errno.errorcode.get(-result) or _internal_errnos().get(-result) or f"errno {-result}"


def error_text(result: int) -> str:
    """Return what the C library says about an errno that is a call's result."""
    return os.strerror(-result)
