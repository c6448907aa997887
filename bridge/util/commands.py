# SPDX-License-Identifier: Apache-2.0
"""The programs and phases of a build: commands with a log, phases with progress.

Guest images are built with them, and the programs of native targets.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from bridge.errors import BridgeError, ImageError, MissingDependencyError

__all__ = ["Commands", "Phases", "Progress", "disk_full", "print_progress"]

Progress = Callable[[str], None]
"""Called with lines of progress."""

_APT_NO_MIRROR = ("Temporary failure resolving", "Could not resolve", "Could not connect")
"""What apt prints if it does not reach a mirror."""
_APT = frozenset({"apt-get", "mmdebstrap"})
"""Programs whose output is apt's; others use the same words for servers of their own."""

_SUPERVISOR = Path(__file__).with_name("supervise.py")
_EVIDENCE_LINES = 15
_TICK_SECONDS = 10.0
_TERM_SECONDS = 10.0


def print_progress(line: str, product: str = "image") -> None:
    """Print progress of the build of a product to stderr."""
    print(f"{product}: {line}", file=sys.stderr, flush=True)


class Phases:
    """Reports each phase of a build at its start, and every ten seconds after that."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._start = time.monotonic()
        self._name = ""
        self._reported = self._start

    def begin(self, name: str) -> None:
        """Begin a new phase."""
        self._name = name
        self._report(name)

    def tick(self) -> None:
        """Report that the phase continues; to be called often."""
        if time.monotonic() - self._reported >= _TICK_SECONDS:
            self._report(f"still {self._name}")

    def _report(self, text: str) -> None:
        self._reported = time.monotonic()
        self._progress(f"[{self._reported - self._start:4.0f} s] {text}")

    @property
    def elapsed(self) -> float:
        """Seconds since the build began."""
        return time.monotonic() - self._start


class Commands:
    """Runs the programs of a build.

    Each runs in its own session, with its output in a log, and ends with this process, whatever
    kills that (:mod:`bridge.util.supervise`). Programs inherit ``keep_fds``, so a lock remains held
    until they have ended.

    Args:
        log: the file of their output.
        phases: reports how the build goes on.
        keep_fds: descriptors that the programs inherit.
        product: what is built, for messages.
        error: what a program that fails raises.
    """

    def __init__(
        self,
        log: Path,
        phases: Phases,
        keep_fds: Sequence[int] = (),
        *,
        product: str = "the image",
        error: type[BridgeError] = ImageError,
    ) -> None:
        self.log = log
        self.phases = phases
        self._keep_fds = tuple(keep_fds)
        self._product = product
        self._error = error

    def run(
        self,
        argv: Sequence[str],
        *,
        what: str,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        feed: Callable[[IO[bytes]], None] | None = None,
        seconds: float | None = None,
    ) -> None:
        """Run a program to its end.

        Args:
            what: names the step in errors.
            feed: writes the program's stdin.
            seconds: its time limit.

        Raises:
            ImageError: it failed; the evidence is the end of its output. (Or another class of
                error, if the constructor was given one.)
            MissingDependencyError: the program is not installed.
        """
        if cwd is not None and not cwd.is_dir():
            raise self._error(f"{what}: {argv[0]} cannot run in {cwd}, which is no directory")
        if not _is_there(argv[0], cwd, os.environ if env is None else env):
            raise MissingDependencyError(
                f"{what}: the program {argv[0]} is not installed",
                hint="`kcov-bridge doctor` says how to install it",
            )
        supervisor = [sys.executable, "-I", "-S", str(_SUPERVISOR), str(os.getpid())]
        with self.log.open("ab") as log:
            log.write(f"$ {shlex.join(argv)}\n".encode())
            log.flush()
            start = log.tell()
            with contextlib.ExitStack() as stack:
                with _interrupts_deferred():
                    process = subprocess.Popen(
                        [*supervisor, *argv],
                        stdin=subprocess.PIPE if feed else subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        env=env,
                        cwd=cwd,
                        pass_fds=self._keep_fds,
                        start_new_session=True,
                    )
                    stack.enter_context(_ended(process))
                broken = self._feed(process, feed)
                status = self._wait(process, seconds)
        if status or broken is not None:
            outcome = f"status {status}" if status >= 0 else f"signal {-status}"
            raise self._failure(argv, what, broken or outcome, start)

    def _feed(
        self, process: subprocess.Popen[bytes], feed: Callable[[IO[bytes]], None] | None
    ) -> str | None:
        """Write the program's stdin; return what failed, or None. Its output has the reason."""
        if not process.stdin or not feed:
            return None
        try:
            with process.stdin as stdin:
                feed(stdin)
        except BrokenPipeError:
            return "a closed input"
        return None

    def _wait(self, process: subprocess.Popen[bytes], seconds: float | None) -> int:
        end = None if seconds is None else time.monotonic() + seconds
        while True:
            try:
                return process.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                self.phases.tick()
            if end is not None and time.monotonic() > end:
                _kill_group(process, signal.SIGKILL)
                end = None

    def _failure(self, argv: Sequence[str], what: str, why: str, start: int) -> BridgeError:
        with self.log.open("rb") as log:
            log.seek(start)
            lines = log.read().decode(errors="replace").splitlines()
        evidence = "\n".join(deque(lines, maxlen=_EVIDENCE_LINES))
        if os.strerror(errno.ENOSPC) in evidence:
            return disk_full(self.log.parent, product=self._product, error=self._error)
        hint = ""
        of_apt = any(Path(word).name in _APT for word in argv)
        if of_apt and any(sign in evidence for sign in _APT_NO_MIRROR):
            hint = "check the network, or name another mirror of Debian: KCOV_BRIDGE_MIRROR=URI"
        return self._error(
            f"{what} failed: {Path(argv[0]).name} ended with {why}", evidence=evidence, hint=hint
        )


def _is_there(program: str, cwd: Path | None, environment: Mapping[str, str]) -> bool:
    """Return whether a program can be found, by a path from ``cwd`` or by its name on PATH."""
    if "/" in program:
        return (cwd or Path()).joinpath(program).is_file()
    return shutil.which(program, path=environment.get("PATH")) is not None


@contextlib.contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Defer Ctrl-C to the end of the block, so that no program is started and then forgotten."""
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield
        return
    pending = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: pending.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if pending.is_set():
            signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Kill the process and its children at the end of the block."""
    try:
        yield
    finally:
        if process.poll() is None:
            _kill_group(process, signal.SIGTERM)
            try:
                process.wait(timeout=_TERM_SECONDS)
            except subprocess.TimeoutExpired:
                _kill_group(process, signal.SIGKILL)
                process.wait()


def _kill_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def disk_full(
    directory: Path,
    needed: int = 0,
    *,
    product: str = "the image",
    error: type[BridgeError] = ImageError,
) -> BridgeError:
    """Return the error for a full disk; ``needed`` in bytes, 0 if unknown."""
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    status = os.statvfs(existing)
    free = status.f_bavail * status.f_frsize
    wants = f", {needed >> 20} MiB are needed" if needed else ""
    return error(
        f"there is no room to build {product}: {free >> 20} MiB are free in {existing}{wants}",
        hint="make room, or set KCOV_BRIDGE_CACHE to a directory on another disk",
    )
