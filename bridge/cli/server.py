# SPDX-License-Identifier: Apache-2.0
"""A guest that is held for others: boot it, start another after a loss, end in order."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shlex
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.cli.runner import claimed, clear, noted
from bridge.cli.streams import Streams
from bridge.config import Settings
from bridge.errors import BridgeError, GuestLostError, GuestSetupError, UsageError
from bridge.guest.guest import Guest
from bridge.guest.guest_image import find_guest_image
from bridge.results import summary as summaries
from bridge.results.coverage_files import HTML_DIRECTORY, LCOV_FILE, make_html, make_lcov
from bridge.results.merge import COVERAGE_FILE, covered_blocks, merge_results, merge_stats
from bridge.session.guest_setup import load_modules
from bridge.session.session import Session
from bridge.session.stats import Stats
from bridge.vm.network import LOCALHOST

__all__ = ["GUESTS_DIRECTORY", "GuestFile", "Provisions", "reserved_port", "serve"]

logger = logging.getLogger(__name__)

GUESTS_DIRECTORY = "guests"
"""In the directory of the results: one for each guest, by its number."""

_LOCK = "kcov-bridge-serve/"
"""What the abstract name of a server's socket begins with; its port follows."""
_UCRED = struct.Struct("3i")
_LOOK_SECONDS = 5.0
_FAILED_STARTS = 5
"""So many starts in a row may fail after the first one that did not."""
_PAUSE_SECONDS = 2.0
_SCRIPT = "/run/kcov-bridge/guest-setup"
_HOME = "/root"


@dataclass(frozen=True)
class GuestFile:
    """A file that each guest gets."""

    local: Path
    remote: str
    mode: int

    @classmethod
    def parse(cls, text: str) -> GuestFile:
        """Read ``FILE[:PATH]``; a path that ends with / is a directory.

        Raises:
            UsageError: there is no such file, or the path is not absolute.
        """
        name, colon, remote = text.rpartition(":")
        if not colon or Path(text).is_file():
            name, remote = text, ""
        # A target may change the working directory.
        local = Path(name).expanduser().absolute()
        remote = remote or f"{_HOME}/"
        if not remote.startswith("/"):
            raise UsageError(
                f"--put {text}: the path in the guest, {remote}, does not begin with /",
                hint="--put FILE:/PATH, or --put FILE for the directory /root",
            )
        if remote.endswith("/"):
            remote += local.name
        _check_readable("--put", local)
        return cls(local, remote, 0o755 if os.access(local, os.X_OK) else 0o644)


@dataclass(frozen=True)
class Provisions:
    """What each guest gets before it is ready."""

    files: Sequence[GuestFile] = ()
    setup: Path | None = None
    modules: Sequence[str] = ()

    @classmethod
    def read(cls, files: Sequence[str], setup: Path | None, modules: Sequence[str]) -> Provisions:
        """Read the flags --put, --guest-setup and --module.

        Raises:
            UsageError: a file cannot be read, or a path is not allowed.
        """
        if setup is not None:
            setup = setup.expanduser().absolute()
            _check_readable("--guest-setup", setup)
        return cls([GuestFile.parse(each) for each in files], setup, modules)


def _check_readable(flag: str, path: Path) -> None:
    try:
        with path.open("rb"):
            return
    except OSError as error:
        raise UsageError(f"{flag}: {path} cannot be read: {error.strerror}") from error


def serve(
    settings: Settings,
    provisions: Provisions,
    streams: Streams,
    *,
    ssh_port: int = 0,
    as_json: bool = False,
) -> int:
    """Hold a guest on one port until a signal comes; return 0 then.

    Raises:
        UsageError: the port, the key or the directory of the results cannot be used.
        BridgeError: the first guest does not start, or too many starts in a row fail.
    """
    with reserved_port(ssh_port) as port, claimed(settings.out) as out:
        image = find_guest_image(settings)
        image.check_key()
        clear(out)
        return _Server(settings, provisions, streams, out, port, image.ssh_key, as_json).run()


@contextlib.contextmanager
def reserved_port(port: int) -> Iterator[int]:
    """Keep other servers from a port of 127.0.0.1 while inside; 0 stands for a free one.

    Raises:
        UsageError: it is taken, or not allowed.
    """
    with contextlib.ExitStack() as stack:
        if port:
            stack.enter_context(_server_lock(port))
        # As QEMU binds it: connections of an earlier guest may linger.
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOCALHOST, port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise UsageError(
                        f"the SSH port {port} is taken by another program",
                        hint="--ssh-port N names another; without it a free one is taken",
                    ) from error
                raise UsageError(
                    f"the SSH port {port} cannot be used: {error.strerror}",
                    hint="--ssh-port takes a port from 1024 on; without it a free one is taken",
                ) from error
            chosen = int(probe.getsockname()[1])
        if not port:
            stack.enter_context(_server_lock(chosen))
        yield chosen


@contextlib.contextmanager
def _server_lock(port: int) -> Iterator[None]:
    """Hold the name of a port's server, which ends with the process."""
    name = f"\0{_LOCK}{port}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as lock:
        try:
            lock.bind(name)
        except OSError as error:
            raise UsageError(
                f"another `kcov-bridge serve`{_holder(name)} has the SSH port {port}",
                hint="--ssh-port N names another; without it a free one is taken",
            ) from error
        lock.listen()
        yield


def _holder(name: str) -> str:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock, contextlib.suppress(OSError):
        sock.settimeout(1)
        sock.connect(name)
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        return f" (process {_UCRED.unpack(credentials)[0]})"
    return ""


class _Server:
    """Guests one after the other, on one port, with results in one directory."""

    def __init__(
        self,
        settings: Settings,
        provisions: Provisions,
        streams: Streams,
        out: Path,
        port: int,
        key: Path,
        as_json: bool,
    ) -> None:
        self._settings = settings
        self._provisions = provisions
        self._streams = streams
        self._out = out
        self._port = port
        self._key = key
        self._as_json = as_json
        self._ending = False
        self._guests = 0
        self._starts = 0
        self._stats: list[Stats] = []
        self._unique: set[int] = set()
        self._began = time.monotonic()

    def run(self) -> int:
        """Serve until a signal comes."""
        error = ""
        failed = 0
        try:
            while True:
                before = self._starts
                try:
                    lost = self._serve_one()
                except BridgeError as problem:
                    if self._ending:
                        # A signal came, and what the guest covered could not be kept.
                        raise
                    failed = 1 if self._starts > before else failed + 1
                    lasting = isinstance(problem, GuestSetupError) or not self._starts
                    if lasting or failed > _FAILED_STARTS:
                        raise
                    lost = problem
                    time.sleep(_PAUSE_SECONDS)
                if lost is None:
                    return 0
                self._say_lost(lost)
        except KeyboardInterrupt:
            if not self._starts:
                error = "interrupted"
                raise
            # While a new guest was started in place of one that was lost.
            return 0
        except BaseException as problem:
            error = problem.message if isinstance(problem, BridgeError) else repr(problem)
            raise
        finally:
            self._write_results(error)

    def _serve_one(self) -> BridgeError | None:
        """Serve with one guest; return why it was lost, None if a signal came."""
        self._guests += 1
        directory = self._out / GUESTS_DIRECTORY / str(self._guests)
        session = Session(self._settings, directory, ssh_port=self._port)
        lost: BridgeError | None = None
        try:
            with session:
                try:
                    self._prepare(session)
                except KeyboardInterrupt:
                    self._ending = True
                    raise
                try:
                    self._starts += 1
                    self._say_ready(session)
                    lost = self._hold(session)
                except KeyboardInterrupt:
                    # The guest is powered down, and the session ends as one that did its work.
                    logger.info("ending")
                    self._ending = True
                    return None
                raise lost
        except BridgeError as error:
            if lost is None:
                raise
            return error
        finally:
            self._keep(session, directory)

    def _prepare(self, session: Session) -> None:
        guest, wanted = session.guest, self._provisions
        load_modules(guest, wanted.modules, "--module names")
        for file in wanted.files:
            parent = str(Path(file.remote).parent)
            guest.run(["mkdir", "-p", "--", parent], check=True)
            guest.put(file.local, file.remote, file.mode)
        if wanted.setup is not None:
            self._run_setup(guest, wanted.setup)
        session.load_symbols()

    def _run_setup(self, guest: Guest, setup: Path) -> None:
        text = setup.read_bytes()
        guest.run(["mkdir", "-p", str(Path(_SCRIPT).parent)], check=True)
        guest.put(text, _SCRIPT, 0o755)
        command = [_SCRIPT] if text.startswith(b"#!") else ["sh", _SCRIPT]
        write = self._streams.write_err
        done = guest.run(command, stdout=write, stderr=write)
        if done.exit_status:
            # What it printed is on stderr already.
            raise GuestSetupError(f"{setup} failed in the guest (exit status {done.exit_status})")

    def _hold(self, session: Session) -> BridgeError:
        """Wait until the guest is lost; return why."""
        lost = threading.Event()
        told: set[str] = set()
        forget = session.machine.add_loss_listener(lambda _: lost.set())
        try:
            while not lost.wait(_LOOK_SECONDS):
                # Of modules that whoever logged in has loaded.
                with contextlib.suppress(BridgeError):
                    session.load_symbols()
                for problem in session.target_problems():
                    if problem not in told:
                        told.add(problem)
                        logger.warning("%s", problem)
        finally:
            forget()
        return session.machine.loss or GuestLostError("the guest was lost")

    # What it says

    def _say_ready(self, session: Session) -> None:
        words = session.guest.ssh_command
        if self._as_json:
            self._print_json(
                event="ready",
                pid=os.getpid(),
                ssh_host=LOCALHOST,
                ssh_port=self._port,
                ssh_user="root",
                ssh_key=str(self._key),
                ssh_command=list(words),
                starts=self._starts,
                kernel=session.ready.kernel,
                device=session.ready.device,
                out=str(self._out),
            )
        elif self._starts == 1:
            self._print(shlex.join(words))
            logger.info(
                "holding the guest on port %d, its key is %s; Ctrl-C ends it", self._port, self._key
            )
        else:
            logger.warning("guest %d is ready on port %d again", self._starts, self._port)

    def _say_lost(self, error: BridgeError) -> None:
        logger.warning("the guest was lost: %s; starting another", error.message)
        logger.debug("%s", error.report())
        if self._as_json:
            self._print_json(event="lost", reason=error.message, starts=self._starts)

    def _print_json(self, **values: Any) -> None:
        self._print(json.dumps(values))

    def _print(self, line: str) -> None:
        try:
            self._streams.write_out(f"{line}\n".encode())
        except BrokenPipeError:
            # Whoever waited for the first line may have read enough.
            if self._starts < 1:
                raise

    # What it leaves

    def _keep(self, session: Session, directory: Path) -> None:
        """Add what a guest covered to the results."""
        stats = session.stats()
        self._stats.append(stats)
        if self._starts:
            with contextlib.suppress(BridgeError):
                self._unique |= session.device.unique
        problems: list[str] = []
        with noted(f"what guest {self._guests} covered", problems):
            merge_results(directory, self._out)

    def _write_results(self, error: str) -> None:
        problems: list[str] = []
        data_file = self._out / COVERAGE_FILE
        stats = merge_stats(self._stats)
        with noted("the figures of all guests", problems):
            blocks = covered_blocks(self._out)
            stats.blocks_covered, stats.blocks_total = blocks.covered, blocks.total
            stats.kernel_blocks_covered = blocks.kernel
            stats.pcs_unique = len(self._unique) + (stats.kernel_blocks_covered or 0)
        if data_file.is_file():
            with noted("the HTML report", problems):
                make_html(data_file, self._out / HTML_DIRECTORY)
            with noted("the LCOV report", problems):
                make_lcov(data_file, self._out / LCOV_FILE)
        with noted("summary.json", problems):
            found = summaries.Summary(
                stats,
                exit_status=BridgeError.exit_status if error else 0,
                command=("serve",),
                run_seconds=round(time.monotonic() - self._began, 3),
                error=error,
            )
            summaries.write(found, self._out / "summary.json")
        print(
            f"{'guests':>12}  {self._starts} served\n{'results in':>12}  {self._out}",
            file=self._streams.err,
        )
