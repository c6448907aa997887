# SPDX-License-Identifier: Apache-2.0
"""A trace for a timeline: JSON of Chrome's trace-event format, which ui.perfetto.dev opens.

The format: "Trace Event Format", by the Chromium project. The process "guest" has a track for each
thread, with its system calls. The process "target" has a track for each of these threads, with the
functions of the target that ran for its calls; the tracer does not record which thread of the
target it was, nor when in the call.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from bridge.trace.call import Call
from bridge.trace.text import call_text
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
    reached: set[int] = set()
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
        if not call.host:
            continue
        if call.thread not in reached:
            reached.add(call.thread)
            yield _name("thread_name", _TARGET, call.thread, f"for thread {call.thread}")
        yield event | {
            "name": call.host[0].function or call.host[0].file,
            "cat": "target",
            "pid": _TARGET,
            "args": {
                "call": call_text(call),
                **{
                    f"{code.file}:{code.function}": ", ".join(map(str, code.lines))
                    for code in call.host
                },
            },
        }


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
