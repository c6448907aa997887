# SPDX-License-Identifier: Apache-2.0
"""Running commands in the guest over a virtio-serial port, by the guest's agent.

The agent runs when the guest's snapshot is made, so a command needs no login and no process but its
own. Output comes with credit: the host grants more as the caller takes what there is, so neither
side's memory grows, and a command that floods its output keeps nobody else waiting.

No thread belongs to the channel. Of the threads that wait for commands, one reads for all.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import secrets
import shlex
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NoReturn, Protocol

from bridge.errors import (
    BridgeError,
    GuestLostError,
    GuestSetupError,
    GuestStoppedError,
    RunTimeoutError,
    UsageError,
)
from bridge.guest.guest import (
    CAPTURE_LIMIT,
    EVIDENCE,
    KILL_SECONDS,
    LINGER_SECONDS,
    LOG_LIMIT,
    SILENCE_SECONDS,
    TO_STDERR,
    TO_STDOUT,
    Capture,
    CommandResult,
    Input,
    Output,
    Watched,
    Word,
    as_user,
    check_variable,
    end_of,
    line_of,
    reset_error,
)
from bridge.util.files import atomic_output
from bridge.vm.channel import (
    COMMANDS,
    NOT_BEGUN,
    PAYLOAD_LIMIT,
    SPEC_LIMIT,
    STDIN_WINDOW,
    Action,
    BrokenChannel,
    ChannelPort,
    Frame,
    Kind,
    Restarted,
)

if TYPE_CHECKING:
    from bridge.guest.ssh import SshGuest

__all__ = ["ChannelGuest", "WatchedMachine"]

logger = logging.getLogger(__name__)

_OUTPUT_WINDOW = 256 * 1024
"""Bytes of each stream of a command that may be on their way."""
_POLL_SECONDS = 0.25
_LOSS_SECONDS = 3.0
_JOIN_SECONDS = 0.1
_CHUNK = 64 * 1024

_PROGRAM = re.compile(r"[A-Za-z0-9_./+-]+\Z")
_SHELL_WORDS = frozenset(
    shlex.split(
        ". : [ alias bg break case cd chdir command continue do done echo elif else esac eval exec "
        "exit export false fc fg fi for getopts hash if in jobs kill local printf pwd read "
        "readonly return set shift test then times trap true type ulimit umask unalias unset "
        "until wait while"
    )
)
"""What the guest's ``sh`` does itself, or reads as its grammar."""


class WatchedMachine(Watched, Protocol):
    """A machine with a channel: :class:`bridge.vm.machine.Machine`."""

    def lose_channel(self, why: str, /) -> None:
        """Declare the guest lost, because its agent cannot be understood."""


class _Silence:
    """Decides whether the guest has been silent for too long."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._silent = 0.0
        self._asked = 0.0
        self._looked = time.monotonic()
        self._heard = 0

    def look(self, heard: int, ask: Callable[[], None]) -> bool:
        """Return whether it is silent for too long; to be called at each poll.

        Args:
            heard: how many frames the guest has sent so far.
            ask: called now and then while it is silent.
        """
        now = time.monotonic()
        # At most a poll's time: what stops or starves this process may stop or starve the guest.
        passed, self._looked = min(now - self._looked, _POLL_SECONDS), now
        if heard != self._heard:
            self._heard = heard
            self._silent = self._asked = 0.0
            return False
        self._silent += passed
        if self._silent - self._asked >= self._seconds / 6:
            self._asked = self._silent
            ask()
        return self._silent >= self._seconds


class _Command:
    """A command that runs; the frames that came for it wait in ``inbox``."""

    def __init__(self, number: int, lock: threading.Lock) -> None:
        self.number = number
        self.inbox: deque[Frame] = deque()
        self.wakes = threading.Condition(lock)
        self.waits = False


class _Channel:
    """The commands of one session of the port."""

    def __init__(self, port: ChannelPort) -> None:
        self.port = port
        self.session = port.session
        self.heard = 0
        self.slots = threading.BoundedSemaphore(COMMANDS)
        self._lock = threading.Lock()  # guards all below
        self._commands: dict[int, _Command] = {}
        self._last = 0
        self._leading = False

    @contextlib.contextmanager
    def command(self) -> Iterator[_Command]:
        """A command with a number of its own; closed on exit."""
        with self._lock:
            self._last = self._last + 1 & 0xFFFFFFFF or 1
            command = self._commands[self._last] = _Command(self._last, self._lock)
        try:
            yield command
        finally:
            with self._lock:
                del self._commands[command.number]
                if not self._leading:
                    self._wake_others()
            with contextlib.suppress(Restarted, BrokenChannel):
                self.send(command, (Kind.CLOSE, b""))

    def send(self, command: _Command | None, *frames: tuple[Kind, bytes]) -> None:
        """Send frames of a command; raises Restarted and BrokenChannel."""
        self.port.send(self.session, command.number if command is not None else 0, frames)

    def receive(self, command: _Command, timeout: float | None) -> list[Frame]:
        """Return the frames for a command, none after the time-out or if something else happened.

        Raises:
            Restarted: the guest is reset.
            BrokenChannel: the guest sends what is no frame.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            while self._leading and not command.inbox:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return []
                command.waits = True
                command.wakes.wait(left)
                command.waits = False
                if self.port.session != self.session:
                    raise Restarted
            if command.inbox:
                return self._take(command)
            self._leading = True
        try:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            self.port.wait(left)
            frames = self.port.receive(self.session)
            with self._lock:
                self.heard += len(frames)
                for frame in frames:
                    self._dispatch(frame)
        finally:
            with self._lock:
                self._leading = False
                self._wake_others()
        with self._lock:
            return self._take(command)

    def _wake_others(self) -> None:
        """Wake those for which something came, and one more, which reads from here on."""
        leader = False
        for each in self._commands.values():
            if each.waits and (each.inbox or not leader):
                leader |= not each.inbox
                each.wakes.notify()

    def _dispatch(self, frame: Frame) -> None:
        command = self._commands.get(frame.command)
        if command is not None:
            command.inbox.append(frame)

    @staticmethod
    def _take(command: _Command) -> list[Frame]:
        frames = list(command.inbox)
        command.inbox.clear()
        return frames


class _Input:
    """Sends stdin as the guest takes it; what may block is read on a thread of its own.

    Attributes:
        error: why stdin could not be read; its end is not sent then.
    """

    def __init__(self, channel: _Channel, command: _Command, stdin: Input | bytes) -> None:
        self.error: BaseException | None = None
        self._channel = channel
        self._command = command
        self._credit = threading.Condition()  # guards the two below
        self._room = STDIN_WINDOW
        self._over = False
        self._data = memoryview(stdin if isinstance(stdin, bytes) else b"")
        self._source = None if isinstance(stdin, bytes) else stdin
        self._thread: threading.Thread | None = None

    def first(self) -> list[tuple[Kind, bytes]]:
        """Return the frames that go with the start of the command."""
        return self._pieces() if self._source is None else []

    def start(self) -> None:
        """Begin to read what is no bytes."""
        if self._source is not None:
            read = getattr(self._source, "read1", self._source.read)
            self._thread = threading.Thread(
                target=self._feed, args=(read,), name="channel-stdin", daemon=True
            )
            self._thread.start()

    def taken(self, size: int) -> None:
        """Note that the guest has taken ``size`` bytes."""
        with self._credit:
            self._room += size
            self._credit.notify()
        if self._source is None and (pieces := self._pieces()):
            self._channel.send(self._command, *pieces)

    def _pieces(self) -> list[tuple[Kind, bytes]]:
        """Return as many frames as there is room for."""
        frames: list[tuple[Kind, bytes]] = []
        if self._over:
            return frames
        while self._data and self._room:
            size = min(len(self._data), self._room, PAYLOAD_LIMIT)
            frames.append((Kind.STDIN, bytes(self._data[:size])))
            self._data = self._data[size:]
            self._room -= size
        if not self._data:
            self._over = True
            frames.append((Kind.STDIN_END, b""))
        return frames

    def _feed(self, read: Callable[[int], bytes]) -> None:
        # A command may end without reading everything.
        with contextlib.suppress(Restarted, BrokenChannel):
            while True:
                with self._credit:
                    self._credit.wait_for(lambda: self._room or self._over)
                    if self._over:
                        return
                    room = self._room
                chunk = self._read(read, min(room, PAYLOAD_LIMIT))
                if self.error is not None or self._over:
                    return
                if not chunk:
                    self._channel.send(self._command, (Kind.STDIN_END, b""))
                    return
                with self._credit:
                    self._room -= len(chunk)
                self._channel.send(self._command, (Kind.STDIN, chunk))

    def _read(self, read: Callable[[int], bytes], size: int) -> bytes:
        try:
            return read(size)
        except BaseException as error:
            self.error = error
            self._channel.port.wake()
            return b""

    def check(self) -> None:
        """Raise UsageError if stdin could not be read."""
        if self.error is not None:
            reason = getattr(self.error, "strerror", None) or self.error
            raise UsageError(f"the input of the command cannot be read: {reason}") from self.error

    def close(self) -> None:
        """End the thread. One that waits for stdin is abandoned, as it cannot be ended."""
        with self._credit:
            self._over = True
            self._credit.notify()
        if self._thread is not None:
            self._thread.join(_JOIN_SECONDS)


class ChannelGuest:
    """A guest whose agent takes commands over the channel; a :class:`bridge.guest.guest.Guest`.

    Args:
        port: the machine's port, after its HELLO was answered.
        watched: the machine.
        ssh: makes the guest for what needs SSH: a person's shell.
        ssh_command: the words of the command with which a person gets into the guest.
    """

    def __init__(
        self,
        port: ChannelPort,
        watched: WatchedMachine,
        *,
        ssh: Callable[[], SshGuest],
        ssh_command: tuple[str, ...],
    ) -> None:
        self._port = port
        self._watched = watched
        self._make_ssh = ssh
        self._ssh_command = ssh_command
        self._lock = threading.Lock()  # guards the three below
        self._channel: _Channel | None = None
        self._ssh: SshGuest | None = None
        self._closed = False
        # Held while a thread has the guest reserved.
        self._reserved = threading.RLock()
        self._stack = contextlib.ExitStack()
        self._stack.callback(watched.add_loss_listener(lambda _: port.wake()))

    def __enter__(self) -> ChannelGuest:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def ssh_command(self) -> tuple[str, ...]:
        """The words of the command with which a person on this machine gets into the guest."""
        return self._ssh_command

    # The connection

    def forget(self) -> None:
        """Break off what runs, because the guest is reset: the machine ends the session itself."""
        with self._lock:
            self._channel = None
            ssh = self._ssh
        if ssh is not None:
            ssh.forget()

    @contextlib.contextmanager
    def reserved(self) -> Iterator[None]:
        """Let only this thread start commands while inside; other threads wait."""
        with self._reserved:
            yield

    def close(self) -> None:
        """Take no commands any more; running ones fail. Safe to call twice."""
        self._stack.close()
        with self._lock:
            self._closed = True
            self._channel = None
            ssh, self._ssh = self._ssh, None
        self._port.wake()
        if ssh is not None:
            ssh.close()

    def _current(self, deadline: float | None) -> _Channel:
        """Return the commands of the current session.

        Raises:
            TimeoutError: the guest was reserved for another thread until the deadline.
        """
        left = -1 if deadline is None else max(0.0, deadline - time.monotonic())
        if not self._reserved.acquire(timeout=left):
            raise TimeoutError
        try:
            self._watched.check()
            with self._lock:
                if self._closed:
                    raise UsageError("there is no connection to the guest")
                if self._channel is None:
                    self._channel = _Channel(self._port)
                return self._channel
        finally:
            self._reserved.release()

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn what the port raises into the errors of commands."""
        try:
            yield
        except Restarted:
            raise reset_error() from None
        except BrokenChannel as error:
            self._watched.lose_channel(str(error))
            self._watched.check()
            raise GuestLostError(f"the channel to the guest broke: {error}") from None

    # Commands

    def run(
        self,
        command: Word | Sequence[Word],
        *,
        stdout: Output | None = None,
        stderr: Output | None = None,
        stdin: Input | bytes = b"",
        timeout: float | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        check: bool = False,
        capture: int = CAPTURE_LIMIT,
        before_kill: Callable[[], object] | None = None,
    ) -> CommandResult:
        """See :meth:`bridge.guest.guest.Guest.run`."""
        line = line_of(command)
        if user is not None:
            command = as_user(command, user, at_home=cwd is None)
        spec = _spec(_words(command, line), env, cwd)
        out, err = Capture(stdout, capture), Capture(stderr, capture)
        result = self._execute(
            Action.EXECUTE, spec, line, out, err, stdin, timeout, before_kill or (lambda: None)
        )
        if check and result.exit_status != 0:
            raise GuestSetupError(
                f"a command in the guest ended with status {result.exit_status}: {line}",
                evidence=end_of(out, err),
            )
        return result

    def look(self, cores: str, timeout: float) -> CommandResult:
        """See :meth:`bridge.guest.guest.Guest.look`."""
        out, err = Capture(None, LOG_LIMIT), Capture(None, EVIDENCE)
        spec = _spec([cores], None, None)
        return self._execute(Action.LOOK, spec, "reading its log", out, err, timeout=timeout)

    def _execute(
        self,
        action: Action,
        spec: bytes,
        line: str,
        out: Capture,
        err: Capture,
        stdin: Input | bytes = b"",
        timeout: float | None = None,
        before_kill: Callable[[], object] = lambda: None,
    ) -> CommandResult:
        started = time.monotonic()
        deadline = None if timeout is None else started + timeout

        def timed_out() -> RunTimeoutError:
            return RunTimeoutError(
                f"the command did not end within {timeout:g} s: {line}", evidence=end_of(out, err)
            )

        with contextlib.ExitStack() as stack:
            try:
                channel = self._current(deadline)
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                if not channel.slots.acquire(timeout=left):
                    raise TimeoutError
            except TimeoutError:
                raise timed_out() from None
            stack.callback(channel.slots.release)
            stack.enter_context(self._translated())
            running = stack.enter_context(channel.command())
            feeder = _Input(channel, running, stdin)
            stack.callback(feeder.close)
            start = b"".join(
                number.to_bytes(4, "little") for number in (action, _OUTPUT_WINDOW, _OUTPUT_WINDOW)
            )
            pieces = range(0, len(spec), PAYLOAD_LIMIT)
            channel.send(
                running,
                *((Kind.SPEC, spec[at : at + PAYLOAD_LIMIT]) for at in pieces),
                (Kind.START, start),
                *feeder.first(),
            )
            try:
                feeder.start()
                status = self._pump(channel, running, out, err, deadline, feeder)
                if status is None:
                    raise timed_out()
            except (Restarted, BrokenChannel):
                before_kill()
                raise
            except BaseException:
                before_kill()
                self._kill(channel, running)
                raise
        if status == NOT_BEGUN:
            raise GuestSetupError(
                f"the guest's shell ended before it ran the command: {line}",
                evidence=end_of(out, err),
                hint="does a start-up file of the user's shell end it?",
            )
        return CommandResult(
            exit_status=status,
            stdout=bytes(out.kept),
            stderr=bytes(err.kept),
            truncated=out.truncated or err.truncated,
            seconds=time.monotonic() - started,
        )

    def _pump(
        self,
        channel: _Channel,
        running: _Command,
        out: Capture,
        err: Capture,
        deadline: float | None,
        feeder: _Input,
    ) -> int | None:
        """Pass output on until the command has ended and all of its output has come.

        Returns:
            The exit status; None if the deadline passed.
        """
        silence = _Silence(SILENCE_SECONDS)
        ask = functools.partial(channel.send, None, (Kind.PING, b""))
        captures = {Kind.STDOUT: out, Kind.STDERR: err}
        used = {Kind.STDOUT: 0, Kind.STDERR: 0}
        status: int | None = None
        linger: float | None = None  # when to stop waiting for what the command left behind
        wait = _POLL_SECONDS
        while True:
            now = time.monotonic()
            if linger is not None:
                if now >= linger:
                    return status
                wait = min(_POLL_SECONDS, linger - now)
            elif status is None and deadline is not None:
                if now >= deadline:
                    return None
                wait = min(_POLL_SECONDS, deadline - now)
            frames = channel.receive(running, wait)
            for kind, _, payload in frames:
                if kind in captures:
                    captures[kind].take(payload)
                    used[kind] += len(payload)
                elif kind is Kind.EXIT:
                    status = int.from_bytes(payload, "little")
                elif kind is Kind.TAKEN:
                    feeder.taken(int.from_bytes(payload, "little"))
                elif kind is Kind.COMPLETE and status is not None:
                    linger = time.monotonic() + LINGER_SECONDS
                elif kind is Kind.END and status is not None:
                    return status
                elif kind is Kind.FAILED:
                    number = int.from_bytes(payload, "little")
                    raise GuestSetupError(
                        f"the guest cannot start another command: {os.strerror(number)}",
                        hint="is its memory or its number of processes used up?",
                    )
            if max(used.values()) >= _OUTPUT_WINDOW // 2:
                credit = b"".join(size.to_bytes(4, "little") for size in used.values())
                channel.send(running, (Kind.CREDIT, credit))
                used = dict.fromkeys(used, 0)
            feeder.check()
            if not frames:
                self._watched.check()
                if self._closed:
                    raise GuestLostError("the connection to the guest was closed")
            if silence.look(channel.heard, ask):
                self._lose_silent()

    def _kill(self, channel: _Channel, running: _Command) -> None:
        """Kill a command and its children, if the guest still answers and was not reset."""
        deadline = time.monotonic() + KILL_SECONDS
        try:
            # Until it is gone, so that what it wrote is not after what a later command does.
            kill = (9).to_bytes(4, "little")
            channel.send(running, (Kind.SIGNAL, kill))
            while (left := deadline - time.monotonic()) > 0:
                self._watched.check()
                for frame in channel.receive(running, min(left, _POLL_SECONDS)):
                    if frame.kind in (Kind.EXIT, Kind.FAILED):
                        return
        except (BridgeError, Restarted, BrokenChannel) as error:
            logger.debug("could not kill a command in the guest: %r", error)

    def _lose_silent(self) -> NoReturn:
        """Raise the loss of a guest that only its silence shows."""
        self._watched.lose_silent(SILENCE_SECONDS)
        self._watched.check()
        raise GuestStoppedError(f"the guest has not answered for {SILENCE_SECONDS:g} s")

    # Files

    def put(
        self,
        local: str | os.PathLike[str] | bytes,
        remote: str | os.PathLike[str],
        mode: int = 0o644,
    ) -> None:
        """See :meth:`bridge.guest.guest.Guest.put`."""
        path = os.fspath(remote)
        # Not shared with another put() of the same path at the same time.
        part = f"{path}.{secrets.token_hex(8)}.part"
        spec = _spec([path, part, f"{mode:o}"], None, None)
        out, err = Capture(None, EVIDENCE), Capture(None, EVIDENCE)
        with contextlib.ExitStack() as stack:
            source: BinaryIO | bytes
            if isinstance(local, bytes):
                source = local
            else:
                try:
                    source = stack.enter_context(Path(local).open("rb"))
                except OSError as error:
                    raise UsageError(f"{local} cannot be read: {error.strerror}") from error
            try:
                result = self._execute(Action.PUT, spec, f"put {path}", out, err, source)
            except BaseException as error:
                with contextlib.suppress(BridgeError):
                    self.run(["rm", "-f", part], timeout=KILL_SECONDS)
                if isinstance(error, UsageError) and not isinstance(local, bytes):
                    raise UsageError(f"{local}: {error.message}") from error
                raise
        if result.exit_status != 0:
            raise GuestSetupError(f"the guest cannot write {path}", evidence=end_of(out, err))

    def get(self, remote: str | os.PathLike[str], local: str | os.PathLike[str]) -> None:
        """See :meth:`bridge.guest.guest.Guest.get`."""
        path, destination = os.fspath(remote), Path(local)
        err = Capture(None, EVIDENCE)
        try:
            with atomic_output(destination) as part:
                with part.open("wb") as file:
                    out = Capture(file.write, 0)
                    spec = _spec([path], None, None)
                    result = self._execute(Action.GET, spec, f"get {path}", out, err)
                if result.exit_status != 0:
                    raise GuestSetupError(
                        f"the guest cannot read {path}", evidence=end_of(out, err)
                    )
        except OSError as error:
            raise UsageError(f"{local} cannot be written: {error.strerror or error}") from error

    # A person

    def shell(
        self,
        command: str | None = None,
        *,
        stdin: int = 0,
        stdout: Output = TO_STDOUT,
        stderr: Output = TO_STDERR,
    ) -> int:
        """See :meth:`bridge.guest.guest.Guest.shell`; it goes over SSH."""
        with self._reserved:
            self._watched.check()
            with self._lock:
                ssh = self._ssh
            if ssh is None:
                ssh = self._make_ssh()
                ssh.connect()
                with self._lock:
                    self._ssh = ssh
        return ssh.shell(command, stdin=stdin, stdout=stdout, stderr=stderr)


def _words(command: Word | Sequence[Word], line: str) -> list[str]:
    """Return the words to execute: the program itself where no shell would make a difference."""
    if isinstance(command, str | bytes | os.PathLike):
        return ["sh", "-c", line]
    words = [os.fsdecode(word) for word in command]
    if words and _PROGRAM.match(words[0]) and words[0] not in _SHELL_WORDS:
        return words
    return ["sh", "-c", line]


def _spec(words: Sequence[str], env: Mapping[str, str] | None, cwd: str | None) -> bytes:
    """Return words, variables and directory in the form that the agent reads."""
    parts = ["a" + word for word in words]
    for name, value in (env or {}).items():
        check_variable(name)
        parts.append(f"e{name}={value}")
    if cwd is not None:
        parts.append("c" + cwd)
    if any("\0" in part for part in parts):
        raise UsageError("a command contains a NUL byte, which no argument can have")
    spec = b"".join(os.fsencode(part) + b"\0" for part in parts)
    if len(spec) > SPEC_LIMIT:
        raise UsageError(f"a command of {len(spec)} bytes is too long for the guest")
    return spec
