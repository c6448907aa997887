# SPDX-License-Identifier: Apache-2.0
"""Coverage of Python code, handed over as it happens.

Reading the lines that coverage.py has collected takes hundreds of microseconds, but a kcov device
asks at every system call return. So this source has its own trace function
(:mod:`bridge.sources.python.tracer`), which notes lines and blocks in shared memory;
:meth:`PythonSource.consume` reads what is new there. The data file has coverage.py's format, for
its reports.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from coverage import CoverageData
from coverage.exceptions import CoverageException

from bridge.device.abi import Comparison
from bridge.device.calls import HostThread
from bridge.device.records import comparison_record
from bridge.errors import SourceError
from bridge.sources import PC
from bridge.sources.by_thread import ThreadOfPc
from bridge.sources.pcs import SLOT_BYTES, BlockTable
from bridge.sources.python import faults
from bridge.sources.python.hooks import MEASURING
from bridge.sources.python.instrument import instrumenting
from bridge.sources.python.lines import MISSED, LineMemory
from bridge.sources.python.packages import PackageFiles, find_packages
from bridge.sources.python.recorder import Recorder, site
from bridge.sources.python.tracer import Apart, Feed, View

__all__ = ["PythonSource", "block_table"]

_log = logging.getLogger(__name__)


class PythonSource:
    """The lines that run in some packages, as basic blocks.

    The source measures the thread that calls :meth:`start`, the threads and forked processes that
    come from it, and the Python programs that these start. Several sources may run in one process,
    also with the same packages; each gets what its own threads ran. Other trace functions of a
    thread (a debugger's, coverage.py's) keep working.

    A source is started and stopped once. :meth:`consume` may be called on any thread, also after
    :meth:`stop`, when it returns what was not consumed before.
    """

    def __init__(
        self,
        packages: Sequence[str],
        *,
        data_file: Path | None,
        name: str = "python",
        comparisons: bool = False,
    ) -> None:
        """Cover ``packages`` and the modules below them.

        Args:
            packages: dotted names of packages or modules.
            data_file: where :meth:`stop` writes coverage.py's data, replacing an existing file;
                None for nowhere.
            comparisons: record comparisons of modules that are imported between :meth:`start` and
                :meth:`stop`; this slows them.
        """
        self.name = name
        self.packages = tuple(packages)
        # Resolved now, because the target may change the working directory.
        self.data_file = data_file.absolute() if data_file is not None else None
        self.given = 0
        """Number of PCs that :meth:`consume` has returned."""
        self._table = BlockTable()
        self._files = PackageFiles({}, ())
        self._started = False
        self._pid = os.getpid()
        # _lock guards all below: consume() and stop() may run on different threads, and a trace
        # function that finds a new file may interrupt either.
        self._lock = threading.RLock()
        self._feed: Feed | None = None
        self._running = False
        # Memories of files that appeared after the start.
        self._later: list[LineMemory] = []
        # What take_lines() returned, for the data file.
        self._taken_lines: dict[str, set[int]] = {}
        self._site_pcs: dict[int, PC] = {}
        self._rest: list[PC] = []
        self._threads = ThreadOfPc()
        self._by_thread = False
        self._recorder = Recorder(self._is_ours) if comparisons else None
        self._instrumenting = ExitStack()

    @property
    def table(self) -> BlockTable:
        """The blocks of all files of the packages; empty before :meth:`start`."""
        return self._table

    @property
    def blocks_total(self) -> int:
        """Number of blocks in all files of the packages that can be parsed, run or not."""
        return len(self._table)

    @property
    def blocks_covered(self) -> int:
        """Number of different blocks that :meth:`consume` has returned."""
        return self._feed.covered if self._feed is not None else 0

    @property
    def measures_this_thread(self) -> bool:
        """Whether this thread is measured for the source, in the process that started it."""
        feed = self._feed
        return feed is not None and os.getpid() == self._pid and MEASURING.measures(feed)

    def start(self, epoch: tuple[str, int] | None = None) -> None:
        """Measure this thread from now on, and all threads and processes that it starts.

        Threads that run already are not measured. If a module of the packages was imported before,
        its import is not covered, and a warning is logged. Finding the files imports nothing.

        Args:
            epoch: a file and the offset in it of a word that each line changes; see
                :mod:`bridge.sources.python.lines`.

        Raises:
            SourceError: a package does not exist or has no source, the source was started before,
                or this Python runs without its interpreter lock.
        """
        if self._started:
            raise SourceError(f"the source {self.name} was already started", hint="make a new one")
        if not self.packages:
            raise SourceError("no package to cover is given", hint="name at least one")
        if not getattr(sys, "_is_gil_enabled", lambda: True)():
            raise SourceError(
                "this Python runs without its global interpreter lock, which the tracer needs",
                hint="run with PYTHON_GIL=1",
            )
        self._started = True
        self._table, self._files = _find_blocks(self.packages)
        self._warn_of_imported()
        paths = {name: path for path, name in self._files.names.items()}
        files = [file for name in self._table.files if (file := self._table.file(name)) is not None]
        try:
            memory = LineMemory.create(
                [(paths[file.name], file.line_ranges()) for file in files],
                [root for root, _ in self._files.roots],
                epoch,
            )
        except OSError as error:
            raise SourceError(f"no memory for the lines: {error.strerror}") from error
        self._feed = Feed(memory, self._new_file)
        self._feed.add(
            memory,
            [file.name for file in files],
            [file.first_pc for file in files],
            SLOT_BYTES,
        )
        if self._recorder is not None:
            self._instrumenting.enter_context(instrumenting(self.packages))
        self._running = True
        MEASURING.begin(self._feed)

    def consume(self) -> list[PC]:
        """Return the PCs of the blocks covered since the last call, each once, and forget them.

        Sorted by file name and, within a file, in the order of the text. Lines without a block
        give no PC and are kept for the data file alone.

        While another process that shares the memory has asked for the threads, each PC has the
        number of one, which :class:`bridge.sources.by_thread.ThreadOfPc` there takes out.

        Raises:
            SourceError: the tracer failed for the first time, in whatever process. Raised once;
                the next call gives the PCs.
        """
        with self._lock:
            if self._rest:
                pcs, self._rest = self._rest, []
            else:
                try:
                    pcs = self._feed.drain() if self._feed is not None else []
                except faults.Faulted:
                    raise self._fault() from None
            self.given += len(pcs)
            if self._by_thread and self._feed is not None:
                return self._threads.unpack(self._feed.memory.buffer, pcs)
            return pcs

    def record_threads(self, on: bool) -> None:
        """As :class:`bridge.sources.by_thread.ByThread`."""
        with self._lock:
            if self._feed is not None:
                self._by_thread = on
                self._threads.record(self._feed.memory.buffer, on)

    @property
    def thread_of(self) -> Mapping[PC, HostThread]:
        """As :class:`bridge.sources.by_thread.ByThread`."""
        return self._threads.thread_of

    def take_lines(self) -> dict[str, set[int]]:
        """Return the lines that ran since the last call, by the path of their file.

        Independent of :meth:`consume`, and also after :meth:`stop`; the data file has all lines.
        """
        with self._lock:
            feed = self._feed
            if feed is None:
                return {}
            taken: dict[str, set[int]] = {}
            for path in list(feed.beyond):
                taken[path] = feed.beyond.pop(path)
            for memory in (feed.memory, *self._later):
                for file in memory.files:
                    if lines := memory.take_lines(file):
                        taken.setdefault(file.path, set()).update(lines)
            for path, lines_of_file in taken.items():
                self._taken_lines.setdefault(path, set()).update(lines_of_file)
            return taken

    def later_lines(self) -> dict[str, set[int]]:
        """Return the lines that are not in the memory of :attr:`shared_lines`."""
        with self._lock:
            lines = {
                path: set(run) for path, run in (self._feed.beyond if self._feed else {}).items()
            }
            for memory in self._later:
                for file in memory.files:
                    lines.setdefault(file.path, set()).update(memory.lines_run(file))
            return lines

    @property
    def shared_lines(self) -> str:
        """Path by which other processes attach the lines; see :class:`.lines.LineMemory`."""
        return self._feed.memory.path if self._feed is not None else ""

    @property
    def tracer_faults(self) -> int:
        """How often the tracer failed, in all processes; each time a line may be missing."""
        return faults.read(self._feed.memory.buffer)[0] if self._feed is not None else 0

    def _fault(self) -> SourceError:
        """Return the first fault of the tracer as an error."""
        text = faults.read(self._feed.memory.buffer)[1] if self._feed is not None else ""
        return SourceError(f"the tracer failed: {text or 'there was no memory to keep the reason'}")

    def line_recorder(self, path: Path, line: int) -> Callable[[], None]:
        """Return a function that notes a line of a covered file as run, for benchmarks.

        Raises:
            SourceError: the source does not measure, or does not cover the file.
        """
        view = self._feed.view(os.path.realpath(path)) if self._feed is not None else None
        if view is None:
            raise SourceError(f"the source {self.name} does not cover {path}")
        return functools.partial(view.record, line)

    def record_comparisons(self, on: bool) -> None:
        """Start or stop to record comparisons.

        Does nothing for a source without ``comparisons``.
        """
        if self._recorder is not None:
            self._recorder.record(on)

    def consume_comparisons(self) -> tuple[list[Comparison], int]:
        """Return the comparisons since the last call, in order, and how many were dropped.

        A comparison's PC is that of the block in which it begins.
        """
        if self._recorder is None:
            return [], 0
        noted, dropped = self._recorder.take()
        with self._lock:
            records = [
                record
                for number, left, right, constant in noted
                if (record := comparison_record(left, right, constant, self._site_pc(number)))
                is not None
            ]
        return records, dropped

    def _is_ours(self, number: int) -> bool:
        """Return whether a comparison on this thread, at a site, belongs to this source."""
        feed = self._feed
        if feed is None or not MEASURING.measures(feed):
            return False
        return feed.view(site(number)[0]) is not None

    def _site_pc(self, number: int) -> PC:
        pc = self._site_pcs.get(number)
        if pc is None:
            path, line = site(number)
            name = self._files.names.get(path)
            # 0 if the file has changed since it was read.
            pc = (self._table.line_pc(name, line) if name is not None else None) or 0
            self._site_pcs[number] = pc
        return pc

    @contextlib.contextmanager
    def divert(self) -> Iterator[list[PC]]:
        """Keep what this thread covers inside the block apart.

        Yields:
            A list that holds the PCs, each once, after the block. :meth:`consume` does not return
            them, and comparisons are not recorded. It stays empty on a thread that is not measured.

        A coroutine or greenlet must not leave the block by ``await`` or a switch. Blocks nest.
        """
        pcs: list[PC] = []
        feed = self._feed
        if feed is None or not self.measures_this_thread:
            yield pcs
            return
        apart = Apart()
        try:
            with (
                apart.keep(),
                self._recorder.apart() if self._recorder else contextlib.nullcontext(),
            ):
                yield pcs
        finally:
            with self._lock:
                pcs += apart.give(feed)

    def stop(self) -> None:
        """Stop the measurement and write the data file, with every line that ran.

        Safe to call twice, and on a source that never started. Other threads are measured until
        their next line. In a forked child of the process that started the source it does nothing.

        Raises:
            SourceError: the data file cannot be written, or the tracer failed and :meth:`consume`
                has not raised that. The measurement has ended in either case.
        """
        if os.getpid() != self._pid:
            return
        fault: SourceError | None = None
        with self._lock:
            feed = self._feed
            if feed is None or not self._running:
                return
            self._running = False
            MEASURING.end(feed)
            for memory in self._later:
                memory.close()
            if self._recorder is not None:
                self._recorder.record(False)
            self._instrumenting.close()
            try:
                rest = feed.drain()
            except faults.Faulted:
                fault = self._fault()
                rest = feed.drain()
            # Another process may ask for the threads at this moment.
            self._rest = list(self._threads.unpack(feed.memory.buffer, rest))
        if feed.memory.buffer[MISSED]:
            _log.warning(
                "a process that the target started ran files of %s that appeared during the "
                "measurement; these are not covered",
                ", ".join(self.packages),
            )
        self._write(feed)
        if fault is not None:
            raise fault

    def _write(self, feed: Feed) -> None:
        if self.data_file is None:
            return
        lines = {path: set(taken) for path, taken in self._taken_lines.items()}
        for path, beyond in feed.beyond.items():
            lines.setdefault(path, set()).update(beyond)
        for memory in (feed.memory, *self._later):
            for file in memory.files:
                lines.setdefault(file.path, set()).update(memory.lines_run(file))
        # coverage.py's file holds text, and would hold none of them.
        for path in [path for path in lines if not _is_text(path)]:
            _log.warning("the coverage data lacks %r: its path is not UTF-8", os.fsencode(path))
            del lines[path]
        data = CoverageData(basename=str(self.data_file))
        try:
            self.data_file.parent.mkdir(parents=True, exist_ok=True)
            data.erase()
            data.add_lines({path: run for path, run in lines.items() if run})
            data.touch_files(list(lines))
            data.write()
        except (CoverageException, OSError, sqlite3.Error) as error:
            raise SourceError(
                f"cannot write the coverage data {self.data_file}", evidence=str(error)
            ) from error
        finally:
            data.close(force=True)

    def _new_file(self, path: str) -> View | None:
        """Return the view of a file that the search for the packages did not find, or None.

        It appeared later, or is in a directory that is not a package, from which Python imports
        modules nevertheless.
        """
        if not path.endswith((".py", ".pyw")):
            return None
        feed = self._feed
        if feed is None:
            return None
        if os.getpid() != self._pid:
            feed.memory.buffer[MISSED] = 1
            return None
        with self._lock:
            name = self._files.name_of(path)
            source = _read(path)
            if name is None or source is None:
                return None
            try:
                file = self._table.add(name, source)
                memory = LineMemory.create([(path, file.line_ranges())])
            except (SourceError, OSError) as error:
                _log.warning("%s has no blocks: %s", path, _text(error))
                return None
            self._files.names[path] = name
            self._later.append(memory)
            (view,) = feed.add(memory, [name], [file.first_pc], SLOT_BYTES)[-1:]
            return view

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


def block_table(packages: Sequence[str]) -> BlockTable:
    """Return the blocks that a source of these packages starts with; import nothing.

    Raises:
        SourceError: a package cannot be found.
    """
    return _find_blocks(packages)[0]


def _find_blocks(packages: Sequence[str]) -> tuple[BlockTable, PackageFiles]:
    """Return the blocks of all files of the packages that can be parsed, and these files."""
    found = find_packages(packages)
    sources: dict[str, bytes] = {}
    for path, name in found.names.items():
        source = _read(path)
        if source is not None:
            sources[name] = source
    table = BlockTable.from_sources(sources, on_error=_warn_of_source)
    names = {path: name for path, name in found.names.items() if table.file(name) is not None}
    return table, PackageFiles(names, found.roots)


def _read(path: str) -> bytes | None:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        _log.warning("%s cannot be read and has no blocks: %s", path, error.strerror)
        return None


def _is_text(path: str) -> bool:
    """Return whether a path, as Python decodes it, is UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _warn_of_source(name: str, error: SourceError) -> None:
    _log.warning("%s has no blocks: %s", name, error.report())


def _text(error: SourceError | OSError) -> str:
    return error.report() if isinstance(error, SourceError) else str(error)
