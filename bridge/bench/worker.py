# SPDX-License-Identifier: Apache-2.0
"""A bridge in a process of its own, as each of many has one, that does what it is asked.

:class:`Worker` is the asking side; ``python -m bridge.bench.worker FD`` boots a guest with the
settings that come first over the socket, and answers one request after the other until it ends. An
answer is whether it went well, and a value or what went wrong.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from time import monotonic, perf_counter
from types import TracebackType
from typing import cast

from bridge.bench.signals import stay_awake
from bridge.config import Settings
from bridge.errors import BridgeError, InfrastructureError
from bridge.session.session import Session
from bridge.vm.process import spawn

__all__ = ["Worker", "proportional_mib", "started_from_snapshot", "wait_for_all"]

_BOOT_SECONDS = 600.0
_ANSWER_SECONDS = 120.0
_END_SECONDS = 30.0


class Worker:
    """A bridge that is booting, or booted, in a process of its own.

    ``from_snapshot``: once it is ready, whether its guest was started from a snapshot.
    """

    def __init__(self, settings: Settings) -> None:
        self.begun = perf_counter()
        self.from_snapshot = False
        ours, theirs = socket.socketpair()
        with theirs:
            self._connection: Connection = Connection(ours.detach())
            try:
                command = [sys.executable, "-m", __name__, str(theirs.fileno())]
                self._process = spawn(command, name="worker", pass_fds=(theirs.fileno(),))
            except BaseException:
                self._connection.close()
                raise
        self._connection.send(settings)

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            # Nobody waits for an orderly end now; the guest dies with its bridge.
            self._process.kill()
        self.close()

    def ask(self, what: str, *arguments: object) -> None:
        """Send a request: the name of a method of the process's side, and its arguments."""
        self._connection.send((what, arguments))

    def answer(self, seconds: float = _ANSWER_SECONDS) -> object:
        """The answer to the oldest request, or to the start: whether it was from a snapshot.

        Raises :class:`bridge.errors.InfrastructureError` with what the process says.
        """
        try:
            if not self._connection.poll(seconds):
                raise InfrastructureError(f"a worker does not answer within {seconds:g} s")
            good, answer = self._connection.recv()
        except EOFError as error:
            self._process.wait(_END_SECONDS)
            raise InfrastructureError(
                f"a worker {self._process.how_it_ended}", evidence=self._process.stderr_text
            ) from error
        if not good:
            raise InfrastructureError("a worker failed", evidence=answer)
        return cast(object, answer)

    def fileno(self) -> int:
        """Readable when there is an answer."""
        return self._connection.fileno()

    def close(self) -> None:
        """End the guest and the process. Safe to call twice."""
        self._connection.close()
        if not self._process.wait(_END_SECONDS):
            self._process.kill()


def wait_for_all(workers: Sequence[Worker]) -> list[float]:
    """Wait until each has booted and a command was answered: seconds since it was started."""
    waiting = {worker.fileno(): worker for worker in workers}
    seconds: dict[Worker, float] = {}
    deadline = monotonic() + _BOOT_SECONDS
    while waiting:
        come = wait(list(waiting), max(0.0, deadline - monotonic()))
        if not come:
            raise InfrastructureError(f"not all guests were ready after {_BOOT_SECONDS:g} s")
        now = perf_counter()
        for fd in come:
            worker = waiting.pop(cast(int, fd))
            worker.from_snapshot = bool(worker.answer())
            seconds[worker] = now - worker.begun
    return [seconds[worker] for worker in workers]


def started_from_snapshot(session: Session) -> bool:
    """Whether the session's guest was started from a snapshot, not booted."""
    return getattr(session, "snapshot", None) is not None


def proportional_mib(pid: int) -> float:
    """A process's memory, what it shares divided by those that share it ("Pss" of proc(5)), MiB.

    Raises OSError for a process that is gone.
    """
    text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    (kib,) = [line.split()[1] for line in text.splitlines() if line.startswith("Pss:")]
    return int(kib) / 1024


class _Served:
    """The process's side: what can be asked."""

    def __init__(self, session: Session) -> None:
        self._session = session
        assert session.doorbell is not None
        self._awake_ns = session.doorbell.polling.poll_ns

    def memory(self) -> tuple[float, float]:
        """MiB of QEMU and of the bridge."""
        return proportional_mib(self._session.machine.pid), proportional_mib(os.getpid())

    def stream(self, seconds: float, adaptive: bool) -> float:
        """Signals a second, with the doorbell as it is or always asleep in between."""
        stay_awake(self._session, self._awake_ns if adaptive else 0)
        words = ["kcov-bench", "stream", str(seconds)]
        figures = json.loads(self._session.guest.run(words, check=True).text)
        if not figures["pcs"]:
            raise InfrastructureError("calls under kcov left no PC")
        return float(figures["calls"] / figures["seconds"])


def _serve(connection: Connection) -> None:
    settings = connection.recv()
    with Session(settings, None) as session:
        session.guest.run(["true"], check=True)
        connection.send((True, started_from_snapshot(session)))
        served = _Served(session)
        while True:
            try:
                what, arguments = connection.recv()
            except (EOFError, ConnectionError):
                return
            connection.send((True, getattr(served, what)(*arguments)))


def main() -> int:
    """The process; see the module's text."""
    with Connection(int(sys.argv[1])) as connection:
        try:
            _serve(connection)
        except BridgeError as error:
            connection.send((False, error.report()))
            return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
