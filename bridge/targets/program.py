# SPDX-License-Identifier: Apache-2.0
"""A program in native code as a target: started, watched and ended by the bridge.

The program is built by its own project, with coverage (docs/native.md). Programs in Go are covered
when they are ready. A subclass says how it is
started and what the guest is given::

    class Echo(ProgramTarget):
        name = "echo"

        def command(self):
            return ["./echo-server", "--port", str(self.port)]

        def serves(self):
            self.endpoints = (Endpoint("echo", self.port, 7),)

The guest is given endpoints, devices and the rest as by any other target
(:class:`bridge.targets.DeviceTarget`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from bridge.errors import MissingDependencyError, TargetError
from bridge.targets import AnyEndpoint, Device, Endpoint, GuestFile, UnixEndpoint
from bridge.targets.scratch import ScratchDirectory

__all__ = ["ProgramTarget", "listens"]

_log = logging.getLogger(__name__)

_STOP_SECONDS: Final = 10.0
_POLL_SECONDS: Final = 0.01
_SHOWN: Final = 4000
"""How much of a program's output an error shows: its last bytes."""

_LISTENING: Final = "0A"
"""State of a TCP socket: Linux, include/net/tcp_states.h, TCP_LISTEN."""
_ACCEPTS: Final = 0x00010000
"""Flag of a Unix socket: Linux, include/linux/net.h, __SO_ACCEPTCON."""

_REPORT: Final = re.compile(
    rb"ERROR: \w+Sanitizer|WARNING: ThreadSanitizer|: runtime error: |^panic: |panicked at ", re.M
)
"""How the report of a sanitizer begins, of a Go program that panics, and of a Rust program."""


def listens(place: int | Path) -> bool:
    """Return whether somebody listens on a TCP port of this machine, or on a Unix socket.

    Nothing connects, because many servers take one connection alone.
    """
    if isinstance(place, int):
        ending = f":{place:04X}"
        for table in ("/proc/net/tcp", "/proc/net/tcp6"):
            with contextlib.suppress(OSError):
                for line in Path(table).read_text(encoding="ascii").splitlines()[1:]:
                    words = line.split()
                    if words[1].endswith(ending) and words[3] == _LISTENING:
                        return True
        return False
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/unix").read_text(errors="surrogateescape").splitlines()[1:]:
            words = line.split(maxsplit=7)
            if len(words) == 8 and words[7] == str(place) and int(words[3], 16) & _ACCEPTS:
                return True
    return False


class ProgramTarget:
    """A target that is one program; see the module. Subclasses define :meth:`command`.

    It counts as ready when it listens on all of its :attr:`endpoints` and of
    :meth:`sockets`, and has written a line that matches :attr:`ready_line`, if there is one.
    """

    name = "program"
    packages: tuple[str, ...] = ()
    native = True
    """Its programs are covered, if they were built for that."""
    environment: Mapping[str, str] = {}
    """Variables that the program gets beside those of the bridge."""
    ready_line: str = ""
    """A regular expression for a line of its standard output or error."""
    start_seconds: float = 30.0
    """How long it may take until it is ready."""
    stop_signal: int = signal.SIGTERM
    ends_with_guest: bool = False
    """Whether it ends by itself, with status 0, when the guest's machine does: no failure then."""
    guest_modules: tuple[str, ...] = ()
    guest_setup = ""
    guest_teardown = ""
    endpoints: Sequence[AnyEndpoint] = ()
    devices: Sequence[Device] = ()
    guest_files: Sequence[GuestFile] = ()
    guest_packages: Sequence[str] = ()

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory
        """The setting ``target_dir``: None, or files that the target may serve."""
        self.pid = 0
        """The program's process, once it was started."""
        self._port = 0
        self._covering: dict[str, str] = {}
        self._scratch = ScratchDirectory(type(self).__name__)
        self._place: Path | None = None
        # The process group of the program; 0 once nobody is left in it.
        self._group = 0
        self._stopping = False
        self._stack = ExitStack()

    # What a subclass defines

    def command(self) -> Sequence[str | Path]:
        """Return program and arguments; may use :attr:`port` and :attr:`scratch`."""
        raise NotImplementedError

    def serves(self) -> None:
        """Set what the guest is given; called before the program is waited for."""

    def sockets(self) -> Sequence[int | Path]:
        """Return further ports and Unix sockets on which it listens when it is ready."""
        return ()

    # What a subclass may use

    @property
    def port(self) -> int:
        """A free TCP port of 127.0.0.1, the same until the program is started again."""
        if not self._port:
            with socket.socket() as sock:
                sock.bind(("127.0.0.1", 0))
                self._port = sock.getsockname()[1]
        return self._port

    @property
    def scratch(self) -> Path:
        """A directory for sockets and files, empty when the program starts."""
        if self._place is None:
            self._place = self._scratch.empty()
        return self._place

    @property
    def output(self) -> str:
        """The end of what the program has written to its standard output and error."""
        return self._written(_SHOWN).decode(errors="replace")

    # What the bridge calls

    @property
    def processes(self) -> Sequence[int]:
        """The program's process; as :class:`bridge.targets.NativeTarget`."""
        return (self.pid,) if self.pid else ()

    def cover_programs(self, environment: Mapping[str, str]) -> None:
        """Take the variables with which programs are covered; called before :meth:`start`."""
        self._covering = dict(environment)

    def start(self) -> None:
        """Start the program; returns when it serves.

        Raises:
            MissingDependencyError: there is no such program.
            TargetError: it ended, or was not ready in time.
        """
        with ExitStack() as stack:
            stack.callback(self._forget)
            command = [str(word) for word in self.command()]
            process = self._launch(command)
            self.pid = process.pid
            stack.callback(self._end, process)
            self.serves()
            self._wait_until_ready(process, command[0])
            # A thread that ends by an exception is what tells of a target that is not well.
            self._stopping = False
            watch = threading.Thread(target=self._watch, args=(process,), name=self.name)
            watch.start()
            stack.callback(watch.join)
            stack.callback(self._end, process)
            self._stack = stack.pop_all()

    def stop(self) -> None:
        """End the program. Safe to call twice."""
        self._stopping = True
        self._stack.close()

    def _launch(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        environment = {**os.environ, **self.environment, **self._covering}
        with (self.scratch / "output").open("wb") as output:
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
            except FileNotFoundError as error:
                raise MissingDependencyError(
                    f"the target {self.name} is the program {command[0]}, which is not there",
                    hint="install or build it",
                ) from error
            except OSError as error:
                raise TargetError(
                    f"the program {command[0]} of the target {self.name} cannot be started: "
                    f"{error.strerror}"
                ) from error
        self._group = process.pid
        self._scratch.kill_with_us(self._group)
        return process

    def _wait_until_ready(self, process: subprocess.Popen[bytes], program: str) -> None:
        deadline = time.monotonic() + self.start_seconds
        line = re.compile(self.ready_line.encode(), re.M) if self.ready_line else None
        while (missing := self._missing(line)) is not None:
            if (status := process.poll()) is not None:
                raise TargetError(
                    f"{program} ended with {_status(status)} before it served",
                    evidence=self.output,
                )
            if time.monotonic() > deadline:
                raise TargetError(
                    f"{program} was not ready within {self.start_seconds:g} s: {missing}",
                    evidence=self.output,
                )
            time.sleep(_POLL_SECONDS)

    def _missing(self, line: re.Pattern[bytes] | None) -> str | None:
        """Return what is not there yet of what tells that the program is ready."""
        if line is not None and not line.search(self._written()):
            return f"it has written no line that matches {self.ready_line!r}"
        places: list[int | Path] = list(self.sockets())
        for each in self.endpoints:
            if isinstance(each, Endpoint):
                places.append(each.host_port)
            elif isinstance(each, UnixEndpoint):
                places.append(each.host_path)
        for place in places:
            if not listens(place):
                return f"it does not listen on {place}"
        return None

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        status = process.wait()
        if not _group_exists(process.pid):
            # Its number may be that of others from now on.
            self._group = 0
            self._scratch.kill_with_us(0)
        if not self._stopping and (status or not self.ends_with_guest):
            said = self._written()
            report = _REPORT.search(said)
            # The report of a sanitizer is long, and says most where it begins.
            start = report.start() if report is not None else max(len(said) - _SHOWN, 0)
            text = said[start : start + _SHOWN].decode(errors="replace")
            raise TargetError(
                f"the program of the target {self.name} ended by itself, with "
                f"{_status(status)}\n{text}"
            )

    def _written(self, most: int = 1 << 20) -> bytes:
        if self._place is None:
            return b""
        with contextlib.suppress(OSError), (self._place / "output").open("rb") as output:
            size = output.seek(0, os.SEEK_END)
            output.seek(max(size - most, 0))
            return output.read(most)
        return b""

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """End the program and the processes that it has started."""
        if process.poll() is None:
            process.send_signal(self.stop_signal)
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                _log.warning("the program of the target %s did not end: it is killed", self.name)
        group, self._group = self._group, 0
        if group:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)
        process.wait()
        self._scratch.kill_with_us(0)

    def _forget(self) -> None:
        self._scratch.remove()
        self._place, self._port, self.pid = None, 0, 0


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _status(status: int) -> str:
    if status >= 0:
        return f"status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"
