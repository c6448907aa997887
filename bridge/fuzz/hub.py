# SPDX-License-Identifier: Apache-2.0
"""The hub of a campaign: merges what its jobs report, and tells each what the others found.

The hub does not know how messages travel (:mod:`bridge.fuzz.cluster`) or what a job is
(:mod:`bridge.fuzz.job`). It keeps a case if it covers a PC or an edge that no case before it did.
What is kept becomes a *segment*: cases and the coverage that they were the first to reach. A job
knows how many segments it has and gets only the later ones, so deltas travel, never a whole corpus,
except to a job that starts. A segment is encoded once for all jobs.

The edges are kept in ``edges.bin`` in the directory of the campaign, words of 64 bits in the order
of the machine. It may lack the last ones after a kill: then some cases are kept twice over.
"""

from __future__ import annotations

import contextlib
import enum
import os
import re
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from bridge.errors import InfrastructureError
from bridge.fuzz.job import STARTING, Figures, FoundFinding
from bridge.fuzz.novelty import Coverage, CoverageSet
from bridge.fuzz.store import Offer, Store, case_name
from bridge.fuzz.wire import (
    Reply,
    Report,
    ReportedCase,
    Segment,
    WireError,
    decode_report,
    encode_reply,
    encode_segment,
)

__all__ = ["EDGES_FILE", "Answer", "CampaignView", "FindingSink", "Hub", "JobState", "JobView"]

EDGES_FILE: Final = "edges.bin"
"""Name of the file of edges in the directory of a campaign."""

_SEGMENT_BYTES: Final = 256 << 10
"""A segment gets no further case when it is this large."""

_REPLY_BYTES: Final = 1 << 20
"""A reply gets no further segment when it is this large."""

_CACHED_BYTES: Final = 64 << 20
"""Encoded segments in memory; others are made again when a job needs them."""

_JOBS_PER_SECOND: Final = 40
"""How many jobs report in a second, as long as that is more often than :data:`_SLOWEST`."""

_FASTEST: Final = 1.0
_SLOWEST: Final = 30.0

_OVERDUE: Final = 30.0
"""Seconds without a report after which a job counts as silent; more if reports are rare."""


class FindingSink(Protocol):
    """Keeps findings."""

    def __call__(self, finding: FoundFinding, /) -> bool:
        """Keep a finding; return whether it is a new one. It is on the disk then."""


class JobState(enum.StrEnum):
    """What the hub knows of a job."""

    WAITING = "waiting"
    """It did not start yet, or is about to start elsewhere."""
    RUNNING = "running"
    SILENT = "silent"
    """It runs, but its reports are overdue."""
    ENDED = "ended"
    FAILED = "failed"


_WITH_VMS: Final = (JobState.RUNNING, JobState.SILENT)
"""A late report is no sign that the VM is gone; a job that vanished waits for another run."""


@dataclass(frozen=True, slots=True)
class JobView:
    """A job as the hub knows it.

    Attributes:
        worker: where it runs, or ran last.
        starts: how often it was started.
        silent: seconds since its last report.
        executions: of all its runs.
        error: why its last run ended, if that was not the hub's wish.
    """

    number: int
    state: JobState
    worker: str
    starts: int
    silent: float
    executions: int
    figures: Figures
    error: str = ""

    @property
    def starting(self) -> bool:
        """Whether it starts, and may take long to say anything."""
        return self.state is JobState.RUNNING and self.figures.state == STARTING


@dataclass(frozen=True, slots=True)
class CampaignView:
    """All jobs together, at one moment."""

    seconds: float
    executions: int
    blocks: int
    edges: int
    corpus: int
    findings: int
    vms: int
    stability: float | None
    jobs: tuple[JobView, ...]
    problems: tuple[str, ...]
    """The last things that went wrong; one sentence each."""

    def workers(self) -> dict[str, int]:
        """Return the VMs that run on each worker."""
        vms: dict[str, int] = {}
        for job in self.jobs:
            if job.state in _WITH_VMS:
                vms[job.worker] = vms.get(job.worker, 0) + job.figures.vms
        return vms


class Answer(NamedTuple):
    """A reply, encoded, and where it goes."""

    job: int
    run: str
    message: bytes


@dataclass(slots=True)
class _Run:
    """A run of a job: from its start to its end, or until it is not heard of any more."""

    run: str
    worker: str
    heard: float
    figures: Figures = field(default_factory=Figures)
    state: JobState = JobState.RUNNING
    error: str = ""


@dataclass(slots=True)
class _Job:
    starts: int = 0
    executions: int = 0
    """Of earlier runs."""
    run: _Run | None = None

    @property
    def all_executions(self) -> int:
        return self.executions + (self.run.figures.executions if self.run else 0)


class Hub:
    """Merges reports. Not thread-safe: one thread calls."""

    def __init__(
        self,
        store: Store,
        jobs: int,
        *,
        elapsed: float | None = None,
        executions: int | None = None,
        keep_finding: FindingSink | None = None,
        tell: Callable[[str], object] = lambda problem: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Continue from what the store has.

        Args:
            store: where cases and findings go.
            jobs: how many jobs there are.
            elapsed: the campaign's clock so far; by default the store's.
            executions: of the campaign so far; by default the store's.
            keep_finding: by default :meth:`bridge.fuzz.store.Store.add_finding`.
            tell: takes a sentence about what goes wrong, as :attr:`CampaignView.problems` has it.
            clock: seconds.

        Raises:
            InfrastructureError: the store's files cannot be read.
        """
        self._store = store
        self._clock = clock
        self._told = tell
        self._began = clock() - (store.elapsed if elapsed is None else elapsed)
        self._executions = store.executions if executions is None else executions
        self._keep_finding = keep_finding or self._add_finding
        self._jobs = [_Job() for _ in range(jobs)]
        self._retired: set[str] = set()
        self._stopping = False
        self._problems: list[str] = []
        self._findings = {
            path.name for path in store.findings.iterdir() if not path.name.startswith(".")
        }
        # The store adds the PCs; edges are the hub's.
        self._covered = CoverageSet(store.covered)
        self._edges = _EdgeFile(store)
        self._covered.edges.update(self._edges.words)
        self._segments = _Segments(store, self._edges.words)
        self.messages = 0
        """Reports so far."""
        self.bytes_in = 0
        self.bytes_out = 0

    def close(self) -> None:
        """Close the file of edges; the store stays open."""
        self._edges.close()

    @property
    def seconds(self) -> float:
        """The campaign's own clock."""
        return self._clock() - self._began

    @property
    def executions(self) -> int:
        """Executions of all jobs, in all their runs."""
        return self._executions + sum(job.all_executions for job in self._jobs)

    @property
    def interval(self) -> float:
        """Seconds between reports of a job."""
        return min(_SLOWEST, max(_FASTEST, len(self._jobs) / _JOBS_PER_SECOND))

    def stop(self) -> None:
        """Answer each further report with the order to end."""
        self._stopping = True

    def retire(self, job: int, reason: str) -> None:
        """Give up the current run of a job; should it report again, it is told to end.

        The job counts as waiting for another run.
        """
        each = self._jobs[job]
        if each.run is not None:
            self._retired.add(each.run.run)
            each.executions += each.run.figures.executions
            each.run = None
            self._tell(f"job {job}: {reason}")

    def receive(self, messages: Iterable[bytes]) -> list[Answer]:
        """Merge reports; their cases and findings are on the disk when this returns.

        Messages that make no sense get no answer.

        Raises:
            InfrastructureError: something cannot be written. No report of these counts as answered:
                the jobs keep their cases and send them again.
        """
        reports: list[Report] = []
        for message in messages:
            self.messages += 1
            self.bytes_in += len(message)
            try:
                report = decode_report(message)
            except WireError as error:
                self._tell(f"a message was left out: {error}")
                continue
            if not 0 <= report.job < len(self._jobs):
                self._tell(f"a message was left out: there is no job {report.job}")
                continue
            reports.append(report)
        live = [report for report in reports if self._note(report)]
        self._merge(reports)
        for report in live:
            self._note_end(report)
        answers = [self._answer(report) for report in reports]
        self.bytes_out += sum(len(answer.message) for answer in answers)
        return answers

    def refuse(self, messages: Iterable[bytes]) -> list[Answer]:
        """Answer reports that cannot be kept: their jobs are to end, and keep what they have."""
        answers = []
        for message in messages:
            with contextlib.suppress(WireError):
                report = decode_report(message)
                reply = Reply(report.sequence, position=report.position, stop=True, kept=False)
                answers.append(Answer(report.job, report.run, encode_reply(reply)))
                run = self._jobs[report.job].run if 0 <= report.job < len(self._jobs) else None
                if run is not None and run.run == report.run and report.ended:
                    run.state = JobState.ENDED
        return answers

    def adopt(self, messages: Iterable[bytes]) -> int:
        """Merge cases and findings of reports that an earlier run of the campaign never saw.

        Returns:
            how many cases and findings they had.

        Raises:
            InfrastructureError: something cannot be written.
        """
        reports = []
        for message in messages:
            try:
                reports.append(decode_report(message))
            except WireError as error:
                self._tell(f"a report that was not sent is damaged and was left out: {error}")
        self._merge(reports)
        return sum(len(report.cases) + len(report.findings) for report in reports)

    def view(self) -> CampaignView:
        """Return the campaign as it is now."""
        now = self._clock()
        overdue = max(_OVERDUE, 3 * self.interval)
        jobs = tuple(_view(number, job, now, overdue) for number, job in enumerate(self._jobs))
        running = [job.figures for job in jobs if job.state in _WITH_VMS]
        known = [each.stability for each in running if each.stability is not None]
        return CampaignView(
            seconds=self.seconds,
            executions=self.executions,
            blocks=len(self._covered.pcs),
            edges=len(self._covered.edges),
            corpus=len(self._store),
            findings=len(self._findings),
            vms=sum(each.vms for each in running),
            stability=sum(known) / len(known) if known else None,
            jobs=jobs,
            problems=tuple(self._problems),
        )

    def _note(self, report: Report) -> bool:
        """Take who reports and its figures; return whether it is the job's current run."""
        if report.run in self._retired:
            return False
        job = self._jobs[report.job]
        if job.run is None or job.run.run != report.run:
            if job.run is not None and job.run.state is JobState.RUNNING:
                self.retire(report.job, f"{job.run.worker} vanished, {report.worker} goes on")
            elif job.run is not None:
                self._retired.add(job.run.run)
                job.executions += job.run.figures.executions
            job.run = _Run(report.run, report.worker, self._clock())
            job.starts += 1
        job.run.heard = self._clock()
        if report.figures.executions >= job.run.figures.executions:
            job.run.figures = report.figures
        return True

    def _note_end(self, report: Report) -> None:
        run = self._jobs[report.job].run
        if run is None or run.run != report.run or not report.ended:
            return
        if report.error and run.state is not JobState.FAILED:
            self._tell(f"job {report.job} failed: {_in_short(report.error)}")
        run.state = JobState.FAILED if report.error else JobState.ENDED
        run.error = report.error

    def _merge(self, reports: Sequence[Report]) -> None:
        for report in reports:
            for finding in report.findings:
                self._keep_finding(finding)
                self._findings.add(finding.name)
        kept: list[tuple[str, ReportedCase]] = []
        fresh = CoverageSet()
        for report in reports:
            for case in report.cases:
                new = fresh.new(self._covered.new(case.coverage))
                if new:
                    fresh.update(new)
                    kept.append((report.run, ReportedCase(case.data, new)))
        if not kept:
            return
        seconds, executions = self.seconds, self.executions
        known = {case.data for _, case in kept if case_name(case.data) in self._store}
        self._store.add(
            Offer(case.data, seconds, executions, case.coverage.pcs) for _, case in kept
        )
        self._covered.edges |= fresh.edges
        self._segments.extend(kept, known)
        edges = array("Q", (each for _, case in kept for each in case.coverage.edges))
        if problem := self._edges.append(edges):
            self._tell(problem)

    def _answer(self, report: Report) -> Answer:
        retired = report.run in self._retired
        if report.ended or retired or self._stopping:
            reply = Reply(report.sequence, position=report.position, stop=True)
        else:
            segments, position = self._segments.after(report.position, report.run)
            reply = Reply(
                report.sequence,
                segments,
                position,
                more=position < len(self._segments),
                interval=self.interval,
            )
        return Answer(report.job, report.run, encode_reply(reply))

    def _add_finding(self, finding: FoundFinding) -> bool:
        try:
            return self._store.add_finding(finding.name, finding.files)
        except ValueError as error:
            self._tell(f"a finding got another name: {error}")
            files = {
                re.sub(r"[^A-Za-z0-9_.-]", "-", f"x{name}"): data
                for name, data in finding.files.items()
            }
            return self._store.add_finding(f"unnamed-{case_name(finding.name.encode())}", files)

    def _tell(self, problem: str) -> None:
        self._problems = [*self._problems[-19:], problem]
        self._told(problem)


def _in_short(error: str) -> str:
    """Return what happened, and the hint, as one line."""
    lines = error.strip().splitlines()
    if lines[0].startswith("Traceback "):
        return lines[-1]
    return f"{lines[0]} ({lines[-1]})" if lines[-1].startswith("hint: ") else lines[0]


def _view(number: int, job: _Job, now: float, overdue: float) -> JobView:
    if (run := job.run) is None:
        return JobView(number, JobState.WAITING, "", job.starts, 0.0, job.executions, Figures())
    silent = now - run.heard
    starting = run.figures.state == STARTING
    late = run.state is JobState.RUNNING and silent > overdue and not starting
    return JobView(
        number,
        JobState.SILENT if late else run.state,
        run.worker,
        job.starts,
        silent,
        job.all_executions,
        run.figures,
        run.error,
    )


class _EdgeFile:
    """``edges.bin``, open to append."""

    def __init__(self, store: Store) -> None:
        self._path = store.directory / EDGES_FILE
        self.words = array("Q")
        """The edges that it had, in the order in which they came."""
        self._broken = False
        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            with contextlib.ExitStack() as stack:
                stack.callback(os.close, self._fd)
                with open(self._fd, "rb", closefd=False) as file:
                    data = file.read()
                self.words.frombytes(data[: len(data) // 8 * 8])
                self._size = len(self.words) * 8
                os.ftruncate(self._fd, self._size)
                stack.pop_all()
        except OSError as error:
            raise self._failed(error) from error

    def append(self, words: array[int]) -> str:
        """Add edges; return what went wrong with the file, which is not needed to go on."""
        if self._broken:
            return ""
        data = words.tobytes()
        try:
            if os.pwrite(self._fd, data, self._size) == len(data):
                self._size += len(data)
                return ""
            reason = "the disk is full"
        except OSError as error:
            reason = error.strerror or "unknown error"
        # What comes later would not be where it belongs.
        self._broken = True
        return f"cannot write {self._path}: {reason}; a resume will keep some cases twice over"

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _failed(self, error: OSError) -> InfrastructureError:
        return InfrastructureError(
            f"cannot write {self._path}: {error.strerror}",
            hint="make room on the disk, then go on with --resume",
        )


@dataclass(frozen=True, slots=True)
class _Part:
    """A segment by its places: in the store's list of cases, and in the lists of coverage."""

    cases: range
    pcs: range
    edges: range
    origin: str
    """The run that found all of it; empty if there were several."""


class _Segments:
    """What was kept, in parts that travel."""

    def __init__(self, store: Store, edges: array[int]) -> None:
        self._store = store
        self._pcs = array("Q", store.covered)
        self._edges = edges
        self._parts: list[_Part] = []
        self._encoded: OrderedDict[int, bytes] = OrderedDict()
        self._cached = 0
        self._cases = 0
        sizes = ((store.corpus / name).stat().st_size for name in store.since(0))
        self._cut(list(sizes), "", (0, 0))

    def __len__(self) -> int:
        return len(self._parts)

    def extend(self, kept: Sequence[tuple[str, ReportedCase]], known: set[bytes]) -> None:
        """Add cases that the store has just taken; ``known`` ones it had before."""
        sizes = [
            len(case.data)
            for case in {case.data: case for _, case in kept}.values()
            if case.data not in known
        ]
        before = len(self._pcs), len(self._edges)
        for _, case in kept:
            self._pcs.extend(case.coverage.pcs)
            self._edges.extend(case.coverage.edges)
        origins = {run for run, _ in kept}
        self._cut(sizes, origins.pop() if len(origins) == 1 else "", before)

    def after(self, position: int, run: str) -> tuple[list[bytes], int]:
        """Return segments from a position on that a run did not find itself, and the next one."""
        found: list[bytes] = []
        size = 0
        position = max(0, position)
        while position < len(self._parts) and size < _REPLY_BYTES:
            if self._parts[position].origin != run:
                found.append(self._message(position))
                size += len(found[-1])
            position += 1
        return found, position

    def _cut(self, sizes: Sequence[int], origin: str, before: tuple[int, int]) -> None:
        """Make parts of the cases that have none; the first takes all new coverage."""
        pcs, edges = range(before[0], len(self._pcs)), range(before[1], len(self._edges))
        for count in _chunks(sizes):
            cases = range(self._cases, self._cases + count)
            self._parts.append(_Part(cases, pcs, edges, origin))
            self._cases += count
            pcs = edges = range(0)
        if pcs or edges:
            self._parts.append(_Part(range(0), pcs, edges, origin))

    def _message(self, number: int) -> bytes:
        if (message := self._encoded.get(number)) is not None:
            self._encoded.move_to_end(number)
            return message
        part = self._parts[number]
        names = self._store.since(part.cases.start, len(part.cases)) if part.cases else ()
        message = encode_segment(
            Segment(
                [self._store.read(name) for name in names],
                Coverage(
                    self._pcs[part.pcs.start : part.pcs.stop],
                    self._edges[part.edges.start : part.edges.stop],
                ),
            )
        )
        self._encoded[number] = message
        self._cached += len(message)
        while self._cached > _CACHED_BYTES and len(self._encoded) > 1:
            self._cached -= len(self._encoded.popitem(last=False)[1])
        return message


def _chunks(sizes: Sequence[int]) -> Iterator[int]:
    """Yield how many cases go into each part."""
    count = total = 0
    for size in sizes:
        count += 1
        total += size
        if total >= _SEGMENT_BYTES:
            yield count
            count = total = 0
    if count:
        yield count
