# SPDX-License-Identifier: Apache-2.0
"""Reports of the guest's agent on the second serial port: JSON, one object a line.

``{"state":"ready","kernel":…,"device":…,"uptime_ms":…,"mem_available_kib":…,"channel":…}`` or
``{"state":"unhealthy","what":…,"why":…}``. The guest is not trusted: the length of a line is
limited, a line that is no report is counted and dropped, and each text is cut and cleaned before
it is shown.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from bridge.vm.console import plain_text

__all__ = ["LINE_LIMIT", "Ready", "Report", "ReportReader", "Unhealthy", "parse_report"]

LINE_LIMIT = 4096
"""Bytes of a report at most."""

_TEXT_LIMIT = 512
_NUMBER_LIMIT = 1 << 62


@dataclass(frozen=True)
class Ready:
    """The guest is set up.

    Attributes:
        kernel: the kernel's release.
        device: the path of the kcov device.
        uptime_ms: milliseconds since the kernel started.
        mem_available_kib: KiB of memory that the guest has left.
        boot_seconds: from the start of QEMU to this report, by the host's clock.
        channel: version of the protocol in which the agent takes commands
            (:mod:`bridge.vm.channel`); 0 if it takes none.
    """

    kernel: str
    device: str
    uptime_ms: int
    mem_available_kib: int
    boot_seconds: float = 0.0
    channel: int = 0


@dataclass(frozen=True)
class Unhealthy:
    """The guest runs, but setting it up failed: at ``what``, and ``why``."""

    what: str
    why: str


Report = Ready | Unhealthy


def _text(value: object) -> str:
    if not isinstance(value, str):
        return "?"
    printable = plain_text(value[:_TEXT_LIMIT].encode(errors="replace"))
    return printable.replace("\n", " ").strip() or "?"


def _number(value: object) -> int:
    # bool is an int; a float can be infinite.
    if type(value) is not int:
        return 0
    return min(max(value, 0), _NUMBER_LIMIT)


def parse_report(line: bytes) -> Report | None:
    """Return the report in a line, None if it is no report. Never raises."""
    if len(line) > LINE_LIMIT:
        return None
    try:
        report = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(report, dict):
        return None
    if report.get("state") == "ready":
        return Ready(
            kernel=_text(report.get("kernel")),
            device=_text(report.get("device")),
            uptime_ms=_number(report.get("uptime_ms")),
            mem_available_kib=_number(report.get("mem_available_kib")),
            channel=_number(report.get("channel")),
        )
    if report.get("state") == "unhealthy":
        return Unhealthy(what=_text(report.get("what")), why=_text(report.get("why")))
    return None


class ReportReader:
    """Parses the guest's bytes into reports. For one thread.

    Attributes:
        ignored: how many lines were no report.
    """

    def __init__(self) -> None:
        self.ignored = 0
        self._line = bytearray()
        self._too_long = False

    def feed(self, chunk: bytes) -> list[Report]:
        """Return the reports that these bytes complete. Never raises; keeps at most one line."""
        reports: list[Report] = []
        *ended, rest = chunk.split(b"\n")
        for piece in ended:
            self._extend(piece)
            report = self._take_line()
            if report is not None:
                reports.append(report)
        self._extend(rest)
        return reports

    def forget(self) -> None:
        """Drop the incomplete line."""
        self._line.clear()
        self._too_long = False

    def _extend(self, piece: bytes) -> None:
        if len(self._line) + len(piece) > LINE_LIMIT:
            self._too_long = True
            self._line.clear()
        elif not self._too_long:
            self._line += piece

    def _take_line(self) -> Report | None:
        line, too_long = bytes(self._line).strip(), self._too_long
        self._line.clear()
        self._too_long = False
        if not line and not too_long:
            return None
        report = None if too_long else parse_report(line)
        if report is None:
            self.ignored += 1
        return report
