# SPDX-License-Identifier: Apache-2.0
"""The tracer in Python: the definition, and the fallback without a C compiler.

A line is attributed to the file of the code object that runs it, looked up at each event. The
tracer does not rely on calls and returns in pairs, because greenlets switch, and Python 3.11
reports no call when an exception is thrown into a coroutine.
"""

from __future__ import annotations

import os
import re
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from types import CodeType, FrameType
from typing import Any

from .. import faults, threads
from ..lines import ACTIVE, CHANGED, DIRTY, LineMemory

__all__ = [
    "Apart",
    "Feed",
    "Group",
    "View",
    "canonical",
    "chain",
    "chained",
    "current",
    "forked",
    "install",
    "interpreters_gettrace",
    "note_fault",
    "thread_ended",
    "uninstall",
]

# The interpreter's own; hooks may replace them later.
_settrace = sys.settrace
interpreters_gettrace: Callable[[], Any] = sys.gettrace


def canonical(filename: str, file: object = None) -> str:
    """Return the path of a source file as coverage.py names it; "" if it is not a file.

    Args:
        filename: of the code object.
        file: ``__file__`` of its module, which is right where compiled code was moved.
    """
    if not filename or filename.startswith("<"):
        return ""
    return os.path.realpath(_moved(filename, file) or filename)


def is_settled(filename: str, file: object = None) -> bool:
    """Return whether a file name means one file, in any module and working directory."""
    if filename.startswith("<"):
        return True
    # A name without a file may be that of moved code, which only ``__file__`` of its module tells.
    return filename.startswith("/") and _moved(filename, file) is None and _exists(filename)


def _moved(filename: str, file: object) -> str | None:
    """Return the path of a module whose code names a missing or relative file, or None."""
    if not isinstance(file, str | os.PathLike) or file == filename:
        return None
    path = os.fspath(file)
    if not isinstance(path, str) or Path(path).name != Path(filename).name:
        return None
    return None if filename.startswith("/") and _exists(filename) else path


def _exists(path: str) -> bool:
    # Not pathlib's, which raises where a directory may not be searched.
    return os.path.exists(path)  # noqa: PTH110


class CodeViews:
    """The views of code whose file name does not say which file it is.

    The name is relative, or compiled code was moved. The file is the one that the name means when
    the code first runs; code inside that code belongs to the same file.
    """

    __slots__ = ("_known",)

    def __init__(self) -> None:
        # By the code's identity, because equal code may belong to two files.
        self._known: dict[int, tuple[weakref.ref[CodeType], tuple[View, ...]]] = {}

    def get(self, code: CodeType) -> tuple[View, ...] | None:
        """Return the views of a code object, or None if it never ran."""
        known = self._known.get(id(code))
        return known[1] if known is not None and known[0]() is code else None

    def put(self, code: CodeType, views: tuple[View, ...]) -> None:
        """Store the views of a code object and of all code in it."""
        known = self._known
        todo = [code]
        while todo:
            each = todo.pop()
            number = id(each)

            def forget(gone: weakref.ref[CodeType], number: int = number) -> None:
                # Unless other code has got the number since.
                if number in known and known[number][0] is gone:
                    del known[number]

            known[number] = (weakref.ref(each, forget), views)
            todo += [constant for constant in each.co_consts if isinstance(constant, CodeType)]


def keep_fault(
    feeds: Sequence[Feed], error: BaseException, filename: object = None, line: int = 0
) -> None:
    """Keep the text of a fault; see :func:`bridge.sources.python.faults.describe`."""
    text = faults.describe(error, filename, line)
    for feed in feeds:
        faults.keep(feed.memory.buffer, text)


def note_fault(
    feeds: Sequence[Feed], error: BaseException, filename: object = None, line: int = 0
) -> None:
    """Note that a line may be lost, and the reason; raise nothing.

    Args:
        feeds: the feeds that the line belongs to.
        error, filename, line: as for :func:`bridge.sources.python.faults.describe`.
    """
    for feed in feeds:
        faults.count(feed.memory.buffer)
    # The fault is counted already; without memory its reason is missing.
    with suppress(BaseException):
        keep_fault(feeds, error, filename, line)
    for feed in feeds:
        faults.report(feed.memory.buffer)


_EPOCH_COUNT_SHIFT = 23
"""A process id needs 22 bits on Linux; the lowest bit is 0."""

_MASK = (1 << 64) - 1
_HIT = re.compile(rb"[^\0]")
# The count starts where no process of the same id was before; the interpreter lock guards it.
_epoch_count = time.monotonic_ns()
_epoch_process = os.getpid() << 1


def _epoch_value() -> int:
    """Return a value for the coverage epoch that it never had before."""
    global _epoch_count
    _epoch_count += 1
    return (_epoch_count << _EPOCH_COUNT_SHIFT | _epoch_process) & _MASK


def forked() -> None:
    """Tell this process from its parent, of which it is a forked child."""
    global _epoch_process
    _epoch_process = os.getpid() << 1
    threads.forked()
    tracer = interpreters_gettrace()
    if isinstance(tracer, _ThreadTracer):
        tracer.numbers.clear()
        tracer.take_numbers(tracer.group, None)


class View:
    """A file in the memory of a feed."""

    __slots__ = (
        "_block_of",
        "_buffer",
        "_dirty",
        "_epoch",
        "_file",
        "covered",
        "feed",
        "first_pc",
        "name",
    )

    def __init__(
        self, feed: Feed, memory: LineMemory, index: int, name: str, first_pc: int, step: int
    ) -> None:
        """View file number ``index`` of the memory; block i has the PC ``first_pc + i * step``."""
        self.feed = feed
        self.name = name
        self.first_pc = range(first_pc, first_pc + step * memory.files[index].blocks, step)
        self._file = file = memory.files[index]
        self._buffer = memory.buffer
        self._dirty = DIRTY + index
        at = feed.memory.epoch_at
        self._epoch = memoryview(feed.memory.epoch)[at : at + 8].cast("Q")
        self._block_of = memoryview(memory.buffer)[
            file.block_of : file.block_of + 4 * file.lines
        ].cast("I")
        self.covered: set[int] = set()

    def record(self, line: int, thread: int = threads.OTHER) -> None:
        """Note that a line has run. For the order of the stores see :mod:`..lines`.

        ``thread``: the number of the thread that ran it; see :mod:`..threads`.
        """
        file = self._file
        if not 0 <= line < file.lines:
            # The file has changed since it was read, or other code was compiled under its name.
            self.feed.note_beyond(file.path, line)
            return
        buffer = self._buffer
        buffer[file.taken + line] = 1
        block = self._block_of[line]
        if block:
            buffer[file.hit + block - 1] = thread
            buffer[self._dirty] = 1
            buffer[CHANGED] = 1
            self._epoch[0] = _epoch_value()

    def take(self, by_thread: bool = False) -> list[int]:
        """Return the PCs of the blocks that ran since the last call, and forget them.

        ``by_thread``: with the number of the thread in each, as :mod:`..threads` says.
        """
        buffer, start, end = self._buffer, self._file.hit, self._file.hit + self._file.blocks
        pcs = []
        numbers = []
        found = _HIT.search(buffer, start, end)
        while found is not None:
            at = found.start()
            numbers.append(buffer[at])
            buffer[at] = 0
            pcs.append(self.first_pc[at - start])
            found = _HIT.search(buffer, at + 1, end)
        self.covered.update(pcs)
        if by_thread:
            return [
                pc & threads.PC_MASK | number << threads.NUMBER_SHIFT
                for pc, number in zip(pcs, numbers, strict=True)
            ]
        return pcs

    def adopt(self, lines: set[int]) -> list[int]:
        """Note lines that were kept apart as run; return the PCs of their blocks."""
        file = self._file
        blocks = set()
        for line in lines:
            if not 0 <= line < file.lines:
                self.feed.note_beyond(file.path, line)
                continue
            self._buffer[file.taken + line] = 1
            if self._block_of[line]:
                blocks.add(self._block_of[line] - 1)
        pcs = [self.first_pc[block] for block in sorted(blocks)]
        self.covered.update(pcs)
        return pcs


class Feed:
    """The lines that tracers of one source write and the source reads.

    Args:
        unknown: returns the view of a file below a root that has none yet, or None. It gets the
            canonical path, and runs inside a trace function on any thread.
    """

    def __init__(self, memory: LineMemory, unknown: Callable[[str], View | None]) -> None:
        self.memory = memory
        self._unknown = unknown
        self._views: dict[str, View | None] = {}
        # Each memory with its views by number; the first memory comes first.
        self._memories: list[tuple[LineMemory, list[View]]] = []
        self._fence = Lock()
        self.beyond: dict[str, set[int]] = {}

    def add(
        self, memory: LineMemory, names: Sequence[str], first_pcs: Sequence[int], step: int
    ) -> list[View]:
        """Add a memory, whose files are sorted by name; return the views of its files."""
        views = [
            View(self, memory, index, name, pc, step)
            for index, (name, pc) in enumerate(zip(names, first_pcs, strict=True))
        ]
        for file, view in zip(memory.files, views, strict=True):
            self._views[file.path] = view
        self._memories.append((memory, views))
        return views

    @property
    def active(self) -> bool:
        """Whether lines are recorded."""
        return self.memory.buffer[ACTIVE] != 0

    @property
    def covered(self) -> int:
        """Number of different PCs that were returned."""
        return sum(len(view.covered) for _, views in self._memories for view in views)

    def view(self, path: str) -> View | None:
        """Return the view of a file by its canonical path; None if it is not covered."""
        try:
            return self._views[path]
        except KeyError:
            if not self.memory.covers(path):
                return None
            view = self._views[path] = self._unknown(path)
            return view

    def note_beyond(self, path: str, line: int) -> None:
        """Keep a line outside its view, for the report."""
        self.beyond.setdefault(path, set()).add(line)

    def drain(self) -> list[int]:
        """Return the PCs of the blocks that ran since the last call, by file name, then in order.

        With the number of the thread in each, while ``BY_THREAD`` of :mod:`..threads` is set.

        Raises:
            Faulted: the tracer failed for the first time; the PCs are there for the next call.
        """
        dirty: list[View] = []
        for memory, views in self._memories:
            buffer = memory.buffer
            if not buffer[CHANGED]:
                continue
            if buffer[faults.FAULTED] == faults.UNREPORTED:
                buffer[faults.FAULTED] = faults.REPORTED
                raise faults.Faulted
            buffer[CHANGED] = 0
            with self._fence:
                pass
            end = DIRTY + len(views)
            at = buffer.find(b"\1", DIRTY, end)
            while at >= 0:
                buffer[at] = 0
                dirty.append(views[at - DIRTY])
                at = buffer.find(b"\1", at + 1, end)
        if not dirty:
            return []
        with self._fence:
            # A full barrier, so that stores before a byte that was just cleared are seen below.
            pass
        if len(self._memories) > 1:
            dirty.sort(key=lambda view: view.name)
        by_thread = self.memory.buffer[threads.BY_THREAD] != 0
        return [pc for view in dirty for pc in view.take(by_thread)]


class Group:
    """The feeds that a thread writes to; threads with the same feeds share the object."""

    __slots__ = ("_code_views", "_views", "feeds")

    def __init__(self, feeds: Sequence[Feed]) -> None:
        self.feeds = tuple(feeds)
        self._views: dict[str, tuple[View, ...]] = {}
        self._code_views = CodeViews()

    @property
    def stale(self) -> bool:
        """Whether a feed has ended."""
        return not all(feed.active for feed in self.feeds)

    def alive(self) -> Group | None:
        """Return the group without the feeds that have ended; None if none is left."""
        feeds = [feed for feed in self.feeds if feed.active]
        return (self if len(feeds) == len(self.feeds) else Group(feeds)) if feeds else None

    def views(self, code: CodeType, file: object = None) -> tuple[View, ...]:
        """Return the views of a code object's file; ``file`` as for :func:`canonical`."""
        filename = code.co_filename
        views = self._views.get(filename)
        if views is None:
            views = self._code_views.get(code)
        if views is None:
            path = canonical(filename, file)
            found = [feed.view(path) for feed in self.feeds] if path else []
            views = tuple(view for view in found if view is not None)
            if not is_settled(filename, file):
                self._code_views.put(code, views)
            elif path:
                self._views[filename] = views
        return views


class Apart:
    """Lines of one thread that are kept apart."""

    __slots__ = ("_lines", "_outer")

    def __init__(self) -> None:
        self._lines: dict[View, set[int]] = {}
        self._outer: Apart | None = None

    def note(self, view: View, lines: set[int]) -> None:
        """Keep lines of a file."""
        self._lines.setdefault(view, set()).update(lines)

    def give(self, feed: Feed) -> list[int]:
        """Return the PCs of the lines of a feed's files, by file name, then in order.

        Lines of other feeds go to those feeds.
        """
        ours = sorted((v for v in self._lines if v.feed is feed), key=lambda view: view.name)
        pcs = [pc for view in ours for pc in view.adopt(self._lines[view])]
        for view, lines in self._lines.items():
            if view.feed is feed:
                continue
            if self._outer is not None:
                self._outer.note(view, lines)
            else:
                for line in lines:
                    view.record(line)
        return pcs

    @contextmanager
    def keep(self) -> Iterator[None]:
        """While inside, keep what this thread runs here. Blocks nest."""
        tracer = interpreters_gettrace()
        if not isinstance(tracer, _ThreadTracer):
            yield
            return
        self._outer, tracer.apart = tracer.apart, self
        try:
            yield
        finally:
            tracer.apart = self._outer


class _ThreadTracer:
    """The trace function of one thread, and the one that it replaced."""

    def __init__(self, group: Group, chained: Any) -> None:
        self.group = group
        self.chained = chained
        self.apart: Apart | None = None
        self.numbers: dict[Feed, int] = {}
        """This thread's number in the memory of each feed."""

    def take_numbers(self, group: Group, name: str | None) -> None:
        """Take a number for each feed that has none yet."""
        for feed in group.feeds:
            if feed not in self.numbers:
                self.numbers[feed] = threads.take(feed.memory, name)

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        if self.group.stale and self.leave(frame):
            return self.chained(frame, event, arg) if self.chained is not None else None
        if self.chained is not None:
            try:
                local = self.chained(frame, event, arg)
            except BaseException as error:
                # The interpreter ends the tracing of a thread whose trace function raises.
                self.fault(error, frame)
                raise
            if interpreters_gettrace() is not self:
                # It removed or replaced itself (coverage.py does both).
                self.chained = interpreters_gettrace()
                _settrace(self)
            return _both(self, local)
        if event == "line":
            self.line(frame, event, arg)
        return None if self.views(frame) == () else self.line

    def views(self, frame: FrameType) -> tuple[View, ...] | None:
        """Return the views of a frame's file; None if the look-up failed."""
        try:
            return self.group.views(frame.f_code, frame.f_globals.get("__file__"))
        except KeyboardInterrupt as error:
            # The interrupt is meant for the code that is traced.
            self.fault(error, frame)
            raise
        except BaseException as error:
            self.fault(error, frame)
            return None

    def line(self, frame: FrameType, event: str, arg: object) -> Any:
        """Handle an event of a frame whose code is covered, as its local trace function."""
        if event != "line" or (self.group.stale and self.leave(frame)):
            return self.line
        for view in self.views(frame) or ():
            try:
                if self.apart is None:
                    view.record(frame.f_lineno, self.numbers.get(view.feed, threads.OTHER))
                else:
                    self.apart.note(view, {frame.f_lineno})
            except Exception as error:
                self.fault(error, frame)
        return self.line

    def fault(self, error: BaseException, frame: FrameType | None) -> None:
        """Note that a line may be lost."""
        if frame is None:
            note_fault(self.group.feeds, error)
        else:
            note_fault(self.group.feeds, error, frame.f_code.co_filename, frame.f_lineno)

    def leave(self, frame: FrameType | None = None) -> bool:
        """Forget the feeds that have ended; return whether that was the end of this tracer.

        If that fails, the tracer continues for all of them, so nothing is lost.
        """
        if any(feed.active for feed in self.group.feeds):
            try:
                group = self.group.alive()
            except BaseException as error:
                self.fault(error, frame)
                return False
            if group is not None:
                self.group = group
                return False
        if interpreters_gettrace() is self:
            _settrace(self.chained)
        return True


def _both(tracer: _ThreadTracer, local: Any) -> Callable[[FrameType, str, object], Any]:
    """Return a local trace function that notes the line and then calls another one."""

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal local
        tracer.line(frame, event, arg)
        if local is not None:
            try:
                local = local(frame, event, arg)
            except BaseException as error:
                tracer.fault(error, frame)
                raise
        return trace

    return trace


def install(group: Group, name: str | None = None) -> None:
    """Make this thread write to the feeds of a group, from its next line on.

    Args:
        name: the thread's name; None for the one that ``threading`` knows.
    """
    tracer = interpreters_gettrace()
    if isinstance(tracer, _ThreadTracer):
        tracer.take_numbers(group, name)
        tracer.group = group
    else:
        tracer = _ThreadTracer(group, tracer)
        tracer.take_numbers(group, name)
        _settrace(tracer)


def thread_ended() -> None:
    """Let other threads have the numbers of this one, which is about to end."""
    tracer = interpreters_gettrace()
    if isinstance(tracer, _ThreadTracer):
        for feed, number in tracer.numbers.items():
            threads.give_back(feed.memory, number)


def uninstall() -> None:
    """End the tracing of this thread, except for feeds that have not ended."""
    tracer = interpreters_gettrace()
    if isinstance(tracer, _ThreadTracer):
        tracer.leave()


def current() -> Group | None:
    """Return the group that this thread writes to; None if it is not measured."""
    tracer = interpreters_gettrace()
    return tracer.group.alive() if isinstance(tracer, _ThreadTracer) else None


def chain(function: Any) -> None:
    """Do what ``sys.settrace()`` does; a measured thread stays measured."""
    tracer = interpreters_gettrace()
    if isinstance(tracer, _ThreadTracer):
        tracer.chained = function
    else:
        _settrace(function)


def chained() -> Any:
    """Return what ``sys.gettrace()`` would return without this tracer."""
    tracer = interpreters_gettrace()
    return tracer.chained if isinstance(tracer, _ThreadTracer) else tracer
