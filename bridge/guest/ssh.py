# SPDX-License-Identifier: Apache-2.0
"""Running commands in the guest, over SSH (paramiko).

A command gets a shell of its own in the guest, which writes a mark before and after the command's
output. The first has the number of its process group: so a command that runs out of time, or whose
caller was interrupted, can be killed with all that it started. The others tell that all of the
command's output is here, as sshd reports the end of the shell before it has sent what the shell
wrote. The guest may vanish at any moment; whoever waits for a command then gets
the reason at once, because the machine tells (:meth:`bridge.vm.machine.Machine.add_loss_listener`),
and does not wait for TCP to find out.
"""

from __future__ import annotations

import base64
import contextlib
import enum
import fcntl
import functools
import io
import logging
import os
import re
import secrets
import select
import shlex
import signal
import socket
import struct
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn, Protocol

import paramiko
from paramiko.pkey import UnknownKeyType

from bridge.errors import (
    BridgeError,
    GuestLostError,
    GuestResetError,
    GuestSetupError,
    GuestStoppedError,
    ImageError,
    RunTimeoutError,
    UsageError,
)
from bridge.util.descriptors import write_all
from bridge.util.files import atomic_output
from bridge.vm.network import LOCALHOST

__all__ = ["CAPTURE_LIMIT", "CommandResult", "Guest", "Output", "Watched", "Word"]

logger = logging.getLogger(__name__)

Output = Callable[[bytes], object]
"""Where a command's output goes as it comes: called with pieces of any size."""

Word = str | bytes | os.PathLike[str] | os.PathLike[bytes]
"""An argument of a command: bytes; text stands for its bytes as :func:`os.fsencode` has it."""

CAPTURE_LIMIT = 1024 * 1024
"""Bytes of stdout, and of stderr, that a result keeps: the first ones."""

_TO_STDOUT: Output = functools.partial(write_all, 1)
_TO_STDERR: Output = functools.partial(write_all, 2)
_CONNECT_SECONDS = 30.0
_CHANNEL_SECONDS = 30.0
_RETRY_SECONDS = 0.1
_KILL_SECONDS = 5.0
_LINGER_SECONDS = 1.0
"""How long the output of a process that a command left behind is waited for."""
_REST_SECONDS = 60.0
"""How long the guest may not send the rest of a command's output after the command's end."""
_SHELL_LINGER_SECONDS = 3.0
_TYPING_POLL_MS = 10
_JOIN_SECONDS = 0.1
_POLL_SECONDS = 0.25  # output and its end wake at once; an exit status alone does not
_LOSS_SECONDS = 3.0
_SILENCE_SECONDS = 180.0
"""How long sshd may not answer while a command writes nothing. Nothing else tells a guest that
suspended itself to idle, or whose processes are all stopped, from one that is at work."""
_CHUNK = 64 * 1024
_EVIDENCE = 4096
_NO_LINGER = struct.pack("ii", 1, 0)
"""``struct linger``: closing resets the connection."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")

_wire = logger.getChild("wire")
# The library logs what it raises as well; a failure is reported once, by whoever catches it.
_wire.setLevel(logging.CRITICAL)


class Watched(Protocol):
    """What can be lost while a command runs: a :class:`bridge.vm.machine.Machine`."""

    def check(self) -> None:
        """Raise the reason if it was lost."""

    def add_loss_listener(self, listener: Callable[[BridgeError], None], /) -> Callable[[], None]:
        """Have the listener called when it is lost; returns how to take it away again."""

    def lose_silent(self, seconds: float, /) -> None:
        """Declare the guest lost: its sshd has not answered for so long."""


@dataclass(frozen=True)
class CommandResult:
    """How a command in the guest ended.

    ``exit_status`` is the shell's: 127 for a command that is not there, 128+N after signal N.
    ``stdout`` and ``stderr`` are the first :data:`CAPTURE_LIMIT` bytes (``truncated`` if there
    were more); ``seconds`` is the time it took, seen from the host.
    """

    exit_status: int
    stdout: bytes
    stderr: bytes
    truncated: bool
    seconds: float

    @property
    def text(self) -> str:
        """stdout as text."""
        return self.stdout.decode(errors="replace")


class _Capture:
    """One of a command's two streams: passed on as it comes, its beginning kept."""

    def __init__(self, sink: Output | None, limit: int) -> None:
        self.sink = sink
        self.limit = limit
        self.kept = bytearray()
        self.truncated = False

    def take(self, chunk: bytes) -> None:
        room = self.limit - len(self.kept)
        self.kept += chunk[:room]
        self.truncated |= len(chunk) > room
        if self.sink is not None and chunk:
            self.sink(chunk)


class _Wake(threading.Event):
    """Set by a channel's buffers when there is something to read, or nothing ever again.

    A buffer that is read empty would clear it, and so the news of the other one. The channel's
    own descriptor is no way out: paramiko may write to it after it was closed, and its number is
    then perhaps another file's.
    """

    def clear(self) -> None:
        """Not for the buffers."""

    def rearm(self) -> None:
        """Cleared by the reader alone, before it reads."""
        super().clear()


class _Liveness:
    """Whether the guest's sshd still answers, asked now and then while a command writes nothing."""

    def __init__(self, transport: paramiko.Transport, seconds: float) -> None:
        self._transport = transport
        self._seconds = seconds
        self._silent = 0.0
        self._looked = time.monotonic()
        self._asking = False
        self._answered = threading.Event()

    def heard(self) -> None:
        """The guest has written something."""
        self._silent = 0.0

    def is_silent(self) -> bool:
        """Return whether the guest has been silent for too long; to be called at each poll."""
        now = time.monotonic()
        # At most a poll's time: what stops or starves this process may stop or starve the guest.
        self._silent += min(now - self._looked, _POLL_SECONDS)
        self._looked = now
        if self._answered.is_set():
            self._answered.clear()
            self._asking = False
            self._silent = 0.0
        if not self._asking and self._silent >= self._seconds / 6:
            self._asking = True
            threading.Thread(target=self._ask, name="ssh-alive", daemon=True).start()
        return self._silent >= self._seconds

    def _ask(self) -> None:
        try:
            self._transport.open_session(timeout=self._seconds).close()
        except paramiko.ChannelException:
            pass  # a refusal is an answer
        except (paramiko.SSHException, OSError, EOFError):
            # No answer (paramiko measures that by the wall clock, which can jump: ask again), or a
            # broken connection, which the command's reader sees.
            self._asking = False
            return
        self._answered.set()


class _Marks:
    """What the shell writes around a command's output, unlike anything that a command writes."""

    def __init__(self) -> None:
        self.name = f"kcov-bridge-{secrets.token_hex(8)}"
        self.begin = f"{self.name}:".encode()  # then the process group and a newline
        self.end = f"{self.name}.".encode()


class _End(enum.Enum):
    """How the output of a command ended."""

    ENDED = enum.auto()
    OUT_OF_TIME = enum.auto()
    CUT_OFF = enum.auto()
    """The command ended, and some of its output is missing."""
    BROKEN = enum.auto()
    """The channel was closed, and not by sshd in order."""


class _Output:
    """Takes the marks out of a stream: what is left is the command's output.

    What a start-up file of the shell writes to stdout comes before the first mark, and is not the
    command's. On stderr it stays, as it may tell why the command did not start.

    Attributes:
        process_group: of the command, once it is known; of stdout alone.
        before: the beginning of what came before the first mark.
        complete: the command's output has come; what follows is that of processes it left behind.
    """

    def __init__(self, marks: _Marks, *, begins: bool) -> None:
        self.process_group: int | None = None
        self.before = b""
        self.complete = False
        self.began = not begins
        self._marks = marks
        self._held = b""

    def strip(self, chunk: bytes) -> bytes:
        if self.complete:
            return chunk
        data = self._held + chunk
        if not self.began:
            data = self._find_begin(data)
            if not self.began:
                self._held = data
                return b""
        output, end, rest = data.partition(self._marks.end)
        if end:
            self.complete, self._held = True, b""
            return output + rest
        kept = _overlap(output, self._marks.end)
        self._held = output[len(output) - kept :]
        return output[: len(output) - kept]

    def finish(self) -> bytes:
        """Nothing more comes: return what was held back, as it could have been a mark."""
        held, self._held = self._held, b""
        if self.began:
            return held
        self._keep(held)
        return b""

    def _find_begin(self, data: bytes) -> bytes:
        """Return what follows the mark, or if it has not come yet, what it may be in."""
        before, begin, rest = data.partition(self._marks.begin)
        number, newline, following = rest.partition(b"\n")
        if begin and newline:
            self._keep(before)
            self.process_group = int(number) if number.isdigit() and len(number) <= 10 else None
            self.began = True
            return following
        cut = len(before) if begin else max(0, len(data) - len(self._marks.begin))
        self._keep(data[:cut])
        return data[cut:]

    def _keep(self, before: bytes) -> None:
        self.before += before[: _EVIDENCE - len(self.before)]


def _overlap(data: bytes, mark: bytes) -> int:
    """Return how many bytes at the end of ``data`` are the beginning of ``mark``."""
    for size in range(min(len(data), len(mark) - 1), 0, -1):
        if mark.startswith(data[-size:]):
            return size
    return 0


class _ReplyEvent(threading.Event):
    """What paramiko waits for after a request, which knows of no time-out."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    def wait(self, timeout: float | None = None) -> bool:
        if not super().wait(self._seconds if timeout is None else timeout):
            raise TimeoutError(f"sshd did not answer a request within {self._seconds:g} s")
        return True


class _Feeder:
    """Sends stdin on a thread of its own, as the command may answer before it has read all.

    Attributes:
        error: why stdin could not be read; its end was not sent then.
    """

    def __init__(self, channel: paramiko.Channel, stdin: BinaryIO | bytes) -> None:
        self.error: BaseException | None = None
        self._channel = channel
        self._thread: threading.Thread | None = None
        if not isinstance(stdin, bytes):
            self._source = stdin
        elif stdin:
            self._source = io.BytesIO(stdin)
        else:
            channel.shutdown_write()
            return
        channel.settimeout(None)
        self._thread = threading.Thread(target=self._feed, name="ssh-stdin", daemon=True)
        self._thread.start()

    def _feed(self) -> None:
        # What is there at once: a pipe's writer may wait for the answer.
        read = getattr(self._source, "read1", self._source.read)
        # A command that ends without reading everything is no failure.
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
            while chunk := self._read(read):
                self._channel.sendall(chunk)
            if self.error is None:
                self._channel.shutdown_write()

    def _read(self, read: Callable[[int], bytes]) -> bytes:
        try:
            return read(_CHUNK)
        except BaseException as error:
            self.error = error
            return b""

    def check(self) -> None:
        """Raise UsageError if stdin could not be read."""
        if self.error is not None:
            reason = getattr(self.error, "strerror", None) or self.error
            raise UsageError(f"the input of the command cannot be read: {reason}") from self.error

    def close(self) -> None:
        """Close the channel. A thread that waits for stdin is left behind: nothing ends that."""
        self._channel.close()
        if self._thread is not None:
            self._thread.join(_JOIN_SECONDS)


class Guest:
    """The guest as a place to run commands; :meth:`connect` first, :meth:`close` at the end.

    ``key`` is the private key file that the guest accepts. ``host_key`` is the guest's public host
    key (a line of an OpenSSH ``.pub`` file) and is insisted on; None, for an image whose key is
    not known, trusts the first connection and insists on that key from then on. ``watched`` is the
    machine that the guest runs in. ``dialed`` is a connection to the port that the first login may
    use. Commands may run on several threads at once.
    """

    def __init__(
        self,
        port: int,
        key: Path,
        host_key: str | None,
        *,
        watched: Watched | None = None,
        user: str = "root",
        dialed: socket.socket | None = None,
    ) -> None:
        self._port = port
        self._dialed = dialed
        self._user = user
        self._key = _private_key(key)
        self._host_key = _public_key(host_key) if host_key is not None else None
        self._watched = watched
        self._lock = threading.Lock()  # guards the four below
        # Set as soon as there is something to close; commands use it once it is logged in.
        self._transport: paramiko.Transport | None = None
        self._logged_in = False
        self._lost = False
        self._forgotten = 0
        # Held by who connects anew after forget(), and by whom the guest is reserved for.
        self._reserved = threading.RLock()
        self._stack = contextlib.ExitStack()
        if watched is not None:
            self._stack.callback(watched.add_loss_listener(self._on_loss))

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # The connection

    def connect(self, timeout: float = _CONNECT_SECONDS) -> None:
        """Log in, as soon as the guest's sshd answers, within ``timeout`` seconds.

        Raises :class:`bridge.errors.GuestSetupError` when it does not answer, refuses the key, or
        shows another host key than the image's, and the reason of the loss when the guest is lost.
        """
        deadline = time.monotonic() + timeout
        while True:
            self._check()
            left = deadline - time.monotonic()
            try:
                self._log_in(max(1.0, left))
                return
            except paramiko.AuthenticationException as error:
                raise GuestSetupError(
                    f"the guest's sshd refuses the key for {self._user}: {error}",
                    hint="the key must be the one that the image was made with",
                ) from error
            except (paramiko.SSHException, OSError, EOFError) as error:
                # Nothing listens yet, or sshd is just starting: QEMU accepts and drops us.
                self._check()
                if left <= _RETRY_SECONDS:
                    raise GuestSetupError(
                        f"the guest's sshd does not answer within {timeout:g} s: {error}",
                        hint="the console tells whether sshd was started",
                    ) from error
                time.sleep(_RETRY_SECONDS)

    def _log_in(self, timeout: float) -> None:
        with contextlib.ExitStack() as stack:
            sock, self._dialed = self._dialed, None
            if sock is None:
                sock = socket.create_connection((LOCALHOST, self._port), timeout)
            stack.callback(sock.close)
            # Otherwise a small message waits for the previous one's acknowledgement, 40 ms in QEMU.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            transport = paramiko.Transport(sock)
            stack.callback(transport.close)
            transport.set_log_channel(_wire.name)
            transport.banner_timeout = timeout
            transport.auth_timeout = timeout
            self._adopt(transport)
            stack.callback(self._adopt, None)
            if self._host_key is not None:
                transport.get_security_options().key_types = (self._host_key.get_name(),)
            transport.start_client(timeout=timeout)
            shown = transport.get_remote_server_key()
            if self._host_key is None:
                logger.info("trusting the guest's host key SHA256 %s", shown.fingerprint)
                self._host_key = shown
            elif shown.asbytes() != self._host_key.asbytes():
                raise GuestSetupError(
                    "SSH host key mismatch: another server answered on the guest's port",
                    evidence=f"expected {self._host_key.fingerprint}\nshown    {shown.fingerprint}",
                    hint="was the image rebuilt while the machine ran?",
                )
            transport.auth_publickey(self._user, self._key)
            with self._lock:
                # close() or forget() may have come meanwhile.
                self._logged_in = self._transport is transport
            stack.pop_all()

    def _adopt(self, transport: paramiko.Transport | None) -> None:
        with self._lock:
            self._transport, self._logged_in = transport, False
            lost = self._lost
        if lost and transport is not None:
            transport.close()

    def _on_loss(self, _: BridgeError) -> None:
        """Wake everyone who waits for the guest. On the machine's thread: must not block."""
        with self._lock:
            self._lost = True
            transport = self._transport
        if transport is not None:
            # close() joins the transport's thread, which may be busy in a callback of ours.
            threading.Thread(target=transport.close, name="ssh-close", daemon=True).start()

    def _check(self) -> None:
        if self._watched is not None:
            self._watched.check()

    def _broken(self, error: BaseException | None, forgotten: int) -> BridgeError:
        """Why the connection broke: the machine's reason, which may come a moment later.

        ``forgotten`` is how often :meth:`forget` had been called when it was whole.
        """
        if self._forgotten != forgotten:
            return GuestResetError(
                "the guest was reset while a command ran in it",
                hint="wait for commands to end, or start them anew",
            )
        deadline = time.monotonic() + _LOSS_SECONDS
        while self._watched is not None:
            try:
                self._watched.check()
            except BridgeError as reason:
                return reason
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        return GuestLostError(
            "the SSH connection to the guest broke",
            evidence=repr(error) if error is not None else "",
            hint="did the workload end sshd, or fill the guest's memory?",
        )

    def _lose_silent(self) -> NoReturn:
        """The guest is there no more, and only its silence says so."""
        if self._watched is not None:
            self._watched.lose_silent(_SILENCE_SECONDS)
            self._watched.check()
        raise GuestStoppedError(f"the guest has not answered for {_SILENCE_SECONDS:g} s")

    def forget(self) -> None:
        """The guest goes on as another: break the connection; the next command makes a new one.

        Commands that run fail with :class:`bridge.errors.GuestResetError`. To be called within
        :meth:`reserved`.
        """
        with self._lock:
            self._forgotten += 1
            self._lost = self._logged_in = False
            transport, self._transport = self._transport, None
        if transport is not None:
            # Not closed in order: QEMU would wait for the guest to agree.
            if isinstance(transport.sock, socket.socket):
                with contextlib.suppress(OSError):
                    transport.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
            transport.close()

    @contextlib.contextmanager
    def reserved(self) -> Iterator[None]:
        """While inside, only this thread starts commands; other threads that want to wait."""
        with self._reserved:
            yield

    def close(self) -> None:
        """Close the connection; commands that still run get an error. Safe to call twice."""
        self._stack.close()
        with self._lock:
            self._logged_in = False
            transport, self._transport = self._transport, None
        if transport is not None:
            transport.close()

    # Commands

    def run(
        self,
        command: Word | Sequence[Word],
        *,
        stdout: Output | None = None,
        stderr: Output | None = None,
        stdin: BinaryIO | bytes = b"",
        timeout: float | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        check: bool = False,
        capture: int = CAPTURE_LIMIT,
        before_kill: Callable[[], object] | None = None,
    ) -> CommandResult:
        """Run a command in the guest and wait for its end.

        ``command`` is a line for the guest's ``sh``, or a sequence of words that no shell
        changes. ``stdout`` and ``stderr`` are called with the output as it comes; ``capture`` is
        how many bytes of each the result keeps. ``timeout`` in seconds, None for none. ``check``
        makes an exit status but 0 an error. A process that the command leaves behind with its
        output open is waited for no longer than a second after the command's own end.
        ``before_kill`` is called before a command that is given up is killed: the last look at it.

        Raises :class:`bridge.errors.RunTimeoutError` (the command is killed, with its children),
        :class:`bridge.errors.GuestLostError` or another reason of the loss when the guest is lost
        (:class:`bridge.errors.GuestResetError` when it was reset), and with ``check``
        :class:`bridge.errors.GuestSetupError`.
        """
        started = time.monotonic()
        deadline = None if timeout is None else started + timeout
        line = _line(command)
        marks = _Marks()
        out, err = _Capture(stdout, capture), _Capture(stderr, capture)
        plain_out, plain_err = _Output(marks, begins=True), _Output(marks, begins=False)

        def ran_out() -> RunTimeoutError:
            return RunTimeoutError(
                f"the command did not end within {timeout:g} s: {line}",
                evidence=plain_out.before.decode(errors="replace") + _end_of(out, err),
            )

        try:
            channel, forgotten = self._open(_wrapped(line, env, cwd, marks), deadline)
        except TimeoutError as error:
            raise ran_out() from error
        with contextlib.ExitStack() as stack:
            stack.callback(channel.close)
            try:
                feeder = _Feeder(channel, stdin)
                stack.callback(feeder.close)
                streams = (out, plain_out), (err, plain_err)
                end = self._pump(channel, *streams, deadline, feeder)
                if end is _End.OUT_OF_TIME:
                    raise ran_out()
            except BaseException:
                if before_kill is not None:
                    before_kill()
                # Before the channel is closed, which the command would take for the end of stdin.
                self._kill(plain_out.process_group, forgotten)
                raise
        status = channel.exit_status
        if status < 0 or end is _End.BROKEN or self._forgotten != forgotten:
            raise self._broken(None, forgotten)
        if end is _End.CUT_OFF:
            raise GuestSetupError(
                f"the guest did not send all of the command's output: {line}",
                evidence=_end_of(out, err),
                hint="did a process that the command left behind make its output non-blocking?",
            )
        if not plain_out.began:
            raise GuestSetupError(
                f"the guest's shell ended with status {status} before it ran the command: {line}",
                evidence=plain_out.before.decode(errors="replace") + _end_of(out, err),
                hint="does a start-up file of the user's shell end it?",
            )
        result = CommandResult(
            exit_status=status,
            stdout=bytes(out.kept),
            stderr=bytes(err.kept),
            truncated=out.truncated or err.truncated,
            seconds=time.monotonic() - started,
        )
        if check and status != 0:
            raise GuestSetupError(
                f"a command in the guest ended with status {status}: {line}",
                evidence=_end_of(out, err),
            )
        return result

    def _open(
        self, script: str, deadline: float | None, *, expected: int | None = None
    ) -> tuple[paramiko.Channel, int]:
        """A channel on which the script runs, and how often the guest was forgotten before.

        Args:
            expected: how often it must have been forgotten; None for any number.

        Raises:
            TimeoutError: the deadline passed.
            BridgeError: the guest is lost, or was forgotten again.
        """
        transport, forgotten = self._connected(deadline)
        if expected not in (None, forgotten):
            raise self._broken(None, forgotten - 1)
        with self._requesting(transport, forgotten, deadline) as stack:
            channel = _new_session(transport, deadline)
            stack.callback(channel.close)
            channel.settimeout(_CHANNEL_SECONDS)
            channel.exec_command(os.fsencode(script))
            stack.pop_all()
        return channel, forgotten

    @contextlib.contextmanager
    def _requesting(
        self, transport: paramiko.Transport, forgotten: int, deadline: float | None
    ) -> Iterator[contextlib.ExitStack]:
        """Translate what paramiko raises; the stack is unwound unless the caller empties it."""
        try:
            with contextlib.ExitStack() as stack:
                yield stack
        except paramiko.ChannelException as error:
            raise GuestSetupError(
                f"the guest's sshd refuses another session: {error}",
                hint="MaxSessions of its sshd_config limits how many commands run at once",
            ) from error
        except (paramiko.SSHException, OSError, EOFError) as error:
            late = deadline is not None and time.monotonic() >= deadline - _RETRY_SECONDS
            if late and transport.is_active():
                raise TimeoutError from error
            raise self._broken(error, forgotten) from error

    def _connected(self, deadline: float | None = None) -> tuple[paramiko.Transport, int]:
        """The connection, made anew if the guest was forgotten since.

        Raises:
            TimeoutError: the guest was reserved for another thread until the deadline.
        """
        left = -1 if deadline is None else max(0.0, deadline - time.monotonic())
        if not self._reserved.acquire(timeout=left):
            raise TimeoutError
        try:
            self._check()
            transport, forgotten = self._usable()
            if transport is None and forgotten:
                self.connect()
                transport, forgotten = self._usable()
        finally:
            self._reserved.release()
        if transport is None:
            raise UsageError("there is no connection to the guest")
        return transport, forgotten

    def _usable(self) -> tuple[paramiko.Transport | None, int]:
        """The connection once it is logged in, and how often the guest was forgotten before."""
        with self._lock:
            return self._transport if self._logged_in else None, self._forgotten

    def _pump(
        self,
        channel: paramiko.Channel,
        out: tuple[_Capture, _Output],
        err: tuple[_Capture, _Output],
        deadline: float | None,
        feeder: _Feeder,
    ) -> _End:
        """Pass output on until the command has ended and all of its output has come."""
        alive = _Liveness(channel.get_transport(), _SILENCE_SECONDS)
        wake = _Wake()
        channel.in_buffer.set_event(wake)
        channel.in_stderr_buffer.set_event(wake)
        ended = False
        waited = 0.0  # since the command's end; no time that output took to be passed on
        while True:
            wake.rearm()
            now = time.monotonic()
            if not ended and deadline is not None and now >= deadline:
                return _End.OUT_OF_TIME
            closed = channel.closed
            over = bool(channel.eof_received)  # and so nothing comes after the rest
            while channel.recv_ready():
                out[0].take(out[1].strip(channel.recv(_CHUNK)))
                alive.heard()
            while channel.recv_stderr_ready():
                err[0].take(err[1].strip(channel.recv_stderr(_CHUNK)))
                alive.heard()
            if out[1].began:
                feeder.check()
            if alive.is_silent():
                self._lose_silent()
            if closed and not over:
                return _End.BROKEN
            if channel.exit_status_ready():
                complete = out[1].complete and err[1].complete
                if over or (complete and waited >= _LINGER_SECONDS):
                    break
                if waited >= _REST_SECONDS:
                    return _End.CUT_OFF
                ended = True
            before = time.monotonic()
            wait = _POLL_SECONDS
            if deadline is not None and not ended:
                wait = min(wait, max(0.0, deadline - before))
            (channel.status_event if over else wake).wait(wait)
            if ended:
                # At most a poll's time: this process may have been stopped itself.
                waited += min(time.monotonic() - before, 2 * _POLL_SECONDS)
        out[0].take(out[1].finish())
        err[0].take(err[1].finish())
        return _End.ENDED

    def _kill(self, process_group: int | None, forgotten: int) -> None:
        """End a command and what it started, if the guest still takes orders and is the same."""
        if process_group is None or self._forgotten != forgotten:
            return
        deadline = time.monotonic() + _KILL_SECONDS
        try:
            channel, _ = self._open(
                f"kill -s KILL -- -{process_group}", deadline, expected=forgotten
            )
        except (BridgeError, TimeoutError) as error:
            logger.debug("could not kill a command in the guest: %r", error)
            return
        channel.status_event.wait(max(0.0, deadline - time.monotonic()))
        channel.close()

    # Files

    def put(
        self,
        local: str | os.PathLike[str] | bytes,
        remote: str | os.PathLike[str],
        mode: int = 0o644,
    ) -> None:
        """Write a file in the guest: complete under its name, or not at all.

        Args:
            local: path of a file here, or the content as bytes.
            remote: path in the guest.

        Raises:
            UsageError: the local file cannot be read.
            GuestSetupError: the guest cannot write it (no room, no such directory).
            BridgeError: as :meth:`run`.
        """
        path = os.fspath(remote)
        name, part = shlex.quote(path), shlex.quote(f"{path}.part")
        remove = f"rm -f {part}"
        write = f"umask 077; cat > {part} || {{ {remove}; exit 1; }}"
        # A command of its own: the end of the input alone does not say that it was all.
        finish = f"chmod {mode:o} {part} && mv -f {part} {name} || {{ {remove}; exit 1; }}"
        with contextlib.ExitStack() as stack:
            if isinstance(local, bytes):
                source: BinaryIO = io.BytesIO(local)
            else:
                try:
                    source = stack.enter_context(Path(local).open("rb"))
                except OSError as error:
                    raise UsageError(f"{local} cannot be read: {error.strerror}") from error
            try:
                result = self.run(write, stdin=source)
                if result.exit_status == 0:
                    result = self.run(finish)
            except BaseException as error:
                with contextlib.suppress(BridgeError):
                    self.run(remove, timeout=_KILL_SECONDS)
                if isinstance(error, UsageError) and not isinstance(local, bytes):
                    raise UsageError(f"{local}: {error.message}") from error
                raise
        if result.exit_status != 0:
            raise GuestSetupError(
                f"the guest cannot write {path}", evidence=result.stderr.decode(errors="replace")
            )

    def get(self, remote: str | os.PathLike[str], local: str | os.PathLike[str]) -> None:
        """Copy a file of the guest into a local one: complete under its name, or not at all.

        Raises:
            GuestSetupError: the guest cannot read it.
            UsageError: it cannot be written here.
            BridgeError: as :meth:`run`.
        """
        path, destination = os.fspath(remote), Path(local)
        try:
            with atomic_output(destination) as part:
                with part.open("wb") as file:
                    result = self.run(["cat", "--", path], stdout=file.write, capture=_EVIDENCE)
                if result.exit_status != 0:
                    raise GuestSetupError(
                        f"the guest cannot read {path}",
                        evidence=result.stderr.decode(errors="replace"),
                    )
        except OSError as error:
            raise UsageError(f"{local} cannot be written: {error.strerror or error}") from error

    # A person

    def shell(
        self,
        command: str | None = None,
        *,
        stdin: int = 0,
        stdout: Output = _TO_STDOUT,
        stderr: Output = _TO_STDERR,
    ) -> int:
        """Connect a terminal, or any file, to a shell in the guest, or to a command.

        Args:
            command: a line for the guest's shell; None for the shell itself.
            stdin: descriptor to read from; that of a terminal is set to raw meanwhile.
            stdout, stderr: are given the output as it comes.

        Returns:
            The exit status.

        Raises:
            GuestLostError: the guest went away.
        """
        transport, forgotten = self._connected()
        interactive = os.isatty(stdin)
        with self._requesting(transport, forgotten, None) as stack:
            channel = _new_session(transport, None)
            stack.callback(channel.close)
            if interactive:
                columns, lines = _terminal_size(stdin)
                channel.get_pty(os.environ.get("TERM", "vt100"), columns, lines)
            if command is None:
                channel.invoke_shell()
            else:
                channel.exec_command(os.fsencode(command))
            stack.pop_all()
        with contextlib.closing(channel):
            with _raw_terminal(stdin, channel) if interactive else contextlib.nullcontext():
                _converse(channel, stdin, stdout, stderr)
            channel.status_event.wait(_LOSS_SECONDS)
            if channel.exit_status < 0:
                raise self._broken(None, forgotten)
            return channel.exit_status


def _line(command: Word | Sequence[Word]) -> str:
    """One line for the guest's shell; bytes that are no text are surrogates in it."""
    if isinstance(command, str | bytes | os.PathLike):
        line = os.fsdecode(command)
    else:
        line = shlex.join(os.fsdecode(word) for word in command)
    if "\0" in line:
        raise UsageError("a command has a NUL in it, which no argument can hold")
    return line


def _new_session(transport: paramiko.Transport, deadline: float | None) -> paramiko.Channel:
    """Open a channel whose requests end by the deadline; raises what paramiko does, and OSError."""
    left = _CHANNEL_SECONDS
    if deadline is not None:
        left = max(0.0, min(left, deadline - time.monotonic()))
    channel = transport.open_session(timeout=left)
    channel.event = _ReplyEvent(left)
    return channel


def _wrapped(line: str, env: Mapping[str, str] | None, cwd: str | None, marks: _Marks) -> str:
    """The command for sshd: runs the line in a shell of its own, between the marks.

    sshd makes each session a process group, whose number is that of the shell it starts. The inner
    shell makes a death by signal an exit status (128+N), which SSH would not carry.
    """
    script = ""
    for name, value in (env or {}).items():
        if not _VARIABLE.match(name):
            raise UsageError(f"{name!r} is no name for an environment variable")
        script += f"export {name}={shlex.quote(value)}; "
    if cwd is not None:
        script += f"cd {shlex.quote(cwd)} || exit 126; "
    return (
        f"echo {marks.name}:$$; sh -c {shlex.quote(script + line)}; "
        f"set -- $?; printf %s {marks.name}.; printf %s {marks.name}. >&2; exit $1"
    )


def _end_of(out: _Capture, err: _Capture) -> str:
    end = bytes(out.kept[-_EVIDENCE:]) + bytes(err.kept[-_EVIDENCE:])
    return end.decode(errors="replace")


def _converse(channel: paramiko.Channel, stdin: int, stdout: Output, stderr: Output) -> None:
    """Copy between the terminal and the channel until the channel ends."""
    poll = select.poll()
    poll.register(stdin, select.POLLIN)
    poll.register(channel.fileno(), select.POLLIN)
    pending = b""  # read from stdin, and not sent yet
    quiet = 0.0  # how long the shell has ended and nothing more has come
    while True:
        started = time.monotonic()
        ready = {fd for fd, _ in poll.poll(_TYPING_POLL_MS if pending else _POLL_SECONDS * 1000)}
        waited = min(time.monotonic() - started, 2 * _POLL_SECONDS)
        closed = channel.closed or bool(channel.eof_received)  # and so nothing comes after the rest
        ended = channel.exit_status_ready()
        moved = False
        while channel.recv_ready():
            moved = True
            stdout(channel.recv(_CHUNK))
        while channel.recv_stderr_ready():
            moved = True
            stderr(channel.recv_stderr(_CHUNK))
        # A process that the shell left behind may keep the channel open.
        quiet = quiet + waited if ended and not moved else 0.0
        if not moved and (closed or quiet >= _SHELL_LINGER_SECONDS):
            return
        if stdin in ready:
            pending = os.read(stdin, _CHUNK)
            poll.unregister(stdin)
            if not pending:
                channel.shutdown_write()
        if not pending:
            continue
        # Never waits for the guest, which may wait for its output to be read.
        with contextlib.suppress(OSError):  # closed just now
            while pending and channel.send_ready():
                pending = pending[channel.send(pending) :]
        if not pending:
            poll.register(stdin, select.POLLIN)


@contextlib.contextmanager
def _raw_terminal(stdin: int, channel: paramiko.Channel) -> Iterator[None]:
    """Every key goes to the guest, and so does a change of the window's size."""
    before = termios.tcgetattr(stdin)

    def resized(*_: object) -> None:
        with contextlib.suppress(paramiko.SSHException):
            channel.resize_pty(*_terminal_size(stdin))

    handler = signal.signal(signal.SIGWINCH, resized)
    try:
        tty.setraw(stdin)
        yield
    finally:
        signal.signal(signal.SIGWINCH, handler)
        termios.tcsetattr(stdin, termios.TCSADRAIN, before)


def _terminal_size(fd: int) -> tuple[int, int]:
    """Columns and lines."""
    lines, columns, _, _ = struct.unpack("HHHH", fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8)))
    return columns or 80, lines or 24


def _private_key(path: Path) -> paramiko.PKey:
    try:
        return paramiko.PKey.from_path(path)
    except OSError as error:
        raise UsageError(f"the SSH key {path} cannot be read: {error.strerror}") from error
    except (paramiko.SSHException, UnknownKeyType, ValueError, TypeError) as error:
        raise UsageError(
            f"the SSH key {path} cannot be used: {error}",
            hint="it must be a private key without a passphrase",
        ) from error


def _public_key(line: str) -> paramiko.PKey:
    try:
        kind, encoded, *_ = line.split()
        from_type_string: Callable[[str, bytes], paramiko.PKey] = paramiko.PKey.from_type_string
        return from_type_string(kind, base64.b64decode(encoded, validate=True))
    except (ValueError, paramiko.SSHException, UnknownKeyType) as error:
        raise ImageError(f"the image's host key is none: {line[:80]!r}") from error
