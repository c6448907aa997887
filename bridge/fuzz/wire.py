# SPDX-License-Identifier: Apache-2.0
"""Messages between the jobs of a campaign and its hub, as bytes.

A message is a MessagePack array whose first element is :data:`VERSION`, compressed with zlib if
that makes it shorter; the first byte says which. Coverage travels as words of 64 bits,
little-endian.
"""

from __future__ import annotations

import sys
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from bridge.errors import MissingDependencyError
from bridge.fuzz.job import Figures, FoundFinding
from bridge.fuzz.novelty import Coverage

try:
    import msgpack
except ImportError as error:
    raise MissingDependencyError(
        "campaigns need the package msgpack", hint="pip install 'kcov-bridge[fuzz]'"
    ) from error

__all__ = [
    "VERSION",
    "Reply",
    "Report",
    "ReportedCase",
    "Segment",
    "WireError",
    "decode_reply",
    "decode_report",
    "decode_segment",
    "encode_reply",
    "encode_report",
    "encode_segment",
]

VERSION: Final = 1
"""Goes up with each change of a message."""

_LARGEST: Final = 1 << 30
"""No message is larger when it is not compressed."""


T = TypeVar("T")


class WireError(ValueError):
    """A message is not what it should be."""


@dataclass(frozen=True, slots=True)
class ReportedCase:
    """A case of a job, with the coverage that was new to the job."""

    data: bytes
    coverage: Coverage


@dataclass(frozen=True, slots=True)
class Report:
    """What a job tells the hub.

    Attributes:
        job: number of the job.
        run: differs each time the job is started.
        sequence: number of this report; one that gets no answer is sent again.
        position: how many segments the job has.
        worker: where it runs.
        ended: the job is over, and this is its last report.
        error: why it is over, if that was not the hub's wish.
    """

    job: int
    run: str
    sequence: int
    position: int
    worker: str = ""
    cases: Sequence[ReportedCase] = ()
    findings: Sequence[FoundFinding] = ()
    figures: Figures = field(default_factory=Figures)
    ended: bool = False
    error: str = ""


@dataclass(frozen=True, slots=True)
class Reply:
    """What the hub answers.

    Attributes:
        sequence: of the report.
        segments: what the job does not have, encoded (:func:`decode_segment`).
        position: how many segments the job has with these.
        more: there are further segments already.
        stop: the job is to end.
        interval: seconds until the next report.
        kept: the cases and findings of the report are on the disk.
    """

    sequence: int
    segments: Sequence[bytes] = ()
    position: int = 0
    more: bool = False
    stop: bool = False
    interval: float = 1.0
    kept: bool = True


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of the corpus, with what was covered first by it."""

    cases: Sequence[bytes]
    coverage: Coverage


def encode_report(report: Report) -> bytes:
    """Return the message."""
    figures = report.figures
    return _pack(
        [
            VERSION,
            report.job,
            report.run,
            report.sequence,
            report.position,
            report.worker,
            [[case.data, *_words(case.coverage)] for case in report.cases],
            [[each.name, dict(each.files), each.times] for each in report.findings],
            [
                figures.executions,
                figures.vms,
                figures.stability,
                figures.state,
                dict(figures.more),
            ],
            report.ended,
            report.error,
        ]
    )


def decode_report(message: bytes) -> Report:
    """Return the report of a message.

    Raises:
        WireError: it is none.
    """
    try:
        (job, run, sequence, position, worker, cases, findings, figures, ended, error) = _unpack(
            message
        )
        return Report(
            _is(int, job),
            _is(str, run),
            _is(int, sequence),
            _is(int, position),
            _is(str, worker),
            [ReportedCase(_is(bytes, data), _coverage(pcs, edges)) for data, pcs, edges in cases],
            [
                FoundFinding(
                    _is(str, name),
                    {_is(str, key): _is(bytes, data) for key, data in files.items()},
                    _is(int, times),
                )
                for name, files, times in findings
            ],
            _figures(*figures),
            _is(bool, ended),
            _is(str, error),
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise WireError(f"not a report: {error}") from error


def encode_reply(reply: Reply) -> bytes:
    """Return the message. Segments are compressed already."""
    return b"\0" + _dump(
        [
            VERSION,
            reply.sequence,
            list(reply.segments),
            reply.position,
            reply.more,
            reply.stop,
            reply.interval,
            reply.kept,
        ]
    )


def decode_reply(message: bytes) -> Reply:
    """Return the reply of a message.

    Raises:
        WireError: it is none.
    """
    try:
        sequence, segments, position, more, stop, interval, kept = _unpack(message)
        return Reply(
            _is(int, sequence),
            [_is(bytes, each) for each in segments],
            _is(int, position),
            _is(bool, more),
            _is(bool, stop),
            float(interval),
            _is(bool, kept),
        )
    except (ValueError, TypeError) as error:
        raise WireError(f"not a reply: {error}") from error


def encode_segment(segment: Segment) -> bytes:
    """Return the message."""
    return _pack([VERSION, list(segment.cases), *_words(segment.coverage)])


def decode_segment(message: bytes) -> Segment:
    """Return the segment of a message.

    Raises:
        WireError: it is none.
    """
    try:
        cases, pcs, edges = _unpack(message)
        return Segment([_is(bytes, each) for each in cases], _coverage(pcs, edges))
    except (ValueError, TypeError) as error:
        raise WireError(f"not a segment: {error}") from error


def _figures(
    executions: object, vms: object, stability: Any, state: object, more: dict[Any, Any]
) -> Figures:
    return Figures(
        max(0, _is(int, executions)),
        max(0, _is(int, vms)),
        None if stability is None else float(stability),
        _is(str, state),
        {_is(str, name): float(value) for name, value in more.items()},
    )


def _is(kind: type[T], value: object) -> T:
    if not isinstance(value, kind):
        raise TypeError(f"{type(value).__name__} where {kind.__name__} should be")
    return value


def _words(coverage: Coverage) -> list[bytes]:
    return [_little_endian(coverage.pcs).tobytes(), _little_endian(coverage.edges).tobytes()]


def _coverage(pcs: object, edges: object) -> Coverage:
    found = Coverage.of()
    found.pcs.frombytes(_is(bytes, pcs))
    found.edges.frombytes(_is(bytes, edges))
    return Coverage(_little_endian(found.pcs), _little_endian(found.edges))


def _little_endian(words: array[int]) -> array[int]:
    if sys.byteorder == "little":
        return words
    swapped = array("Q", words)
    swapped.byteswap()
    return swapped


def _pack(values: list[Any]) -> bytes:
    plain = _dump(values)
    if len(plain) < 256:
        return b"\0" + plain
    packed = zlib.compress(plain, 1)
    return b"\1" + packed if len(packed) < len(plain) else b"\0" + plain


def _unpack(message: bytes) -> list[Any]:
    """Return the elements after the version; raises ValueError or TypeError."""
    kind, body = message[:1], message[1:]
    if kind == b"\1":
        stream = zlib.decompressobj()
        try:
            body = stream.decompress(body, _LARGEST)
        except zlib.error as error:
            raise WireError(str(error)) from error
        if not stream.eof or stream.unused_data:
            raise WireError("it is cut, or too large")
    elif kind != b"\0":
        raise WireError("unknown kind of message")
    try:
        values = msgpack.unpackb(body)
    except (ValueError, msgpack.UnpackException) as error:
        raise WireError(str(error)) from error
    if not isinstance(values, list) or not values:
        raise WireError("no array")
    if values[0] != VERSION:
        raise WireError(
            f"version {str(values[0])[:20]} where this program has {VERSION}: "
            "install the same kcov-bridge on all machines"
        )
    return values[1:]


def _dump(values: list[Any]) -> bytes:
    data: bytes = msgpack.packb(values)
    return data
