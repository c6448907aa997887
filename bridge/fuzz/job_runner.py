# SPDX-License-Identifier: Apache-2.0
"""Runs one job on the machine where it is, and exchanges news with the campaign's hub."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, Protocol

from bridge.errors import BridgeError, InfrastructureError
from bridge.fuzz.job import STARTING, Figures, FoundFinding, Job, JobFactory, JobSettings
from bridge.fuzz.novelty import CoverageSet
from bridge.fuzz.outbox import Outbox, leftover_reports
from bridge.fuzz.wire import (
    Reply,
    Report,
    ReportedCase,
    WireError,
    decode_reply,
    decode_report,
    decode_segment,
    encode_report,
)

__all__ = ["OUTBOX_DIRECTORY", "HubGoneError", "Link", "run_job"]

OUTBOX_DIRECTORY: Final = "outbox"
"""Name of the directory of outboxes in a job's directory."""

_TICK: Final = 1.0
"""Seconds between two looks at what the job found."""

_RESEND: Final = 15.0
"""Seconds after which a report that has no answer is sent again."""

_PATIENCE: Final = 120.0
"""Seconds without an answer after which there is no hub any more."""

_REPORT_BYTES: Final = 4 << 20
"""A report gets nothing further when it is this large."""


class HubGoneError(InfrastructureError):
    """The campaign does not answer any more; what it did not confirm is in the outbox."""


class Link(Protocol):
    """The way to the hub and back."""

    def send(self, message: bytes, /) -> None:
        """Send a report.

        Raises:
            HubGoneError: the hub cannot be reached any more.
        """

    def receive(self, seconds: float, /) -> bytes | None:
        """Return the next answer; None if there is none in time.

        Raises:
            HubGoneError: there will be none.
        """


class _Runner:
    """A run of a job."""

    def __init__(
        self,
        job: Job,
        settings: JobSettings,
        link: Link,
        worker: str,
        outbox: Outbox,
        ordered: bool,
    ) -> None:
        self._job = job
        self._settings = settings
        self._link = link
        self._worker = worker
        self._outbox = outbox
        self._ordered = ordered
        self._covered = CoverageSet()
        self._own: set[int] = set()
        """Hashes of the cases that the job found, so that they are not given back to it."""
        self._pending: list[tuple[Path | None, Report]] = []
        """What is not confirmed, with its file."""
        self._figures = Figures(state=STARTING)
        self._playing = False
        self._sequence = 0
        self._position = 0
        self._answered = time.monotonic()

    def take_leftovers(self, messages: Sequence[bytes]) -> None:
        """Send what an earlier run left, too; it goes into this run's outbox."""
        for message in messages:
            with contextlib.suppress(WireError):
                self._put(decode_report(message))

    def run(self) -> None:
        """Start the job and carry its news until the hub says stop."""
        reply, seeds = self._exchange()
        while reply.more and not reply.stop:
            reply, given = self._exchange()
            seeds += given
        if reply.stop:
            return
        self._job.start(self._settings, seeds)
        self._playing = True
        due = time.monotonic()
        while not reply.stop:
            self._take_news()
            if time.monotonic() >= due:
                reply, cases = self._exchange()
                if cases:
                    self._job.give(cases)
                due = time.monotonic() + (0 if self._more(reply) else reply.interval)
            else:
                time.sleep(max(0.01, min(_TICK, due - time.monotonic())))

    def finish(self, error: str) -> None:
        """Stop the job, and send what is left; the last report says how it ended."""
        trouble = error
        self._playing = False
        for step in (self._job.stop, self._take_news):
            try:
                step()
            except BaseException:
                trouble = trouble or traceback.format_exc()
        while True:
            last = sum(_size(each) for _, each in self._pending) <= _REPORT_BYTES
            reply, _ = self._exchange(ended=last, error=trouble if last else "")
            if last or not reply.kept:
                return

    def _more(self, reply: Reply) -> bool:
        return reply.more or sum(_size(each) for _, each in self._pending) > _REPORT_BYTES

    def _take_news(self) -> None:
        news = self._job.take_news()
        self._figures = news.figures
        cases = []
        for case in news.cases:
            if found := self._covered.take(case.traces, ordered=self._ordered, again=case.again):
                cases.append(ReportedCase(case.data, found))
                self._own.add(hash(case.data))
        if cases or news.findings:
            self._put(self._report(cases, news.findings))

    def _put(self, report: Report) -> None:
        path: Path | None = None
        # Without room here it is sent all the same: the campaign's disk may be another one.
        with contextlib.suppress(InfrastructureError):
            path = self._outbox.put(encode_report(report))
        self._pending.append((path, report))

    def _report(self, cases: Sequence[ReportedCase], findings: Sequence[FoundFinding]) -> Report:
        return Report(
            self._settings.number,
            self._outbox.run,
            self._sequence,
            self._position,
            self._worker,
            cases,
            findings,
            self._figures,
        )

    def _exchange(self, *, ended: bool = False, error: str = "") -> tuple[Reply, list[bytes]]:
        """Send what is pending; return the reply and the cases in it."""
        self._sequence += 1
        sent = 0
        size = 0
        cases: list[ReportedCase] = []
        findings: list[FoundFinding] = []
        for _, each in self._pending:
            if sent and size > _REPORT_BYTES:
                break
            cases += each.cases
            findings += each.findings
            size += _size(each)
            sent += 1
        report = replace(self._report(cases, findings), ended=ended, error=error)
        reply = self._send(encode_report(report))
        if reply.kept:
            for path, _ in self._pending[:sent]:
                if path is not None:
                    self._outbox.done(path)
            del self._pending[:sent]
        self._position = max(self._position, reply.position)
        given: list[bytes] = []
        for message in reply.segments:
            segment = decode_segment(message)
            self._covered.update(segment.coverage)
            given += [case for case in segment.cases if hash(case) not in self._own]
        return reply, given

    def _send(self, message: bytes) -> Reply:
        """Send a report until it is answered; keep what the job finds meanwhile."""
        self._link.send(message)
        sent = time.monotonic()
        while True:
            answer = self._link.receive(_TICK)
            if answer is not None:
                reply = decode_reply(answer)
                # An earlier one may have come twice.
                if reply.sequence == self._sequence:
                    self._answered = time.monotonic()
                    return reply
                continue
            if self._playing:
                self._take_news()
            now = time.monotonic()
            if now - self._answered > _PATIENCE:
                raise HubGoneError(
                    f"the campaign did not answer for {_PATIENCE:.0f} s",
                    hint="go on with it by --resume",
                )
            if now - sent > _RESEND:
                self._link.send(message)
                sent = now


def run_job(
    make_job: JobFactory,
    settings: JobSettings,
    link: Callable[[str], contextlib.AbstractContextManager[Link]],
    *,
    worker: str,
    ordered: bool,
) -> str:
    """Run a job until the hub says stop.

    Args:
        make_job: makes the job.
        settings: for the job; its directory is made if it does not exist.
        link: makes the way to the hub for a run of this name.
        worker: name of this machine or process.
        ordered: PCs come in order, so that edges count.

    Returns:
        why the job failed; empty if it ended as the hub wished. The hub knows it too.

    Raises:
        HubGoneError: the hub does not answer; the outbox has what it did not confirm.
        InfrastructureError: the job's directory cannot be written.
    """
    outboxes = settings.directory / OUTBOX_DIRECTORY
    with contextlib.ExitStack() as stack:
        outbox = stack.enter_context(Outbox(outboxes))
        way = stack.enter_context(link(outbox.run))
        job = make_job()
        stack.callback(_stop_quietly, job)
        runner = _Runner(job, settings, way, worker, outbox, ordered)
        with leftover_reports(outboxes) as messages:
            runner.take_leftovers(messages)
        error = ""
        try:
            runner.run()
        except (HubGoneError, WireError):
            raise
        except BridgeError as failure:
            # It says for itself what happened and what to do: also the engine's own words.
            error = failure.report()
        except BaseException:
            # Code of an engine or a target may raise anything, SystemExit included.
            error = traceback.format_exc()
        runner.finish(error)
        return error


def _stop_quietly(job: Job) -> None:
    """Stop a job whose own trouble is known already."""
    with contextlib.suppress(BaseException):
        job.stop()


def _size(report: Report) -> int:
    return sum(
        len(case.data) + 8 * (len(case.coverage.pcs) + len(case.coverage.edges))
        for case in report.cases
    ) + sum(len(data) for finding in report.findings for data in finding.files.values())
