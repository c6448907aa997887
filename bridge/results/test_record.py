# SPDX-License-Identifier: Apache-2.0
"""``tests.jsonl``: the record of a pytest run, one line for each test.

The file is JSON lines. The first line is the header: ``format`` is ``"kcov-bridge tests"`` and
``version`` the number :data:`VERSION`, which goes up when a key is taken away or changes its
meaning. New keys may come at any time, so a reader ignores those it does not know. Each further
line is one test, with the fields of :class:`RecordedTest` as keys.

Each worker of pytest-xdist writes a file of its own, ``tests.WORKER.jsonl``; :func:`read_records`
merges them. A line is complete only with its newline: a worker that was killed may leave a part of
its last line behind.
"""

from __future__ import annotations

import enum
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, Final

from bridge.errors import InfrastructureError
from bridge.util.files import FileWriter

__all__ = [
    "EVIDENCE_DIRECTORY",
    "FORMAT",
    "RECORD_FILE",
    "VERSION",
    "FailureKind",
    "Outcome",
    "RecordWriter",
    "RecordedTest",
    "Records",
    "TLines",
    "evidence_name",
    "read_records",
    "record_files",
    "remove_records",
]

FORMAT: Final = "kcov-bridge tests"
"""The value of the key ``format`` in the header."""

VERSION: Final = 1
"""The value of the key ``version`` in the header."""

EVIDENCE_DIRECTORY: Final = "evidence"
"""Name of the directory of what is known of failed tests, in the directory of the record."""

RECORD_FILE: Final = "tests.jsonl"
"""Name of the file of a run without workers."""

TLines = Mapping[str, tuple[int, ...]]
"""Lines by source file; the files are named as in coverage data, the lines are sorted."""

_WORKER_FILE: Final = re.compile(r"tests\.[A-Za-z0-9_-]+\.jsonl")
_WORKER: Final = re.compile(r"[A-Za-z0-9_-]+")


class Outcome(enum.StrEnum):
    """How a test ended."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    ERROR = "error"


class FailureKind(enum.StrEnum):
    """What made a test fail."""

    ASSERTION = "assertion"
    """Something in the test itself."""
    MACHINE = "machine"
    """The guest or the target, although the test may have passed."""


@dataclass(frozen=True, slots=True)
class RecordedTest:
    """One test; a default stands for what is not known."""

    test: str
    """Its node id."""
    outcome: Outcome
    kind_of_failure: FailureKind | None = None
    """None unless it failed."""
    seconds: float = 0.0
    """How long the test took: set-up, call and teardown, without the reset of the guest."""
    reset_seconds: float = 0.0
    """How long the guest's reset before the test took."""
    began: float = 0.0
    """When it began, in seconds since the epoch."""
    image: str = ""
    """Image of its guest; empty if it had none."""
    kernel: str = ""
    """Release of its guest's kernel."""
    accelerator: str = ""
    """Accelerator of its guest: ``kvm`` or ``tcg``."""
    worker: str = ""
    """Worker of pytest-xdist; empty without one."""
    lines: TLines = field(default_factory=dict)
    """Lines of the target that it reached."""
    new_lines: TLines = field(default_factory=dict)
    """Those of them that no earlier test of the same worker reached."""
    calls: int | None = None
    """How many system calls were traced; None if none could be."""
    message: str = ""
    """Why it failed or was skipped."""
    pcs: int | None = None
    """How many PCs were recorded; None if that is not known."""
    lost: int | None = None
    """How many PCs and comparisons were dropped and how many processes were not traced; None if
    that is not known."""

    def as_dict(self) -> dict[str, Any]:
        """Return the object that stands in the file."""
        values = {name: getattr(self, name) for name in self.__slots__}
        for name in ("lines", "new_lines"):
            values[name] = {file: sorted(lines) for file, lines in values[name].items()}
        return values


@dataclass(frozen=True, slots=True)
class Records:
    """What :func:`read_records` found."""

    tests: tuple[RecordedTest, ...] = ()
    """The tests of all workers in the order in which they began."""
    problems: tuple[str, ...] = ()
    """What is missing, and why; one sentence each."""


class RecordWriter(FileWriter[FileIO]):
    """Writes the record of one process; a context manager.

    A test is in the file when :meth:`write` returns. A write that fails leaves the file as it was
    before, so the next one can succeed.
    """

    def __init__(self, directory: Path, worker: str = "") -> None:
        """Create the file, in place of an old one, with its header.

        Args:
            directory: where it is created; made if it does not exist.
            worker: the worker of pytest-xdist that writes it.

        Raises:
            InfrastructureError: it cannot be written.
        """
        if worker and not _WORKER.fullmatch(worker):
            raise ValueError(f"not the name of a worker: {worker!r}")
        path = directory / (f"tests.{worker}.jsonl" if worker else RECORD_FILE)

        def opened() -> FileIO:
            directory.mkdir(parents=True, exist_ok=True)
            return FileIO(path, "w")

        super().__init__(path, opened)
        self._size = 0
        try:
            self._write_line({"format": FORMAT, "version": VERSION})
        except BaseException:
            self._file.close()
            raise

    def write(self, record: RecordedTest) -> None:
        """Append a test.

        Raises:
            InfrastructureError: it cannot be written; the file is as before.
        """
        self._write_line(record.as_dict())

    def _write_line(self, values: dict[str, Any]) -> None:
        # ASCII alone: a file name may contain what UTF-8 cannot encode.
        data = json.dumps(values, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"
        try:
            # What an earlier write left behind goes first.
            self._file.seek(self._size)
            self._file.truncate()
            written = 0
            while written < len(data):
                written += self._file.write(data[written:])
        except OSError as error:
            raise self._failed(error) from error
        self._size += len(data)


def evidence_name(test: str) -> str:
    """Return the name of the file with what is known of a failed test, without its suffix."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", test).strip("-.")[-150:]


def record_files(directory: Path) -> list[Path]:
    """Return the files of a record in a directory, sorted; none if there is no such directory.

    Raises:
        InfrastructureError: the directory cannot be read.
    """
    try:
        return sorted(
            path
            for path in directory.iterdir()
            if path.name == RECORD_FILE or _WORKER_FILE.fullmatch(path.name)
        )
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InfrastructureError(f"cannot read {directory}: {error.strerror}") from error


def remove_records(directory: Path) -> None:
    """Remove the record of an earlier run, of all its workers; the first act of a new run.

    Raises:
        InfrastructureError: a file cannot be removed.
    """
    for path in record_files(directory):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise InfrastructureError(f"cannot remove {path}: {error.strerror}") from error


def read_records(directory: Path) -> Records:
    """Read and merge the record in a directory; empty if it has none.

    An incomplete last line is left out, and ``problems`` says so.

    Raises:
        InfrastructureError: a file cannot be read, is not a record, has another version, or is
            damaged.
    """
    tests: list[RecordedTest] = []
    problems: list[str] = []
    for path in record_files(directory):
        tests.extend(_read_file(path, problems))
    return Records(tuple(sorted(tests, key=lambda test: test.began)), tuple(problems))


def _read_file(path: Path, problems: list[str]) -> Iterator[RecordedTest]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InfrastructureError(f"cannot read {path}: {error.strerror}") from error
    lines = data.split(b"\n")
    torn = lines.pop()
    if not lines:
        if not torn or f'{{"format":"{FORMAT}"'.encode().startswith(torn[:10]):
            problems.append(f"{path.name} has no header: what wrote it was killed at its start")
            return
        raise _foreign(path)
    _check_header(path, lines[0])
    if torn:
        problems.append(
            f"the last line of {path.name} is incomplete and was left out: "
            "what wrote it was killed, or the disk was full"
        )
    for number, line in enumerate(lines[1:], 2):
        try:
            yield _parse(line)
        except _DamagedError as error:
            raise InfrastructureError(
                f"{path} is damaged in line {number}: {error}",
                evidence=line[:80].decode("utf-8", "replace"),
                hint="run the tests again, or remove the file to do without its tests",
            ) from error


def _check_header(path: Path, line: bytes) -> None:
    try:
        header = _object(line)
    except _DamagedError as error:
        raise _foreign(path) from error
    if header.get("format") != FORMAT:
        raise _foreign(path)
    if (version := header.get("version")) != VERSION or isinstance(version, bool):
        raise InfrastructureError(
            f"{path} has version {version}, this program reads version {VERSION}",
            hint="install the version that wrote it, or run the tests again",
        )


def _foreign(path: Path) -> InfrastructureError:
    return InfrastructureError(
        f"{path} is not a record of tests: its first line has no format {FORMAT!r}",
        hint="another program may have written it; move it out of the directory",
    )


class _DamagedError(ValueError):
    """A line is not what it should be; the message says what is wrong."""


def _object(line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _DamagedError("it is not JSON") from error
    if not isinstance(values, dict):
        raise _DamagedError("it is not a JSON object")
    return values


def _parse(line: bytes) -> RecordedTest:
    values = _object(line)
    arguments = {}
    for name, check in _CHECKS.items():
        if name in values:
            try:
                arguments[name] = check(values[name])
            except (TypeError, ValueError, OverflowError) as error:
                raise _DamagedError(f"wrong value of {name!r}") from error
        elif name in ("test", "outcome"):
            raise _DamagedError(f"it lacks {name!r}")
    return RecordedTest(**arguments)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError
    if not math.isfinite(value) or value < 0:
        raise ValueError
    return float(value)


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError
    if value < 0:
        raise ValueError
    return value


def _lines(value: object) -> TLines:
    if not isinstance(value, dict):
        raise TypeError
    found = {}
    for file, lines in value.items():
        if not isinstance(lines, list):
            raise TypeError
        found[file] = tuple(sorted({_count(line) for line in lines}))
    return found


def _outcome(value: object) -> Outcome:
    return Outcome(_text(value))


def _failure_kind(value: object) -> FailureKind:
    return FailureKind(_text(value))


def _or_none(check: Callable[[object], Any]) -> Callable[[object], Any]:
    return lambda value: None if value is None else check(value)


_CHECKS: Final[dict[str, Callable[[object], Any]]] = {
    "test": _text,
    "outcome": _outcome,
    "kind_of_failure": _or_none(_failure_kind),
    "seconds": _number,
    "reset_seconds": _number,
    "began": _number,
    "image": _text,
    "kernel": _text,
    "accelerator": _text,
    "worker": _text,
    "lines": _lines,
    "new_lines": _lines,
    "calls": _or_none(_count),
    "message": _text,
    "pcs": _or_none(_count),
    "lost": _or_none(_count),
}
