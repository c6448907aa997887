# SPDX-License-Identifier: Apache-2.0
"""``trace.jsonl``: the calls of a run, for programs.

The first line is a JSON object with ``format`` ``"kcov-bridge trace"``, ``version``
:data:`VERSION`, and the fields of :class:`TraceHeader`. Each further line is an object with the
fields of a :class:`~bridge.trace.call.Call`, in the order in which the calls were entered. The
version goes up when a key is removed or changes its meaning; new keys may come at any time, so a
reader ignores those that it does not know.

Several processes that write into one directory each have their own file, ``trace.WORKER.jsonl``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TextIO

from bridge.errors import InfrastructureError, UsageError
from bridge.trace.call import Call, HostCode, HostThread
from bridge.util.files import FileWriter

__all__ = [
    "FORMAT",
    "TRACE_FILE",
    "VERSION",
    "TraceHeader",
    "TraceReader",
    "TraceWriter",
    "call_line",
    "read_traces",
]

TRACE_FILE: Final = "trace.jsonl"
"""Its name in the directory of a run."""
FORMAT: Final = "kcov-bridge trace"
"""The value of the key ``format``."""
VERSION: Final = 1
"""The value of the key ``version``."""

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@dataclass(frozen=True)
class TraceHeader:
    """What a trace was taken of.

    Attributes:
        source: the sources in use: ``python``, ``kernel``, ``kernel,python`` or "".
        image: the guest's image, "" if it is not known.
        kernel: release of the guest's kernel, "" if it is not known.
        command: what ran; empty for a run of tests.
    """

    source: str = ""
    image: str = ""
    kernel: str = ""
    command: tuple[str, ...] = ()


class TraceWriter(FileWriter[TextIO]):
    """Writes a trace file, call by call; a context manager.

    A call's text comes from the guest and may have any characters; what UTF-8 cannot hold is
    replaced.

    Args:
        path: the file, which is replaced.
        header: what the trace is of.

    Raises:
        InfrastructureError: the file cannot be written; also from the methods.
    """

    def __init__(self, path: Path, header: TraceHeader) -> None:
        super().__init__(
            path,
            lambda: path.open("w", encoding="utf-8", errors="backslashreplace", newline="\n"),
        )
        self.calls = 0
        """How many calls were written."""
        try:
            head = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(header)}
            self._write_line(_encode(head))
        except BaseException:
            with contextlib.suppress(OSError):
                self._file.close()
            raise

    def write(self, call: Call) -> None:
        """Write one call."""
        self._write_line(call_line(call))
        self.calls += 1

    def write_all(self, calls: Iterable[Call]) -> None:
        """Write several calls, and hand them to the system."""
        for call in calls:
            self.write(call)
        self.flush()

    def flush(self) -> None:
        """Hand what was written to the system, so that a kill loses none of it."""
        try:
            self._file.flush()
        except OSError as error:
            raise self._failed(error) from error

    def _write_line(self, line: str) -> None:
        try:
            self._file.write(line + "\n")
        except OSError as error:
            raise self._failed(error) from error


class TraceReader:
    """Reads a trace file; iterating yields its calls, as often as it is done.

    Attributes:
        header: what the trace was taken of.

    Raises:
        UsageError: there is no such file.
        InfrastructureError: it cannot be read, or is no trace; also while iterating.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._open() as lines:
            self.header = self._read_header(next(lines, ""))

    def __iter__(self) -> Iterator[Call]:
        with self._open() as lines:
            next(lines, "")
            for number, line in enumerate(lines, 2):
                try:
                    yield _from_dict(json.loads(line))
                except (ValueError, TypeError, KeyError, AttributeError) as error:
                    raise InfrastructureError(
                        f"line {number} of {self._path} is damaged", evidence=repr(error)
                    ) from error

    @contextlib.contextmanager
    def _open(self) -> Iterator[Iterator[str]]:
        try:
            # Only \n ends a line: a guest's text may have other ends of lines.
            with self._path.open(encoding="utf-8", errors="replace", newline="\n") as file:
                yield iter(file)
        except FileNotFoundError as error:
            raise UsageError(
                f"there is no trace {self._path}",
                hint="record one: kcov-bridge run --trace",
            ) from error
        except OSError as error:
            raise InfrastructureError(f"cannot read {self._path}: {error.strerror}") from error

    def _read_header(self, line: str) -> TraceHeader:
        try:
            values = json.loads(line)
        except ValueError as error:
            raise InfrastructureError(f"{self._path} is no trace", evidence=str(error)) from error
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise InfrastructureError(f"{self._path} is no trace")
        if values.get("version") != VERSION:
            raise InfrastructureError(
                f"{self._path} has version {values.get('version')}, this program reads version "
                f"{VERSION}"
            )
        return TraceHeader(
            source=_text(values.get("source")),
            image=_text(values.get("image")),
            kernel=_text(values.get("kernel")),
            command=tuple(map(_text, values.get("command") or ())),
        )


def read_traces(directory: Path) -> Iterator[TraceReader]:
    """Open the trace of a directory, or those of its workers, in the order of their names."""
    for path in sorted(directory.glob("trace*.jsonl")):
        if path.name == TRACE_FILE or path.name.startswith("trace."):
            yield TraceReader(path)


def call_line(call: Call) -> str:
    """Return the line of a call, without its end."""
    return _encode(_as_dict(call))


def _as_dict(call: Call) -> dict[str, Any]:
    return {
        "start": round(call.start, 9),
        "seconds": round(call.seconds, 9) if call.seconds is not None else None,
        "thread": call.thread,
        "command": call.command,
        "number": call.number,
        "name": call.name,
        "arguments": list(call.arguments) if call.arguments is not None else None,
        "result": call.result,
        "error": call.error,
        "host": [
            {
                "file": code.file,
                "function": code.function,
                "lines": list(code.lines),
                "thread": dataclasses.asdict(code.thread) if code.thread is not None else None,
                # As text: readers of other languages round a number of 64 bits.
                "pcs": [f"{pc:#x}" for pc in code.pcs],
            }
            for code in call.host
        ],
        "kernel": list(call.kernel),
        "modules": {module: list(functions) for module, functions in call.modules},
        "test": call.test,
    }


def _from_dict(values: dict[str, Any]) -> Call:
    seconds, arguments, result = values["seconds"], values["arguments"], values["result"]
    return Call(
        start=float(values["start"]),
        seconds=float(seconds) if seconds is not None else None,
        thread=int(values["thread"]),
        command=_text(values["command"]),
        number=int(values["number"]),
        name=_text(values["name"]),
        arguments=tuple(map(_text, arguments)) if arguments is not None else None,
        result=int(result) if result is not None else None,
        error=_text(values["error"]) or None,
        host=tuple(
            HostCode(
                _text(code["file"]),
                _text(code["function"]),
                tuple(map(int, code["lines"])),
                _thread(code.get("thread")),
                tuple(int(pc, 16) for pc in code.get("pcs", ())),
            )
            for code in values["host"]
        ),
        kernel=tuple(map(_text, values["kernel"])),
        modules=tuple(
            (module, tuple(map(_text, functions)))
            for module, functions in values.get("modules", {}).items()
        ),
        test=_text(values.get("test")) or None,
    )


def _thread(values: dict[str, Any] | None) -> HostThread | None:
    """Read a thread of the target, which older traces do not have."""
    if values is None:
        return None
    return HostThread(int(values["process"]), int(values["id"]), _text(values["name"]))


def _text(value: object) -> str:
    return value if isinstance(value, str) else "" if value is None else str(value)
