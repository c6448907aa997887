# SPDX-License-Identifier: Apache-2.0
"""Start the programs that run beside the bridge.

A program started here dies with the bridge, whatever kills the bridge (parent-death signal), is
not reached by the terminal's Ctrl-C (a session of its own), inherits exactly the file descriptors
that it was given, and leaves the end of its stderr as evidence.

The kernel sends the parent-death signal when the forking *thread* ends, not the process. So one
thread, which lives as long as the process, makes all forks.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue

from bridge.errors import LIMITS_HINT, InfrastructureError, MissingDependencyError

__all__ = ["STDERR_LIMIT", "Process", "spawn"]

logger = logging.getLogger(__name__)

STDERR_LIMIT = 64 * 1024
"""Bytes at the end of a program's stderr that are kept."""

_LAUNCHER = Path(__file__).with_name("launch.py")


class Process:
    """A running program, made by :func:`spawn`. :meth:`kill` ends it at the latest.

    ``on_end`` is called once, on a thread of this object, after the program has ended and its
    stderr has been read.
    """

    def __init__(
        self,
        popen: subprocess.Popen[bytes],
        argv: Sequence[str],
        name: str,
        on_end: Callable[[Process], None] | None,
    ) -> None:
        self.name = name
        self.argv = tuple(argv)
        self.pid = popen.pid
        self._popen = popen
        self._on_end = on_end
        self._stderr = bytearray()  # only the watching thread writes; bytes() of it is atomic
        self._ended = threading.Event()
        self._pidfd_lock = threading.Lock()  # guards _pidfd against its own closing
        self._pidfd: int | None = os.pidfd_open(popen.pid)
        self._watcher = threading.Thread(target=self._watch, name=f"{name}-watch", daemon=True)
        try:
            self._watcher.start()
        except BaseException:
            os.close(self._pidfd)
            raise

    @property
    def running(self) -> bool:
        """Whether the program still runs."""
        return not self._ended.is_set()

    @property
    def returncode(self) -> int | None:
        """The exit status, -N after signal N, None while the program runs."""
        return self._popen.returncode if self._ended.is_set() else None

    @property
    def stderr_text(self) -> str:
        """The last :data:`STDERR_LIMIT` bytes of stderr, as far as they were read."""
        return bytes(self._stderr).decode(errors="replace")

    @property
    def command(self) -> str:
        """The command, to paste into a shell."""
        return shlex.join(self.argv)

    @property
    def how_it_ended(self) -> str:
        """``exited with status 1``, ``was killed by SIGKILL``, or ``is still running``."""
        code = self.returncode
        if code is None:
            return "is still running"
        if code >= 0:
            return f"exited with status {code}"
        try:
            return f"was killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"was killed by signal {-code}"

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end, at most ``timeout`` seconds. Returns whether the program ended."""
        return self._ended.wait(timeout)

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, unless the program has ended."""
        with self._pidfd_lock:
            if self._pidfd is not None:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._pidfd, number)

    def kill(self, timeout: float = 10.0) -> None:
        """Kill the program and wait until it is gone. Does nothing after its end.

        Raises:
            InfrastructureError: it still exists after ``timeout`` seconds, because the kernel
                holds it in a system call that cannot be interrupted.
        """
        self.send_signal(signal.SIGKILL)
        if not self._ended.wait(timeout):
            raise InfrastructureError(f"{self.name} (pid {self.pid}) does not end on SIGKILL")
        if threading.current_thread() is not self._watcher:
            self._watcher.join(timeout)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _watch(self) -> None:
        pipe = self._popen.stderr or self._popen.stdout
        assert pipe is not None
        assert self._pidfd is not None
        os.set_blocking(pipe.fileno(), False)
        poll = select.poll()
        poll.register(pipe.fileno(), select.POLLIN)
        poll.register(self._pidfd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if pipe.fileno() in ready and not self._read_stderr(pipe.fileno()):
                poll.unregister(pipe.fileno())
            if self._pidfd in ready:
                break
        # The pipe still holds its last output; a child of it may keep the other end open.
        while self._read_stderr(pipe.fileno(), end_is_empty=True):
            pass
        pipe.close()
        with self._pidfd_lock:
            self._popen.wait()
            os.close(self._pidfd)
            self._pidfd = None
        self._ended.set()
        logger.debug("%s (pid %d) %s", self.name, self.pid, self.how_it_ended)
        if self._on_end is not None:
            self._on_end(self)

    def _read_stderr(self, fd: int, *, end_is_empty: bool = False) -> bool:
        """Read once; False at the pipe's end, with ``end_is_empty`` also if it is empty."""
        try:
            chunk = os.read(fd, STDERR_LIMIT)
        except BlockingIOError:
            return not end_is_empty
        self._stderr[:] = (self._stderr + chunk)[-STDERR_LIMIT:]
        return bool(chunk)


def spawn(
    argv: Sequence[str | Path],
    *,
    name: str = "",
    pass_fds: Iterable[int] = (),
    env: Mapping[str, str] | None = None,
    on_end: Callable[[Process], None] | None = None,
    join_output: bool = False,
) -> Process:
    """Start a program and return once its exec has succeeded.

    Its stdin and stdout are /dev/null.

    Args:
        name: the program's name in messages; "" for its file name.
        pass_fds: the descriptors that it inherits.
        join_output: its stdout goes where its stderr goes.
        on_end: see :class:`Process`.

    Raises:
        MissingDependencyError: there is no such program.
        InfrastructureError: it cannot be started.
    """
    command = [str(word) for word in argv]
    name = name or Path(command[0]).name
    if shutil.which(command[0]) is None:
        raise MissingDependencyError(f"{command[0]} is not installed, or is not an executable file")
    order = _Order(command, name, tuple(pass_fds), env, on_end, join_output)
    try:
        _spawner().put(order)
    except RuntimeError as error:
        raise InfrastructureError(
            f"{name} could not be started: {error}", hint=LIMITS_HINT
        ) from error
    try:
        return order.result.result()
    except BaseException:
        # The wait was interrupted (Ctrl-C), so nobody will own the program.
        order.result.add_done_callback(_end_orphan)
        raise


def _end_orphan(result: Future[Process]) -> None:
    if not result.cancelled() and result.exception() is None:
        result.result().send_signal(signal.SIGKILL)


class _Order:
    """A request of :func:`spawn` to the forking thread."""

    def __init__(
        self,
        command: list[str],
        name: str,
        pass_fds: tuple[int, ...],
        env: Mapping[str, str] | None,
        on_end: Callable[[Process], None] | None,
        join_output: bool,
    ) -> None:
        self.command = command
        self.name = name
        self.pass_fds = pass_fds
        self.env = env
        self.on_end = on_end
        self.join_output = join_output
        self.result: Future[Process] = Future()

    def carry_out(self) -> Process:
        reading, writing = os.pipe()
        try:
            launcher = [sys.executable, "-I", "-S", str(_LAUNCHER), str(os.getpid())]
            popen = subprocess.Popen(
                [*launcher, str(writing), "--", *self.command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if self.join_output else subprocess.DEVNULL,
                stderr=subprocess.STDOUT if self.join_output else subprocess.PIPE,
                pass_fds=(*self.pass_fds, writing),
                env=self.env,
                start_new_session=True,
            )
            os.close(writing)
            writing = -1
            failure = os.read(reading, 32)  # empty once the exec has closed the other end
        except OSError as error:
            raise InfrastructureError(
                f"{self.name} could not be started: {error.strerror}",
                evidence=shlex.join(self.command),
                hint=LIMITS_HINT,
            ) from error
        finally:
            os.close(reading)
            if writing >= 0:
                os.close(writing)
        if failure:
            with popen:
                popen.kill()
            reason = os.strerror(int(failure))
            raise InfrastructureError(
                f"{self.name} could not be started: {reason}",
                evidence=shlex.join(self.command),
                hint="free some memory" if int(failure) == errno.ENOMEM else "",
            )
        logger.debug("started %s (pid %d): %s", self.name, popen.pid, shlex.join(self.command))
        try:
            return Process(popen, self.command, self.name, self.on_end)
        except BaseException as error:
            # Nobody would own it.
            with popen:
                popen.kill()
            if not isinstance(error, OSError | RuntimeError):
                raise
            raise InfrastructureError(
                f"{self.name} could not be started: {getattr(error, 'strerror', None) or error}",
                evidence=shlex.join(self.command),
                hint=LIMITS_HINT,
            ) from error


_spawner_lock = threading.Lock()  # guards _orders
_orders: SimpleQueue[_Order] | None = None


def _spawner() -> SimpleQueue[_Order]:
    """Return the queue of the forking thread, which the first call starts."""
    global _orders
    with _spawner_lock:
        if _orders is None:
            orders: SimpleQueue[_Order] = SimpleQueue()
            threading.Thread(
                target=_serve_orders, args=(orders,), name="spawner", daemon=True
            ).start()
            _orders = orders
        return _orders


def _serve_orders(orders: SimpleQueue[_Order]) -> None:
    while True:
        order = orders.get()
        try:
            order.result.set_result(order.carry_out())
        except Exception as error:
            order.result.set_exception(error)
        del order


def _after_fork_in_child() -> None:
    # A fork copies only the calling thread, so the child needs a forking thread of its own.
    global _orders, _spawner_lock
    _orders = None
    _spawner_lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)
