# SPDX-License-Identifier: Apache-2.0
"""QMP for threads: the asyncio client of qemu.qmp on an event loop with its own thread."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

from qemu.qmp import (
    ConnectError,
    ExecInterruptedError,
    ExecuteError,
    Message,
    QMPClient,
    QMPError,
    Runstate,
)

from bridge.errors import QemuError

__all__ = ["COMMAND_SECONDS", "EventLoopThread", "Qmp"]

T = TypeVar("T")
logger = logging.getLogger(__name__)

COMMAND_SECONDS = 10.0
"""How long QEMU may take for a command. Its main loop usually answers in microseconds."""

_POLL_SECONDS = 0.01

_wire = logger.getChild("wire")
# The library logs what it raises, too; whoever catches a failure reports it, once.
_wire.setLevel(logging.CRITICAL)


class EventLoopThread:
    """An asyncio event loop that runs on a thread until :meth:`stop`."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine on the loop, from any thread. Raises RuntimeError if it was stopped."""
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError:
            coroutine.close()
            raise

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and wait for it. An interrupt of the wait cancels it."""
        future = self.submit(coroutine)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def watch(self, sock: socket.socket, callback: Callable[[], object]) -> None:
        """Call back on the loop whenever the socket is readable."""
        self._loop.call_soon_threadsafe(self._loop.add_reader, sock, callback)

    def unwatch(self, sock: socket.socket) -> None:
        """Stop watching a socket. Only for the loop's thread."""
        self._loop.remove_reader(sock)

    @staticmethod
    async def until(condition: Callable[[], bool], timeout: float) -> bool:
        """Wait on the loop for a condition, ``timeout`` seconds at most; True if it holds."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(_POLL_SECONDS)
        return True

    def stop(self) -> None:
        """Cancel what runs and end the thread. Safe to call twice."""
        if not self._thread.is_alive():
            return
        self.submit(self._cancel_all()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    @staticmethod
    async def _cancel_all() -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


class Qmp:
    """A QMP connection over a connected socket, which it owns from then on.

    ``on_event`` is called on the loop's thread with each event, in order, before the answer to
    any later command. The methods are for other threads, unless they say otherwise.
    """

    def __init__(
        self, loop: EventLoopThread, name: str, on_event: Callable[[Message], None]
    ) -> None:
        self._loop = loop
        self._client = QMPClient(name)
        self._client.logger = _wire

        def observe(event: Message) -> bool:
            on_event(event)
            return False

        # The filter drops every event: the library's own queue and history have no limit.
        self._client.events.event_filter = observe

    def connect(self, sock: socket.socket, timeout: float) -> None:
        """Wait for QEMU's greeting, at most ``timeout`` seconds, and negotiate capabilities.

        Raises:
            QemuError: there is no greeting, or QEMU closed the socket.
        """

        async def connect() -> None:
            await asyncio.wait_for(self._client.connect(sock), timeout)

        try:
            self._loop.run(connect())
        except TimeoutError as error:
            raise QemuError(f"QEMU sent no greeting on its QMP socket for {timeout:g} s") from error
        except ConnectError as error:
            raise QemuError(f"QEMU closed its QMP socket: {error}") from error

    def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout: float = COMMAND_SECONDS,
    ) -> object:
        """Execute a QMP command and return its value.

        Raises:
            QemuError: QEMU refuses, ends, or does not answer within ``timeout`` seconds.
        """
        return self._loop.run(self.execute_on_loop(command, arguments, timeout=timeout))

    async def execute_on_loop(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout: float = COMMAND_SECONDS,
    ) -> object:
        """Do the same as :meth:`execute` in a coroutine on the loop."""
        try:
            return await asyncio.wait_for(self._client.execute(command, arguments), timeout)
        except TimeoutError as error:
            raise QemuError(f"QEMU did not answer {command!r} within {timeout:g} s") from error
        except ExecuteError as error:
            raise QemuError(f"QEMU refused {command!r}: {error}") from error
        except (ExecInterruptedError, QMPError) as error:
            raise QemuError(f"QEMU ended before it answered {command!r}") from error

    def send_fd(self, fd: int, name: str) -> None:
        """Send QEMU a copy of a descriptor, which its commands then know by ``name``.

        Raises:
            QemuError: as from :meth:`execute`.
        """

        async def send() -> None:
            self._client.send_fd_scm(fd)

        try:
            self._loop.run(send())
        except OSError as error:
            raise QemuError(f"a descriptor could not be sent to QEMU: {error}") from error
        self.execute("getfd", {"fdname": name})

    async def drained(self, timeout: float) -> None:
        """Wait on the loop until everything that an ended QEMU had sent has been read."""

        async def drain() -> None:
            while self._client.runstate in (Runstate.CONNECTING, Runstate.RUNNING):
                await self._client.runstate_changed()

        try:
            await asyncio.wait_for(drain(), timeout)
        except TimeoutError:
            logger.debug("the QMP socket stayed open after QEMU's end")

    def disconnect(self) -> None:
        """Close the connection. Safe to call if it is closed, broken or was never open."""

        async def disconnect() -> None:
            try:
                await self._client.disconnect()
            except (QMPError, EOFError, OSError) as error:
                # The error is how the connection had ended before, which is known by now.
                logger.debug("the QMP connection had ended: %r", error)

        self._loop.run(disconnect())
