# SPDX-License-Identifier: Apache-2.0
"""A target that serves in a process of its own, forked from one in which it is ready.

The process that is ready holds the target made, and prepared if it has a method ``prepare``. Each
:meth:`ForkedTarget.renew` ends the process that serves and forks another, whose ``start`` then
begins with what was ready: imports, data, sockets that listen. So a guest's reset and this one
together lead back to the same state on both sides.

Threads do not survive a fork. So ``start`` starts them, in the child, and a target that has
threads when it is ready is refused. The lines of the child are noted in memory that both processes
share (:mod:`bridge.sources.python.lines`), so the one that is ready hands them over.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bridge.errors import BridgeError, TargetError, UsageError
from bridge.session.target_host import InProcessTarget, describe_failure, read_attribute
from bridge.targets.description import Description, describe
from bridge.targets.faults import ServingThreads, SharedCount, TargetFaults, stacks_of
from bridge.targets.registry import TargetMaker
from bridge.targets.thread import foreign

__all__ = ["ForkedTarget"]

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_STOP_SECONDS = 20.0
_ANSWER_SECONDS = 5.0
_DUMP_SECONDS = 0.5
"""How long a child may take to write where its threads are."""
_POLL_SECONDS = 0.001
_STACKS_LIMIT = 64 * 1024
_STOP, _PROBLEMS, _READ, _STACKS = "stop", "problems", "read", "stacks"


class ForkedTarget(InProcessTarget):
    """As :class:`bridge.session.target_host.InProcessTarget`, with a service that is forked.

    Args:
        faults: what watches this process, and from the fork on the child.
        own_threads: the threads of this process that may be there when the child is forked; read
            when it starts.
        not_for_child: sockets that a child closes, so that their other side sees the end of this
            process.
        count: is told which process serves.
    """

    def __init__(
        self,
        target: str | TargetMaker,
        directory: Path | None,
        *,
        faults: TargetFaults,
        own_threads: Sequence[threading.Thread] = (),
        not_for_child: Sequence[socket.socket] = (),
        count: SharedCount | None = None,
        out: Path | None = None,
        start_seconds: float | None = None,
    ) -> None:
        super().__init__(target, directory, out=out, start_seconds=start_seconds)
        self._faults = faults
        self._own_threads = own_threads
        self._not_for_child = tuple(not_for_child)
        self._count = count
        self._prepared = False
        self._child: _Child | None = None
        self._libc = ctypes.CDLL(None, use_errno=True)

    def _serve(self) -> Description:
        if not self._prepared:
            if (prepare := getattr(self.target, "prepare", None)) is not None:
                self.thread.call_foreign(self._who, "on prepare", prepare, self._start_seconds)
            self._check_threads()
            self._prepared = True
        child = self._child = self.thread.call(self._fork)
        if self._count is not None:
            self._count.set_pid(child.pid)
        try:
            return Description.from_dict(child.ask_for("start", self._start_seconds))
        except BaseException:
            self._child = None
            child.kill()
            raise

    def _check_threads(self) -> None:
        known = {*self._own_threads, threading.main_thread(), self.thread.thread}
        if others := [each.name for each in threading.enumerate() if each not in known]:
            raise UsageError(
                f"{self._who} cannot be forked: it has started threads before start(): "
                + ", ".join(others),
                hint="a fork keeps no threads: start them in start(), not in __init__(), "
                'prepare() or an import; or use reset="restart"',
            )

    def _fork(self) -> _Child:
        """Fork the process that serves; runs on the target's thread, which the child keeps."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        ours, theirs = socket.socketpair()
        stacks = os.memfd_create("kcov-bridge-stacks", os.MFD_CLOEXEC)
        parent = os.getpid()
        with warnings.catch_warnings():
            # Python 3.12 and newer warn of threads; those that are here wait for this one.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            status = 1
            try:
                ours.close()
                self._be_child(parent, theirs, stacks)
                status = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                with contextlib.suppress(BaseException):
                    sys.stderr.flush()
                os._exit(status)
        theirs.close()
        return _Child(pid, ours, stacks, self._who)

    def _be_child(self, parent: int, channel: socket.socket, stacks: int) -> None:
        os.setsid()
        # The thread that forked lives as long as the parent.
        self._libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:
            return
        for sock in self._not_for_child:
            sock.close()
        faulthandler.enable(stacks, all_threads=True)
        self._faults.after_fork()
        target = self.target
        serving: ServingThreads | None = None

        def start() -> object:
            nonlocal serving
            before = ServingThreads.running()
            with foreign(self._who, "on start"):
                target.start()
            serving = ServingThreads(before)
            return describe(target).as_dict()

        def problems() -> object:
            return [*self._faults.take(), *(serving.take_ended() if serving is not None else ())]

        def stop() -> object:
            with foreign(self._who, "on stop"):
                target.stop()
            return None

        def read(name: str, call: str | None) -> object:
            return read_attribute(self._who, target, name, call)

        work: dict[str, Callable[..., object]] = {
            "start": start,
            _PROBLEMS: problems,
            _STOP: stop,
            _READ: read,
            _STACKS: lambda: stacks_of(threading.enumerate()),
        }
        with channel, channel.makefile("rwb") as stream:
            while line := stream.readline():
                what, *arguments = json.loads(line)
                try:
                    answer = {"result": work[what](*arguments)}
                except BridgeError as error:
                    answer = {"failure": describe_failure(error)}
                stream.write(json.dumps(answer).encode() + b"\n")
                stream.flush()
                if what == _STOP:
                    return

    def renew(self) -> Description:
        """As :class:`bridge.session.target_host.TargetHost`: forks the process anew."""
        if self._child is not None:
            self._child.kill()
            self._child = None
        return self._serve()

    def problems(self) -> list[str]:
        """As :class:`bridge.session.target_host.TargetHost`; with the exceptions of the child."""
        child = self._child
        if child is None or child.told:
            return []
        if (death := child.death()) is not None:
            child.told = True
            return [f"{death}\n{child.fault_stacks()}".rstrip()]
        try:
            return list(child.ask_for(_PROBLEMS, _ANSWER_SECONDS))
        except TargetError as error:
            child.told = True
            return [f"{error.message}\n{error.evidence}".rstrip()]

    def stacks(self) -> str:
        """As :class:`bridge.session.target_host.TargetHost`, of the child."""
        child = self._child
        return str(child.ask_for(_STACKS, _ANSWER_SECONDS)) if child is not None else ""

    def read(self, name: str, call: str | None) -> str:
        """As :class:`bridge.session.target_host.InProcessTarget`, of the child."""
        child = self._child
        if child is None:
            raise TargetError(f"{self._who} does not run")
        return str(child.ask_for(_READ, _ANSWER_SECONDS, name, call))

    def _end_service(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        try:
            if (death := child.death()) is None:
                child.ask_for(_STOP, _STOP_SECONDS)
            elif not child.told:
                raise TargetError(death)
        finally:
            child.kill()


class _Child:
    """The parent's side of a process that serves.

    Args:
        sock: what it answers on.
        stacks: a file into which it writes where its threads are when a fault ends it.
        who: the target, for messages.
    """

    def __init__(self, pid: int, sock: socket.socket, stacks: int, who: str) -> None:
        self.pid = pid
        self.told = False
        """Whether its death, or that it does not answer, was reported."""
        self._who = who
        self._stacks = stacks
        self._socket = sock
        self._stream = sock.makefile("rwb")
        self._status: int | None = None

    def ask_for(self, what: str, seconds: float | None, *arguments: object) -> Any:
        """Have the child do something and return its result.

        Raises:
            TargetError, UsageError: what the child raised; or it died, or did not answer in time.
        """
        self._socket.settimeout(seconds)
        try:
            self._stream.write(json.dumps([what, *arguments]).encode() + b"\n")
            self._stream.flush()
            line = self._stream.readline()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGABRT)
            self._wait(_DUMP_SECONDS)
            raise TargetError(
                f"{self._who} did not answer within {seconds or 0:g} s ({what})",
                evidence=self.fault_stacks(),
                hint="--target-timeout allows it more time" if what == "start" else "",
            ) from None
        except OSError:
            line = b""
        if not line:
            death = self.death(_ANSWER_SECONDS)
            raise TargetError(
                death or f"{self._who} closed its connection", evidence=self.fault_stacks()
            )
        answer = json.loads(line)
        if (failure := answer.get("failure")) is not None:
            raised = UsageError if failure["usage"] else TargetError
            raise raised(failure["message"], evidence=failure["evidence"], hint=failure["hint"])
        return answer["result"]

    def death(self, seconds: float = 0.0) -> str | None:
        """Return how the process ended; None if it runs."""
        status = self._wait(seconds)
        if status is None:
            return None
        code = os.waitstatus_to_exitcode(status)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        return f"the process of {self._who} {how}"

    def fault_stacks(self) -> str:
        """Return where its threads were when a fault ended it; empty where none did."""
        return os.pread(self._stacks, _STACKS_LIMIT, 0).decode(errors="replace")

    def _wait(self, seconds: float) -> int | None:
        deadline = time.monotonic() + seconds
        while self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = status
            elif time.monotonic() >= deadline:
                break
            else:
                time.sleep(_POLL_SECONDS)
        return self._status

    def kill(self) -> None:
        """End the process and those that it started. Safe to call twice."""
        with contextlib.suppress(OSError):
            # Its own group, once it has made one.
            os.killpg(self.pid, signal.SIGKILL)
        if self._status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            _, self._status = os.waitpid(self.pid, 0)
        # What was not sent to a process that is dead is of no account.
        with contextlib.suppress(OSError):
            self._stream.close()
        self._socket.close()
        if self._stacks >= 0:
            os.close(self._stacks)
            self._stacks = -1
