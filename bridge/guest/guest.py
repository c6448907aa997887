# SPDX-License-Identifier: Apache-2.0
"""What the host does in a guest, whichever way it goes: run commands, copy files, open a shell."""

from __future__ import annotations

import functools
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from bridge.errors import BridgeError, GuestResetError, UsageError
from bridge.util.descriptors import write_all
from bridge.vm.network import LOCALHOST

__all__ = [
    "CAPTURE_LIMIT",
    "EVIDENCE",
    "KILL_SECONDS",
    "LINGER_SECONDS",
    "LOG_LIMIT",
    "SILENCE_SECONDS",
    "TO_STDERR",
    "TO_STDOUT",
    "Capture",
    "CommandResult",
    "Guest",
    "Input",
    "Output",
    "Watched",
    "Word",
    "as_user",
    "check_variable",
    "end_of",
    "line_of",
    "reset_error",
    "ssh_words",
]

Output = Callable[[bytes], object]
"""Called with a command's output as it comes, in pieces of any size."""


class Input(Protocol):
    """What a command's input is read from, on a thread of its own: a binary file, for one."""

    def read(self, size: int, /) -> bytes:
        """Return up to ``size`` bytes, none at the end. May block."""


Word = str | bytes | os.PathLike[str] | os.PathLike[bytes]
"""An argument of a command: bytes, or text that :func:`os.fsencode` makes bytes."""

CAPTURE_LIMIT = 1024 * 1024
"""A result keeps this many bytes of stdout, and of stderr: the first ones."""

LOG_LIMIT = 16 << 20
"""Bytes kept of what :meth:`Guest.look` reads; the kernel's own buffer is smaller."""

TO_STDOUT: Output = functools.partial(write_all, 1)
TO_STDERR: Output = functools.partial(write_all, 2)

EVIDENCE = 4096
"""Bytes of each stream that an error shows."""
KILL_SECONDS = 5.0
LINGER_SECONDS = 1.0
"""How long to wait for the output of a process that a command left behind."""
SILENCE_SECONDS = 180.0
"""The longest silence of the guest while a command writes nothing. Only this distinguishes a guest
that suspended itself to idle, or whose processes or kernel are stuck, from one that works."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


class Watched(Protocol):
    """A machine that can be lost while a command runs: :class:`bridge.vm.machine.Machine`."""

    def check(self) -> None:
        """Raise the reason if it was lost."""

    def add_loss_listener(self, listener: Callable[[BridgeError], None], /) -> Callable[[], None]:
        """Call the listener when the machine is lost; return a function that removes it."""

    def lose_silent(self, seconds: float, /) -> None:
        """Declare the guest lost, because it has not answered for this long."""


@dataclass(frozen=True)
class CommandResult:
    """The result of a command in the guest.

    Attributes:
        exit_status: as in a shell: 127 for a command that does not exist, 128+N after signal N.
        stdout, stderr: the first :data:`CAPTURE_LIMIT` bytes.
        truncated: whether there were more.
        seconds: the time that it took, measured on the host.
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


class Guest(Protocol):
    """Runs commands in the guest. Commands may run on several threads at once."""

    @property
    def ssh_command(self) -> tuple[str, ...]:
        """The words of the command with which a person on this machine gets into the guest."""

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
        """Run a command in the guest and wait for its end.

        A process that the command leaves behind with its output open delays the result by at most a
        second after the command's own end.

        Args:
            command: a line for the guest's ``sh``, or a sequence of words that no shell changes.
            stdout, stderr: called with the output as it comes.
            stdin: the command's input.
            timeout: in seconds; None for none.
            env: environment variables to set.
            cwd: the working directory; None for the user's home.
            user: runs the command, a name from the guest's /etc/passwd, with all of its groups;
                None for root. A user that does not exist gives the exit status 126.
            check: whether an exit status other than 0 is an error.
            capture: how many bytes of each stream the result keeps.
            before_kill: called before a command is killed early.

        Raises:
            RunTimeoutError: the command timed out and was killed, with its children.
            GuestResetError: the guest was reset.
            GuestLostError: the guest was lost; another reason of the loss may be raised instead.
            GuestSetupError: the command could not be run, or failed with ``check``.
        """

    def look(self, cores: str, timeout: float) -> CommandResult:
        """Read how the guest's kernel is: stdout has its taint mask and its log, line by line.

        A NUL follows, and a line for each file whose path begins with ``cores``.

        Raises:
            RunTimeoutError: this took longer than ``timeout`` seconds.
            GuestLostError: as for :meth:`run`.
        """

    def put(
        self,
        local: str | os.PathLike[str] | bytes,
        remote: str | os.PathLike[str],
        mode: int = 0o644,
    ) -> None:
        """Write a file in the guest, completely or not at all.

        Args:
            local: path of a file here, or the content as bytes.
            remote: path in the guest.

        Raises:
            UsageError: the local file cannot be read.
            GuestSetupError: the guest cannot write it (no room, no such directory).
            BridgeError: as :meth:`run`.
        """

    def get(self, remote: str | os.PathLike[str], local: str | os.PathLike[str]) -> None:
        """Copy a file from the guest to this machine, completely or not at all.

        Raises:
            GuestSetupError: the guest cannot read it.
            UsageError: it cannot be written here.
            BridgeError: as :meth:`run`.
        """

    def shell(
        self,
        command: str | None = None,
        *,
        stdin: int = 0,
        stdout: Output = TO_STDOUT,
        stderr: Output = TO_STDERR,
    ) -> int:
        """Connect a terminal, or any file, to a shell in the guest, or to a command.

        Args:
            command: a line for the guest's shell; None for the shell itself.
            stdin: descriptor to read from; a terminal is set to raw mode meanwhile.
            stdout, stderr: called with the output as it comes.

        Returns:
            The exit status.

        Raises:
            GuestLostError: the guest was lost.
        """

    def forget(self) -> None:
        """Break off what runs, because the guest is reset; later commands run in the new one.

        Running commands fail with :class:`bridge.errors.GuestResetError`. To be called within
        :meth:`reserved`.
        """

    def reserved(self) -> AbstractContextManager[None]:
        """Let only this thread start commands while inside; other threads wait."""

    def close(self) -> None:
        """Close the connection; running commands fail. Safe to call twice."""


class Capture:
    """One of a command's two streams: passes output on as it comes, and keeps its beginning."""

    def __init__(self, sink: Output | None, limit: int) -> None:
        self.sink = sink
        self.limit = limit
        self.kept = bytearray()
        self.truncated = False

    def take(self, chunk: bytes) -> None:
        """Take a piece of output."""
        room = self.limit - len(self.kept)
        self.kept += chunk[:room]
        self.truncated |= len(chunk) > room
        if self.sink is not None and chunk:
            self.sink(chunk)


def line_of(command: Word | Sequence[Word]) -> str:
    """Return one line for the guest's shell; bytes that are not text become surrogates."""
    if isinstance(command, str | bytes | os.PathLike):
        line = os.fsdecode(command)
    else:
        line = shlex.join(os.fsdecode(word) for word in command)
    if "\0" in line:
        raise UsageError("a command contains a NUL byte, which no argument can have")
    return line


_AS_USER: Final = """\
entry=$(getent passwd "$0") || { echo "sh: 1: there is no user $0" >&2; exit 126; }
group=${entry#*:*:*:}
group=${group%%:*}
HOME=${entry%:*}
export HOME="${HOME##*:}" USER="$0" LOGNAME="$0"
CD unset entry
exec setpriv --reuid="$0" --regid="$group" --init-groups -- "$@"
"""
"""Becomes the user ``$0``. Programs of util-linux and libc-bin, which each Debian has."""


def as_user(command: Word | Sequence[Word], user: str, *, at_home: bool) -> list[str]:
    """Return words that run a command of root as another user.

    Args:
        at_home: in the user's home, or in / where the user has none.
    """
    script = _AS_USER.replace("CD", 'cd "$HOME" 2>/dev/null || cd /;' if at_home else "")
    words = ["sh", "-c", command] if isinstance(command, str | bytes | os.PathLike) else command
    return ["sh", "-c", script, user, *map(os.fsdecode, words)]


def check_variable(name: str) -> None:
    """Raise UsageError unless a shell can export a variable of this name."""
    if not _VARIABLE.match(name):
        raise UsageError(f"{name!r} is not a valid name of an environment variable")


def end_of(out: Capture, err: Capture) -> str:
    """Return the end of what was kept of the output, as evidence."""
    end = bytes(out.kept[-EVIDENCE:]) + bytes(err.kept[-EVIDENCE:])
    return end.decode(errors="replace")


def ssh_words(key: Path, port: int, user: str = "root") -> tuple[str, ...]:
    """Return the words of the command with which a person on this machine gets into the guest."""
    return (
        *("ssh", "-i", str(key), "-p", str(port)),
        # Each guest of an image has the same host key, on another port.
        *("-o", "UserKnownHostsFile=/dev/null", "-o", "StrictHostKeyChecking=no"),
        *("-o", "LogLevel=ERROR", f"{user}@{LOCALHOST}"),
    )


def reset_error() -> GuestResetError:
    """Return the error of a command during which the guest was reset."""
    return GuestResetError(
        "the guest was reset while a command ran in it",
        hint="wait for commands to end before a reset, or start them again",
    )
