# SPDX-License-Identifier: Apache-2.0
"""The findings of a campaign: a folder for each, which is whole as soon as it has its name.

=================== =============================================================================
in the folder       what
=================== =============================================================================
``finding.json``    title, kind, stack, how often, when, with which settings and versions
``case``            the first case that led to it
``case.txt``        its readable form, where the harness has one
``case-SHA-256``    more cases that led to it, a few (the first digits of their SHA-256)
``console.log``     the guest's console and its kernel's log since the reset before
``traceback.txt``   what the target reported, and what guest and target were doing
``coverage.txt``    the PCs of the case, a line each, an empty line between two tasks
``output``          what the harness wrote to stderr, its end
=================== =============================================================================

A folder is made under a hidden name, written to the disk, and renamed; :meth:`Findings.record`
returns after that. So what it returned is there, whatever ends this process. Several processes may
record into the same directory.

``finding.json`` is one JSON object. ``format`` is ``"kcov-bridge finding"`` and ``version`` the
number :data:`VERSION`, which goes up when a key is taken away or changes its meaning; new keys may
come at any time. The other keys are the fields of :class:`Finding`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

from bridge.errors import InfrastructureError, UsageError
from bridge.fuzz.slot_events import Suspect
from bridge.fuzz.titles import Fault, Kind
from bridge.session.target_host import TargetState
from bridge.util.files import remove, sync

__all__ = [
    "CASE",
    "CASES_KEPT",
    "CASE_TEXT",
    "FINDING",
    "FORMAT",
    "VERSION",
    "Finding",
    "Findings",
    "OutputError",
    "Place",
    "files_of",
    "finding_of",
    "load_finding",
]

FORMAT: Final = "kcov-bridge finding"
VERSION: Final = 1
FINDING: Final = "finding.json"
CASE: Final = "case"
CASES_KEPT: Final = 4
"""How many cases of one finding are kept."""
CASE_TEXT: Final = "case.txt"
_MORE: Final = "case-"
_DIGITS: Final = 16

_CONSOLE: Final = "console.log"
_TRACEBACK: Final = "traceback.txt"
_COVERAGE: Final = "coverage.txt"
_OUTPUT: Final = "output"
_LOCK: Final = ".lock"
_PARTIAL: Final = ".new-"
_SHOWN_CASE: Final = 4096
_PLAIN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")
"""Names of findings and of their files."""
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)


class OutputError(InfrastructureError):
    """The campaign's directory cannot be written: the campaign must end."""


@dataclass(frozen=True)
class Place:
    """What a finding is to be reproduced with, and where in the campaign it was found.

    Attributes:
        harness: the specification of the harness.
        command: the words of a command as harness.
        differential, ignore, libraries, exit_status: what the harness was told; see
            :meth:`bridge.fuzz.harness.Harness.parse`.
        settings: as :meth:`bridge.config.Settings.changed` describes them.
        target_state: what a reset does to the target: a value of
            :class:`bridge.session.target_host.TargetState`.
        versions: of what took part, by name.
    """

    harness: str = ""
    command: tuple[str, ...] = ()
    differential: bool = False
    ignore: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    exit_status: bool = False
    target_state: str = TargetState.FORK.value
    settings: Mapping[str, object] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """One finding, as ``finding.json`` has it.

    Attributes:
        name: of its folder.
        others: titles of what the same case led to besides.
        times: how often it was found.
        seconds, executions: of the campaign when it was found first.
        found: the same, in seconds since the epoch.
        status: wait status of the harness; None if it did not end.
        sha256: of the case.
        place: what it is to be reproduced with; its fields are keys beside the others.
    """

    name: str
    title: str
    kind: Kind
    stack: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    times: int = 1
    seconds: float = 0.0
    executions: int = 0
    found: float = 0.0
    status: int | None = None
    timed_out: bool = False
    sha256: str = ""
    place: Place = field(default_factory=Place)

    def as_json(self) -> bytes:
        """Return the text of ``finding.json``."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        values |= {each.name: getattr(self.place, each.name) for each in fields(Place)}
        del values["place"]
        whole = {"format": FORMAT, "version": VERSION, **values}
        return json.dumps(whole, indent=1, default=str).encode() + b"\n"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Finding:
        """Read a finding; keys that are not known are of no account.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        if data["format"] != FORMAT or data["version"] != VERSION:
            raise ValueError(f"format {data['format']!r}, version {data['version']!r}")
        known = {each.name for each in fields(cls)} - {"place"}
        values = {key: value for key, value in data.items() if key in known}
        place = {each.name: data[each.name] for each in fields(Place) if each.name in data}
        if not _PLAIN.fullmatch(values["name"]):
            raise ValueError(f"not a plain name: {values['name'][:80]!r}")
        values["kind"] = Kind(values["kind"])
        for name in ("stack", "others"):
            values[name] = tuple(values.get(name, ()))
        for name in ("command", "ignore", "libraries"):
            place[name] = tuple(place.get(name, ()))
        return cls(**values, place=Place(**place))


def load_finding(folder: Path) -> Finding:
    """Read the finding of a folder.

    Raises:
        UsageError: there is none, or another version of kcov-bridge wrote it.
    """
    try:
        text = (folder / FINDING).read_bytes()
    except OSError as error:
        raise UsageError(
            f"{folder} is not the folder of a finding: {FINDING}: {error.strerror}",
            hint="a finding is a folder in `findings` of a campaign's directory",
        ) from error
    return _parse(text, folder)


def _parse(text: bytes, folder: Path) -> Finding:
    try:
        return Finding.from_dict(json.loads(text))
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{folder / FINDING} cannot be read: {error}",
            hint="was it written by another version of kcov-bridge?",
        ) from error


class Findings:
    """Writes the findings of a campaign.

    Args:
        directory: where their folders are; made if it is missing.
        cases: how many cases of one finding are kept.
        readable: makes the readable form of a case; None if the harness has none.

    Raises:
        OutputError: the directory cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        *,
        cases: int = CASES_KEPT,
        readable: Callable[[bytes], str] | None = None,
    ) -> None:
        self.directory = directory
        self._cases = cases
        self._readable = readable
        with _explained(directory, "findings cannot be kept"):
            directory.mkdir(parents=True, exist_ok=True)
            with self._locked():
                for left in directory.glob(f"{_PARTIAL}*"):
                    remove(left)  # of a process that was killed

    def __iter__(self) -> Iterator[Finding]:
        """Yield the findings that are there, the first found first."""
        found = [load_finding(path.parent) for path in self.directory.glob(f"*/{FINDING}")]
        return iter(sorted(found, key=lambda each: (each.found, each.name)))

    def record(
        self,
        suspect: Suspect,
        faults: Sequence[Fault],
        place: Place,
        *,
        seconds: float = 0.0,
        executions: int = 0,
    ) -> Finding:
        """Keep a case and what it led to; return when it is on the disk.

        Args:
            faults: as :func:`bridge.fuzz.titles.faults_of` returns them; not empty.
            seconds, executions: of the campaign.

        Returns:
            The finding, with the number of times that it was found.

        Raises:
            OutputError: it cannot be written. What was returned before is still there.
        """
        finding = finding_of(suspect, faults, place, seconds=seconds, executions=executions)
        return self.add(files_of(finding, suspect, self._readable))

    def add(
        self, files: Mapping[str, bytes], times: int = 1, *, executions: int | None = None
    ) -> Finding:
        """Keep the files of a finding; return when they are on the disk.

        Args:
            files: as :func:`files_of` returns them.
            times: how often it was found, if it is not found the first time.
            executions: of the campaign, which a job does not know; None to keep what the files say.

        Raises:
            UsageError: they are not the files of a finding.
            OutputError: they cannot be written.
        """
        for name in files:
            if not _PLAIN.fullmatch(name):
                raise UsageError(f"not the plain name of a file: {name[:80]!r}")
        finding = _parse(files[FINDING], self.directory)
        if executions is not None:
            finding = replace(finding, executions=executions)
            files = {**files, FINDING: finding.as_json()}
        case = files[CASE]
        shown = case[:_SHOWN_CASE].hex(" ")
        with (
            _explained(
                self.directory,
                f"the finding {finding.title!r} cannot be kept",
                f"the case, {len(case)} bytes:\n{shown}",
            ),
            self._locked(),
        ):
            folder = self.directory / finding.name
            if (folder / FINDING).is_file():
                return self._repeat(folder, finding, case, times)
            self._create(folder, files)
            return finding

    def count(self, name: str, times: int) -> Finding:
        """Note that a finding that is there was found again so often.

        Raises:
            UsageError: it is not there.
            OutputError: it cannot be written.
        """
        with _explained(self.directory, f"the finding {name} cannot be counted"), self._locked():
            return self._count(self.directory / name, times)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other processes out; the kernel unlocks for one that is killed."""
        lock = os.open(self.directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _create(self, folder: Path, files: Mapping[str, bytes]) -> None:
        part = folder.with_name(f"{_PARTIAL}{folder.name}")
        if part.exists():
            remove(part)  # nobody writes it: the lock is ours
        try:
            part.mkdir()
            for name, content in files.items():
                (part / name).write_bytes(content)
            sync(part)
            part.rename(folder)
            _sync_directory(self.directory)
        except BaseException:
            with contextlib.suppress(OSError):
                remove(part)
            raise

    def _repeat(self, folder: Path, again: Finding, case: bytes, times: int) -> Finding:
        first = load_finding(folder)
        if again.sha256 != first.sha256:
            more = folder / f"{_MORE}{again.sha256[:_DIGITS]}"
            if not more.exists() and len(list(folder.glob(f"{_MORE}*"))) + 1 < self._cases:
                _replace(more, case, durable=True)
        return self._count(folder, times)

    def _count(self, folder: Path, times: int) -> Finding:
        first = load_finding(folder)
        counted = replace(first, times=first.times + times)
        # Not waited for until it is on the disk: only a loss of power could take it back.
        _replace(folder / FINDING, counted.as_json())
        return counted


def finding_of(
    suspect: Suspect,
    faults: Sequence[Fault],
    place: Place,
    *,
    seconds: float = 0.0,
    executions: int = 0,
) -> Finding:
    """Return what a case led to as a finding; see :meth:`Findings.record`."""
    fault = faults[0]
    return Finding(
        name=fault.key,
        title=fault.title,
        kind=fault.kind,
        stack=fault.stack,
        others=tuple(dict.fromkeys(each.title for each in faults[1:])),
        seconds=seconds,
        executions=executions,
        found=time.time(),
        status=suspect.status,
        timed_out=suspect.timed_out,
        sha256=hashlib.sha256(suspect.case).hexdigest(),
        place=place,
    )


def files_of(
    finding: Finding, suspect: Suspect, readable: Callable[[bytes], str] | None = None
) -> dict[str, bytes]:
    """Return the files of a finding by their names.

    Args:
        readable: makes the readable form of a case.
    """
    evidence = suspect.evidence
    log = evidence.console
    if evidence.dmesg:
        log = f"{log.rstrip()}\n\n==== the kernel's log\n{evidence.dmesg}"
    if evidence.lost:
        log = f"{log.rstrip()}\n\n==== the guest was lost\n{evidence.lost}"
    reports = [*evidence.problems, *([evidence.stacks] if evidence.stacks else [])]
    if evidence.later:
        reports.append(f"==== the target a moment later\n{evidence.later}")
    files = {
        FINDING: finding.as_json(),
        CASE: suspect.case,
        _CONSOLE: _text(log),
        _OUTPUT: suspect.output,
    }
    if reports:
        files[_TRACEBACK] = _text("\n\n".join(each.rstrip() for each in reports))
    if suspect.pcs:
        files[_COVERAGE] = "\n".join(
            "".join(f"{pc:016x}\n" for pc in task) for task in suspect.pcs
        ).encode()
    if readable is not None:
        files[CASE_TEXT] = _text(_readable(readable, suspect.case))
    return files


def _text(text: str) -> bytes:
    return text.encode(errors="backslashreplace") + (b"" if text.endswith("\n") else b"\n")


def _readable(make: Callable[[bytes], str], case: bytes) -> str:
    """The form is for people; that it cannot be made must not cost the finding."""
    try:
        return make(case)
    except Exception as error:
        return f"(the readable form cannot be made: {type(error).__name__}: {error})"


def _replace(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Write a file that replaces an older one at once; the lock must be held."""
    part = path.with_name(f".{path.name}")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def _sync_directory(path: Path) -> None:
    """Write the names in a directory to the disk.

    Raises:
        OSError: the disk failed.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _explained(directory: Path, what: str, evidence: str = "") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in _FULL
        why = "the disk is full" if full else error.strerror or str(error)
        raise OutputError(
            f"{what} in {directory}: {why}",
            evidence=evidence,
            hint="make room, then go on with --resume: what was announced is kept"
            if full
            else "check that the directory exists and can be written; then go on with --resume",
        ) from error
