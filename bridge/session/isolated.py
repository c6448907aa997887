# SPDX-License-Identifier: Apache-2.0
"""A target in a process of its own: one that dies or hangs does not take the device with it.

The process (``python -m bridge.session.isolated``) runs source and target as the bridge would.
Two sockets connect it. On the first the bridge says what the target is, asks what was covered, and
at the end to stop; a thread that is not measured answers at once. On the second the process asks:
to have coverage on behalf of a handle appended to an area. A message is a kind (one byte), a length
(eight bytes, little-endian) and that many bytes.

The source answers within :data:`CONSUME_SECONDS`. If not, it raises once, and gives nothing until a
late answer comes; so the guest goes on, without PCs, whatever the target does.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import importlib.util
import io
import json
import logging
import pickle
import socket
import struct
import sys
import threading
import time
import traceback
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.device.calls import HostThread
from bridge.errors import BridgeError, SourceError, TargetError, UsageError
from bridge.session.forked import ForkedTarget
from bridge.session.stats import Stats
from bridge.session.target_host import (
    InProcessTarget,
    TargetState,
    describe_failure,
    fill_blocks,
)
from bridge.sources.by_thread import ThreadOfPc
from bridge.sources.pcs import BlockTable
from bridge.sources.remote import Deliver
from bridge.sources.symbolize import BLOCKS_FILE
from bridge.targets import Target
from bridge.targets.description import Description
from bridge.targets.faults import SharedCount, TargetFaults
from bridge.targets.registry import TargetMaker
from bridge.targets.thread import TargetThread, foreign
from bridge.vm.network import EpochWord
from bridge.vm.process import Process, spawn

if TYPE_CHECKING:
    from bridge.sources.python.lines import LineMemory
    from bridge.sources.python.source import PythonSource

__all__ = ["CONSUME_SECONDS", "IsolatedTarget", "RemoteTarget"]

logger = logging.getLogger(__name__)

CONSUME_SECONDS = 0.25
"""How long a system call's return may wait for a target that holds the interpreter lock: well
below the time that the guest waits for the host."""

_STOP_SECONDS = 60.0
_SETTLE_SECONDS = 20.0
_HEAD = struct.Struct("<cQ")
_LENGTH_LIMIT = 1 << 30
_CONSUME, _STOP, _READY, _DONE, _FAILED, _HANDLE = b"c", b"s", b"r", b"d", b"f", b"h"
_ORDER, _RENEW, _PROBLEMS, _READ, _STACKS = b"o", b"n", b"p", b"g", b"k"
_SPARE_SECONDS = 10.0
"""What the process needs on top of the target's own time to start."""
_ANSWER_SECONDS = 20.0


@dataclass(frozen=True)
class _Order:
    """What the process is to run; the bridge pickles it.

    Attributes:
        target: a name, or a maker of targets, pickled.
        modules: the files of the modules whose classes the maker needs, by the module's name.
        path: where those are looked for (``sys.path``).
        count: the memory of :class:`bridge.targets.faults.SharedCount`.
    """

    target: str | bytes
    name: str
    modules: dict[str, str]
    path: tuple[str, ...]
    directory: Path | None
    out: Path | None
    start_seconds: float | None
    state: TargetState
    epoch: EpochWord | None = None
    count: str | None = None


def _order(
    target: str | TargetMaker,
    directory: Path | None,
    out: Path | None,
    start_seconds: float | None,
    state: TargetState,
) -> _Order:
    path = tuple(sys.path)
    if isinstance(target, str):
        return _Order(target, target, {}, path, directory, out, start_seconds, state)
    files: dict[str, str] = {}

    class Pickler(pickle.Pickler):
        """Notes the modules that a pickle needs."""

        def reducer_override(self, thing: Any) -> Any:
            module = getattr(thing, "__module__", None)
            if isinstance(module, str):
                file = getattr(sys.modules.get(module), "__file__", None)
                if file is not None:
                    files[module] = file
            return NotImplemented

    buffer = io.BytesIO()
    try:
        Pickler(buffer).dump(target)
    except Exception as error:
        raise UsageError(
            f"the target {target} cannot run in a process of its own: {error}",
            hint="its class must be at the top level of a module, and what an instance holds must "
            "be plain data before start(); open files and sockets, and make locks and threads, in "
            "prepare() or start()",
        ) from error
    return _Order(buffer.getvalue(), str(target), files, path, directory, out, start_seconds, state)


class _Maker:
    """The maker of an order, which is unpickled when it is called."""

    def __init__(self, order: _Order, pickled: bytes) -> None:
        self._order = order
        self._pickled = pickled

    def __str__(self) -> str:
        return self._order.name

    def __call__(self, directory: Path | None) -> Target:
        order = self._order

        class Unpickler(pickle.Unpickler):
            def find_class(self, module: str, name: str) -> Any:
                try:
                    if module == "__main__":
                        raise ModuleNotFoundError  # this process has another one
                    return super().find_class(module, name)
                except (ModuleNotFoundError, AttributeError):
                    if module not in order.modules:
                        raise
                return functools.reduce(
                    getattr, name.split("."), _load_file(module, order.modules[module])
                )

        made: Target = Unpickler(io.BytesIO(self._pickled)).load()(directory)
        return made


def _load_file(name: str, file: str) -> object:
    """Import a module of a test run, which has no name that Python finds here."""
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"no module {name} in {file}", name=name)
    module = importlib.util.module_from_spec(spec)
    if name != "__main__":
        sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class _Channel:
    """Messages over a stream socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        # What has come of a message; the next receive() goes on from there.
        self._come = bytearray()

    def send(self, kind: bytes, payload: bytes = b"") -> None:
        self.socket.sendall(_HEAD.pack(kind, len(payload)) + payload)

    def receive(self) -> tuple[bytes, bytes]:
        """Receive a message.

        Raises:
            EOFError: at the end.
            TimeoutError: the socket's time is up. Nothing of the message is lost.
            OSError, ValueError: it cannot be received.
        """
        timeout = self.socket.gettimeout()
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            self._wait_for(_HEAD.size, deadline)
            kind, length = _HEAD.unpack_from(self._come)
            if length > _LENGTH_LIMIT:
                raise ValueError(f"a message of {length} bytes")
            self._wait_for(_HEAD.size + length, deadline)
        finally:
            if self.socket.gettimeout() != timeout:
                self.socket.settimeout(timeout)
        message, self._come = self._come, bytearray()
        return kind, bytes(memoryview(message)[_HEAD.size :])

    def _wait_for(self, length: int, deadline: float | None) -> None:
        """Receive until so much of the message has come, and no more."""
        come = self._come
        while len(come) < length:
            chunk = self.socket.recv(min(length - len(come), 1 << 20))
            if not chunk:
                raise EOFError("the other side is gone")
            come += chunk
            if deadline is not None and len(come) < length:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError("the time is up in the middle of a message")
                self.socket.settimeout(left)


class _Running:
    """The process of a target, from its start to its end."""

    def __init__(self, process: Process, answers: _Channel) -> None:
        self.process = process
        self.answers = answers
        self.stack = contextlib.ExitStack()
        self.owed = 0
        """How many answers are due."""
        self.gone = False
        """Whether it is of no use to ask again: it is dead, or was told to stop."""
        self.told = False
        """Whether its death was one of the target's problems."""

    def failure(self, name: str, hint: str = "") -> tuple[str, str, str]:
        """Message, evidence and hint for a process that is gone."""
        self.process.wait(1.0)
        message = f"the process of the target {name} {self.process.how_it_ended}"
        return message, self.process.stderr_text, hint

    def conclude(self, name: str, expected: bytes) -> dict[str, Any]:
        """Return the answer to start or stop. Raises TargetError, UsageError."""
        try:
            kind, payload = self.answers.receive()
            answer = json.loads(payload)
        except TimeoutError as error:
            raise TargetError(
                f"the target {name} does not answer", evidence=self.process.stderr_text
            ) from error
        except (EOFError, OSError, ValueError) as error:
            message, evidence, hint = self.failure(name)
            raise TargetError(message, evidence=evidence, hint=hint) from error
        if kind != expected:
            failure = UsageError if answer["usage"] else TargetError
            raise failure(answer["message"], evidence=answer["evidence"], hint=answer["hint"])
        return dict(answer)


class IsolatedTarget:
    """The bridge's side: a target and the source of its coverage at once.

    Args:
        target: what makes the target, and its directory, as
            :func:`bridge.targets.registry.create` takes them; it must have packages to cover.
        out: where the process leaves ``.coverage`` and ``blocks.tsv``; None for nowhere.
        start_seconds: how long the target may take to start.
        state: what :meth:`renew` does.

    Raises:
        UsageError: what makes the target cannot be given to another process.
    """

    thread: TargetThread | None = None

    def __init__(
        self,
        target: str | TargetMaker,
        directory: Path | None,
        out: Path | None,
        *,
        start_seconds: float = 90.0,
        state: TargetState = TargetState.KEEP,
    ) -> None:
        self.name = str(target)
        self.packages: tuple[str, ...] = ()
        self.table = BlockTable()
        self._order = _order(target, directory, out, start_seconds, state)
        self._out = out
        self._covered: set[int] = set()
        self.given = 0
        """How many PCs :meth:`consume` has given."""
        self.tracer_faults = 0
        """As :class:`bridge.sources.python.source.PythonSource`, as of the last answer with it."""
        # Under _lock: one conversation at a time.
        self._lock = threading.Lock()
        self._running: _Running | None = None
        self._lines: LineMemory | None = None
        self._threads = ThreadOfPc()
        # Lines of files that are not in _lines; the process tells them at its end.
        self._rest_of_lines: dict[str, set[int]] = {}
        self._count: SharedCount | None = None
        # What settle() has received for the next consume().
        self._settled: tuple[bytes, bytes] | None = None

    @property
    def source(self) -> IsolatedTarget:
        """As :class:`bridge.session.target_host.TargetHost`."""
        return self

    @property
    def pid(self) -> int | None:
        """The process in which the target runs."""
        running = self._running
        return running.process.pid if running is not None else None

    @property
    def serving_pid(self) -> int | None:
        """As :class:`bridge.session.target_host.TargetHost`."""
        return (self._count.pid or self.pid) if self._count is not None else None

    @property
    def fault_count(self) -> int:
        """As :class:`bridge.session.target_host.TargetHost`."""
        return self._count.faults if self._count is not None else 0

    @property
    def fault_memory(self) -> int | None:
        """As :class:`bridge.session.target_host.TargetHost`."""
        return self._count.fd if self._count is not None else None

    @property
    def blocks_total(self) -> int:
        """As :class:`bridge.sources.python.source.PythonSource`."""
        return len(self.table)

    @property
    def blocks_covered(self) -> int:
        """As :class:`bridge.sources.python.source.PythonSource`."""
        return len(self._covered)

    def build_programs(self) -> None:
        """Do nothing: native programs are not covered in a process of its own."""

    def start(self, deliver: Deliver, epoch: EpochWord | None = None) -> Description:
        """As :class:`bridge.session.target_host.TargetHost`.

        Raises:
            UsageError: the target covers nothing.
            TargetError: the target raised something, or its process ended.
        """
        with contextlib.ExitStack() as stack:
            ours, theirs = socket.socketpair()
            asked, asking = socket.socketpair()
            for sock in (ours, theirs, asked, asking):
                stack.callback(sock.close)
            fds = (theirs.fileno(), asking.fileno())
            command = [sys.executable, "-m", "bridge.session.isolated", *map(str, fds), self.name]
            process = spawn(command, name=f"target {self.name}", pass_fds=fds)
            stack.callback(process.kill)
            theirs.close()
            asking.close()
            running = _Running(process, _Channel(ours))
            seconds = self._order.start_seconds
            ours.settimeout(None if seconds is None else seconds + _SPARE_SECONDS)
            self._count = count = SharedCount()
            stack.callback(self._end_count)
            # A process that is dead already is noticed by what follows.
            with contextlib.suppress(OSError):
                order = dataclasses.replace(self._order, epoch=epoch, count=count.path)
                running.answers.send(_ORDER, pickle.dumps(order))
            answer = running.conclude(self.name, _READY)
            description = Description.from_dict(answer["description"])
            self.name = description.name
            if answer["native"]:
                logger.warning(
                    "the native programs of the target %s are not covered: its own process "
                    "(--isolate) covers its packages of Python alone",
                    self.name,
                )
            # Imported here, for a run that isolates nothing.
            from bridge.sources.python.lines import LineMemory
            from bridge.sources.python.source import block_table

            try:
                self._lines = LineMemory.attach(answer["lines"])
            except (OSError, ValueError) as error:
                raise TargetError(
                    f"the lines of the target {self.name} cannot be read: {error}"
                ) from error
            self._lines.close()
            with foreign(f"the target {self.name}", "while its packages were looked for"):
                self.packages = tuple(answer["packages"])
                self.table = block_table(self.packages)
            server = threading.Thread(
                target=self._serve_handles,
                args=(_Channel(asked), deliver),
                name="handles",
                daemon=True,
            )
            server.start()
            running.stack = stack.pop_all()
            self._running = running
            # A target may be busy with itself for longer than a return could wait.
            self.settle()
            return description

    def _end_count(self) -> None:
        count, self._count = self._count, None
        if count is not None:
            count.close()

    def renew(self) -> Description:
        """As :class:`bridge.session.target_host.TargetHost`."""
        seconds = self._order.start_seconds
        answer = self._ask(
            _RENEW, None if seconds is None else 2 * (seconds + _SPARE_SECONDS), self.name
        )
        return Description.from_dict(answer["description"])

    def problems(self) -> list[str]:
        """As :class:`bridge.session.target_host.TargetHost`, with the exceptions on its threads."""
        running = self._running
        if running is None:
            return []
        if running.gone:
            if running.told or running.process.running:
                return []
            running.told = True
            message, evidence, _ = running.failure(self.name)
            return [f"{message}\n{evidence}".rstrip()]
        try:
            return list(self._ask(_PROBLEMS, _ANSWER_SECONDS, self.name)["problems"])
        except TargetError as error:
            return [f"{error.message}\n{error.evidence}".rstrip()]

    def stacks(self) -> str:
        """As :class:`bridge.session.target_host.TargetHost`."""
        try:
            return str(self._ask(_STACKS, _ANSWER_SECONDS, self.name)["stacks"])
        except BridgeError:
            return ""

    def read(self, name: str, call: str | None) -> str:
        """As :class:`bridge.session.target_host.InProcessTarget`."""
        answer = self._ask(_READ, _ANSWER_SECONDS, self.name, {"name": name, "call": call})
        return str(answer["value"])

    def _ask(
        self, kind: bytes, seconds: float | None, name: str, arguments: object = None
    ) -> dict[str, Any]:
        """Have the process do something; raises TargetError, UsageError."""
        with self._lock:
            running = self._running
            if running is None or running.gone:
                raise TargetError(f"the process of the target {name} has ended")
            channel = running.answers
            channel.socket.settimeout(seconds)
            # What is due from before comes first.
            with contextlib.suppress(EOFError, OSError, ValueError):
                while running.owed:
                    self._keep(*channel.receive())
                    running.owed -= 1
                channel.send(kind, json.dumps(arguments).encode())
            try:
                return running.conclude(self.name, kind)
            except TargetError:
                running.gone = not running.process.running or running.gone
                raise

    def _keep(self, kind: bytes, payload: bytes) -> None:
        """Keep an answer for the next :meth:`consume`; under the lock."""
        if self._settled is not None and self._settled[0] == kind == _CONSUME:
            payload = self._settled[1] + payload
        self._settled = kind, payload

    def settle(self, seconds: float = _SETTLE_SECONDS) -> None:
        """Wait for what is covered so far, which the next :meth:`consume` returns.

        For a time without a guest, which could not wait so long. A target that takes longer is no
        failure here: its answer comes late.
        """
        with self._lock:
            running = self._running
            if running is None or running.gone or self._settled is not None:
                return
            channel = running.answers
            # If the process is dead, consume() says so.
            with contextlib.suppress(EOFError, OSError, ValueError):
                channel.socket.settimeout(seconds)
                if not running.owed:
                    running.owed += 1
                    channel.send(_CONSUME)
                self._settled = channel.receive()
                running.owed -= 1

    @property
    def native(self) -> None:
        """None: a target in a process of its own has no native programs that are covered."""

    def consume(self) -> Sequence[int]:
        """Return the PCs covered since the last call, in the order of the process.

        Raises:
            SourceError: the process is dead, or does not answer in time: raised once, then there
                is nothing until it answers. Or the source in the process has raised something.
        """
        with self._lock:
            running = self._running
            if running is None or running.gone:
                return ()
            channel = running.answers
            quiet = running.owed > 0
            try:
                if self._settled is not None:
                    (kind, payload), self._settled = self._settled, None
                else:
                    if not running.owed:
                        running.owed += 1
                        channel.socket.settimeout(CONSUME_SECONDS)
                        channel.send(_CONSUME)
                    else:
                        # An answer is due since a call before: take it if it is there.
                        channel.socket.settimeout(0.001)
                    kind, payload = channel.receive()
                    running.owed -= 1
            except TimeoutError as error:
                if quiet:
                    return ()
                raise SourceError(
                    f"the target {self.name} did not answer within {CONSUME_SECONDS:g} s"
                ) from error
            except (EOFError, OSError, ValueError) as error:
                running.gone = True
                message, evidence, _ = running.failure(self.name)
                raise SourceError(message, evidence=evidence) from error
            if kind == _FAILED:
                failure = json.loads(payload)
                self.tracer_faults = failure["faults"]
                raise SourceError(failure["message"], evidence=failure["evidence"])
            pcs = self._pcs(payload)
            self._covered.update(pcs)
            self.given += len(pcs)
            return pcs

    def _pcs(self, payload: bytes) -> Sequence[int]:
        words = array("Q", payload)
        if self._lines is None or not ThreadOfPc.has_numbers(words):
            return words
        return self._threads.unpack(self._lines.buffer, words)

    def record_threads(self, on: bool) -> None:
        """As :class:`bridge.sources.by_thread.ByThread`."""
        with self._lock:
            if self._lines is not None:
                self._threads.record(self._lines.buffer, on)

    @property
    def thread_of(self) -> Mapping[int, HostThread]:
        """As :class:`bridge.sources.by_thread.ByThread`."""
        return self._threads.thread_of

    def take_lines(self) -> dict[str, set[int]]:
        """As :class:`bridge.sources.python.source.PythonSource`; also when the process is dead.

        Lines of files that appeared during the run come after :meth:`stop`.
        """
        taken, self._rest_of_lines = self._rest_of_lines, {}
        if self._lines is not None:
            for file in self._lines.files:
                if lines := self._lines.take_lines(file):
                    taken.setdefault(file.path, set()).update(lines)
        return taken

    def stop(self) -> None:
        """As :class:`bridge.session.target_host.TargetHost`.

        Raises:
            TargetError: the target raised something, or its process is dead, and the coverage
                file is missing then.
        """
        with self._lock:
            running, self._running = self._running, None
            if running is None:
                return
            with running.stack:
                if running.gone:
                    message, evidence, hint = running.failure(
                        self.name, "what it covered is in the PCs, not in a coverage file"
                    )
                    raise TargetError(message, evidence=evidence, hint=hint)
                channel = running.answers
                channel.socket.settimeout(_STOP_SECONDS)
                if self._settled is not None:
                    self._cover(*self._settled)
                for _ in range(running.owed):
                    with contextlib.suppress(TimeoutError, EOFError, OSError, ValueError):
                        self._cover(*channel.receive())
                with contextlib.suppress(OSError):
                    channel.send(_STOP)
                done = running.conclude(self.name, _DONE)
                self._covered.update(done["rest"])
                self._rest_of_lines = {file: set(lines) for file, lines in done["lines"].items()}
                self.tracer_faults = done["faults"]
                if self._out is not None:
                    # With the files that appeared at run time.
                    self.table = BlockTable.load(self._out / BLOCKS_FILE)

    def _cover(self, kind: bytes, payload: bytes) -> None:
        """Count what an answer has that nobody consumes any more."""
        if kind == _CONSUME:
            self._covered.update(self._pcs(payload))

    def fill(self, stats: Stats) -> None:
        """As :class:`bridge.session.stats.Measured`."""
        stats.target = self.name
        fill_blocks(stats, self)

    def _serve_handles(self, channel: _Channel, deliver: Deliver) -> None:
        """Append coverage on behalf of handles to areas, and confirm it."""
        with contextlib.suppress(EOFError, OSError, ValueError):
            while True:
                _, payload = channel.receive()
                handle, *pcs = array("Q", payload)
                # Not under the lock, which stop() holds while the target may still deliver.
                self._covered.update(pcs)
                deliver(handle, pcs)
                channel.send(_HANDLE)


class RemoteTarget:
    """Stands for a target in a process of its own: attributes are copies, methods run there.

    A method's arguments and result are copied too. An attribute cannot be set.

    Args:
        host: what runs the target.
        prefix: what leads to it from there: empty, or ``targets.N.`` for a part of a composite.
    """

    def __init__(self, host: IsolatedTarget, prefix: str = "") -> None:
        object.__setattr__(self, "_host", host)
        object.__setattr__(self, "_prefix", prefix)

    def __getattr__(self, name: str) -> Any:
        host: IsolatedTarget = object.__getattribute__(self, "_host")
        if name.startswith("__"):
            raise AttributeError(name)
        name = object.__getattribute__(self, "_prefix") + name
        callable_, value = pickle.loads(base64.b64decode(host.read(name, None)))
        if not callable_:
            return value

        def method(*places: Any, **names: Any) -> Any:
            call = base64.b64encode(pickle.dumps((places, names))).decode()
            return pickle.loads(base64.b64decode(host.read(name, call)))[1]

        return method

    def __setattr__(self, name: str, value: object) -> None:
        raise UsageError(
            f"{name} cannot be set: the target runs in a process of its own",
            hint="call a method of the target that sets it",
        )


# ---- the process


def _target_process(
    answers: _Channel, asks: _Channel, order: _Order, stack: contextlib.ExitStack
) -> None:
    """Serve until told to stop. Raises what goes wrong on start and on stop."""
    count = SharedCount(order.count) if order.count is not None else None
    faults = TargetFaults(count)
    faults.watch()
    own_threads: list[threading.Thread] = []
    host = _host(order, faults, own_threads, (answers.socket, asks.socket), count)
    stack.callback(host.stop)
    source, native = host.source, host.native
    # Nothing here hands over what it would cover.
    host.native = None
    if source is None and native is not None:
        raise UsageError(
            f"the target {host.name} is native programs, and these are covered only without "
            "--isolate",
            hint="leave out --isolate: the programs are processes of their own anyway. In a test, "
            'take reset="restart" for reset="fork"',
        )
    if source is None:
        raise UsageError(
            f"the target {host.name} cannot run in a process of its own: it covers no packages",
            hint="name the packages that it runs in its `packages`; or leave out --isolate, and "
            'reset="fork" in a test',
        )
    stop = threading.Event()
    ready = threading.Event()

    def serve() -> None:
        ready.wait()
        _serve(answers, host, source, faults, stop)

    # Before the source starts, so that it is not measured.
    answering = threading.Thread(target=serve, name="answers", daemon=True)
    own_threads.append(answering)
    answering.start()
    asking = threading.Lock()

    def deliver(handle: int, pcs: Sequence[int]) -> None:
        with asking, contextlib.suppress(EOFError, OSError, ValueError):
            asks.send(_HANDLE, array("Q", [handle, *pcs]).tobytes())
            asks.receive()

    description = host.start(deliver, order.epoch)
    answer = {
        "description": description.as_dict(),
        "packages": source.packages,
        "lines": source.shared_lines,
        "native": native is not None,
    }
    answers.send(_READY, json.dumps(answer).encode())
    ready.set()
    stop.wait()
    host.stop()
    done = {
        "rest": source.consume(),
        "lines": {path: sorted(lines) for path, lines in source.later_lines().items()},
        "faults": source.tracer_faults,
    }
    answers.send(_DONE, json.dumps(done).encode())


def _host(
    order: _Order,
    faults: TargetFaults,
    own_threads: Sequence[threading.Thread],
    sockets: Sequence[socket.socket],
    count: SharedCount | None,
) -> InProcessTarget:
    sys.path += [each for each in order.path if each not in sys.path]
    target = order.target if isinstance(order.target, str) else _Maker(order, order.target)
    if order.state is not TargetState.FORK:
        return InProcessTarget(
            target, order.directory, out=order.out, start_seconds=order.start_seconds
        )
    return ForkedTarget(
        target,
        order.directory,
        faults=faults,
        own_threads=own_threads,
        not_for_child=sockets,
        count=count,
        out=order.out,
        start_seconds=order.start_seconds,
    )


def _serve(
    channel: _Channel,
    host: InProcessTarget,
    source: PythonSource,
    faults: TargetFaults,
    stop: threading.Event,
) -> None:
    """Answer the bridge until it wants the end, or is gone."""
    try:
        while True:
            kind, payload = channel.receive()
            if kind == _STOP:
                break
            try:
                if kind == _CONSUME:
                    answer = kind, array("Q", source.consume()).tobytes()
                else:
                    answer = kind, json.dumps(_work(kind, payload, host, faults)).encode()
            except Exception as error:
                failure = {**_failure("", error), "faults": source.tracer_faults}
                answer = _FAILED, json.dumps(failure).encode()
            channel.send(*answer)
    except (EOFError, OSError, ValueError) as error:
        logger.debug("the bridge is gone: %s", error)
    stop.set()


def _work(
    kind: bytes, payload: bytes, host: InProcessTarget, faults: TargetFaults
) -> dict[str, object]:
    """Do what the bridge asks for, except for coverage."""
    if kind == _RENEW:
        return {"description": host.renew().as_dict()}
    if kind == _READ:
        return {"value": host.read(**json.loads(payload))}
    if kind == _STACKS:
        return {"stacks": host.stacks()}
    return {"problems": [*faults.take(), *host.problems()]}


def main(argv: Sequence[str]) -> int:
    """``isolated.py ANSWERS_FD ASKS_FD TARGET``; the rest comes as the first message."""
    answers = _Channel(socket.socket(fileno=int(argv[1])))
    asks = _Channel(socket.socket(fileno=int(argv[2])))
    name = argv[3]
    stack = contextlib.ExitStack()
    try:
        _, payload = answers.receive()
        _target_process(answers, asks, pickle.loads(payload), stack)
    except BaseException as error:
        # Whatever it is, the bridge is to show it to a person.
        failure = _failure(name, error)
        with contextlib.suppress(OSError):
            answers.send(_FAILED, json.dumps(failure).encode())
        return 1
    finally:
        with contextlib.suppress(BridgeError):
            stack.close()
    return 0


def _failure(name: str, error: BaseException) -> dict[str, object]:
    if isinstance(error, BridgeError):
        return describe_failure(error)
    who = f"the process of the target {name}" if name else "the source"
    return {
        "message": f"{who} raised {type(error).__name__}: {error}",
        "evidence": "".join(traceback.format_exception(error)),
        "hint": "",
        "usage": False,
    }


if __name__ == "__main__":
    # Pickles name the classes of this module by its full name, not __main__.
    from bridge.session.isolated import main as _main

    sys.exit(_main(sys.argv))
