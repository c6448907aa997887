# SPDX-License-Identifier: Apache-2.0
"""A trace for people: a line a call, as strace prints it, with the code that it reached."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Final

from bridge.sources.python.functions import ranges_text
from bridge.trace.call import Call, HostCode, HostThread
from bridge.trace.names import error_text

__all__ = ["FUNCTIONS", "call_text", "duration", "host_text", "render_trace", "some", "thread_text"]

_POINTERS: Final = frozenset({"mmap", "brk", "mremap", "shmat"})
"""Calls that return an address."""
FUNCTIONS: Final = 6
"""How many functions of the kernel, and of each of its modules, a line shows."""


def render_trace(
    calls: Iterable[Call], *, thread: bool | None = None, functions: int | None = FUNCTIONS
) -> Iterator[str]:
    """Yield a line for each call, without its end.

    Args:
        thread: begin each line with the thread; None: from the second thread on. The threads of the
            target are named from their second one on.
        functions: how many functions of the kernel, and of each of its modules, to show; None: all.
    """
    first: int | None = None
    ran: set[HostThread] = set()
    for call in calls:
        if first is None:
            first = call.thread
        ran.update(code.thread for code in call.host if code.thread is not None)
        yield call_text(
            call,
            thread=call.thread != first if thread is None else thread,
            target_threads=len(ran) > 1,
            functions=functions,
        )


def call_text(
    call: Call,
    *,
    thread: bool = False,
    target_threads: bool | None = None,
    functions: int | None = FUNCTIONS,
) -> str:
    """Return a call as one line: ``openat("…") = 3  1.2 ms → server.py: Session.walk 120-134``.

    The functions of the kernel come before the target's, and those of modules by themselves:
    ``→ kernel: vfs_write and 9 more → nbd: nbd_queue_rq → protocol.c: …``.

    Args:
        thread: begin with the thread.
        target_threads: name the threads of the target; None: if there are several in the call.
        functions: as for :func:`render_trace`.
    """
    arguments = "..." if call.arguments is None else ", ".join(call.arguments)
    parts = [f"[{_plain(call.command)} {call.thread}] " if thread else ""]
    parts.append(f"{call.name}({arguments}) = {_result(call)}")
    if call.seconds is not None:
        parts.append(f"  {duration(call.seconds)}")
    of_modules = {name for _, names in call.modules for name in names}
    own = tuple(name for name in call.kernel if name not in of_modules)
    for place, names in (("kernel", own), *call.modules):
        if names:
            parts.append(f" → {place}: {some(names, functions)}")
    if call.host:
        parts.append(f" → {host_text(call.host, target_threads)}")
    return "".join(parts)


def host_text(host: Sequence[HostCode], threads: bool | None = None) -> str:
    """Return the target's code: ``server.py: Session.walk 120-134, open 201; util.py: f 3``.

    Args:
        threads: name the threads, ``[worker 4711] server.py: f 3``; None: if there are several.
    """
    by_thread: dict[HostThread | None, dict[str, list[str]]] = {}
    names = _short({code.file: None for code in host})
    for code in host:
        lines = ranges_text(code.lines)
        text = " ".join(part for part in (code.function, lines) if part)
        by_thread.setdefault(code.thread, {}).setdefault(code.file, []).append(text)
    if threads is None:
        threads = len(by_thread) > 1
    return "; ".join(
        (f"[{thread_text(thread)}] " if threads and thread is not None else "")
        + "; ".join(f"{names[file]}: {', '.join(texts)}" for file, texts in files.items())
        for thread, files in by_thread.items()
    )


def some(names: Sequence[str], most: int | None) -> str:
    """Return functions as a list: the first of them, and how many more there are; None: all."""
    shown = ", ".join(names[:most])
    more = len(names) - most if most is not None else 0
    if more <= 0:
        return shown
    return f"{shown} and {more} more" if shown else f"functions: {more}"


def thread_text(thread: HostThread) -> str:
    """Return a thread of the target as text: its name and its id."""
    return f"{_plain(thread.name)} {thread.id}".lstrip()


def _short(files: Iterable[str]) -> dict[str, str]:
    """Return the last part of each file's path, or all of it where that says too little."""
    last = {
        file: file if file.endswith("/__init__.py") else PurePosixPath(file).name for file in files
    }
    seen = list(last.values())
    return {file: name if seen.count(name) == 1 else file for file, name in last.items()}


def _result(call: Call) -> str:
    result = call.result
    if result is None:
        return "?"
    if call.error is not None:
        # The kernel carries the call out again, or makes EINTR of it.
        if call.error.startswith("ERESTART"):
            return f"? {call.error}"
        return f"-1 {call.error} ({error_text(result)})"
    return f"{result:#x}" if call.name in _POINTERS else str(result)


def duration(seconds: float) -> str:
    """Return a time as text: ``1.2 ms``."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}" if seconds < 1000 else f"{seconds:.0f} s"
    return f"{seconds / 1e-6:.3g} µs"


def _plain(text: str) -> str:
    """Return text of the guest that a terminal may show."""
    return "".join(each if each.isprintable() else "?" for each in text)
