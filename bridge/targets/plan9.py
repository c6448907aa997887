# SPDX-License-Identifier: Apache-2.0
"""The default target: pyroute2's 9P server, mounted by the guest kernel's own 9p client.

Every file operation on the mount is a request to Python code on the host, and the system call in
the guest waits for the answer: what that code covered belongs to that very call.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import socket
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

from bridge.errors import TargetError
from bridge.targets import DEFAULT_TARGET, MOUNT_POINT, TARGET_ADDRESS, Endpoint
from bridge.targets.thread import foreign, traceback_of
from bridge.targets.tree import Entry, built_in, read_directory

__all__ = ["GUEST_PORT", "Plan9Target"]

_log = logging.getLogger(__name__)

GUEST_PORT = 564
"""The TCP port registered for 9P ("9pfs")."""

_START_SECONDS = 60.0
_STOP_SECONDS = 10.0

_RAISED_SHOWN = 10

_SERVER = "pyroute2.plan9.server"

_HEADER_SIZE = 7
"""size[4] type[1] tag[2], the start of each 9P message: intro(5) of the Plan 9 manual."""

_MAX_MESSAGE = 16 << 20
"""Above anything a client negotiates: Linux's 9p client stops at 1 MiB over TCP."""


class _WholeMessages(asyncio.Protocol):
    """Hands a 9P server protocol one whole message at a time.

    TCP may cut a message in two. pyroute2's server takes each piece for whole messages and drops
    the rest, and its client waits for ever: ``dd bs=8192 of=FILE`` on the mount hangs in the guest.
    So messages are put together here, before the server sees them.
    """

    def __init__(self, inner: asyncio.Protocol, open_now: set[asyncio.Transport]) -> None:
        self._inner = inner
        self._open = open_now
        self._buffer = bytearray()
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A server of streams is given nothing else.
        self._transport = cast(asyncio.Transport, transport)
        self._open.add(self._transport)
        self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while len(self._buffer) >= 4:
            size = int.from_bytes(self._buffer[:4], "little")
            if not _HEADER_SIZE <= size <= _MAX_MESSAGE:
                _log.warning("a client sent a 9P message of size %d; its connection is cut", size)
                self._buffer.clear()
                self._transport.abort()
                return
            if len(self._buffer) < size:
                return
            message = bytes(self._buffer[:size])
            del self._buffer[:size]
            self._inner.data_received(message)

    def connection_lost(self, exc: Exception | None) -> None:
        self._open.discard(self._transport)
        self._inner.connection_lost(exc)


class Plan9Target:
    """``pyroute2.plan9.server`` on a free port of 127.0.0.1, on a thread of its own.

    It serves a copy of ``directory`` as it is at :meth:`start`, or a small tree of its own.
    Nothing that the guest writes reaches the directory.
    """

    name = DEFAULT_TARGET
    packages: tuple[str, ...] = ("pyroute2.plan9",)
    guest_modules: tuple[str, ...] = ("9p", "9pnet_fd")

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory
        self._thread: threading.Thread | None = None
        self._endpoints: tuple[Endpoint, ...] = ()
        self._raised_count = 0
        # Written by the thread before it ends, read after it was joined.
        self._failure: BaseException | None = None
        # Both belong to the thread's loop; set before start() returns.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """The 9P port; empty before :meth:`start` and after :meth:`stop`."""
        return self._endpoints

    @property
    def guest_setup(self) -> str:
        """Mount the tree, uncached: each operation is to reach the server."""
        return _mount("", f"trans=tcp,port={GUEST_PORT}", TARGET_ADDRESS)

    @property
    def guest_setup_by_region(self) -> str:
        """The same, with a connection that the guest's client is given."""
        return _mount(f"kcov-wire {GUEST_PORT} ", "trans=fd,rfdno=3,wfdno=3", self.name)

    @property
    def guest_teardown(self) -> str:
        """Unmount, even while something still has a file open there."""
        return f"umount {MOUNT_POINT} || umount -l {MOUNT_POINT}\n"

    def prepare(self) -> None:
        """Import the server, which a target that is forked for each reset then has."""
        importlib.import_module(_SERVER)

    def start(self) -> None:
        """Serve; returns when a connection would be answered.

        Raises :class:`bridge.errors.UsageError` for a directory that cannot be served and
        :class:`TargetError` where the server raises or is already started.
        """
        if self._thread is not None:
            raise TargetError("the target plan9 is already started")
        entries = built_in() if self._directory is None else read_directory(self._directory)
        try:
            listener = socket.create_server(("127.0.0.1", 0))
        except OSError as error:
            raise TargetError(f"no port to listen on: {error.strerror}") from error
        port: int = listener.getsockname()[1]
        started: Future[None] = Future()
        thread = threading.Thread(
            target=self._run, args=(listener, entries, started), name="target-plan9", daemon=True
        )
        self._thread = thread
        thread.start()
        with foreign("the 9P server", "on start"):
            try:
                started.result(_START_SECONDS)
            except TimeoutError as error:
                self._thread = None  # stuck in the server's code, which nothing can interrupt
                raise TargetError(f"the 9P server did not start in {_START_SECONDS:g} s") from error
            except BaseException:
                self.stop()
                raise
        self._endpoints = (Endpoint("9p", host_port=port, guest_port=GUEST_PORT),)

    def stop(self) -> None:
        """Cut all connections, close the port, join the thread.

        Raises :class:`TargetError` if the server had ended by itself with an exception, or is
        stuck and its thread does not end.
        """
        thread, self._thread = self._thread, None
        self._endpoints = ()
        if thread is None:
            return
        loop, stopping = self._loop, self._stopping
        if loop is not None and stopping is not None:
            # The loop may have ended by itself in the meantime.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(stopping.set)
        thread.join(_STOP_SECONDS)
        if thread.is_alive():
            raise TargetError(f"the 9P server's thread did not end in {_STOP_SECONDS:g} s")
        failure, self._failure = self._failure, None
        if failure is not None:
            raise TargetError(
                f"the 9P server ended by itself: {type(failure).__name__}: {failure}",
                evidence=traceback_of(failure),
            ) from failure

    def _run(
        self, listener: socket.socket, entries: tuple[Entry, ...], started: Future[None]
    ) -> None:
        with listener:
            try:
                asyncio.run(self._serve(listener, entries, started))
            except BaseException as error:
                # Who waits for the start gets it; later there is nobody to raise it to.
                if not started.done():
                    started.set_exception(error)
                else:
                    # Where faults of targets are noted, as in _raised().
                    logging.getLogger("asyncio").error("the 9P server ended", exc_info=error)
                    self._failure = error

    def _raised(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """The server let an exception escape, which costs a client its connection."""
        self._raised_count += 1
        if self._raised_count <= _RAISED_SHOWN:
            # To asyncio's logger, where faults of targets are noted.
            loop.default_exception_handler(context)
        if self._raised_count == _RAISED_SHOWN:
            # A guest that is fuzzed can go on with this without end.
            _log.warning("the 9P server raised %d times; no more is shown", _RAISED_SHOWN)

    async def _serve(
        self, listener: socket.socket, entries: tuple[Entry, ...], started: Future[None]
    ) -> None:
        self._stopping = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(self._raised)
        # Imported here, when the measurement is on, so that module bodies count.
        module = importlib.import_module(_SERVER)
        server: Any = module.Plan9ServerSocket(address=listener.getsockname())
        server.get_loop()  # binds the server to this loop; its close() counts on that
        _fill(server.filesystem, entries)
        connections: set[asyncio.Transport] = set()

        def connection() -> _WholeMessages:
            inner = module.Plan9ServerProtocol(None, server.marshal, server.filesystem)
            return _WholeMessages(inner, connections)

        # With its listener in place the server's own set-up leaves it alone.
        server.local.server = await self._loop.create_server(connection, sock=listener)
        serving = await server.async_run()
        ending = asyncio.ensure_future(self._stopping.wait())
        started.set_result(None)
        try:
            await asyncio.wait({serving, ending}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # From Python 3.12 on, the end of a server waits for its connections.
            for transport in tuple(connections):
                transport.abort()
            ending.cancel()
            serving.cancel()
            results = await asyncio.gather(serving, ending, return_exceptions=True)
            server.close()
        for result in results:
            if isinstance(result, Exception):
                raise result


def _mount(prefix: str, transport: str, source: str) -> str:
    options = f"{transport},version=9p2000,noextend,cache=none"
    return (
        f"set -e\n[ -d {MOUNT_POINT} ] || mkdir -p {MOUNT_POINT}\n"
        f"{prefix}mount -t 9p -o {options} {source} {MOUNT_POINT}\n"
    )


def _fill(filesystem: Any, entries: tuple[Entry, ...]) -> None:
    """Put a tree into a pyroute2 file system, readable by all, writable by the owner."""
    directory_type = 0x80  # QTDIR, stat(5) of the Plan 9 manual
    for entry in entries:
        if entry.content is None:
            filesystem.create(entry.path, qtype=directory_type, mode=0o755)
        else:
            inode = filesystem.create(entry.path, mode=0o644)
            # create() takes text only; the content is any bytes.
            inode.data.write(entry.content)
            inode.sync()
