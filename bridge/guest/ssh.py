# SPDX-License-Identifier: Apache-2.0
"""Running commands in the guest, over SSH (paramiko).

Each command runs in its own shell in the guest, which writes a mark before and after the command's
output. The first mark contains the number of the process group, so a command that times out, or
whose caller was interrupted, can be killed with its children. The other marks show that all of the
command's output has come, because sshd reports the end of the shell before it has sent the shell's
output. The guest may be lost at any moment; a caller that waits for a command then gets the reason
at once, from the machine (:meth:`bridge.vm.machine.Machine.add_loss_listener`), without waiting for
TCP to time out.
"""

from __future__ import annotations

import base64
import contextlib
import enum
import fcntl
import io
import logging
import os
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
from pathlib import Path
from typing import BinaryIO, NoReturn

import paramiko
from paramiko.pkey import UnknownKeyType

from bridge.errors import (
    BridgeError,
    GuestLostError,
    GuestSetupError,
    GuestStoppedError,
    ImageError,
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
    ssh_words,
)
from bridge.util.files import atomic_output
from bridge.vm.network import LOCALHOST

__all__ = ["SshGuest", "private_key"]

logger = logging.getLogger(__name__)

_CONNECT_SECONDS = 30.0
_CHANNEL_SECONDS = 30.0
_RETRY_SECONDS = 0.1
_REST_SECONDS = 60.0
"""How long to wait for the rest of a command's output after the command's end."""
_SHELL_LINGER_SECONDS = 3.0
_TYPING_POLL_MS = 10
_JOIN_SECONDS = 0.1
_POLL_SECONDS = 0.25  # output and its end wake the reader at once, an exit status does not
_LOSS_SECONDS = 3.0
_CHUNK = 64 * 1024
_NO_LINGER = struct.pack("ii", 1, 0)
"""``struct linger``: closing resets the connection."""

_wire = logger.getChild("wire")
# The library also logs what it raises; a failure is reported once, where it is caught.
_wire.setLevel(logging.CRITICAL)


class _Wake(threading.Event):
    """Set by a channel's buffers when there is something to read, or at the end.

    Each buffer clears its event when it is read empty, which would clear the other one's event too.
    The channel's own descriptor is no alternative: paramiko may write to it after it was closed,
    when its number may belong to another file.
    """

    def clear(self) -> None:
        """Do nothing: the buffers must not clear it."""

    def rearm(self) -> None:
        """Clear the event; only the reader does that, before it reads."""
        super().clear()


class _Liveness:
    """Checks periodically whether the guest's sshd answers while a command writes nothing."""

    def __init__(self, transport: paramiko.Transport, seconds: float) -> None:
        self._transport = transport
        self._seconds = seconds
        self._silent = 0.0
        self._looked = time.monotonic()
        self._asking = False
        self._answered = threading.Event()

    def heard(self) -> None:
        """Note that the guest has written something."""
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
            # No answer: ask again, because paramiko uses the wall clock, which can jump.
            # Or a broken connection, which the command's reader sees.
            self._asking = False
            return
        self._answered.set()


class _Marks:
    """The marks that the shell writes around a command's output; no command writes the same."""

    def __init__(self) -> None:
        self.name = f"kcov-bridge-{secrets.token_hex(8)}"
        self.begin = f"{self.name}:".encode()  # then the process group and a newline
        self.end = f"{self.name}.".encode()


class _End(enum.Enum):
    """How the output of a command ended."""

    ENDED = enum.auto()
    TIMED_OUT = enum.auto()
    CUT_OFF = enum.auto()
    """The command ended, but some of its output is missing."""
    BROKEN = enum.auto()
    """The channel was closed, but not by sshd in the regular way."""


class _Output:
    """Removes the marks from a stream, so that the command's output remains.

    On stdout, the output of the shell's start-up files before the first mark is removed. On stderr
    it stays, because it may show why the command did not start.

    Attributes:
        process_group: of the command, once it is known; only for stdout.
        before: the beginning of the output before the first mark.
        complete: all of the command's output has come; later output is of processes that it left
            behind.
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
        """End the stream; return output that was held back because it could have been a mark."""
        held, self._held = self._held, b""
        if self.began:
            return held
        self._keep(held)
        return b""

    def _find_begin(self, data: bytes) -> bytes:
        """Return the output after the mark; without one yet, the end that may contain it."""
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
        self.before += before[: EVIDENCE - len(self.before)]


def _overlap(data: bytes, mark: bytes) -> int:
    """Return how many bytes at the end of ``data`` are the beginning of ``mark``."""
    for size in range(min(len(data), len(mark) - 1), 0, -1):
        if mark.startswith(data[-size:]):
            return size
    return 0


class _ReplyEvent(threading.Event):
    """The event that paramiko waits for after a request; it adds a time-out."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    def wait(self, timeout: float | None = None) -> bool:
        if not super().wait(self._seconds if timeout is None else timeout):
            raise TimeoutError(f"sshd did not answer a request within {self._seconds:g} s")
        return True


class _Feeder:
    """Sends stdin on its own thread, because the command may answer before it has read all.

    Attributes:
        error: why stdin could not be read; its end is not sent then.
    """

    def __init__(self, channel: paramiko.Channel, stdin: Input | bytes) -> None:
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
        # Reads what is available, because a pipe's writer may wait for the answer.
        read = getattr(self._source, "read1", self._source.read)
        # A command may end without reading everything.
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
        """Close the channel. A thread that waits for stdin is abandoned, as it cannot be ended."""
        self._channel.close()
        if self._thread is not None:
            self._thread.join(_JOIN_SECONDS)


class SshGuest:
    """Runs commands in the guest; :meth:`connect` first, :meth:`close` at the end.

    Commands may run on several threads at once.

    Args:
        port: the guest's SSH port on this machine.
        key: the file of a private key that the guest accepts.
        host_key: the guest's required public host key, a line of an OpenSSH ``.pub`` file. With
            None, for an image whose key is unknown, the key of the first connection is trusted and
            required from then on.
        watched: the machine that the guest runs in.
        user: the user to log in as.
    """

    def __init__(
        self,
        port: int,
        key: Path,
        host_key: str | None,
        *,
        watched: Watched | None = None,
        user: str = "root",
    ) -> None:
        self._port = port
        self._user = user
        self._key_file = key
        self._key = private_key(key)
        self._host_key = _public_key(host_key) if host_key is not None else None
        self._watched = watched
        self._lock = threading.Lock()  # guards the four below
        # Set as soon as it must be closed; commands use it once it is logged in.
        self._transport: paramiko.Transport | None = None
        self._logged_in = False
        self._lost = False
        self._forgotten = 0
        # Held while a thread connects again after forget(), or has the guest reserved.
        self._reserved = threading.RLock()
        self._stack = contextlib.ExitStack()
        if watched is not None:
            self._stack.callback(watched.add_loss_listener(self._on_loss))

    def __enter__(self) -> SshGuest:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def ssh_command(self) -> tuple[str, ...]:
        """The words of the command with which a person on this machine gets into the guest."""
        return ssh_words(self._key_file, self._port, self._user)

    # The connection

    def connect(self, timeout: float = _CONNECT_SECONDS) -> None:
        """Log in as soon as the guest's sshd answers, within ``timeout`` seconds.

        Raises:
            GuestSetupError: sshd does not answer, refuses the key, or has another host key than the
                image.
            BridgeError: the reason of the loss, if the guest is lost.
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
                # sshd does not listen yet, or is starting: QEMU accepts and drops connections.
                self._check()
                if left <= _RETRY_SECONDS:
                    raise GuestSetupError(
                        f"the guest's sshd does not answer within {timeout:g} s: {error}",
                        hint="the console shows whether sshd was started",
                    ) from error
                time.sleep(_RETRY_SECONDS)

    def _log_in(self, timeout: float) -> None:
        with contextlib.ExitStack() as stack:
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
        """Wake all threads that wait for the guest. On the machine's thread: must not block."""
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
        """Return why the connection broke: the machine's reason, which may come a moment later.

        Args:
            forgotten: number of calls of :meth:`forget` before the connection was made.
        """
        if self._forgotten != forgotten:
            return reset_error()
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
        """Raise the loss of a guest that only its silence shows."""
        if self._watched is not None:
            self._watched.lose_silent(SILENCE_SECONDS)
            self._watched.check()
        raise GuestStoppedError(f"the guest has not answered for {SILENCE_SECONDS:g} s")

    def forget(self) -> None:
        """Break the connection, because the guest is reset; the next command makes a new one.

        Running commands fail with :class:`bridge.errors.GuestResetError`. To be called within
        :meth:`reserved`.
        """
        with self._lock:
            self._forgotten += 1
            self._lost = self._logged_in = False
            transport, self._transport = self._transport, None
        if transport is not None:
            # Reset instead of closed, because QEMU would wait for the guest's part in a close.
            if isinstance(transport.sock, socket.socket):
                with contextlib.suppress(OSError):
                    transport.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
            transport.close()

    @contextlib.contextmanager
    def reserved(self) -> Iterator[None]:
        """Let only this thread start commands while inside; other threads wait."""
        with self._reserved:
            yield

    def close(self) -> None:
        """Close the connection; running commands fail. Safe to call twice."""
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
        started = time.monotonic()
        deadline = None if timeout is None else started + timeout
        line = line_of(command)
        if user is not None:
            command = as_user(command, user, at_home=cwd is None)
        marks = _Marks()
        out, err = Capture(stdout, capture), Capture(stderr, capture)
        plain_out, plain_err = _Output(marks, begins=True), _Output(marks, begins=False)

        def timed_out() -> RunTimeoutError:
            return RunTimeoutError(
                f"the command did not end within {timeout:g} s: {line}",
                evidence=plain_out.before.decode(errors="replace") + end_of(out, err),
            )

        try:
            channel, forgotten = self._open(_wrapped(line_of(command), env, cwd, marks), deadline)
        except TimeoutError as error:
            raise timed_out() from error
        with contextlib.ExitStack() as stack:
            stack.callback(channel.close)
            try:
                feeder = _Feeder(channel, stdin)
                stack.callback(feeder.close)
                streams = (out, plain_out), (err, plain_err)
                end = self._pump(channel, *streams, deadline, feeder)
                if end is _End.TIMED_OUT:
                    raise timed_out()
            except BaseException:
                if before_kill is not None:
                    before_kill()
                # Before the channel is closed, which the command would see as the end of stdin.
                self._kill(plain_out.process_group, forgotten)
                raise
        status = channel.exit_status
        if status < 0 or end is _End.BROKEN or self._forgotten != forgotten:
            raise self._broken(None, forgotten)
        if end is _End.CUT_OFF:
            raise GuestSetupError(
                f"the guest did not send all of the command's output: {line}",
                evidence=end_of(out, err),
                hint="did a process that the command left behind make its output non-blocking?",
            )
        if not plain_out.began:
            raise GuestSetupError(
                f"the guest's shell ended with status {status} before it ran the command: {line}",
                evidence=plain_out.before.decode(errors="replace") + end_of(out, err),
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
                evidence=end_of(out, err),
            )
        return result

    def _open(
        self, script: str, deadline: float | None, *, expected: int | None = None
    ) -> tuple[paramiko.Channel, int]:
        """Run the script on a new channel.

        Args:
            expected: the required number of calls of :meth:`forget`; None for any number.

        Returns:
            The channel, and the number of calls of :meth:`forget` before.

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
        """Return the connection, made again after :meth:`forget`, and the number of those calls.

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
        """Return the connection if it is logged in, and the number of calls of :meth:`forget`."""
        with self._lock:
            return self._transport if self._logged_in else None, self._forgotten

    def _pump(
        self,
        channel: paramiko.Channel,
        out: tuple[Capture, _Output],
        err: tuple[Capture, _Output],
        deadline: float | None,
        feeder: _Feeder,
    ) -> _End:
        """Pass output on until the command has ended and all of its output has come."""
        alive = _Liveness(channel.get_transport(), SILENCE_SECONDS)
        wake = _Wake()
        channel.in_buffer.set_event(wake)
        channel.in_stderr_buffer.set_event(wake)
        ended = False
        waited = 0.0  # seconds since the command's end, without those for passing output on
        while True:
            wake.rearm()
            now = time.monotonic()
            if not ended and deadline is not None and now >= deadline:
                return _End.TIMED_OUT
            closed = channel.closed
            over = bool(channel.eof_received)  # no output comes after what is buffered
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
                if over or (complete and waited >= LINGER_SECONDS):
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
                # At most a poll's time, because this process may have been stopped itself.
                waited += min(time.monotonic() - before, 2 * _POLL_SECONDS)
        out[0].take(out[1].finish())
        err[0].take(err[1].finish())
        return _End.ENDED

    def _kill(self, process_group: int | None, forgotten: int) -> None:
        """Kill a command and its children, if the guest still answers and was not reset."""
        if process_group is None or self._forgotten != forgotten:
            return
        deadline = time.monotonic() + KILL_SECONDS
        try:
            channel, _ = self._open(
                f"kill -s KILL -- -{process_group}", deadline, expected=forgotten
            )
        except (BridgeError, TimeoutError) as error:
            logger.debug("could not kill a command in the guest: %r", error)
            return
        channel.status_event.wait(max(0.0, deadline - time.monotonic()))
        channel.close()

    def look(self, cores: str, timeout: float) -> CommandResult:
        """See :meth:`bridge.guest.guest.Guest.look`."""
        script = (
            "cat /proc/sys/kernel/tainted; dmesg; printf '\\0'; "
            f"""printf '%s\\n' {shlex.quote(cores)}*"""
        )
        return self.run(script, timeout=timeout, capture=LOG_LIMIT)

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
        name, part = shlex.quote(path), shlex.quote(f"{path}.{secrets.token_hex(8)}.part")
        remove = f"rm -f {part}"
        write = f"umask 077; cat > {part} || {{ {remove}; exit 1; }}"
        # A separate command, because the end of the input does not prove that it was complete.
        finish = (
            # mv would put the file into the directory.
            f"if [ -d {name} ]; then echo {name} is a directory >&2; false; "
            f"else chmod {mode:o} {part} && mv -f {part} {name}; fi || {{ {remove}; exit 1; }}"
        )
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
                    self.run(remove, timeout=KILL_SECONDS)
                if isinstance(error, UsageError) and not isinstance(local, bytes):
                    raise UsageError(f"{local}: {error.message}") from error
                raise
        if result.exit_status != 0:
            raise GuestSetupError(
                f"the guest cannot write {path}", evidence=result.stderr.decode(errors="replace")
            )

    def get(self, remote: str | os.PathLike[str], local: str | os.PathLike[str]) -> None:
        """See :meth:`bridge.guest.guest.Guest.get`."""
        path, destination = os.fspath(remote), Path(local)
        try:
            with atomic_output(destination) as part:
                with part.open("wb") as file:
                    result = self.run(["cat", "--", path], stdout=file.write, capture=EVIDENCE)
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
        stdout: Output = TO_STDOUT,
        stderr: Output = TO_STDERR,
    ) -> int:
        """See :meth:`bridge.guest.guest.Guest.shell`."""
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


def _new_session(transport: paramiko.Transport, deadline: float | None) -> paramiko.Channel:
    """Open a channel whose requests end by the deadline; raises what paramiko does, and OSError."""
    left = _CHANNEL_SECONDS
    if deadline is not None:
        left = max(0.0, min(left, deadline - time.monotonic()))
    channel = transport.open_session(timeout=left)
    channel.event = _ReplyEvent(left)
    return channel


def _wrapped(line: str, env: Mapping[str, str] | None, cwd: str | None, marks: _Marks) -> str:
    """Return the command for sshd, which runs the line in its own shell, between the marks.

    sshd makes each session a process group with the number of the shell that it starts. The inner
    shell turns a death by signal into an exit status (128+N), which SSH would not carry.
    """
    script = ""
    for name, value in (env or {}).items():
        check_variable(name)
        script += f"export {name}={shlex.quote(value)}; "
    if cwd is not None:
        script += f"cd {shlex.quote(cwd)} || exit 126; "
    return (
        f"echo {marks.name}:$$; sh -c {shlex.quote(script + line)}; "
        f"set -- $?; printf %s {marks.name}.; printf %s {marks.name}. >&2; exit $1"
    )


def _converse(channel: paramiko.Channel, stdin: int, stdout: Output, stderr: Output) -> None:
    """Copy between the terminal and the channel until the channel ends."""
    poll = select.poll()
    poll.register(stdin, select.POLLIN)
    poll.register(channel.fileno(), select.POLLIN)
    pending = b""  # read from stdin, but not sent yet
    quiet = 0.0  # seconds without output since the shell ended
    while True:
        started = time.monotonic()
        ready = {fd for fd, _ in poll.poll(_TYPING_POLL_MS if pending else _POLL_SECONDS * 1000)}
        waited = min(time.monotonic() - started, 2 * _POLL_SECONDS)
        closed = channel.closed or bool(channel.eof_received)  # only buffered output is left
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
        # Never wait for the guest, which may wait until its output is read.
        with contextlib.suppress(OSError):  # closed just now
            while pending and channel.send_ready():
                pending = pending[channel.send(pending) :]
        if not pending:
            poll.register(stdin, select.POLLIN)


@contextlib.contextmanager
def _raw_terminal(stdin: int, channel: paramiko.Channel) -> Iterator[None]:
    """Send every key to the guest, and changes of the window's size."""
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
    """Return columns and lines."""
    lines, columns, _, _ = struct.unpack("HHHH", fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8)))
    return columns or 80, lines or 24


def private_key(path: Path) -> paramiko.PKey:
    """Load a key.

    Raises:
        UsageError: it cannot be read, or used.
    """
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
        raise ImageError(f"the image's host key is not a public key: {line[:80]!r}") from error
