# SPDX-License-Identifier: Apache-2.0
"""Sessions in processes of their own, several at once.

    with Pool(4, Settings(target="none")) as pool:
        pool.wait_ready()
        for number, result in pool.map("kcov", [(["ls"],), (["true"],)]):
            print(number, result.pcs)

:class:`Worker` is the asking side of one. Its process (``python -m bridge.session.pool FD``) starts
a session, makes a service for it, and answers one request after the other until it is told to end;
a request is the name of a method of the service and its arguments. :class:`Service` offers what a
session offers; a caller that needs more gives the name of a class of its own.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import os
import pickle
import socket
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from multiprocessing.connection import Connection, wait
from pathlib import Path
from time import monotonic, perf_counter
from types import TracebackType
from typing import Any

from bridge.config import Settings
from bridge.errors import BridgeError, InfrastructureError, UsageError
from bridge.session.executor import KcovResult
from bridge.session.session import Session
from bridge.session.stats import Stats
from bridge.vm.process import spawn

__all__ = ["DEFAULT_SERVICE", "Pool", "Service", "Worker"]

DEFAULT_SERVICE = "bridge.session.pool:Service"
"""The class whose methods can be asked for, as ``module:Class``."""

_LAST = 1 << 62
"""The number of an answer that is the last."""
_READY_SECONDS = 600.0
_ANSWER_SECONDS = 120.0
_END_SECONDS = 30.0
_SHORT = 1 << 14
"""Bytes of a request for which the socket has room."""
_TURN_SECONDS = 0.01


class Service:
    """What can be asked of a worker: the methods of its session."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def kcov(self, *arguments: Any, **options: Any) -> KcovResult:
        """As :meth:`bridge.session.session.Session.kcov`; the PCs are a list."""
        result = self._session.kcov(*arguments, **options)
        return dataclasses.replace(result, pcs=list(result.pcs))

    def run(self, *arguments: Any, **options: Any) -> Any:
        """As :meth:`bridge.session.session.Session.run`."""
        return self._session.run(*arguments, **options)

    def put(self, *arguments: Any) -> None:
        """As :meth:`bridge.session.session.Session.put`."""
        self._session.put(*arguments)

    def get(self, *arguments: Any) -> None:
        """As :meth:`bridge.session.session.Session.get`."""
        self._session.get(*arguments)

    def reset(self) -> None:
        """As :meth:`bridge.session.session.Session.reset`."""
        self._session.reset()

    def stats(self) -> Stats:
        """As :meth:`bridge.session.session.Session.stats`."""
        return self._session.stats()


class Worker:
    """A session that is starting, or ready, in a process of its own.

    Args:
        settings: what to start.
        out: as for a session.
        service: what can be asked, as ``module:Class``; called with the session.

    Attributes:
        stats: the session's figures when it was ready; None until :meth:`wait_ready`.
        seconds: how long it took until the guest answered a command; None until then.
    """

    def __init__(
        self,
        settings: Settings,
        out: str | os.PathLike[str] | None = None,
        *,
        service: str = DEFAULT_SERVICE,
    ) -> None:
        self._begun = perf_counter()
        self.stats: Stats | None = None
        self.seconds: float | None = None
        # Requests are numbered from 1 on; 0 is the start.
        self._asked = 0
        self._answered = 0
        # The answers that came, until they are given out or dropped: number, good, answer.
        self._come: deque[tuple[int, bool, Any]] = deque()
        ours, theirs = socket.socketpair()
        with theirs:
            self._connection: Connection = Connection(ours.detach())
            try:
                command = [sys.executable, "-m", __name__, str(theirs.fileno())]
                self._process = spawn(command, name="worker", pass_fds=(theirs.fileno(),))
            except BaseException:
                self._connection.close()
                raise
        self._connection.send((settings, os.fspath(out) if out is not None else None, service))

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            # Nobody waits for an orderly end now; the guest dies with its session.
            self._process.kill()
        self.close()

    def fileno(self) -> int:
        """Readable when there is an answer."""
        return self._connection.fileno()

    @property
    def running(self) -> bool:
        """Whether the process has not ended."""
        return self._process.running

    def wait_ready(self, seconds: float = _READY_SECONDS) -> Stats:
        """Wait until the guest answers commands; return the session's figures.

        Raises:
            BridgeError: what the session raised.
            InfrastructureError: the process ended, or the time is up.
        """
        if self.stats is None:
            stats = self._receive(0, seconds)
            self.seconds = perf_counter() - self._begun
            self.stats = stats
        return self.stats

    def ask(self, method: str, *arguments: object, **options: object) -> None:
        """Send a request; its answer comes with :meth:`answer`."""
        self.wait_ready()
        request = pickle.dumps((method, arguments, options))
        if len(request) <= _SHORT:
            self._send(request)
        else:
            # A worker that sends a long answer reads nothing until that is received.
            with ThreadPoolExecutor(1, "ask") as sender:
                sending = sender.submit(self._send, request)
                while not sending.done():
                    self._receive_next(_TURN_SECONDS)
            sending.result()
        self._asked += 1

    def answer(self, seconds: float = _ANSWER_SECONDS) -> Any:
        """Return the answer to the oldest request that has none yet.

        An answer that comes after the time is up is dropped.

        Raises:
            BridgeError: what the request raised.
            InfrastructureError: the process ended, the time is up, or the request raised
                something that is no BridgeError.
        """
        if self._answered == self._asked:
            raise UsageError("the worker was asked nothing")
        self._answered += 1
        return self._receive(self._answered, seconds)

    def call(self, method: str, *arguments: object, **options: object) -> Any:
        """Ask, and return the answer; answers to requests before are dropped."""
        self.forget()
        self.ask(method, *arguments, **options)
        return self.answer()

    def forget(self) -> None:
        """Drop the answers to all requests so far, also those that are still to come."""
        self._answered = self._asked

    def has_answer(self) -> bool:
        """Take what has come; return whether the oldest request that has no answer gets one."""
        return self._take(self._answered + 1, 0.0)

    @property
    def has_come(self) -> bool:
        """Whether something has come already that the descriptor does not show any more."""
        return bool(self._come)

    def close(self) -> None:
        """End session and process. Safe to call twice."""
        self._connection.close()
        if not self._process.wait(_END_SECONDS):
            self._process.kill()

    def _receive(self, number: int, seconds: float) -> Any:
        if not self._take(number, seconds):
            raise InfrastructureError(f"a worker does not answer within {seconds:g} s")
        _, good, answer = self._come.popleft()
        if not good:
            raise answer
        return answer

    def _take(self, number: int, seconds: float) -> bool:
        """Wait until the answer of this number has come, and drop those before it."""
        deadline = monotonic() + seconds
        while True:
            while self._come and self._come[0][0] < number:
                self._come.popleft()
            if self._come:
                return True
            if not self._receive_next(max(0.0, deadline - monotonic())):
                return False

    def _receive_next(self, seconds: float) -> bool:
        """Receive one answer, whichever it is; return False if none comes in time."""
        try:
            if not self._connection.poll(seconds):
                return False
            self._come.append(pickle.loads(self._connection.recv_bytes()))
        except (EOFError, OSError) as error:
            raise self._ended() from error
        return True

    def _send(self, request: bytes) -> None:
        try:
            self._connection.send_bytes(request)
        except OSError as error:
            raise self._ended() from error

    def _ended(self) -> InfrastructureError:
        self._process.wait(_END_SECONDS)
        return InfrastructureError(
            f"a worker {self._process.how_it_ended}", evidence=self._process.stderr_text
        )


class Pool:
    """Workers that share work; a context manager, which starts them all at once.

    Args:
        count: how many.
        settings: the same for all, or one for each.
        out: directory in which each has one of its own, ``0``, ``1`` ...; None for none.
        service: as for a :class:`Worker`.
    """

    def __init__(
        self,
        count: int,
        settings: Settings | Sequence[Settings],
        out: str | os.PathLike[str] | None = None,
        *,
        service: str = DEFAULT_SERVICE,
    ) -> None:
        if count < 1:
            raise UsageError(f"a pool of {count} workers", hint="at least 1 is needed")
        each = [settings] * count if isinstance(settings, Settings) else list(settings)
        if len(each) != count:
            raise UsageError(f"{count} workers are to share {len(each)} settings")
        self.workers: tuple[Worker, ...]
        with ExitStack() as stack:
            self.workers = tuple(
                stack.enter_context(
                    Worker(
                        one, Path(out, str(number)) if out is not None else None, service=service
                    )
                )
                for number, one in enumerate(each)
            )
            self._stack = stack.pop_all()
        # Counts what the workers were given to share; what was given before has no answers then.
        self._turn = 0

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def wait_ready(self, seconds: float = _READY_SECONDS) -> list[Stats]:
        """Wait until all guests answer commands; return their figures.

        Raises:
            BridgeError: what one of the sessions raised.
            InfrastructureError: not all were ready in time.
        """
        deadline = monotonic() + seconds
        waiting = {worker for worker in self.workers if worker.stats is None}
        while waiting:
            come = _first(waiting, deadline - monotonic())
            if not come:
                raise InfrastructureError(f"not all guests were ready after {seconds:g} s")
            for worker in come:
                worker.wait_ready()
                waiting.discard(worker)
        return [worker.wait_ready() for worker in self.workers]

    def all(self, method: str, *arguments: object, **options: object) -> list[Any]:
        """Ask all workers the same, at once; return their answers.

        A :meth:`map` that has not ended is abandoned.
        """
        self._abandon()
        for worker in self.workers:
            worker.ask(method, *arguments, **options)
        return [worker.answer() for worker in self.workers]

    def map(
        self,
        method: str,
        arguments: Iterable[Sequence[object]],
        seconds: float = _ANSWER_SECONDS,
    ) -> Iterator[tuple[int, Any]]:
        """Ask for ``method`` with each of the arguments; whoever is free takes the next.

        A map that has not ended is abandoned, and what it asked has no answers.

        Yields:
            The number of the arguments and the answer, in the order in which answers come.

        Raises:
            BridgeError: as :meth:`Worker.answer`; what was not answered then is lost.
            UsageError: this map was abandoned for later work.
        """
        turn = self._abandon()
        numbered = enumerate(arguments)
        free = deque(self.workers)
        busy: dict[Worker, int] = {}
        while True:
            while free and (following := next(numbered, None)) is not None:
                worker = free.popleft()
                number, words = following
                worker.ask(method, *words)
                busy[worker] = number
            if not busy:
                return
            come = _first(busy, seconds)
            if not come:
                raise InfrastructureError(f"no worker answers within {seconds:g} s")
            for worker in come:
                # What came may be due to a map that was abandoned.
                if not worker.has_answer():
                    continue
                answer = worker.answer()
                free.append(worker)
                yield busy.pop(worker), answer
                if self._turn != turn:
                    raise UsageError(
                        "the pool was given other work before this map had ended",
                        hint="take all answers of a map first, or make a pool for each",
                    )

    def _abandon(self) -> int:
        """Drop what the workers still have to answer; return the number of the turn that begins."""
        for worker in self.workers:
            worker.forget()
        self._turn += 1
        return self._turn


def _first(workers: Iterable[Worker], seconds: float) -> list[Worker]:
    """Wait for answers and return the workers that have one; none when the time is up."""
    workers = tuple(workers)
    if come := [worker for worker in workers if worker.has_come]:
        return come
    ready = set(wait([worker.fileno() for worker in workers], max(0.0, seconds)))
    return [worker for worker in workers if worker.fileno() in ready]


# ---- the process


def _service(name: str) -> Callable[[Session], object]:
    module, _, attribute = name.partition(":")
    made: Callable[[Session], object] = getattr(importlib.import_module(module), attribute)
    return made


def _serve(connection: Connection) -> None:
    settings, out, service = connection.recv()
    with Session(settings, out) as session:
        session.run(["true"])
        served = _service(service)(session)
        connection.send_bytes(pickle.dumps((0, True, session.stats())))
        for number in itertools.count(1):
            try:
                method, arguments, options = connection.recv()
            except (EOFError, ConnectionError):
                return
            try:
                if method.startswith("_"):
                    raise UsageError(f"{method} is nothing that a worker can be asked")
                result = getattr(served, method)(*arguments, **options)
                answer = pickle.dumps((number, True, result))
            except Exception as error:
                answer = pickle.dumps((number, False, _portable(error)))
            connection.send_bytes(answer)


def _portable(error: Exception) -> BridgeError:
    if isinstance(error, BridgeError):
        return error
    return InfrastructureError(
        f"a request raised {type(error).__name__}: {error}",
        evidence="".join(traceback.format_exception(error)),
    )


def main() -> int:
    """The process; see the module's text."""
    with Connection(int(sys.argv[1])) as connection:
        try:
            _serve(connection)
        except Exception as error:
            failure = _portable(error)
            # In place of whatever it was to answer.
            connection.send_bytes(pickle.dumps((_LAST, False, failure)))
            return failure.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
