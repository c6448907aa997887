# SPDX-License-Identifier: Apache-2.0
"""A trace for a timeline: JSON of Chrome's trace-event format, which ui.perfetto.dev opens.

The format: "Trace Event Format", by the Chromium project. The process "guest" has a track for each
thread, with its system calls. Each process of the target has a track for each of its threads, with
the functions that the thread ran for a call. The tracer does not record when in the call that was:
the slice is as long as the call, except that it begins where an earlier one of the same thread
ends. Code whose thread is not known is in the process "target", on a track for the guest's thread.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from bridge.trace.call import Call, HostCode, HostThread
from bridge.trace.text import call_text, thread_text
from bridge.util.files import write_stream

__all__ = ["PERFETTO_FILE", "perfetto_text", "trace_events", "write_perfetto"]

PERFETTO_FILE: Final = "trace.perfetto.json"
"""Its name in the directory of a run."""

_GUEST: Final = 1
_TARGET: Final = 2
_MICROSECONDS: Final = 1e6


def trace_events(calls: Iterable[Call]) -> Iterator[dict[str, Any]]:
    """Yield the events of a trace."""
    yield _name("process_name", _GUEST, 0, "guest")
    yield _name("process_name", _TARGET, 0, "target")
    commands: dict[int, str] = {}
    tracks = _Tracks()
    for call in calls:
        if commands.get(call.thread) != call.command:
            # A thread that executes a program gets another name; the last one counts.
            commands[call.thread] = call.command
            name = f"{call.command} {call.thread}"
            yield _name("thread_name", _GUEST, call.thread, name)
        event = {
            "name": call.name,
            "cat": "syscall",
            "ph": "X",
            "pid": _GUEST,
            "tid": call.thread,
            "ts": call.start * _MICROSECONDS,
            "dur": (call.seconds or 0.0) * _MICROSECONDS,
        }
        yield event | {"args": _arguments(call)}
        by_thread: dict[HostThread | None, list[HostCode]] = {}
        for code in call.host:
            by_thread.setdefault(code.thread, []).append(code)
        for thread, ran in by_thread.items():
            yield from tracks.add(thread, call.thread)
            start, end = tracks.occupy(thread, call)
            yield event | {
                "name": ran[0].function or ran[0].file,
                "cat": "target",
                "pid": tracks.process(thread),
                "tid": thread.id if thread is not None else call.thread,
                "ts": start * _MICROSECONDS,
                "dur": (end - start) * _MICROSECONDS,
                "args": {
                    "call": call_text(call),
                    **{
                        f"{code.file}:{code.function}": ", ".join(map(str, code.lines))
                        for code in ran
                    },
                },
            }


class _Tracks:
    """The tracks of the target's threads."""

    def __init__(self) -> None:
        # Numbers of the file's own, by process id, because a process may have those of the guest.
        self._processes: dict[int, int] = {}
        self._named: set[tuple[HostThread | None, int]] = set()
        self._busy_until: dict[HostThread, float] = {}

    def process(self, thread: HostThread | None) -> int:
        """Return the number of a thread's process."""
        if thread is None:
            return _TARGET
        return self._processes.setdefault(thread.process, _TARGET + 1 + len(self._processes))

    def add(self, thread: HostThread | None, guest_thread: int) -> Iterator[dict[str, Any]]:
        """Yield the names of a track, and of its process, that the file does not have yet."""
        if thread is None:
            if (None, guest_thread) not in self._named:
                self._named.add((None, guest_thread))
                name = f"for thread {guest_thread}"
                yield _name("thread_name", _TARGET, guest_thread, name)
            return
        if thread.process not in self._processes:
            name = f"target {thread.process}"
            yield _name("process_name", self.process(thread), 0, name)
        if (thread, 0) not in self._named:
            self._named.add((thread, 0))
            yield _name("thread_name", self.process(thread), thread.id, thread_text(thread))

    def occupy(self, thread: HostThread | None, call: Call) -> tuple[float, float]:
        """Return start and end of a slice; those of one thread do not overlap."""
        start, end = call.start, call.start + (call.seconds or 0.0)
        if thread is not None:
            start = max(start, self._busy_until.get(thread, 0.0))
            end = max(end, start)
            self._busy_until[thread] = end
        return start, end


def write_perfetto(calls: Iterable[Call], path: Path) -> None:
    """Write the file, whole or not at all.

    Raises:
        InfrastructureError: it cannot be written.
    """
    write_stream(path, perfetto_text(calls))


def perfetto_text(calls: Iterable[Call]) -> Iterator[str]:
    """Yield the text of the file, in pieces."""
    yield '{"displayTimeUnit":"ns","traceEvents":[\n'
    separator = ""
    for event in trace_events(calls):
        yield separator + json.dumps(event)
        separator = ",\n"
    yield "\n]}\n"


def _arguments(call: Call) -> dict[str, Any]:
    values: dict[str, Any] = {"result": call.result, "number": call.number}
    for index, argument in enumerate(call.arguments or ()):
        values[f"argument {index}"] = argument
    if call.error is not None:
        values["error"] = call.error
    if call.host:
        values["host"] = [f"{code.file}:{code.function}" for code in call.host]
    if call.kernel:
        values["kernel"] = list(call.kernel)
    if call.test is not None:
        values["test"] = call.test
    return values


def _name(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
