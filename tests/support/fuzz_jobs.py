# SPDX-License-Identifier: Apache-2.0
"""Jobs of a campaign without an engine: a process that plays a recorded stream of cases.

A stream is made from a seed: each number gives the same cases in every run, as the same engine with
the same seed would. Each case covers a few PCs of its own and many that others cover too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence

from bridge.fuzz.campaign_job import CampaignJob
from bridge.fuzz.job import Figures, FoundCase, FoundFinding, Job, JobSettings, News

__all__ = [
    "BASE",
    "FailingJob",
    "PlayedJob",
    "PrintingJob",
    "RealOrPlayedJob",
    "stream",
    "stream_pcs",
]

BASE = 0xFFFFFFFF81000000


def stream(number: int, length: int) -> Iterator[FoundCase]:
    """Yield the cases of a job."""
    numbers = random.Random(f"stream {number}")
    for count in range(length):
        common = [BASE + 16 * int(numbers.paretovariate(0.4)) % 4096 for _ in range(20)]
        own = BASE + 0x100000 * (number + 1) + 16 * count
        yield FoundCase(numbers.randbytes(numbers.randrange(4, 900)), ((*common, own), (own,)))


def stream_pcs(number: int, length: int) -> set[int]:
    """Return all that a stream covers."""
    return {pc for case in stream(number, length) for trace in case.traces for pc in trace}


class PlayedJob:
    """Plays a stream in a process of its own.

    Values: ``length`` of the stream, ``rate`` in cases per second, ``finding`` to have one.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""
        self._executions = 0
        self._findings: list[FoundFinding] = []
        self._given = 0

    def start(self, settings: JobSettings, seeds: Sequence[bytes], /) -> None:
        values = settings.values
        program = (
            "from tests.support.fuzz_jobs import play; "
            f"play({settings.number}, {values.get('length', 100)}, {values.get('rate', 50)})"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, env=_environment()
        )
        self._given = len(seeds)
        if values.get("finding"):
            files = {"case": b"boom", "console.log": str(settings.number).encode()}
            self._findings.append(FoundFinding("kernel-BUG-at-fs-9p-0123", files))

    def take_news(self) -> News:
        cases = []
        for line in self._lines():
            case = json.loads(line)
            self._executions += 10
            traces = tuple(tuple(trace) for trace in case["traces"])
            cases.append(FoundCase(bytes.fromhex(case["data"]), traces))
        findings, self._findings = self._findings, []
        figures = Figures(
            self._executions, 1, 0.9, "playing", {"given": self._given, "process": os.getpid()}
        )
        return News(cases, findings, figures)

    def give(self, cases: Sequence[bytes], /) -> None:
        self._given += len(cases)

    def stop(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            self._process.wait()

    def _lines(self) -> list[bytes]:
        if self._process is None or self._process.stdout is None:
            return []
        fd = self._process.stdout.fileno()
        while select.select([fd], [], [], 0)[0]:
            data = os.read(fd, 1 << 20)
            if not data:
                break
            self._rest += data
        *lines, self._rest = self._rest.split(b"\n")
        return lines


class PrintingJob(PlayedJob):
    """Prints, as a target may, here and in another process."""

    def start(self, settings: JobSettings, seeds: Sequence[bytes], /) -> None:
        print("printed by the job", flush=True)
        print("complained by the job", file=sys.stderr, flush=True)
        subprocess.run(["echo", "printed by a program"], check=True)
        super().start(settings, seeds)


class FailingJob(PlayedJob):
    """Fails at its start, as an engine that is not installed."""

    def start(self, settings: JobSettings, seeds: Sequence[bytes], /) -> None:
        raise SystemExit("there is no afl-fuzz")


class RealOrPlayedJob:
    """A job with a VM for the first numbers of a campaign, a played one for the others.

    Values: ``real``, how many have a VM; ``plan`` for those; what :class:`PlayedJob` takes.
    """

    def __init__(self) -> None:
        self._job: Job = PlayedJob()

    def start(self, settings: JobSettings, seeds: Sequence[bytes], /) -> None:
        if settings.number < settings.values["real"]:
            self._job = CampaignJob()
            settings = dataclasses.replace(settings, values=settings.values["plan"])
        self._job.start(settings, seeds)

    def take_news(self) -> News:
        news = self._job.take_news()
        more = {**news.figures.more, "process": os.getpid()}
        return dataclasses.replace(news, figures=dataclasses.replace(news.figures, more=more))

    def give(self, cases: Sequence[bytes], /) -> None:
        self._job.give(cases)

    def stop(self) -> None:
        self._job.stop()


def play(number: int, length: int, rate: float) -> None:
    """Write a stream to standard output, then wait, as an engine that finds nothing more."""
    die_with_parent()
    for count, case in enumerate(stream(number, length), 1):
        line = json.dumps({"data": case.data.hex(), "traces": case.traces})
        try:
            print(line, flush=True)
        except BrokenPipeError:
            # Whoever reads it was killed.
            os._exit(0)
        if rate:
            select.select([], [], [], count and 1 / rate)
    signal.pause()


def die_with_parent() -> None:
    """Die when the thread that started this process does."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
