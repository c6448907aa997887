# SPDX-License-Identifier: Apache-2.0
"""The lines of targets that tests reach, and how they join coverage.py's data.

coverage.py's collectors are a stack, and one that starts pauses the one before. So none is started
here: the bridge's own tracer (:mod:`bridge.sources.python`) says which lines ran in which phase of
which test, and these are added to the data of the coverage.py that measures this process, that of
pytest-cov or ``coverage run``. It finds no line less than without the bridge, and in addition those
of other processes; each has a context, ``nodeid|setup``, ``nodeid|run`` or ``nodeid|teardown``, as
with pytest-cov's ``--cov-context=test``. Where coverage.py measures branches, a line is recorded as
an arc from itself to itself, which says that it ran and nothing of a branch.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from bridge.errors import InfrastructureError

if TYPE_CHECKING:
    from coverage import Coverage, CoverageData

__all__ = ["ContextLines", "active_coverage", "join", "write", "write_configured"]

Plain = Mapping[str, Mapping[str, Iterable[int]]]
"""Lines by file by context, as a worker of pytest-xdist sends them."""


class ContextLines:
    """Lines by the context in which they ran, and by the path of their file."""

    def __init__(self) -> None:
        self._lines: dict[str, dict[str, set[int]]] = {}

    def __bool__(self) -> bool:
        return bool(self._lines)

    def add(self, context: str, lines: Mapping[str, Iterable[int]]) -> None:
        """Add lines of one context."""
        if not lines:
            return
        files = self._lines.setdefault(context, {})
        for path, numbers in lines.items():
            files.setdefault(path, set()).update(numbers)

    def update(self, lines: Plain) -> None:
        """Add lines of several contexts."""
        for context, files in lines.items():
            self.add(context, files)

    def context(self, context: str) -> dict[str, set[int]]:
        """Return the lines of one context."""
        return self._lines.get(context, {})

    def plain(self) -> dict[str, dict[str, list[int]]]:
        """Return all lines in a form that a message can hold."""
        return {
            context: {path: sorted(numbers) for path, numbers in files.items()}
            for context, files in self._lines.items()
        }

    def write_into(
        self,
        data: CoverageData,
        *,
        arcs: bool = False,
        name_of: Callable[[str], str | None] = lambda path: path,
        static: str = "",
    ) -> None:
        """Add the lines to coverage data.

        Args:
            data: its current context is changed.
            arcs: add them as arcs, for data of branches.
            name_of: returns the name of a file in the data, or None to leave it out.
            static: a context that comes before each.
        """
        for context, files in self._lines.items():
            data.set_context("|".join(filter(None, (static, context))))
            named = {name: run for path, run in files.items() if (name := name_of(path))}
            if arcs:
                data.add_arcs({name: [(line, line) for line in run] for name, run in named.items()})
            else:
                data.add_lines(named)


def active_coverage() -> Coverage | None:
    """Return the coverage.py that measures this process; None if none does."""
    if "coverage" not in sys.modules:
        return None
    import coverage

    return coverage.Coverage.current()


def join(active: Coverage, lines: ContextLines) -> None:
    """Add lines to the data of a coverage.py that measures, of the files that it measures.

    Raises:
        InfrastructureError: they cannot be added.
    """
    from coverage import CoverageData
    from coverage.exceptions import CoverageWarning

    def name_of(path: str) -> str | None:
        if not _is_text(path) or not _measures(active, path):
            return None
        return active._file_mapper(path)

    # The current context of its data stays: what it has collected is not written yet.
    with _explained("the coverage data of this run"), tempfile.TemporaryDirectory() as directory:
        part = CoverageData(basename=os.path.join(directory, "lines"))  # noqa: PTH118
        try:
            lines.write_into(
                part,
                arcs=bool(active.get_option("run:branch")),
                name_of=name_of,
                static=str(active.get_option("run:context") or ""),
            )
            with warnings.catch_warnings():
                # It warns once more when it saves, and then knows of these lines.
                warnings.simplefilter("ignore", CoverageWarning)
                data = active.get_data()
            data.update(part)
        finally:
            part.close(force=True)


def write(lines: ContextLines, file: Path) -> None:
    """Write lines into a file of coverage data, in place of an old one.

    Raises:
        InfrastructureError: it cannot be written.
    """
    from coverage import CoverageData

    _write(CoverageData(basename=str(file)), lines)


def write_configured(lines: ContextLines) -> Path:
    """Write lines where coverage.py's configuration says, and return where that is.

    Raises:
        InfrastructureError: it cannot be written, or the configuration is wrong.
    """
    from coverage import Coverage, CoverageData

    # One that is not started pauses no other.
    with _explained("coverage data"):
        configured = Coverage()
        file = Path(str(configured.get_option("run:data_file"))).absolute()
        data = CoverageData(
            basename=str(file), suffix=True if configured.get_option("run:parallel") else None
        )
        configured.get_data()  # which reads how files are named
    _write(
        data,
        lines,
        arcs=bool(configured.get_option("run:branch")),
        name_of=configured._file_mapper,
        static=str(configured.get_option("run:context") or ""),
    )
    return Path(data.data_filename())


def _write(data: CoverageData, lines: ContextLines, **how: Any) -> None:
    name_of = how.pop("name_of", lambda path: path)
    with _explained(data.data_filename()):
        try:
            Path(data.data_filename()).parent.mkdir(parents=True, exist_ok=True)
            data.erase()
            lines.write_into(
                data, name_of=lambda path: name_of(path) if _is_text(path) else None, **how
            )
            data.write()
        finally:
            data.close(force=True)


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    from coverage.exceptions import CoverageException

    try:
        yield
    except (CoverageException, OSError, sqlite3.Error) as error:
        raise InfrastructureError(
            f"the lines that tests reached are missing in {what}", evidence=str(error)
        ) from error


def _measures(active: Coverage, path: str) -> bool:
    """Return whether a coverage.py that runs wants a file: by its source, include and omit."""
    # It takes the module's name from the frame that runs the file.
    frame = SimpleNamespace(f_globals={"__name__": _module_name(path), "__file__": path})
    return active._should_trace(path, cast(FrameType, frame)).trace


def _module_name(path: str) -> str:
    """Return the name under which a file can be imported."""
    found = [
        entry
        for entry in map(os.path.realpath, sys.path)
        if path.startswith(entry.rstrip(os.sep) + os.sep)
    ]
    rest = Path(path).relative_to(max(found, key=len)) if found else Path(Path(path).name)
    parts = rest.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _is_text(path: str) -> bool:
    """Return whether a path, as Python decodes it, is UTF-8; coverage.py's files hold text."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
