# SPDX-License-Identifier: Apache-2.0
"""What goes wrong in a target beside its return values: exceptions that nobody sees, dead threads.

One thread of a server that ends by an exception, or simply returns, is no error of the process.
The guest then waits for answers that never come.
"""

from __future__ import annotations

import logging
import mmap
import os
import socketserver
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from typing import Any, Final

__all__ = ["ServingThreads", "SharedCount", "TargetFaults", "stacks_of"]

_ASYNCIO: Final = "asyncio"
"""The logger of asyncio's event loops."""


class SharedCount:
    """How many faults a target had, and which process serves, for those that only look.

    It is a page of memory that the bridge and the processes of a target share, so that a look costs
    nothing, whatever the target does. A word has one writer at a time.

    Args:
        path: the memory of another process's object; None makes some.

    Raises:
        OSError: it cannot be mapped.
    """

    _FAULTS, _PID, _WORDS = 0, 1, 2

    def __init__(self, path: str | None = None) -> None:
        if path is None:
            self.fd = os.memfd_create("kcov-bridge-faults", os.MFD_CLOEXEC)
            """The memory; its first word is the number of faults."""
            os.ftruncate(self.fd, mmap.PAGESIZE)
        else:
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.path = f"/proc/{os.getpid()}/fd/{self.fd}"
        """Where another process finds the memory, as long as this object lives."""
        try:
            self._memory = mmap.mmap(self.fd, mmap.PAGESIZE)
        except BaseException:
            os.close(self.fd)
            raise
        self._words = memoryview(self._memory).cast("Q")

    @property
    def faults(self) -> int:
        """How many there were."""
        count: int = self._words[self._FAULTS]
        return count

    @property
    def pid(self) -> int:
        """The process that serves the guest; 0 before it does."""
        pid: int = self._words[self._PID]
        return pid

    def add_fault(self) -> None:
        """Count one; callers have a lock."""
        self._words[self._FAULTS] += 1

    def set_pid(self, pid: int) -> None:
        """Say which process serves."""
        self._words[self._PID] = pid

    def close(self) -> None:
        """Give the memory back. Safe to call twice."""
        if self.fd >= 0:
            self._words.release()
            self._memory.close()
            os.close(self.fd)
            self.fd = -1


class TargetFaults(logging.Handler):
    """Exceptions on threads of this process while it watches.

    These are exceptions that end a thread, those that asyncio only logs, and those that
    socketserver prints for a request. The target's threads look like all others, so each thread
    but the main one counts.

    Args:
        shared: counts them too.
    """

    def __init__(self, shared: SharedCount | None = None) -> None:
        super().__init__(logging.ERROR)
        self._shared = shared
        self._faults_lock = threading.Lock()  # guards _faults
        self._faults: list[str] = []
        self._before: Callable[[threading.ExceptHookArgs], object] = threading.excepthook
        self._noting = threading.local()
        self._handle_error: Callable[[socketserver.BaseServer, Any, Any], None] | None = None

    def watch(self) -> None:
        """Begin, or take the place again that another hook has taken meanwhile."""
        if threading.excepthook != self._note:
            self._before = threading.excepthook
            threading.excepthook = self._note
        logging.getLogger(_ASYNCIO).addHandler(self)  # once, however often it is called
        if self._handle_error is None:
            self._handle_error = original = socketserver.BaseServer.handle_error

            def handle_error(server: socketserver.BaseServer, request: Any, address: Any) -> None:
                if threading.current_thread() is not threading.main_thread():
                    self._add(f"{type(server).__name__} failed on a request", sys.exc_info()[1])
                original(server, request, address)

            setattr(socketserver.BaseServer, "handle_error", handle_error)  # noqa: B010

    def close(self) -> None:
        """Put back the hook that was there before, unless another has taken its place."""
        if threading.excepthook == self._note:
            threading.excepthook = self._before
        logging.getLogger(_ASYNCIO).removeHandler(self)
        if self._handle_error is not None:
            setattr(socketserver.BaseServer, "handle_error", self._handle_error)  # noqa: B010
            self._handle_error = None
        super().close()

    def after_fork(self) -> None:
        """Forget what the parent noted; another of its threads may have held the lock."""
        self._faults_lock = threading.Lock()
        self._faults = []

    @property
    def waiting(self) -> bool:
        """Whether :meth:`take` would return any."""
        return bool(self._faults)

    def take(self) -> list[str]:
        """Return the exceptions since the last call, with their tracebacks."""
        with self._faults_lock:
            faults, self._faults = self._faults, []
        return faults

    def emit(self, record: logging.LogRecord) -> None:
        """Note what asyncio logs."""
        if record.thread != threading.main_thread().ident:
            text = self.format(record)
            first, _, rest = text.partition("\n")
            self._append(f"asyncio on the thread {record.threadName}: {first}\n{rest}")

    def _add(self, what: str, error: BaseException | None) -> None:
        text = "".join(traceback.format_exception(error)) if error is not None else ""
        self._append(f"{what}\n{text}")

    def _append(self, fault: str) -> None:
        with self._faults_lock:
            self._faults.append(fault)
            if self._shared is not None:
                self._shared.add_fault()

    def _note(self, args: threading.ExceptHookArgs) -> None:
        ended_in_order = isinstance(args.exc_value, SystemExit) and not args.exc_value.code
        if not ended_in_order:
            name = args.thread.name if args.thread is not None else "?"
            self._add(f"the thread {name} ended by an exception", args.exc_value)
        if getattr(self._noting, "active", False):
            return  # a hook that took this one's place calls it, and is called by it
        self._noting.active = True
        try:
            self._before(args)
        finally:
            self._noting.active = False


class ServingThreads:
    """The threads that a target started, of which none may end before the target is stopped.

    Args:
        before: the threads that ran before the target was started.
    """

    def __init__(self, before: frozenset[threading.Thread]) -> None:
        self._threads = [
            thread for thread in threading.enumerate() if thread not in before and thread.is_alive()
        ]

    @staticmethod
    def running() -> frozenset[threading.Thread]:
        """Return the threads that run now."""
        return frozenset(threading.enumerate())

    @property
    def alive(self) -> list[threading.Thread]:
        """Those that run."""
        return [thread for thread in self._threads if thread.is_alive()]

    def take_ended(self) -> list[str]:
        """Return a line for each that has ended since the last call."""
        ended = [thread for thread in self._threads if not thread.is_alive()]
        self._threads = [thread for thread in self._threads if thread not in ended]
        return [f"the thread {thread.name}, which serves the guest, has ended" for thread in ended]


def stacks_of(threads: Iterable[threading.Thread]) -> str:
    """Return where threads of this process are now."""
    frames = sys._current_frames()
    texts = []
    for thread in threads:
        if (frame := frames.get(thread.ident or 0)) is not None:
            texts.append(f"thread {thread.name}:\n" + "".join(traceback.format_stack(frame)))
    return "\n".join(texts)
