# SPDX-License-Identifier: Apache-2.0
"""One system call of the guest, and the code that it reached."""

from __future__ import annotations

from dataclasses import dataclass

from bridge.device.calls import HostThread

__all__ = ["Call", "HostCode", "HostThread"]


@dataclass(frozen=True, slots=True)
class HostCode:
    """Code of the target that ran for a call.

    Attributes:
        file: its name as in the coverage files; for native code as its compiler wrote it, or the
            module's name without debug information.
        function: the name as ``__qualname__`` has it, without ``<locals>``; "" for code of the
            module or of a class. For native code the innermost function, "" if it is not known.
        lines: numbers of the covered lines, sorted.
        thread: the thread of the target that ran it last for the call; None if that is not known.
        pcs: the PCs of its blocks that ran, sorted; empty in traces that an earlier version wrote.
    """

    file: str
    function: str
    lines: tuple[int, ...]
    thread: HostThread | None = None
    pcs: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Call:
    """A system call.

    Attributes:
        start: when it was entered, in seconds since the trace began.
        seconds: how long it took; None if it did not return.
        thread: the thread's id in the guest.
        command: the thread's name when it entered the call.
        number: the system call's number; -1 if the thread had none.
        name: its name, ``syscall_NUMBER`` if it has none.
        arguments: its arguments as text, as strace prints them; None if they are not known.
        result: what it returned, signed; None if it did not return.
        error: the name of the errno that it returned, or None.
        host: the target's code that ran for it, in the order in which the files came.
        kernel: functions of the guest's kernel that it reached, in order, each once.
        modules: those of them that belong to loadable modules, by module: drivers, file systems.
        test: the test during which it ran, or None.
    """

    start: float
    seconds: float | None
    thread: int
    command: str
    number: int
    name: str
    arguments: tuple[str, ...] | None
    result: int | None
    error: str | None = None
    host: tuple[HostCode, ...] = ()
    kernel: tuple[str, ...] = ()
    modules: tuple[tuple[str, tuple[str, ...]], ...] = ()
    test: str | None = None
