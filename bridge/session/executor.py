# SPDX-License-Identifier: Apache-2.0
"""How a command runs in the guest under kcov."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from bridge.device.abi import SLOTS, Comparison
from bridge.device.calls import CallBook, LoggedCalls
from bridge.device.streams import Stream
from bridge.errors import DoorbellError, IncompleteError, RunTimeoutError
from bridge.guest.guest import EVIDENCE, line_of
from bridge.session.device_host import DeviceHost, reason_of
from bridge.sources.comparisons import LIMIT as COMPARISONS_LIMIT
from bridge.trace.call import Call

if TYPE_CHECKING:
    from bridge.guest.guest import CommandResult, Guest, Input, Output

__all__ = ["Executor", "GuestExecutor", "KcovResult"]

logger = logging.getLogger(__name__)

_AREA_WORDS = 1 << 14
"""Size of the area of each thread that is traced; it is emptied when it is full."""
_WATCHED_AREA_WORDS = 1 << 21
"""The same where the guest kernel fills it by itself between two system calls, if the region has
room: one call may have half a million PCs."""
_BITMAP_WORDS = 1 << 13
"""A bit for more blocks than a kernel has that one process reaches."""
_CALL_BITMAP_WORDS = 1 << 11
"""The same for the blocks of a few calls; the guest clears it at each call of a trace."""


@dataclass(frozen=True)
class KcovResult:
    """What a command did under kcov: its exit status, its PCs in order, its output.

    The PCs of many are read from a file when they are asked for (see
    :class:`bridge.device.streams.PcLog`). ``untraced``: how many processes and threads were not
    traced, because as many were traced already as can be. ``calls``: the system calls with the code
    that each reached, in the order in which they were entered, if a trace was asked for.
    """

    exit_status: int
    pcs: Sequence[int]
    stdout: bytes
    stderr: bytes
    untraced: int = 0
    calls: Sequence[Call] = ()


class Executor(Protocol):
    """A way to run a command in the guest under kcov."""

    def kcov(
        self,
        command: Sequence[str],
        *,
        follow: bool,
        unique: bool | None,
        trace: bool = False,
        timeout: float | None = None,
        stdout: Output | None = None,
        stderr: Output | None = None,
        stdin: Input | bytes = b"",
    ) -> KcovResult:
        """Run ``command`` and return what it did.

        Args:
            command: its words; bytes that are no text as surrogates (:func:`os.fsdecode`).
            follow: trace its children and threads too.
            unique: record each PC once a process; None: once a call if there is a trace, else once
                a process, where that is possible and the guest kernel is a source.
            trace: have ``calls`` in the result.
            timeout: seconds.
            stdout, stderr: are given the output as it comes.
            stdin: its input.

        Raises:
            RunTimeoutError: it did not end in time.
            GuestLostError: the guest went away.
            IncompleteError: the PCs could not all be kept.
        """

    def compare(
        self, command: Sequence[str], *, follow: bool, timeout: float | None = None
    ) -> Sequence[Comparison]:
        """Run ``command`` and return what the target compares meanwhile; raises as above."""


class GuestExecutor:
    """Runs ``kcov-exec`` in the guest; the PCs come by way of the device, in a stream.

    Args:
        guest: where the commands run.
        device: whose streams they trace into.
        watched: whether the guest kernel writes into areas by itself.
        directory: takes the unnamed files of many PCs; None for the system's temporary directory.
        can_be_unique: whether the device's personality can record each PC once.
        explain: turns the records of calls, with the PCs of the stream, into calls.
        cut_off: is given the PCs and the calls of a command that did not end well.
    """

    def __init__(
        self,
        guest: Guest,
        device: DeviceHost,
        *,
        watched: bool,
        directory: Path | None,
        can_be_unique: bool,
        explain: Callable[[LoggedCalls, Sequence[int]], Sequence[Call]],
        cut_off: Callable[[Sequence[int], Sequence[Call]], object],
    ) -> None:
        self._guest = guest
        self._device = device
        self._watched = watched
        self._directory = directory
        self._can_be_unique = can_be_unique
        self._explain = explain
        self._cut_off = cut_off

    def kcov(
        self,
        command: Sequence[str],
        *,
        follow: bool,
        unique: bool | None,
        trace: bool = False,
        timeout: float | None = None,
        stdout: Output | None = None,
        stderr: Output | None = None,
        stdin: Input | bytes = b"",
    ) -> KcovResult:
        """As :class:`Executor`."""
        once_a_call = unique is None and trace and self._watched and self._can_be_unique
        if unique is None:
            unique = self._watched and self._can_be_unique
        bitmap_words = _CALL_BITMAP_WORDS if once_a_call else _BITMAP_WORDS
        stream = Stream(
            _WATCHED_AREA_WORDS if self._watched else _AREA_WORDS,
            bitmap_words=bitmap_words if unique else 0,
            calls=CallBook(self._directory) if trace else None,
            unique_per_call=once_a_call,
            directory=self._directory,
        )
        try:
            result = self._run(stream, command, follow, timeout, stdout, stderr, stdin)
            stream.check()
            if stream.dropped:
                raise IncompleteError(
                    f"the PCs are incomplete: {stream.dropped:,} did not fit into an area between "
                    "two returns",
                    hint="record less of the kernel (--kernel-exclude), or take a larger region "
                    "(--region MIB)",
                )
        except BaseException:
            calls: Sequence[Call] = ()
            with contextlib.suppress(OSError):
                calls = self._calls(stream)
            self._cut_off(stream.pcs, calls)
            raise
        return KcovResult(
            result.exit_status,
            stream.pcs,
            result.stdout,
            result.stderr,
            stream.untraced,
            self._calls(stream),
        )

    def _calls(self, stream: Stream) -> Sequence[Call]:
        return self._explain(stream.calls.calls, stream.pcs) if stream.calls is not None else ()

    def compare(
        self, command: Sequence[str], *, follow: bool, timeout: float | None = None
    ) -> Sequence[Comparison]:
        """As :class:`Executor`."""
        stream = Stream(_AREA_WORDS, comparisons=True, directory=self._directory)
        self._run(stream, command, follow, timeout)
        stream.check()
        if stream.dropped:
            logger.warning(
                "%d comparisons are missing: more than %d came between two returns, or they did "
                "not fit",
                stream.dropped,
                COMPARISONS_LIMIT,
            )
        return stream.records

    def _run(
        self,
        stream: Stream,
        command: Sequence[str],
        follow: bool,
        timeout: float | None,
        stdout: Output | None = None,
        stderr: Output | None = None,
        stdin: Input | bytes = b"",
    ) -> CommandResult:
        """Run a command whose processes trace into ``stream``, which is finished at the end."""
        close = functools.partial(self._device.close_stream, stream)

        def close_if_possible() -> None:
            with contextlib.suppress(DoorbellError):
                close()

        options = ["-s", f"{stream.number:#x}", *(["-f"] if follow else [])]
        words = ["kcov-exec", *options, "--", *command]
        try:
            before = self._device.unanswered()
            failures = self._device.source_failures
            self._device.open_stream(stream)
            result = self._guest.run(
                words,
                timeout=timeout,
                stdout=stdout,
                stderr=stderr,
                stdin=stdin,
                before_kill=close_if_possible,
            )
            close()
            after = self._device.unanswered()
        except RunTimeoutError as error:
            close_if_possible()
            # It names the command that the caller gave.
            message = error.message.replace(line_of(words), line_of(command))
            raise RunTimeoutError(message, evidence=error.evidence, hint=error.hint) from None
        except BaseException:
            close_if_possible()
            raise
        finally:
            stream.finish()
        if not stream.joined:
            # Its process joins the stream before it executes the command.
            raise IncompleteError(
                f"the command was not run, because it could not be traced: {line_of(command)}",
                evidence=result.stderr[-EVIDENCE:].decode(errors="replace"),
                hint="the guest's message says why; if this machine did not answer the guest in "
                "time, run the command again while it is less busy",
            )
        failure = self._device.doorbell.last_failure
        if self._device.source_failures > failures and failure is not None:
            reason, evidence = reason_of(failure)
            raise IncompleteError(f"the PCs are incomplete: {reason}", evidence=evidence)
        untraced = after.untraced - before.untraced
        if untraced > 0:
            raise IncompleteError(
                f"the PCs are incomplete: {untraced:,} processes or threads were not traced, "
                "because this machine did not answer the guest in time",
                hint="run the command again while this machine is less busy",
            )
        gave_up = after.gave_up - before.gave_up
        if gave_up > 0:
            logger.warning(
                "PCs may be missing: the guest stopped waiting for the host %d times; "
                "is this machine overloaded?",
                gave_up,
            )
        if stream.untraced:
            logger.warning(
                "%d processes or threads were not traced: at most %d can be traced at a time, and "
                "each needs room in the region (--region)",
                stream.untraced,
                SLOTS - 1,
            )
        return result
