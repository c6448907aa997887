# SPDX-License-Identifier: Apache-2.0
"""The guest of a test: what a test can do in it.

The names are those of the test driver of NixOS (``nixos/lib/test-driver``), which testers know.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import pytest

from bridge.errors import BridgeError, GuestLostError, GuestSetupError, RunTimeoutError
from bridge.guest.guest import as_user
from bridge.pytest_plugin.evidence import before_kill
from bridge.pytest_plugin.machines import Lease, Traced
from bridge.session.session import Session

__all__ = ["CommandError", "Guest", "Result", "WaitTimeoutError"]

SECONDS: Final = 60.0
"""How long a command or a wait may take unless its caller says otherwise."""

_POLL_SECONDS: Final = 0.02
"""How often a wait looks, inside the guest."""
_CONSOLE_POLL_SECONDS: Final = 0.01
_WAIT_OUTPUT: Final = 64 * 1024
"""How many bytes of the last output a wait returns or shows."""
_GRACE_SECONDS: Final = 5.0
"""A wait ends itself inside the guest; if it does not within this time, the guest is at fault."""
_CONSOLE_LINES: Final = 20
_CAPTURE: Final = 16 * 1024 * 1024
"""How many bytes of the output of a command a result keeps."""
_STDIN: Final = "/run/kcov-bridge/stdin"
"""In the guest: what a traced command reads."""
_TIMED_OUT: Final = 124
_CRASH_SECONDS: Final = 30.0

Command = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""A line for the guest's ``sh``, or words that no shell changes."""

_WAIT: Final = """\
now() {{ read -r up rest </proc/uptime; now=${{up%.*}}${{up#*.}}; }}
command=$1
shift
now; end=$((now + {centiseconds}))
while :; do
    output=$({{ (eval "$command") && echo "=0" || echo "=$?"; }} 2>&1 | tail -c {limit})
    status=${{output##*=}}
    output=${{output%=*}}
    [ $status {test} 0 ] && {{ printf '%s' "$output"; exit 0; }}
    now; [ $now -lt $end ] || {{ printf '%s' "$output"; exit {timed_out}; }}
    sleep {poll}
done
"""
"""Runs the command ``$1`` until it ends as wanted, and prints what it printed the last time.

``eval`` keeps whatever the command is out of the syntax of this script. ``tail`` bounds the memory
that the output takes.
"""


class CommandError(AssertionError):
    """A command did not end as the test wants."""


class WaitTimeoutError(AssertionError):
    """What the test waits for did not happen in time."""


@dataclass(frozen=True)
class Result:
    """The result of a command in the guest.

    Attributes:
        status: the exit status as in a shell: 127 for a command that does not exist, 128+N after
            signal N.
        stdout_bytes, stderr_bytes: the first 16 MiB of its output; 1 MiB under kcov.
        seconds: the time that it took, measured on the host.
    """

    status: int
    stdout_bytes: bytes
    stderr_bytes: bytes
    seconds: float

    @property
    def stdout(self) -> str:
        """The output as text; what is not UTF-8 is replaced."""
        return self.stdout_bytes.decode(errors="replace")

    @property
    def stderr(self) -> str:
        """The error output as text; what is not UTF-8 is replaced."""
        return self.stderr_bytes.decode(errors="replace")


class Guest:
    """The guest of a test.

    Commands take a line for the guest's ``sh``, or a sequence of words that no shell changes.
    Whatever is raised when the guest is lost (it panicked, was switched off, or sleeps) is a
    :class:`bridge.GuestLostError`.
    """

    def __init__(self, lease: Lease, config: pytest.Config) -> None:
        self._lease = lease
        self._config = config
        self._traces: list[Tracer] = []

    @property
    def session(self) -> Session:
        """The bridge's session, for what this class does not offer."""
        return self._lease.session

    @property
    def target(self) -> Any:
        """The target that serves this guest now; a tuple where there are several.

        A target in a process of its own (``reset="fork"``, ``isolate``) is not here: attributes
        are copies, methods run in that process.
        """
        targets = self.session.target_objects
        return targets if len(targets) > 1 else targets[0]

    # Commands

    def run(
        self,
        command: Command,
        *,
        timeout: float | None = SECONDS,
        stdin: bytes | str = b"",
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        user: str | None = None,
    ) -> Result:
        """Run a command and return its result, whatever its status.

        Args:
            command: see the class.
            timeout: seconds; None for no limit.
            stdin: what the command reads.
            env: variables to set.
            cwd: where it runs; None for the user's home.
            user: who runs it, a name from the guest's /etc/passwd; None for root. The same for the
                verbs below.

        Raises:
            RunTimeoutError: it did not end in time, and was killed.
            GuestLostError: the guest was lost.
        """
        data = stdin.encode() if isinstance(stdin, str) else stdin
        self._lease.used()
        if self._traces:
            traced = self._traces[-1].run(self._plain(command, data, env, cwd, user), timeout)
            self._lease.note_output(traced.stdout_bytes, traced.stderr_bytes)
            return traced
        result = self.session.guest.run(
            command,
            timeout=timeout,
            stdin=data,
            env=env,
            cwd=os.fspath(cwd) if cwd is not None else None,
            user=user,
            capture=_CAPTURE,
            before_kill=functools.partial(before_kill, self._lease),
        )
        self._lease.note_output(result.stdout, result.stderr)
        return Result(result.exit_status, result.stdout, result.stderr, result.seconds)

    def _plain(
        self,
        command: Command,
        stdin: bytes,
        env: Mapping[str, str] | None,
        cwd: str | os.PathLike[str] | None,
        user: str | None,
    ) -> Command:
        """Return a command that needs none of the other arguments."""
        if user is not None:
            command = as_user(command, user, at_home=cwd is None)
        if env or cwd:
            words = ["env", *(["-C", os.fspath(cwd)] if cwd else [])]
            words += [f"{name}={value}" for name, value in (env or {}).items()]
            command = [*words, *_words(command)]
        if stdin:
            self.session.put(stdin, _STDIN)
            command = ["sh", "-c", 'exec "$@" <"$0"', _STDIN, *_words(command)]
        return command

    def succeed(
        self, *commands: Command, timeout: float | None = SECONDS, user: str | None = None
    ) -> str:
        """Run commands, each of which must end with status 0; return their output as text.

        Raises:
            CommandError: one of them ended with another status; the rest were not run.
        """
        __tracebackhide__ = True
        output = ""
        for command in commands:
            result = self.run(command, timeout=timeout, user=user)
            if result.status:
                raise CommandError(_told(command, f"ended with status {result.status}", result))
            output += result.stdout
        return output

    def fail(
        self, *commands: Command, timeout: float | None = SECONDS, user: str | None = None
    ) -> str:
        """Run commands, each of which must end with another status than 0; return their output.

        Raises:
            CommandError: one of them ended with status 0; the rest were not run.
        """
        __tracebackhide__ = True
        output = ""
        for command in commands:
            result = self.run(command, timeout=timeout, user=user)
            if not result.status:
                raise CommandError(_told(command, "ended with status 0, and should fail", result))
            output += result.stdout
        return output

    # Waits

    def wait_until_succeeds(
        self, command: Command, timeout: float = SECONDS, *, user: str | None = None
    ) -> str:
        """Run a command again and again until it ends with status 0; return its last output.

        Raises:
            WaitTimeoutError: it did not; with its last output and the end of the console.
        """
        __tracebackhide__ = True
        what = f"{_line(command)} succeeds"
        return self._wait(command, timeout, succeeds=True, what=what, user=user)

    def wait_until_fails(
        self, command: Command, timeout: float = SECONDS, *, user: str | None = None
    ) -> str:
        """Run a command again and again until it fails; return its last output.

        Raises:
            WaitTimeoutError: it did not; with its last output and the end of the console.
        """
        __tracebackhide__ = True
        what = f"{_line(command)} fails"
        return self._wait(command, timeout, succeeds=False, what=what, user=user)

    def wait_for_file(self, path: str | os.PathLike[str], timeout: float = SECONDS) -> None:
        """Wait until a file exists in the guest.

        Raises:
            WaitTimeoutError: it does not in time.
        """
        __tracebackhide__ = True
        self._wait(["test", "-e", path], timeout, succeeds=True, what=f"{path} exists")

    def wait_for_open_port(self, port: int, timeout: float = SECONDS) -> None:
        """Wait until a process in the guest listens on a TCP port, on any of its addresses.

        Nothing connects to it: the guest's tables of sockets are read.

        Raises:
            WaitTimeoutError: none does in time.
        """
        __tracebackhide__ = True
        # The local address and the state LISTEN: Linux, net/ipv4/tcp_ipv4.c, get_tcp4_sock().
        look = f"grep -qE '^ *[0-9]+: [0-9A-F]+:{port:04X} [0-9A-F:]+ 0A ' /proc/net/tcp*"
        self._wait(look, timeout, succeeds=True, what=f"port {port} is open")

    def wait_for_console_text(self, pattern: str, timeout: float = SECONDS) -> str:
        """Wait until the console shows a text that a regular expression matches; return it.

        Only what was written since the test began counts.

        Raises:
            WaitTimeoutError: it does not in time.
            GuestLostError: the guest was lost, and had not written it.
        """
        __tracebackhide__ = True
        compiled = re.compile(pattern, re.MULTILINE)
        deadline = time.monotonic() + timeout
        while True:
            loss = self.session.machine.loss
            if match := compiled.search(self.console_log()):
                return match.group()
            if loss is not None:
                raise loss
            if time.monotonic() > deadline:
                raise WaitTimeoutError(
                    f"the console did not show {pattern!r} within {timeout:g} s\n"
                    f"{self._console_end()}"
                )
            time.sleep(_CONSOLE_POLL_SECONDS)

    def _wait(
        self,
        command: Command,
        timeout: float,
        *,
        succeeds: bool,
        what: str,
        user: str | None = None,
    ) -> str:
        __tracebackhide__ = True
        script = _WAIT.format(
            limit=_WAIT_OUTPUT,
            test="-eq" if succeeds else "-ne",
            centiseconds=max(0, round(timeout * 100)),
            timed_out=_TIMED_OUT,
            poll=_POLL_SECONDS,
        )
        try:
            words = ["sh", "-c", script, "sh", _line(command)]
            result = self.run(words, timeout=timeout + _GRACE_SECONDS, user=user)
        except RunTimeoutError:
            raise WaitTimeoutError(
                f"timed out after {timeout:g} s, waiting until {what}: the command itself did not "
                f"end, or keeps its output open in the background\n{self._console_end()}"
            ) from None
        if result.status:
            raise WaitTimeoutError(
                f"timed out after {timeout:g} s, waiting until {what}\n"
                f"last output:\n{_indented(result.stdout + result.stderr)}\n{self._console_end()}"
            )
        return result.stdout.rstrip("\n")

    # Files

    def put(
        self,
        local: str | os.PathLike[str] | bytes,
        remote: str | os.PathLike[str],
        mode: int = 0o644,
    ) -> None:
        """Write a file of the host, or bytes, into the guest.

        Raises:
            CommandError: the guest cannot write it.
            UsageError: the file cannot be read here.
        """
        __tracebackhide__ = True
        self._lease.used()
        try:
            self.session.put(local, remote, mode)
        except GuestSetupError as error:
            raise CommandError(error.report()) from None

    def get(self, remote: str | os.PathLike[str]) -> bytes:
        """Return what a file in the guest holds, whatever its size.

        Raises:
            CommandError: it cannot be read.
        """
        __tracebackhide__ = True
        self._lease.used()
        pieces: list[bytes] = []
        command = ["cat", "--", remote]
        done = self.session.guest.run(command, timeout=SECONDS, stdout=pieces.append, capture=4096)
        if done.exit_status:
            result = Result(done.exit_status, b"", done.stderr, done.seconds)
            raise CommandError(_told(command, "failed", result))
        return b"".join(pieces)

    def get_file(self, remote: str | os.PathLike[str], local: str | os.PathLike[str]) -> Path:
        """Copy a file of the guest to the host, and return where it is now.

        Raises:
            CommandError: it cannot be read.
            UsageError: it cannot be written here.
        """
        __tracebackhide__ = True
        self._lease.used()
        try:
            self.session.get(remote, local)
        except GuestSetupError as error:
            raise CommandError(error.report()) from None
        return Path(local)

    # What the machine says

    def dmesg(self) -> str:
        """Return what the guest's kernel has logged since the test began."""
        return self._lease.kernel_log()

    def console_log(self) -> str:
        """Return what the console has shown since the test began; at most its last 64 KiB."""
        return self.session.machine.console.since(self._lease.console_start)

    def _console_end(self) -> str:
        end = "\n".join(self.console_log().splitlines()[-_CONSOLE_LINES:])
        return f"end of the console:\n{_indented(end)}"

    # The machine itself

    def reset(self) -> None:
        """Return the guest to its ready state: its memory, files, processes and devices."""
        self._lease.reset()

    def crash(self) -> None:
        """Have the guest's kernel panic, and wait until it has.

        The guest is lost then; :meth:`reboot` starts another.
        """
        with contextlib.suppress(BridgeError):
            self.session.run("echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger")
        deadline = time.monotonic() + _CRASH_SECONDS
        while self.session.machine.loss is None:
            if time.monotonic() > deadline:
                raise GuestLostError(
                    f"the guest did not panic within {_CRASH_SECONDS:g} s",
                    evidence=self._console_end(),
                )
            time.sleep(_CONSOLE_POLL_SECONDS)
        self._lease.expect_loss()

    def reboot(self) -> None:
        """End the guest, whatever its state, and start another with the same settings."""
        self._lease.replace()

    def interact(self) -> None:
        """Open a shell in the guest on this terminal, until it ends; for use while debugging."""
        from bridge.pytest_plugin.interact import open_shell

        open_shell(self._config, self.session, "a shell in the guest; `exit` goes on with the test")

    # Traces

    @contextlib.contextmanager
    def traced_by(self, tracer: Tracer) -> Iterator[None]:
        """Have ``tracer`` run all commands inside the block."""
        self._traces.append(tracer)
        if tracer not in self._lease.traces:
            self._lease.traces.append(tracer)
        try:
            yield
        finally:
            self._traces.remove(tracer)


class Tracer(Traced, Protocol):
    """Runs commands in the place of :meth:`Guest.run`: :class:`bridge.pytest_plugin.Trace`."""

    def run(self, command: Command, timeout: float | None) -> Result:
        """Run a command and return its result."""


def _words(command: Command) -> list[str]:
    if isinstance(command, str | os.PathLike):
        return ["sh", "-c", os.fspath(command)]
    return [os.fspath(word) for word in command]


def _line(command: Command) -> str:
    if isinstance(command, str | os.PathLike):
        return os.fspath(command)
    return shlex.join(_words(command))


def _told(command: Command, how: str, result: Result) -> str:
    text = f"the command {how} after {result.seconds:.1f} s: {_line(command)}"
    for name, output in (("stdout", result.stdout), ("stderr", result.stderr)):
        if output.strip():
            text += f"\n{name}:\n{_indented(output)}"
    return text


def _indented(text: str) -> str:
    return "\n".join("  | " + line for line in text.rstrip().splitlines()) or "  | (nothing)"
