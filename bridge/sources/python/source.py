# SPDX-License-Identifier: Apache-2.0
"""Coverage of Python code, measured by coverage.py and handed over as it happens.

coverage.py collects the lines of each file in a set, and offers that data whole, through a
database: hundreds of microseconds for each look. A kcov device looks at every system call return.
So this source reads the collector's sets themselves and empties them as it goes, and puts all lines
back at the end, so that coverage.py writes the very file that it would have written alone.

What makes this sound (all of it is tried out before the first use, see ``_try_out``):

* With the C tracer (``core = ctrace``, also where another core is the default) the collector's
  ``data`` maps a file name to the set of its lines. A frame looks its set up when it is entered,
  keeps a reference, and adds to it at each line.
* :class:`bridge.device.fastpath.plain.LineDrain` empties the sets in place while frames add to
  them.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.machinery
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar, Final

import coverage
from coverage.exceptions import CoverageException

from bridge.device.fastpath import LineDrain, LineSets
from bridge.errors import SourceError
from bridge.sources import PC
from bridge.sources.comparisons import Comparison, Recorder, comparison, site
from bridge.sources.pcs import BlockTable
from bridge.sources.python.instrument import instrumenting

__all__ = ["PythonSource", "block_table"]

# What coverage.py calls an importable source file (coverage/files.py, find_python_files): files
# with other characters in their name are left by editors.
_SOURCE_NAME: Final = re.compile(r"[^.#~!$@%^&*()+=,]+\.pyw?")

# Warnings of coverage.py that say nothing here: imported before is our own warning, and a target
# that was never reached is no fault of the measurement.
_QUIET: Final = [
    "already-imported",
    "module-not-imported",
    "module-not-measured",
    "module-not-python",
    "no-ctracer",
    "no-data-collected",
]

_REINSTALL: Final = "install coverage.py 7.10 or later from a wheel, which has the C tracer"

_log = logging.getLogger(__name__)


class PythonSource:
    """The lines that run in some packages of this process, as basic blocks.

    One source covers any number of packages; only one can be running in a process, because
    coverage.py measures for the one started last only. It stacks on a coverage.py that measures
    already: that one is paused from :meth:`start` to :meth:`stop`.

    The life: made, started, stopped; then done. :meth:`consume` may be called on any thread, and
    also after :meth:`stop`, when it gives what was not consumed before.
    """

    # The source that is running in this process; under _running_lock.
    _running: ClassVar[PythonSource | None] = None
    _running_lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(
        self,
        packages: Sequence[str],
        *,
        data_file: Path | None,
        name: str = "python",
        comparisons: bool = False,
    ) -> None:
        """Cover ``packages`` (dotted names of packages or modules) and what is below them.

        ``data_file`` is where :meth:`stop` writes coverage.py's data, replacing what is there;
        None for nowhere. With ``comparisons`` modules that are imported from :meth:`start` to
        :meth:`stop` show what they compare; it slows them.
        """
        self.name = name
        self.packages = tuple(packages)
        self.data_file = data_file
        self._table = BlockTable()
        self._sources: dict[str, str] = {}
        """Names in the table, by the canonical path that coverage.py uses."""
        self._roots: list[tuple[str, str]] = []
        self._coverage: coverage.Coverage | None = None
        self._started = False
        # All below is under _lock: consume() and stop() may come from different threads.
        self._lock = threading.Lock()
        self._tap: LineDrain | None = None
        self._line_pcs: dict[str, list[PC] | None] = {}
        self._site_pcs: dict[int, PC] = {}
        self._covered = 0
        self._rest: list[PC] = []
        self._recorder = Recorder() if comparisons else None
        self._instrumenting = ExitStack()

    @property
    def table(self) -> BlockTable:
        """The blocks of all files of the packages; empty before :meth:`start`."""
        return self._table

    @property
    def blocks_total(self) -> int:
        """The blocks of all files of the packages, run or not, that can be parsed."""
        return len(self._table)

    @property
    def blocks_covered(self) -> int:
        """How many different blocks :meth:`consume` has given."""
        tap = self._tap
        return tap.covered if tap is not None else self._covered

    def start(self) -> None:
        """Measure this thread, from the next function call on, and threads that start later.

        Threads that run already are not measured. A module of the packages that is imported
        already is measured in what it does from now on; the log warns, because its import is
        missing. Where a package lies inside another one, coverage.py imports the outer one, and
        removes it again from ``sys.modules``, to find it.

        Raises :class:`bridge.errors.SourceError` for a package that cannot be found, without the
        C tracer, where a coverage.py does not work as this module expects, or where another
        source is running.
        """
        if self._started:
            raise SourceError(f"the source {self.name} was started before", hint="make a new one")
        if not self.packages:
            raise SourceError("there is no package to cover", hint="name at least one")
        with ExitStack() as undo:
            with PythonSource._running_lock:
                if PythonSource._running is not None:
                    raise SourceError(
                        f"the source {PythonSource._running.name} is covering Python code already",
                        hint="stop it first, or give all packages to one source",
                    )
                PythonSource._running = self
            undo.callback(self._release)
            self._started = True
            _try_out()
            self._find_files()
            self._warn_of_imported()
            measurement = _new_coverage(self.data_file, source_pkgs=list(self.packages))
            undo.callback(_discard, measurement)
            try:
                measurement.start()
            except CoverageException as error:
                raise SourceError("coverage.py did not start", evidence=str(error)) from error
            undo.callback(measurement.stop)
            self._tap = LineDrain(_line_sets(measurement), self._find_lines)
            self._coverage = measurement
            if self._recorder is not None:
                self._instrumenting.enter_context(instrumenting(self.packages))
            undo.pop_all()

    def consume(self) -> list[PC]:
        """The PCs of the blocks covered since the last call, each once, and forget them.

        Sorted by file name and, within a file, in the order of the text. The first time that a
        file is among them its lines are mapped to PCs, which takes about 0.4 us a block; a file
        that was not there at the start is parsed then. Lines without a block give no PC and are
        kept for the data file alone.
        """
        with self._lock:
            if self._rest:
                rest, self._rest = self._rest, []
                return rest
            if self._tap is None:
                return []
            return self._tap.drain()

    def record_comparisons(self, on: bool) -> None:
        """Somebody wants comparisons from now on, or nobody does any more.

        Needs a source that was made with ``comparisons``.
        """
        assert self._recorder is not None
        self._recorder.record(on)

    def consume_comparisons(self) -> tuple[list[Comparison], int]:
        """The comparisons since the last call, in order, and how many more were dropped.

        A comparison's PC is that of the block in which it begins.
        """
        assert self._recorder is not None
        noted, dropped = self._recorder.take()
        with self._lock:
            records = [
                record
                for note in noted
                if (record := comparison(note, self._site_pc(note[0]))) is not None
            ]
        return records, dropped

    def _site_pc(self, number: int) -> PC:
        pc = self._site_pcs.get(number)
        if pc is None:
            path, line = site(number)
            found = self._find_lines(path)
            line_pcs = found[1] if found is not None else None
            # 0 where the file has changed since it was read.
            pc = line_pcs[line] if line_pcs is not None and line < len(line_pcs) else 0
            self._site_pcs[number] = pc
        return pc

    @contextlib.contextmanager
    def divert(self) -> Iterator[list[PC]]:
        """Keep apart what functions that this thread calls inside the block cover.

        The list that is given holds their PCs, each once, when the block ends; :meth:`consume`
        does not give them, and what they compare is not recorded. Code of the function that the
        block itself stands in is not kept apart, and in a coroutine the block must not be left by
        ``await``. Blocks nest. On a thread that is not measured nothing is covered and nothing
        kept apart.
        """
        tracer: Any = sys.gettrace()
        pcs: list[PC] = []
        if type(tracer).__name__ != "CTracer" or self._tap is None:
            yield pcs
            return
        outer: LineSets = tracer.data
        inner: LineSets = {}
        # Frames look their set up when they are entered, in what is here then.
        tracer.data = inner
        try:
            with self._recorder.apart() if self._recorder else contextlib.nullcontext():
                yield pcs
        finally:
            tracer.data = outer
            with self._lock:
                if self._tap is not None:
                    pcs += self._tap.adopt(inner)

    def stop(self) -> None:
        """End the measurement and write the data file, with every line that was ever consumed.

        Safe to call twice, and on a source that never started. Call it on the thread that called
        :meth:`start` where a coverage.py was measuring before, which goes on on this thread.

        Raises :class:`bridge.errors.SourceError` where the data file cannot be written, or the
        code under test has disturbed coverage.py; the measurement has ended also then.
        """
        with ExitStack() as cleanup:
            with self._lock:
                measurement, tap = self._coverage, self._tap
                if measurement is None or tap is None:
                    return
                self._coverage = self._tap = None
                cleanup.callback(self._release)
                cleanup.callback(self._instrumenting.close)
                cleanup.callback(_discard, measurement)
                in_order = _stop(measurement)
                self._rest = tap.drain()
                self._covered = tap.covered
            # The rest takes its time, and consume() need not wait for it.
            tap.put_back()
            try:
                data = measurement.get_data()
                # Where the target removed its package from sys.modules, coverage.py has not
                # found the files that never ran.
                data.touch_files(list(self._sources))
                data.write()
            except (CoverageException, OSError) as error:
                raise SourceError(
                    f"cannot write the coverage data {self.data_file}", evidence=str(error)
                ) from error
        if not in_order:
            raise SourceError(
                "another coverage.py was started during the measurement and has not ended",
                hint="what ran since is missing: the code under test must not measure itself",
            )

    def _find_lines(self, path: str) -> tuple[str, list[PC]] | None:
        """A file's name and the PC of each of its lines; None where it has no blocks."""
        try:
            line_pcs = self._line_pcs[path]
        except KeyError:
            line_pcs = self._line_pcs[path] = self._find_line_pcs(path)
        return (self._sources[path], line_pcs) if line_pcs is not None else None

    def _find_line_pcs(self, path: str) -> list[PC] | None:
        """The PC of each line of a file that ran for the first time."""
        name = self._sources.get(path)
        if name is None:
            # It was not there when the packages were searched, or in a directory that is not
            # a package: its blocks are found now.
            name = self._new_name(path)
            source = _read(path)
            if source is None:
                return None
            try:
                self._table.add(name, source)
            except SourceError as error:
                _log.warning("%s has no blocks: %s", path, error.report())
                return None
            self._sources[path] = name
        file = self._table.file(name)
        return file.line_pcs() if file is not None else None

    def _new_name(self, path: str) -> str:
        """The package-relative name of a file that was not found when the packages were."""
        for root, prefix in self._roots:
            if path.startswith(root + os.sep):
                return prefix + "/" + path[len(root) + 1 :].replace(os.sep, "/")
        # Code that names itself a module of the package from somewhere else.
        return self.packages[0].partition(".")[0] + "/" + Path(path).name

    def _find_files(self) -> None:
        """Find all source files of the packages, without importing any, and their blocks."""
        paths: dict[str, str] = {}
        for package in self.packages:
            for root, prefix in _locations(package):
                canonical = os.path.realpath(root)
                if canonical.endswith((".py", ".pyw")):
                    paths.setdefault(prefix + Path(canonical).suffix, canonical)
                    continue
                self._roots.append((canonical, prefix))
                for name in _walk(canonical):
                    paths.setdefault(f"{prefix}/{name}", os.path.realpath(f"{canonical}/{name}"))
        # The innermost package names a file, whatever the order of the packages.
        self._roots.sort(key=lambda root: len(root[0]), reverse=True)
        sources: dict[str, bytes] = {}
        for name, path in paths.items():
            source = _read(path)
            if source is not None:
                sources[name] = source
        self._table = BlockTable.from_sources(sources, on_error=_warn_of_source)
        self._sources = {
            path: name for name, path in paths.items() if self._table.file(name) is not None
        }

    def _warn_of_imported(self) -> None:
        wanted = tuple(package + "." for package in self.packages)
        imported = sorted(
            module for module in list(sys.modules) if (module + ".").startswith(wanted)
        )
        if imported:
            _log.warning(
                "imported before the measurement, so that %s is not covered: %s%s",
                "their import"
                if self._recorder is None
                else "their import, and what they compare,",
                ", ".join(imported[:5]),
                f" and {len(imported) - 5} more" if len(imported) > 5 else "",
            )

    def _release(self) -> None:
        with PythonSource._running_lock:
            if PythonSource._running is self:
                PythonSource._running = None


def block_table(packages: Sequence[str]) -> BlockTable:
    """The blocks that a source of these packages has when it starts; nothing is imported.

    Raises :class:`bridge.errors.SourceError` for a package that cannot be found.
    """
    source = PythonSource(packages, data_file=None)
    source._find_files()
    return source.table


def _new_coverage(data_file: Path | None, **selection: list[str]) -> coverage.Coverage:
    """A Coverage that measures lines with the C tracer and heeds no configuration of the user."""
    options: dict[str, Any] = dict(selection)
    try:
        measurement = coverage.Coverage(
            data_file=None if data_file is None else str(data_file), config_file=False, **options
        )
        # After the environment (COVERAGE_CORE) has had its say.
        measurement.set_option("run:core", "ctrace")
        measurement.set_option("run:timid", False)
        measurement.set_option("run:branch", False)
        measurement.set_option("run:concurrency", ["thread"])
        measurement.set_option("run:disable_warnings", _QUIET)
    except CoverageException as error:
        raise SourceError(
            "coverage.py cannot be configured", evidence=str(error), hint=_REINSTALL
        ) from error
    return measurement


def _line_sets(measurement: coverage.Coverage) -> LineSets:
    """The live line sets of a Coverage that was started. Raises SourceError without them."""
    collector = getattr(measurement, "_collector", None)
    tracers = getattr(collector, "tracers", None)
    if not isinstance(tracers, list) or not tracers:
        raise SourceError(
            f"coverage.py {coverage.__version__} has no collector as it is expected",
            hint=_REINSTALL,
        )
    tracer = tracers[0]
    if type(tracer).__name__ != "CTracer":
        raise SourceError(
            f"coverage.py measures with {type(tracer).__name__}, not with its C tracer",
            hint=_REINSTALL,
        )
    data = getattr(collector, "data", None)
    if type(data) is not dict or tracer.data is not data or getattr(collector, "branch", True):
        raise SourceError(
            f"coverage.py {coverage.__version__} does not keep lines as it is expected",
            hint=_REINSTALL,
        )
    return data


def _stop(measurement: coverage.Coverage) -> bool:
    """Stop a Coverage; false where it was not the last one that was started."""
    collector: Any = measurement._collector
    stack: list[object] = type(collector)._collectors
    if stack and stack[-1] is collector:
        measurement.stop()
        return True
    # It is paused already. coverage.py could only fail an assertion now, and would again at exit.
    if collector in stack:
        stack.remove(collector)
    measurement._started = False
    return False


def _discard(measurement: coverage.Coverage) -> None:
    """Close what a stopped Coverage has open, and let go of what keeps it in memory for good.

    That is its exit handler, the C tracers, which the garbage collector cannot look into, and a
    cache of a class. A coverage.py without one of them has nothing to let go of there.
    """
    handler = getattr(measurement, "_atexit", None)
    if handler is not None:
        atexit.unregister(handler)
    data = getattr(measurement, "_data", None)
    if data is not None:
        data.close(force=True)
    collector = getattr(measurement, "_collector", None)
    if collector is not None:
        collector.tracers = []
        mapped_file = getattr(type(collector), "cached_mapped_file", None)
        clear = getattr(mapped_file, "cache_clear", None)
        if clear is not None:
            clear()


@functools.cache
def _try_out() -> None:
    """Try on a small program, once a process, that consuming works with this coverage.py.

    Functions are called again and again, a generator is entered again, and a function consumes
    while it runs: every line must show each time it runs, and once. Raises SourceError.
    """
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        raise SourceError(
            "this Python runs without its global lock, which keeps the consumed sets whole",
            hint="run with PYTHON_GIL=1",
        )
    path = str(Path(__file__).resolve().with_name("_tried_out.py"))
    program: dict[str, Any] = {}
    code = (
        "def call():\n"
        "    return 1\n"
        "def generate():\n"
        "    yield 1\n"
        "    yield 2\n"
        "    yield 3\n"
        "def hold(look):\n"
        "    look()\n"
        "    look()\n"
    )
    exec(compile(code, path, "exec"), program)
    measurement = _new_coverage(None, include=[path])
    seen: list[list[int]] = []
    with ExitStack() as cleanup:
        cleanup.callback(_discard, measurement)
        measurement.start()
        cleanup.callback(measurement.stop)
        # A line stands for itself; there is none of number 0.
        tap = LineDrain(_line_sets(measurement), lambda path: (path, list(range(10))))

        def look() -> None:
            seen.append(tap.drain())

        generator = program["generate"]()
        for _ in range(3):
            program["call"]()
            next(generator)
            look()
            program["hold"](look)
        look()
    expected = [lines for turn in (4, 5, 6) for lines in ([2, turn], [8], [9])]
    if seen != [*expected, []]:
        raise SourceError(
            f"consuming does not work with coverage.py {coverage.__version__} on this Python",
            evidence=f"lines {seen}",
            hint=_REINSTALL,
        )


def _locations(package: str) -> list[tuple[str, str]]:
    """Where a package or module lies: directory or source file, and its name with slashes.

    Nothing is imported. Raises SourceError where there is none, or none with source.
    """
    search: Sequence[str] | None = None
    spec: importlib.machinery.ModuleSpec | None = None
    parts = package.split(".")
    for depth in range(1, len(parts) + 1):
        spec = _find_spec(".".join(parts[:depth]), search)
        if spec is None:
            raise SourceError(
                f"there is no package {'.'.join(parts[:depth])}",
                hint="install it into this Python, or set PYTHONPATH",
            )
        search = spec.submodule_search_locations and list(spec.submodule_search_locations)
        if search is None and depth < len(parts):
            raise SourceError(f"{'.'.join(parts[:depth])} is a module, not a package")
    name = "/".join(parts)
    found = [(root, name) for root in search or () if Path(root).is_dir()]
    origin = spec.origin if spec is not None else None
    if not found and origin is not None and origin.endswith((".py", ".pyw")):
        found = [(origin, name)]
    if not found:
        raise SourceError(
            f"{package} has no Python source", hint="only source files can be covered"
        )
    return found


def _find_spec(name: str, search: Sequence[str] | None) -> importlib.machinery.ModuleSpec | None:
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        spec: importlib.machinery.ModuleSpec | None = find(name, search) if find else None
        if spec is not None:
            return spec
    return None


def _walk(root: str) -> Iterator[str]:
    """The source files of a package directory, relative to it, as coverage.py finds them.

    Directories below it without ``__init__.py`` are no part of the package.
    """
    for directory, below, files in os.walk(root):
        if directory != root and "__init__.py" not in files:
            below.clear()
            continue
        for file in files:
            if _SOURCE_NAME.fullmatch(file):
                yield (Path(directory) / file).relative_to(root).as_posix()


def _read(path: str) -> bytes | None:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        _log.warning("%s cannot be read and has no blocks: %s", path, error.strerror)
        return None


def _warn_of_source(name: str, error: SourceError) -> None:
    _log.warning("%s has no blocks: %s", name, error.report())
