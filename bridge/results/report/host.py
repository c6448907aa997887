# SPDX-License-Identifier: Apache-2.0
"""Lines of host code: coverage data of runs and records of tests, joined and analysed.

Which lines of Python count, and which were reached, is what coverage.py says: a statement of
several lines counts once, as its first line. Of native programs the lines of blocks count.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final

from bridge.errors import InfrastructureError
from bridge.results.code_file import CodeFile

if TYPE_CHECKING:
    from coverage import Coverage, CoverageData

__all__ = [
    "COVERAGE_FILE",
    "Function",
    "HostData",
    "SourceFile",
    "find_paths",
    "join_coverage",
    "measured_files",
    "native_files",
    "short_names",
]

COVERAGE_FILE: Final = ".coverage"
"""Name of coverage.py's data file in the directory of a run."""

_SOURCE_BYTES: Final = 4 << 20
"""A larger file is shown without its text."""
_NATIVE_BYTES: Final = 24 << 20
"""Of the texts of native programs, all together."""


@dataclass(frozen=True, slots=True)
class Function:
    """A function of a source file."""

    name: str
    """As ``__qualname__`` has it, without ``<locals>``."""
    first: int
    last: int


@dataclass(slots=True)
class SourceFile:
    """A file of host code that was measured."""

    path: str
    """As in the coverage data."""
    name: str = ""
    """Short, for people; each file has its own."""
    text: list[str] = field(default_factory=list)
    """Its lines; empty if they cannot be shown."""
    statements: set[int] = field(default_factory=set)
    """First lines of the statements that count."""
    first_lines: dict[int, int] = field(default_factory=dict)
    """First line of the statement that each further line belongs to."""
    reached: set[int] = field(default_factory=set)
    """Those of ``statements`` that ran, in any way."""
    functions: list[Function] = field(default_factory=list)
    problem: str = ""
    """Why the text is missing or doubtful."""

    def count(self, lines: Iterable[int]) -> set[int]:
        """Return the statements among lines; the lines themselves if the source is not known."""
        found = {self.first_lines.get(line, line) for line in lines}
        return found & self.statements if self.statements else found


class HostData:
    """Joined coverage data, in a file that lives as long as the block of :func:`join_coverage`."""

    def __init__(self, data_file: Path, lines: dict[str, dict[str, set[int]]]) -> None:
        """Take coverage data.

        Args:
            data_file: the joined data, for coverage.py.
            lines: lines by context, by path.
        """
        self.data_file = data_file
        self.lines = lines

    def coverage(self) -> Coverage:
        """Open the joined data; a configuration of the user is ignored."""
        import coverage

        measured = coverage.Coverage(
            data_file=str(self.data_file), config_file=False, messages=False
        )
        measured.load()
        return measured

    def files(self, modified_before: float | None = None) -> list[SourceFile]:
        """Analyse all measured files, sorted by path; also those of which no line ran.

        Args:
            modified_before: a source that is newer is doubtful; seconds since the epoch.
        """
        measured = self.coverage()
        files = [
            _analyse(measured, path, set().union(*contexts.values()), modified_before)
            for path, contexts in sorted(self.lines.items())
        ]
        for file, name in zip(files, short_names([each.path for each in files]), strict=True):
            file.name = name
        return files


@contextlib.contextmanager
def join_coverage(
    data_files: Iterable[Path], tests: Iterable[tuple[str, Mapping[str, Iterable[int]]]]
) -> Iterator[HostData]:
    """Join coverage data of runs with lines that tests reached.

    If tests have lines, only the files of those are kept: the data may have the user's own unit
    tests and their packages beside them.

    Args:
        data_files: files of coverage.py.
        tests: node ids and lines by path.

    Raises:
        InfrastructureError: a file cannot be read or is no coverage data.
    """
    data_files = list(data_files)
    lines: dict[str, dict[str, set[int]]] = {}
    for path in data_files:
        with _reading(path) as data:
            for file in data.measured_files():
                by_context = lines.setdefault(file, {})
                for line, contexts in data.contexts_by_lineno(file).items():
                    for context in contexts:
                        by_context.setdefault(context, set()).add(line)
    wanted: set[str] = set()
    added = False
    for test, by_path in tests:
        for file, reached in by_path.items():
            if not (numbers := set(reached)):
                continue
            wanted.add(file)
            by_context = lines.setdefault(file, {})
            before: set[int] = set().union(*by_context.values())
            by_context.setdefault(f"{test}|run", set()).update(numbers)
            added = added or not numbers <= before
    dropped = {file for file in lines if wanted and file not in wanted}
    for file in dropped:
        del lines[file]
    if len(data_files) == 1 and not added and not dropped:
        # As it is: it may have branches too.
        yield HostData(data_files[0], lines)
        return
    with TemporaryDirectory(prefix="kcov-bridge-report-") as scratch:
        joined = Path(scratch, "coverage")
        _write(joined, lines)
        yield HostData(joined, lines)


def measured_files(data_files: Iterable[Path]) -> set[str]:
    """Return the paths of all files in coverage data; raises as :func:`join_coverage`."""
    paths: set[str] = set()
    for path in data_files:
        with _reading(path) as data:
            paths |= data.measured_files()
    return paths


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[CoverageData]:
    from coverage import CoverageData
    from coverage.exceptions import CoverageException

    data = CoverageData(basename=str(path))
    try:
        data.read()
        yield data
    except CoverageException as error:
        raise InfrastructureError(
            f"{path} cannot be read as coverage data", evidence=str(error)
        ) from error
    finally:
        data.close()


def _write(path: Path, lines: dict[str, dict[str, set[int]]]) -> None:
    from coverage import CoverageData

    by_context: dict[str, dict[str, set[int]]] = {}
    for file, contexts in lines.items():
        for context, numbers in contexts.items():
            by_context.setdefault(context, {})[file] = numbers
    data = CoverageData(basename=str(path))
    # A file without any line is data too.
    data.add_lines({})
    data.touch_files([_storable(file) for file in lines])
    for context, by_file in by_context.items():
        data.set_context(_storable(context))
        data.add_lines({_storable(file): numbers for file, numbers in by_file.items()})
    data.write()
    data.close()


def _storable(text: str) -> str:
    """Return a text as a database can hold it: a file name may have what UTF-8 cannot encode."""
    return text.encode("utf-8", "backslashreplace").decode()


def _analyse(
    measured: Coverage, path: str, lines: set[int], modified_before: float | None
) -> SourceFile:
    from coverage.exceptions import CoverageException
    from coverage.python import PythonFileReporter

    file = SourceFile(path)
    try:
        status = Path(path).stat()
        if status.st_size > _SOURCE_BYTES:
            raise OSError(f"the file has {status.st_size:,} bytes, too many to show")
        # As coverage.py and editors count lines: \f and the like do not end one.
        with tokenize.open(path) as source:
            file.text = source.read().split("\n")
        reporter = PythonFileReporter(path, coverage=measured)
        file.statements = set(reporter.lines())
        for number in range(1, len(file.text) + 1):
            (first,) = reporter.translate_lines([number])
            if first != number:
                file.first_lines[number] = first
        for region in reporter.code_regions():
            if region.kind == "function" and region.lines:
                last = max(region.lines)
                file.functions.append(Function(region.name, min(region.start, last), last))
    except (CoverageException, OSError, SyntaxError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        file.problem = f"the source cannot be shown with its lines: {reason}"
        file.statements, file.first_lines = set(), {}
    else:
        if modified_before is not None and status.st_mtime > modified_before:
            file.problem = "the file was changed after the run: its lines may be others now"
    file.functions.sort(key=lambda function: (function.first, -function.last))
    file.reached = file.count(lines)
    if not file.statements:
        file.statements = set(file.reached)
    return file


def native_files(files: Mapping[str, CodeFile], written: float) -> list[SourceFile]:
    """Return the files of native programs, sorted by path.

    Those of which no line ran are without their text, and so are files beyond a page's worth.

    Args:
        written: when the coverage was, in seconds since the epoch; a source that is newer is
            doubtful.
    """
    found = []
    room = _NATIVE_BYTES
    there = sorted(path for path in files if Path(path).is_file())
    names = dict(zip(there, short_names(there), strict=True))
    for path, code in sorted(files.items()):
        file = SourceFile(path, names.get(path, path), statements=set(code.lines))
        file.reached = {line for line, ran in code.lines.items() if ran}
        file.functions = sorted(
            (
                Function(function, first, code.last_lines[function])
                for function, (first, _) in code.functions.items()
            ),
            key=lambda each: (each.first, -each.last),
        )
        try:
            status = Path(path).stat()
            if not file.reached:
                file.problem = "no line of it ran, so its text is not here"
            elif status.st_size > min(room, _SOURCE_BYTES):
                file.problem = "the page has no room for its text"
            else:
                text = Path(path).read_text(encoding="utf-8", errors="replace")
                room -= status.st_size
                file.text = text.split("\n")
                if status.st_mtime > written:
                    file.problem = "the file was changed after the run: its lines may be others now"
        except OSError as error:
            file.problem = f"the source cannot be shown: {error.strerror}"
        found.append(file)
    return found


def find_paths(names: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Return the path of each file that is named relative to its package.

    Args:
        names: paths, or the ends of paths.
        known: paths of coverage data, looked at first; then the modules of this Python.
    """
    known = sorted(known)
    found = {}
    for name in names:
        if Path(name).is_absolute():
            found[name] = name
            continue
        ending = f"/{name}"
        places = [path for path in known if path.endswith(ending)] or [
            path
            for entry in sys.path
            if (path := os.path.realpath(entry + ending))
            if Path(path).is_file()
        ]
        found[name] = places[0] if places else name
    return found


def short_names(paths: list[str]) -> list[str]:
    """Return short names for different paths, each different from the others."""
    names = []
    for path in paths:
        for mark in ("/site-packages/", "/dist-packages/"):
            _, found, after = path.rpartition(mark)
            if found:
                names.append(after)
                break
        else:
            names.append("")
    others = [path for path, name in zip(paths, names, strict=True) if not name]
    with contextlib.suppress(ValueError):
        top = os.path.commonpath([str(Path(path).parent) for path in others]) if others else ""
        # The directory itself stays: a name alone may say little.
        top = str(Path(top).parent) if top else top
        for index, path in enumerate(paths):
            if not names[index] and path.startswith(top.rstrip("/") + "/"):
                names[index] = path[len(top.rstrip("/")) + 1 :]
    times = Counter(names)
    return [
        path if not name or times[name] > 1 else name
        for path, name in zip(paths, names, strict=True)
    ]
