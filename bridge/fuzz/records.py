# SPDX-License-Identifier: Apache-2.0
"""Reads all that the directory of a campaign has; the campaign may still run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bridge.errors import InfrastructureError, UsageError
from bridge.fuzz.findings import CASE_TEXT, Finding, load_finding
from bridge.fuzz.progress import PROGRESS_FILE, Progress, read_progress
from bridge.fuzz.store import CASES_FILE, FINDINGS_DIRECTORY, Case, read_campaign, read_cases
from bridge.fuzz.titles import Kind
from bridge.sources import PC

__all__ = ["CampaignRecord", "FoundFinding", "read_record"]

_TEXT = 64 << 10
"""Bytes that are read of a text of a finding."""


@dataclass(frozen=True, slots=True)
class FoundFinding:
    """A finding, with what its directory says for people."""

    directory: Path
    finding: Finding
    case: str = ""
    """The case in readable form."""
    evidence: str = ""
    """The report of the target or the kernel."""


@dataclass(slots=True)
class CampaignRecord:
    """What the directory of a campaign has."""

    directory: Path
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Settings and versions."""
    progress: Progress = field(default_factory=Progress)
    cases: tuple[Case, ...] = ()
    findings: list[FoundFinding] = field(default_factory=list)
    """The first one that was seen comes first."""
    problems: list[str] = field(default_factory=list)
    """What is missing, and why; one sentence each."""

    @property
    def name(self) -> str:
        """A short name for people."""
        return self.directory.resolve().name or str(self.directory)

    def covered(self) -> set[PC]:
        """Return all PCs that a case reached."""
        return {pc for case in self.cases for pc in case.pcs}

    def seeds_covered(self) -> set[PC]:
        """Return the PCs that a seed reached first.

        What a seed reached after a case of the campaign had is not among them; seeds run first.
        """
        return {pc for case in self.cases if case.seed for pc in case.pcs}

    def fact(self, name: str) -> str:
        """Return a setting or version as text; "" if it is not known."""
        return _as_text(self.facts.get(name))


def read_record(directory: Path) -> CampaignRecord:
    """Read the directory of a campaign.

    Lines and findings that are damaged are no errors: ``problems`` says so.

    Raises:
        UsageError: the directory is not that of a campaign.
        InfrastructureError: a file cannot be read, or is of another version.
    """
    if not directory.is_dir():
        raise UsageError(
            f"there is no directory {directory}", hint="name the directory of a campaign (--out)"
        )
    record = CampaignRecord(directory, read_campaign(directory).facts)
    if (directory / PROGRESS_FILE).is_file():
        record.progress = read_progress(directory / PROGRESS_FILE)
        record.problems += record.progress.problems
    if record.progress.last is None:
        record.problems.append("the campaign has no figures yet")
    if (directory / CASES_FILE).is_file():
        found = read_cases(directory)
        record.cases = found.cases
        record.problems += found.problems
    else:
        record.problems.append(
            f"there is no {CASES_FILE}: the blocks that were reached are unknown"
        )
    _read_findings(record)
    return record


def _read_findings(record: CampaignRecord) -> None:
    try:
        directories = sorted((record.directory / FINDINGS_DIRECTORY).iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise InfrastructureError(
            f"cannot read {record.directory / FINDINGS_DIRECTORY}: {error.strerror}"
        ) from error
    for directory in directories:
        # One that is being written has a hidden name.
        if directory.is_dir() and not directory.name.startswith("."):
            try:
                record.findings.append(_finding(directory))
            except UsageError as error:
                record.problems.append(f"a finding was left out: {error.message}")
    record.findings.sort(key=lambda each: each.finding.seconds)


def _finding(directory: Path) -> FoundFinding:
    finding = load_finding(directory)
    names = ("traceback.txt", "console.log", "output")
    if finding.kind is Kind.KERNEL:
        names = ("console.log", "traceback.txt", "output")
    evidence = next(filter(None, (_text(directory / name) for name in names)), "")
    return FoundFinding(directory, finding, _text(directory / CASE_TEXT), evidence)


def _text(path: Path) -> str:
    """Return the beginning of a text; "" if there is none."""
    try:
        with path.open("rb") as file:
            return file.read(_TEXT).decode(errors="replace").strip("\n")
    except OSError:
        return ""


def _as_text(value: Any) -> str:
    """Return a value of JSON as people write it."""
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return ", ".join(map(_as_text, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else json.dumps(value)
