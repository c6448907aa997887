# SPDX-License-Identifier: Apache-2.0
"""Installs a source's tracers on its thread, and on all that is started from there.

A source measures the thread that calls :meth:`Measuring.begin`, the threads that it starts, the
processes that these fork, and the Python programs that they start. While a source measures, the
functions that start them are replaced by ones that also pass the tracing on.

``sys.settrace()`` is replaced too. A thread has one trace function, but a debugger or the
coverage.py of a test run needs it as well. On a measured thread theirs is called after the tracer's
own, so both see every event, and ``sys.settrace(None)`` ends only theirs.
"""

from __future__ import annotations

import _posixsubprocess
import _thread
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import get_ident
from types import FrameType
from typing import Any, Final

from . import tracer
from .lines import MISSED, LineMemory
from .tracer import Feed, Group, View
from .tracer.plain import interpreters_gettrace

__all__ = ["LINES_VARIABLE", "MEASURING", "Measuring", "attach"]

LINES_VARIABLE: Final = "KCOV_BRIDGE_LINES"
"""Where a Python program that a target starts writes its lines: paths, separated by ``:``."""

_STARTUP: Final = str(Path(__file__).resolve().with_name("startup"))
"""A directory with a ``sitecustomize`` that calls :func:`attach`."""


class Measuring:
    """The measurement in this process; one object, because there is one interpreter."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._groups: list[Group] = []
        self._feeds: list[Feed] = []
        self._replaced: list[tuple[Any, str, Any, Any]] = []
        self.threads: dict[int, Group] = {}
        """The threads that are measured, by their identifiers, and some that have ended."""
        os.register_at_fork(after_in_child=self._after_fork)

    def begin(self, feed: Feed) -> None:
        """Measure this thread, and all that it starts from now on, for another feed."""
        with self._lock:
            if not self._feeds:
                self._replace()
            self._feeds.append(feed)
            group = tracer.current()
            feeds = (*group.feeds, feed) if group is not None else (feed,)
            group = self._group(feeds)
            self.threads[get_ident()] = group
            tracer.install(group)

    def join(self) -> None:
        """Measure this thread too, which was started by code in C, for all feeds of the process."""
        if tracer.current() is not None:
            return
        with self._lock:
            feeds = [feed for feed in self._feeds if feed.active]
            if feeds:
                tracer.install(self._group(feeds))

    def end(self, feed: Feed) -> None:
        """End the measurement for a feed, at once on this thread, elsewhere at the next event."""
        self._check_tracer([feed])
        feed.memory.end()
        tracer.uninstall()
        with self._lock:
            self._groups = [group for group in self._groups if not group.stale]
            for thread, group in list(self.threads.items()):
                if group.alive() is None:
                    self.threads.pop(thread, None)
            if feed in self._feeds:
                self._feeds.remove(feed)
            if not self._feeds:
                self._put_back()

    @property
    def feeds(self) -> list[Feed]:
        """The feeds that measure in this process."""
        return list(self._feeds)

    def measures(self, feed: Feed) -> bool:
        """Return whether this thread is measured for a feed."""
        group = tracer.current()
        return group is not None and feed in group.feeds

    def thread_ends(self, name: str) -> None:
        """Forget this thread, which is about to end; threading has forgotten its name."""
        group = self.threads.get(get_ident())
        if group is not None:
            self._check_tracer([feed for feed in group.feeds if feed.active], name)
            self.threads.pop(get_ident(), None)
            tracer.thread_ended()

    def _check_tracer(self, feeds: Sequence[Feed], name: str = "") -> None:
        """Note a fault if this thread should write to feeds and does not any more."""
        group = self.threads.get(get_ident())
        if group is None:
            return
        now = tracer.current()
        lost = [
            feed for feed in feeds if feed in group.feeds and (now is None or feed not in now.feeds)
        ]
        if lost:
            who = f"the thread {name}" if name else "the thread"
            reason = f"{who} was not measured to its end: its trace function was replaced"
            tracer.note_fault(lost, TracerReplaced(reason))

    def groups_by_thread(self) -> dict[int, Group]:
        """Return the group of each measured thread that runs."""
        running = sys._current_frames()
        return {
            thread: alive
            for thread, group in list(self.threads.items())
            if thread in running and (alive := group.alive()) is not None
        }

    def _group(self, feeds: Sequence[Feed]) -> Group:
        for group in self._groups:
            if group.feeds == tuple(feeds):
                return group
        group = Group(feeds)
        self._groups.append(group)
        return group

    def _after_fork(self) -> None:
        # Another thread may have held the lock.
        self._lock = threading.Lock()
        tracer.forked()

    # The functions that are replaced

    def _replace(self) -> None:
        self._put(sys, "settrace", lambda real: tracer.chain)
        self._put(sys, "gettrace", lambda real: tracer.chained)
        self._put(sys, "_settraceallthreads", _setting_all_traces)
        for name in ("start_new_thread", "start_new", "start_joinable_thread"):
            self._put(_thread, name, _starting_thread)
        for name in ("_start_new_thread", "_start_joinable_thread"):
            self._put(threading, name, _starting_thread)
        self._put(_posixsubprocess, "fork_exec", _starting_program)
        self._put(subprocess, "_fork_exec", _starting_program)
        for name in ("execve", "posix_spawn", "posix_spawnp"):
            self._put(os, name, _with_environment)
        self._put(os, "execv", lambda real: _execv)
        collector = getattr(sys.modules.get("coverage.collector"), "Collector", None)
        for name in ("_start_tracer", "resume"):
            self._put(collector, name, _setting_trace)

    def _put(self, holder: Any, name: str, replacement: Callable[[Any], Any]) -> None:
        real = getattr(holder, name, None)
        if real is not None:
            ours = replacement(real)
            setattr(holder, name, ours)
            self._replaced.append((holder, name, real, ours))

    def _put_back(self) -> None:
        while self._replaced:
            holder, name, real, ours = self._replaced.pop()
            # Others (gevent) may have replaced it since.
            if getattr(holder, name, None) is ours:
                setattr(holder, name, real)


class TracerReplaced(Exception):
    """Code under test set a trace function in a way that :class:`Measuring` does not see."""


class _Heir:
    """The function of a thread that a measured thread has started."""

    __slots__ = ("_function", "_group")

    def __init__(self, group: Group, function: Callable[..., object]) -> None:
        self._group = group
        self._function = function

    def __call__(self, *args: Any, **keywords: Any) -> object:
        thread = getattr(self._function, "__self__", None)
        try:
            group = self._group.alive()
            if group is not None:
                MEASURING.threads[get_ident()] = group
                tracer.install(group, _name_of(thread))
        except BaseException as error:
            # The thread runs all the same.
            tracer.note_fault(self._group.feeds, error)
        try:
            return self._function(*args, **keywords)
        finally:
            MEASURING.thread_ends(_name_of(thread))


def _name_of(thread: object) -> str:
    return thread.name if isinstance(thread, threading.Thread) else ""


def _starting_thread(real: Callable[..., Any]) -> Callable[..., Any]:
    def start(function: Any, *args: Any, **keywords: Any) -> Any:
        group = tracer.current()
        if group is not None and callable(function):
            function = _Heir(group, function)
        return real(function, *args, **keywords)

    return start


def _starting_program(real: Callable[..., Any]) -> Callable[..., Any]:
    # The sixth argument is the environment, a list or None, on all supported Pythons.
    def fork_exec(*args: Any) -> Any:
        group = tracer.current()
        if group is not None and len(args) > 5:
            args = (*args[:5], _environment_list(args[5], group), *args[6:])
        return real(*args)

    return fork_exec


def _with_environment(real: Callable[..., Any]) -> Callable[..., Any]:
    def start(path: Any, argv: Any, env: Any, *args: Any, **keywords: Any) -> Any:
        group = tracer.current()
        if group is not None and (env is None or isinstance(env, Mapping)):
            # posix_spawn() of Python 3.13 and newer takes None for this process's environment.
            env = _environment(os.environ if env is None else env, group)
        return real(path, argv, env, *args, **keywords)

    return start


def _execv(path: Any, argv: Any) -> Any:
    return os.execve(path, argv, os.environ)


def _setting_trace(real: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method of coverage.py's collector that sets a trace function in C."""

    def method(collector: Any, *args: Any, **keywords: Any) -> Any:
        group = tracer.current()
        try:
            return real(collector, *args, **keywords)
        finally:
            if group is not None:
                tracer.install(group)

    return method


def _setting_all_traces(real: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap what ``threading.settrace_all_threads()`` calls to set other threads' tracers."""

    def set_all(function: Any) -> None:
        here = tracer.current()
        groups = MEASURING.groups_by_thread()

        def resume(frame: FrameType, event: str, arg: object) -> Any:
            # Runs at the first call on each thread, where it replaces itself.
            tracer.chain(function)
            group = groups.get(get_ident())
            if group is not None and (group := group.alive()) is not None:
                tracer.install(group)
            following = function if tracer.COMPILED else interpreters_gettrace()
            return following(frame, event, arg) if following is not None else None

        real(resume if groups else function)
        tracer.chain(function)
        if here is not None:
            tracer.install(here)

    return set_all


def _environment(env: Mapping[Any, Any], group: Group) -> dict[bytes, bytes]:
    """Return an environment with which a Python program writes to the feeds of a group."""
    result = {os.fsencode(name): os.fsencode(value) for name, value in env.items()}
    paths = [feed.memory.path for feed in group.feeds if feed.memory.descriptor >= 0]
    result[LINES_VARIABLE.encode()] = os.fsencode(os.pathsep.join(paths))
    startup = os.fsencode(_STARTUP)
    before = result.get(b"PYTHONPATH", b"")
    if startup not in before.split(b":"):
        result[b"PYTHONPATH"] = startup + (b":" + before if before else b"")
    return result


def _environment_list(env: Sequence[bytes] | None, group: Group) -> list[bytes]:
    if env is None:
        pairs: Mapping[Any, Any] = os.environ
    else:
        pairs = dict(entry.split(b"=", 1) for entry in env if b"=" in entry[1:])
    return [name + b"=" + value for name, value in _environment(pairs, group).items()]


MEASURING: Final = Measuring()


def attach(paths: str) -> None:
    """Write the lines of this program to the memories that :data:`LINES_VARIABLE` names."""
    for path in paths.split(os.pathsep):
        try:
            memory = LineMemory.attach(path)
        except (OSError, ValueError):
            # The source has ended, or cannot be reached.
            continue
        if not memory.active:
            memory.close()
            continue
        MEASURING.begin(attached_feed(memory))


def attached_feed(memory: LineMemory) -> Feed:
    """Return a feed that writes to memory which another process reads."""

    def unknown(path: str) -> View | None:
        if path.endswith((".py", ".pyw")):
            memory.buffer[MISSED] = 1
        return None

    feed = Feed(memory, unknown)
    feed.add(memory, [file.path for file in memory.files], [0] * len(memory.files), 1)
    return feed
