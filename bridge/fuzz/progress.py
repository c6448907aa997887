# SPDX-License-Identifier: Apache-2.0
"""``progress.jsonl``: how a campaign went, a line for each sample.

The file is JSON lines. The first line is the header: ``format`` is ``"kcov-bridge fuzz progress"``
and ``version`` the number :data:`VERSION`, which goes up when a key is taken away or changes its
meaning. New keys may come at any time, so a reader ignores those it does not know. Each further
line is one sample, with the fields of :class:`Sample` as keys.

A line is complete only with its newline: a campaign that was killed may leave a part of its last
line behind. A campaign that is resumed goes on in the same file, after such a part.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from bridge.errors import InfrastructureError

__all__ = [
    "FORMAT",
    "PROGRESS_FILE",
    "VERSION",
    "Progress",
    "ProgressWriter",
    "Sample",
    "TCurve",
    "read_progress",
]

FORMAT: Final = "kcov-bridge fuzz progress"
"""The value of the key ``format`` in the header."""

VERSION: Final = 1
"""The value of the key ``version`` in the header."""

PROGRESS_FILE: Final = "progress.jsonl"
"""Name of the file in the directory of a campaign."""

TCurve = list[tuple[float, float]]
"""Points of a figure, with x rising."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The figures of a campaign at one moment, of all jobs together."""

    seconds: float
    """The campaign's own clock: time between its end and a resume does not count."""
    executions: int
    blocks: int
    """Different blocks that were covered, those of the seeds included."""
    corpus: int = 0
    """Cases that are kept."""
    findings: int = 0
    """Different findings."""
    vms: int = 0
    """VMs that run."""
    stability: float | None = None
    """How often the same case gives the same map, 0 to 1; None if that is not known."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What :func:`read_progress` found."""

    samples: tuple[Sample, ...] = ()
    problems: tuple[str, ...] = ()
    """What is missing, and why; one sentence each."""

    @property
    def last(self) -> Sample | None:
        """The last sample; None if there is none."""
        return self.samples[-1] if self.samples else None

    def curve(self, figure: str, over: str = "seconds") -> TCurve:
        """Return a figure over another one: names of fields of :class:`Sample`.

        Samples in which the figure is not known are left out.
        """
        return [
            (getattr(sample, over), value)
            for sample in self.samples
            if (value := getattr(sample, figure)) is not None
        ]

    def rates(self, seconds: float = 0.0) -> TCurve:
        """Return executions per second, at the end of each interval.

        Args:
            seconds: length of an interval; it begins with the last sample that is as old, or with
                the first one.
        """
        points: TCurve = []
        earlier: deque[Sample] = deque()
        for sample in self.samples:
            if earlier and sample.seconds <= earlier[-1].seconds:
                continue
            while len(earlier) > 1 and sample.seconds - earlier[1].seconds >= seconds:
                earlier.popleft()
            if earlier:
                before = earlier[0]
                done = sample.executions - before.executions
                points.append((sample.seconds, max(0, done) / (sample.seconds - before.seconds)))
            earlier.append(sample)
        return points


class ProgressWriter:
    """Writes samples; a context manager.

    Each line is written at once, with one system call, so a kill loses nothing before it.

    Raises:
        InfrastructureError: the file cannot be written; also :meth:`write`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise self._failed(error) from error
        try:
            size = os.fstat(self._fd).st_size
            if not size:
                self._append(json.dumps({"format": FORMAT, "version": VERSION}))
            elif os.pread(self._fd, 1, size - 1) != b"\n":
                # What a kill has left of a line stands alone.
                os.write(self._fd, b"\n")
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise self._failed(error) from error
            raise

    def write(self, sample: Sample) -> None:
        """Append a sample."""
        self._append(json.dumps(asdict(sample), allow_nan=False))

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _append(self, text: str) -> None:
        data = f"{text}\n".encode()
        try:
            written = os.write(self._fd, data)
        except OSError as error:
            raise self._failed(error) from error
        if written != len(data):
            # The disk became full in the middle; the reader skips the part.
            raise InfrastructureError(
                f"cannot write {self._path}: only {written} of {len(data)} bytes fit",
                hint="make room on the disk, then go on with --resume",
            )

    def _failed(self, error: OSError) -> InfrastructureError:
        return InfrastructureError(
            f"cannot write {self._path}: {error.strerror}",
            hint="check that its directory exists, is writable and has room left",
        )


def read_progress(path: Path) -> Progress:
    """Read the samples of a campaign.

    Lines that are damaged are left out, and :attr:`Progress.problems` says so; so are samples that
    go back in time. The part of a last line is no problem: the campaign may be writing it.

    Raises:
        InfrastructureError: the file cannot be read, is no such file, or is of another version.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InfrastructureError(f"cannot read {path}: {error.strerror}") from error
    # What follows the last newline is not complete.
    header, *lines = text.split("\n")[:-1] or [""]
    _check_header(path, header)
    samples: list[Sample] = []
    damaged = backward = 0
    for line in lines:
        try:
            sample = _sample(json.loads(line))
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            damaged += 1
            continue
        last = samples[-1] if samples else None
        if last and (sample.seconds < last.seconds or sample.executions < last.executions):
            backward += 1
        else:
            samples.append(sample)
    problems = []
    if damaged:
        problems.append(f"{damaged:,} lines of {path} are damaged and were left out")
    if backward:
        problems.append(f"{backward:,} samples of {path} go back in time and were left out")
    return Progress(tuple(samples), tuple(problems))


def _check_header(path: Path, line: str) -> None:
    try:
        header = json.loads(line)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise InfrastructureError(f"{path} is no record of a campaign's progress")
    if header.get("version") != VERSION:
        raise InfrastructureError(
            f"{path} has version {header.get('version')}, this program reads version {VERSION}"
        )


def _sample(values: Any) -> Sample:
    """Return the sample of a line; raises ValueError, TypeError or KeyError for anything else."""
    found: dict[str, Any] = {}
    for each in fields(Sample):
        value = values.get(each.name, each.default) if isinstance(values, dict) else None
        if value is None and each.default is None:
            found[each.name] = None
            continue
        kinds = int if each.type == "int" else int | float
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise ValueError(each.name)
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(each.name)
        found[each.name] = value if each.type == "int" else float(value)
    return Sample(**found)
