# SPDX-License-Identifier: Apache-2.0
"""A target in a process of its own: one that dies or hangs does not take the device with it.

The process runs coverage source and target just as the bridge itself would (``python -m
bridge.session.isolated``); two sockets connect it. On the first the bridge asks, and is answered at
once by a thread that is not measured: what was covered, and in the end to stop. On the second the
process asks: that coverage on behalf of a handle goes into an area. A message is a kind (one byte),
a length (eight bytes, little-endian) and that many bytes.

The source answers in :data:`CONSUME_SECONDS`, or raises once and gives nothing until an answer has
come after all; so the guest goes on, without PCs, whatever the target does.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import struct
import sys
import threading
import traceback
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bridge.errors import SourceError, TargetError, UsageError
from bridge.sources.pcs import BlockTable
from bridge.sources.remote import Deliver, serving
from bridge.sources.symbolize import BLOCKS_FILE
from bridge.targets import Endpoint, Target
from bridge.targets.registry import create as create_target
from bridge.vm.process import Process, spawn

if TYPE_CHECKING:
    from bridge.sources.python.source import PythonSource

__all__ = ["CONSUME_SECONDS", "IsolatedTarget"]

logger = logging.getLogger(__name__)
T = TypeVar("T")

CONSUME_SECONDS = 0.25
"""How long a system call's return may wait for a target that holds the interpreter lock: well
below the time that the guest waits for the host."""

_START_SECONDS = 90.0
_STOP_SECONDS = 60.0
_HEAD = struct.Struct("<cQ")
_LENGTH_LIMIT = 1 << 30
_CONSUME, _STOP, _READY, _DONE, _FAILED, _HANDLE = b"c", b"s", b"r", b"d", b"f", b"h"


class _Channel:
    """Messages over a stream socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock

    def send(self, kind: bytes, payload: bytes = b"") -> None:
        self.socket.sendall(_HEAD.pack(kind, len(payload)) + payload)

    def receive(self) -> tuple[bytes, bytes]:
        """The next message. Raises EOFError at the end, OSError (a time-out too), ValueError."""
        kind, length = _HEAD.unpack(self._exactly(_HEAD.size))
        if length > _LENGTH_LIMIT:
            raise ValueError(f"a message of {length} bytes")
        return kind, self._exactly(length)

    def _exactly(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            chunk = self.socket.recv(min(length - len(data), 1 << 20))
            if not chunk:
                raise EOFError("the other side is gone")
            data += chunk
        return bytes(data)


class IsolatedTarget:
    """The bridge's side: a target and the source of its coverage at once.

    Give it the name and the directory as :func:`bridge.targets.registry.create` takes them. It
    must be a target with packages to cover; ``out`` is where the process leaves ``.coverage`` and
    ``blocks.tsv``, None for nowhere. ``deliver`` gets coverage on behalf of handles, on a thread
    of this object.
    """

    def __init__(
        self, target: str, directory: Path | None, out: Path | None, deliver: Deliver
    ) -> None:
        described = create_target(target, directory)
        if not described.packages:
            raise UsageError(
                f"the target {target} has nothing to isolate: it covers no packages",
                hint="leave out --isolate",
            )
        self.name = described.name
        self.packages = described.packages
        self.guest_modules: tuple[str, ...] = ()
        self.guest_setup = ""
        self.guest_teardown = ""
        self.endpoints: tuple[Endpoint, ...] = ()
        self.table = BlockTable()
        self._arguments = (target, str(directory or ""), str(out or ""))
        self._out = out
        self._deliver = deliver
        self._covered: set[int] = set()
        self._stack = contextlib.ExitStack()
        self._process: Process | None = None
        self._channel: _Channel
        # Under _lock: one conversation at a time.
        self._lock = threading.Lock()
        self._owed = 0
        self._stopped = False

    @property
    def blocks_total(self) -> int:
        """As :class:`bridge.sources.python.source.PythonSource`."""
        return len(self.table)

    @property
    def blocks_covered(self) -> int:
        """As :class:`bridge.sources.python.source.PythonSource`."""
        return len(self._covered)

    def start(self) -> None:
        """Start the process; returns when the target serves.

        Raises :class:`bridge.errors.TargetError` with what the target raised.
        """
        with contextlib.ExitStack() as stack:
            ours, theirs = socket.socketpair()
            asked, asking = socket.socketpair()
            for sock in (ours, theirs, asked, asking):
                stack.callback(sock.close)
            fds = (theirs.fileno(), asking.fileno())
            command = [
                sys.executable,
                "-m",
                "bridge.session.isolated",
                *map(str, fds),
                *self._arguments,
            ]
            self._process = spawn(command, name=f"target {self.name}", pass_fds=fds)
            stack.callback(self._process.kill)
            theirs.close()
            asking.close()
            self._channel = _Channel(ours)
            ours.settimeout(_START_SECONDS)
            description = self._conclude(_READY)
            self.guest_modules = tuple(description["guest_modules"])
            self.guest_setup = description["guest_setup"]
            self.guest_teardown = description["guest_teardown"]
            self.endpoints = tuple(Endpoint(**each) for each in description["endpoints"])
            # Imported here, for a run that isolates nothing.
            from bridge.sources.python.source import block_table

            self.table = block_table(self.packages)
            server = threading.Thread(
                target=self._serve_handles, args=(_Channel(asked),), name="handles", daemon=True
            )
            server.start()
            self._stack = stack.pop_all()

    def _conclude(self, expected: bytes) -> dict[str, Any]:
        """The answer to start or stop. Raises TargetError."""
        assert self._process is not None
        try:
            kind, payload = self._channel.receive()
            answer = json.loads(payload)
        except TimeoutError as error:
            raise TargetError(
                f"the target {self.name} does not answer", evidence=self._process.stderr_text
            ) from error
        except (EOFError, OSError, ValueError) as error:
            self._process.wait(1.0)
            raise TargetError(
                f"the process of the target {self.name} {self._process.how_it_ended}",
                evidence=self._process.stderr_text,
            ) from error
        if kind != expected:
            raise TargetError(answer["message"], evidence=answer["evidence"])
        return dict(answer)

    def consume(self) -> Sequence[int]:
        """The PCs covered since the last call, in the order the process gives them.

        Raises :class:`bridge.errors.SourceError` once when the process is dead or does not answer
        in time; then gives nothing, until it answers.
        """
        with self._lock:
            if self._process is None or self._stopped:
                return ()
            quiet = self._owed > 0
            try:
                if not self._owed:
                    self._owed += 1
                    self._channel.socket.settimeout(CONSUME_SECONDS)
                    self._channel.send(_CONSUME)
                else:
                    # An answer is due since a call before: take it if it is there.
                    self._channel.socket.settimeout(0.001)
                _, payload = self._channel.receive()
            except TimeoutError as error:
                if quiet:
                    return ()
                raise SourceError(
                    f"the target {self.name} does not answer in {CONSUME_SECONDS:g} s"
                ) from error
            except (EOFError, OSError, ValueError) as error:
                self._stopped = True
                self._process.wait(1.0)
                raise SourceError(
                    f"the process of the target {self.name} {self._process.how_it_ended}",
                    evidence=self._process.stderr_text,
                ) from error
            self._owed -= 1
            pcs = array("Q", payload)
            self._covered.update(pcs)
            return pcs

    def stop(self) -> None:
        """Have the process stop the target and write its coverage, then end it.

        Safe to call twice. Raises :class:`bridge.errors.TargetError` where it cannot any more: the
        coverage file is missing then.
        """
        with self._lock:
            if self._process is None:
                return
            try:
                if not self._stopped:
                    self._stopped = True
                    self._channel.socket.settimeout(_STOP_SECONDS)
                    for _ in range(self._owed):
                        with contextlib.suppress(TimeoutError, EOFError, OSError, ValueError):
                            self._channel.receive()
                    with contextlib.suppress(OSError):
                        self._channel.send(_STOP)
                    done = self._conclude(_DONE)
                    self._covered.update(done["rest"])
                    if self._out is not None:
                        # With the files that appeared at run time.
                        self.table = BlockTable.load(self._out / BLOCKS_FILE)
                else:
                    raise TargetError(
                        f"the process of the target {self.name} {self._process.how_it_ended}",
                        evidence=self._process.stderr_text,
                        hint="what it covered is in the PCs, not in a coverage file",
                    )
            finally:
                self._process = None
                self._stack.close()

    def _serve_handles(self, channel: _Channel) -> None:
        """Put coverage on behalf of handles into areas, and say when it is there."""
        with contextlib.suppress(EOFError, OSError, ValueError):
            while True:
                _, payload = channel.receive()
                handle, *pcs = array("Q", payload)
                with self._lock:
                    self._covered.update(pcs)
                self._deliver(handle, pcs)
                channel.send(_HANDLE)


# ---- the process


def _target_process(answers: _Channel, asks: _Channel, target: Target, out: Path | None) -> None:
    """Serve until told to stop. Raises what goes wrong on start."""
    from bridge.sources.python.source import PythonSource

    data_file = out / ".coverage" if out is not None else None
    source = PythonSource(target.packages, data_file=data_file)
    executor = ThreadPoolExecutor(1, thread_name_prefix="target")

    def there(function: Callable[[], T]) -> T:
        return executor.submit(function).result()

    stop = threading.Event()
    ready = threading.Event()

    def serve() -> None:
        ready.wait()
        _serve(answers, source, stop)

    # Before the source starts, so that it is not measured.
    server = threading.Thread(target=serve, name="answers", daemon=True)
    server.start()
    asking = threading.Lock()

    def deliver(handle: int, pcs: Sequence[int]) -> None:
        with asking, contextlib.suppress(EOFError, OSError, ValueError):
            asks.send(_HANDLE, array("Q", [handle, *pcs]).tobytes())
            asks.receive()

    with serving(source, deliver):
        there(source.start)
        try:
            there(target.start)
        except Exception:
            # What a target that never started raises on its end says nothing.
            with contextlib.suppress(Exception):
                there(target.stop)
            raise
        try:
            answers.send(_READY, json.dumps(_description(target)).encode())
            ready.set()
            stop.wait()
        finally:
            try:
                there(target.stop)
            finally:
                there(source.stop)
    if out is not None:
        source.table.save(out / BLOCKS_FILE)
    answers.send(_DONE, json.dumps({"rest": source.consume()}).encode())


def _serve(channel: _Channel, source: PythonSource, stop: threading.Event) -> None:
    """Answer the bridge until it wants the end, or is gone."""
    try:
        while True:
            kind, _ = channel.receive()
            if kind == _STOP:
                break
            channel.send(_CONSUME, array("Q", source.consume()).tobytes())
    except (EOFError, OSError, ValueError) as error:
        logger.debug("the bridge is gone: %s", error)
    stop.set()


def _description(target: Target) -> dict[str, object]:
    return {
        "endpoints": [
            {"name": each.name, "host_port": each.host_port, "guest_port": each.guest_port}
            for each in target.endpoints
        ],
        "guest_modules": list(target.guest_modules),
        "guest_setup": target.guest_setup,
        "guest_teardown": target.guest_teardown,
    }


def main(argv: Sequence[str]) -> int:
    """``isolated.py ANSWERS_FD ASKS_FD TARGET DIRECTORY OUT``; the last two may be empty."""
    answers = _Channel(socket.socket(fileno=int(argv[1])))
    asks = _Channel(socket.socket(fileno=int(argv[2])))
    name, directory, out = argv[3:6]
    try:
        target = create_target(name, Path(directory) if directory else None)
        _target_process(answers, asks, target, Path(out) if out else None)
    except Exception as error:
        # Whatever it is, the bridge is to show it to a person.
        message = f"the target {name} raised {type(error).__name__}: {error}"
        failure = {"message": message, "evidence": "".join(traceback.format_exception(error))}
        with contextlib.suppress(OSError):
            answers.send(_FAILED, json.dumps(failure).encode())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
