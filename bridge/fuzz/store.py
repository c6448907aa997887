# SPDX-License-Identifier: Apache-2.0
"""The directory of a campaign: its corpus, its findings, and the record of its cases.

=================  ====================================================================
``campaign.json``  settings and versions (:class:`Campaign`); replaced, never changed
``lock``           held by the campaign that runs (flock); says which process holds it
``corpus/``        a plain file a case, named by :func:`case_name`; any fuzzer can take it
``cases.jsonl``    a line a case of the corpus, in the order in which they came (:class:`Case`)
                   and another one when more of what it covers becomes known
``findings/``      a directory a finding
``jobs/``          directories of the engine, one a job
``progress.jsonl`` the figures over time (:mod:`bridge.fuzz.progress`)
=================  ====================================================================

``cases.jsonl`` is JSON lines. Its first line is a header with the keys ``format`` and ``version``.
New keys may come at any time, so a reader ignores those it does not know. PCs are hexadecimal text,
because many readers of JSON round numbers of 64 bits.

A case is *announced* when :meth:`Store.add` returns: its file and its line are on the disk. A kill
at any moment loses no announced case. It may leave the part of a line behind, which the next
:meth:`Store.resume` removes, or the file of a case that has no line yet, which gets one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import socket
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from bridge.errors import InfrastructureError, UsageError
from bridge.util.files import atomic_output, remove, remove_partial

__all__ = [
    "CAMPAIGN_FILE",
    "CASES_FILE",
    "CORPUS_DIRECTORY",
    "FINDINGS_DIRECTORY",
    "FORMAT",
    "JOBS_DIRECTORY",
    "LOCK_FILE",
    "VERSION",
    "Campaign",
    "Case",
    "Cases",
    "Offer",
    "Store",
    "case_name",
    "check_unused",
    "read_campaign",
    "read_cases",
]

FORMAT: Final = "kcov-bridge fuzz campaign"
"""The value of the key ``format`` in ``campaign.json``."""

CASES_FORMAT: Final = "kcov-bridge fuzz cases"
"""The value of the key ``format`` in the header of ``cases.jsonl``."""

VERSION: Final = 1
"""The value of the key ``version`` in both."""

CAMPAIGN_FILE: Final = "campaign.json"
CASES_FILE: Final = "cases.jsonl"
LOCK_FILE: Final = "lock"
CORPUS_DIRECTORY: Final = "corpus"
FINDINGS_DIRECTORY: Final = "findings"
JOBS_DIRECTORY: Final = "jobs"

_PARTIAL: Final = ".partial"
"""Files and directories that have no name yet. Only the holder of the lock uses it."""

_NAME: Final = re.compile(r"[0-9a-f]{40}")
_FINDING: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,+=@-]{0,199}")
_ROOM: Final = "make room on the disk, then go on with --resume"


def case_name(data: bytes) -> str:
    """Return the name of a case: the first 40 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(data).hexdigest()[:40]


@dataclass(frozen=True, slots=True)
class Campaign:
    """The contents of ``campaign.json``."""

    id: str
    """Differs between any two campaigns."""
    began: float
    """When it began, in seconds since the epoch."""
    facts: Mapping[str, Any]
    """Settings and versions, as the campaign gave them; values of JSON."""
    resumed: tuple[float, ...] = ()
    """When it was resumed."""

    def as_dict(self) -> dict[str, Any]:
        """Return the object that stands in the file."""
        return {
            **self.facts,
            "format": FORMAT,
            "version": VERSION,
            "id": self.id,
            "began": self.began,
            "resumed": list(self.resumed),
        }


@dataclass(frozen=True, slots=True)
class Case:
    """A line of ``cases.jsonl``."""

    name: str
    """Its name in the corpus (:func:`case_name`)."""
    seconds: float
    """When it came, on the campaign's own clock."""
    executions: int
    """Executions of all jobs until then."""
    seed: bool = False
    """It was given to the campaign, not found by it."""
    pcs: tuple[int, ...] = ()
    """The PCs that no case before it had covered."""

    def as_dict(self) -> dict[str, Any]:
        """Return the object that stands in the file."""
        return {
            "name": self.name,
            "seconds": round(self.seconds, 3),
            "executions": self.executions,
            "seed": self.seed,
            "pcs": [f"{pc:x}" for pc in self.pcs],
        }


@dataclass(frozen=True, slots=True)
class Cases:
    """What :func:`read_cases` found."""

    cases: tuple[Case, ...] = ()
    problems: tuple[str, ...] = ()
    """What is missing, and why; one sentence each."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A case for :meth:`Store.add`."""

    data: bytes
    seconds: float
    executions: int
    pcs: Iterable[int] = field(default=())
    """PCs that it covered; the store records those that are new."""
    seed: bool = False


class Store:
    """The directory of a campaign, which this process holds; a context manager.

    Not thread-safe: one thread adds. Others may read :attr:`corpus`.
    """

    def __init__(self, directory: Path, *, resume: bool, facts: Mapping[str, Any]) -> None:
        """Use :meth:`create` or :meth:`resume`."""
        self.directory = directory
        self.corpus = directory / CORPUS_DIRECTORY
        self.findings = directory / FINDINGS_DIRECTORY
        self.jobs = directory / JOBS_DIRECTORY
        self.problems: list[str] = []
        """What a resume found and repaired; one sentence each."""
        self.covered: set[int] = set()
        """PCs of all cases."""
        self.elapsed = 0.0
        """The campaign's clock at the last case."""
        self.executions = 0
        """Executions of all jobs at the last case."""
        self._names: list[str] = []
        self._known: set[str] = set()
        self._seeds: set[str] = set()
        self._partial = directory / _PARTIAL
        with contextlib.ExitStack() as stack:
            if not resume:
                check_unused(directory)
            elif not (directory / CAMPAIGN_FILE).is_file():
                raise _no_campaign(directory)
            with _writing(directory):
                for each in (directory, self.corpus, self.findings, self.jobs, self._partial):
                    each.mkdir(parents=True, exist_ok=True)
            stack.callback(os.close, _lock(directory))
            if not resume:
                # Another one may have come first.
                check_unused(directory)
            with _writing(directory):
                remove_partial(directory / CAMPAIGN_FILE)
                for left in self._partial.iterdir():
                    remove(left)
            self._journal = _Journal(directory / CASES_FILE)
            stack.callback(self._journal.close)
            if resume:
                campaign = read_campaign(directory)
                self.campaign = Campaign(
                    campaign.id,
                    campaign.began,
                    {**campaign.facts, **facts},
                    (*campaign.resumed, time.time()),
                )
                self._load()
            else:
                self.campaign = Campaign(uuid.uuid4().hex, time.time(), dict(facts))
            self._write_campaign()
            self._stack = stack.pop_all()

    @classmethod
    def create(cls, directory: Path, facts: Mapping[str, Any]) -> Store:
        """Begin a campaign.

        Args:
            directory: made if it does not exist.
            facts: settings and versions for ``campaign.json``; values of JSON.

        Raises:
            UsageError: the directory belongs to a campaign or contains something else.
            InfrastructureError: it cannot be written.
        """
        return cls(directory, resume=False, facts=facts)

    @classmethod
    def resume(cls, directory: Path, facts: Mapping[str, Any] | None = None) -> Store:
        """Go on with a campaign.

        :attr:`problems` says what the end of the last run has left behind. Reads the whole corpus.

        Args:
            directory: its directory.
            facts: what changed since it began, for ``campaign.json``.

        Raises:
            UsageError: there is no campaign, or another process holds it.
            InfrastructureError: the directory cannot be read or written, or is of another version.
        """
        return cls(directory, resume=True, facts=facts or {})

    def close(self) -> None:
        """Give the directory free. Safe to call twice."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def since(self, number: int, limit: int | None = None) -> Sequence[str]:
        """Return the names of the cases from the given number on, in the order they came."""
        return self._names[number : None if limit is None else number + limit]

    def read(self, name: str) -> bytes:
        """Return a case of the corpus.

        Raises:
            InfrastructureError: it cannot be read.
        """
        try:
            return (self.corpus / name).read_bytes()
        except OSError as error:
            raise InfrastructureError(
                f"cannot read the case {self.corpus / name}: {error.strerror}",
                hint="put it back, or remove its line from cases.jsonl",
            ) from error

    def add(self, offers: Iterable[Offer]) -> list[Case]:
        """Announce cases; return the lines that were written for them.

        A case that the corpus has already gets another line if it covers more than is recorded,
        as a seed does when it is executed, and none otherwise. All is on the disk when this
        returns. After an error none of them counts as announced; they can be offered again.

        Raises:
            InfrastructureError: they cannot be written.
        """
        new: list[str] = []
        lines: dict[str, list[Case]] = {}
        reached: set[int] = set()
        with _writing(self.corpus):
            try:
                for offer in offers:
                    name = case_name(offer.data)
                    if name not in self._known and name not in new:
                        new.append(name)
                        _write_new(self._partial / name, offer.data)
                    pcs = tuple(sorted(set(offer.pcs) - self.covered - reached))
                    reached.update(pcs)
                    if pcs or (new and new[-1] == name and name not in lines):
                        seed = offer.seed or name in self._seeds
                        lines.setdefault(name, []).append(
                            Case(name, offer.seconds, offer.executions, seed, pcs)
                        )
                if not lines:
                    return []
                self._sync_files([self._partial / name for name in new])
                for name in new:
                    (self._partial / name).replace(self.corpus / name)
                if new:
                    _sync(self.corpus)
            except BaseException:
                for name in new:
                    (self._partial / name).unlink(missing_ok=True)
                raise
        cases = [case for each in lines.values() for case in each]
        self._journal.append([case.as_dict() for case in cases])
        self._take(cases)
        return cases

    def add_finding(self, name: str, files: Mapping[str, bytes]) -> bool:
        """Write the directory of a finding, whole or not at all.

        Returns:
            False if there is one of that name; it is left as it is.

        Raises:
            ValueError: a name is not the plain name of a file.
            InfrastructureError: it cannot be written.
        """
        for each in (name, *files):
            if not _FINDING.fullmatch(each):
                raise ValueError(f"not a plain name: {each[:80]!r}")
        place = self.findings / name
        if os.path.lexists(place):
            return False
        part = self._partial / name
        with _writing(place):
            remove(part)
            part.mkdir()
            try:
                for each, data in files.items():
                    _write_new(part / each, data)
                    _sync(part / each)
                _sync(part)
                part.replace(place)
                _sync(self.findings)
            finally:
                remove(part)
        return True

    def update(self, facts: Mapping[str, Any]) -> None:
        """Add to the facts in ``campaign.json``.

        Raises:
            InfrastructureError: it cannot be written.
        """
        old = self.campaign
        self.campaign = Campaign(old.id, old.began, {**old.facts, **facts}, old.resumed)
        self._write_campaign()

    def _sync_files(self, paths: Sequence[Path]) -> None:
        """Write files to the disk; many at the same time, since each waits for the same journal."""
        if len(paths) < 4:
            for path in paths:
                _sync(path)
        else:
            with ThreadPoolExecutor(16) as pool:
                for _ in pool.map(_sync, paths):
                    pass

    def _take(self, cases: Iterable[Case]) -> None:
        for case in cases:
            if case.name not in self._known:
                self._names.append(case.name)
                self._known.add(case.name)
            if case.seed:
                self._seeds.add(case.name)
            self.covered.update(case.pcs)
            self.elapsed = max(self.elapsed, case.seconds)
            self.executions = max(self.executions, case.executions)

    def _write_campaign(self) -> None:
        path = self.directory / CAMPAIGN_FILE
        text = json.dumps(self.campaign.as_dict(), indent=2, allow_nan=False) + "\n"
        with _writing(path), atomic_output(path, durable=True) as part:
            part.write_text(text, encoding="utf-8")

    def _load(self) -> None:
        """Take the cases of the last run, and repair what its end has left behind."""
        recorded = read_cases(self.directory)
        if torn := self._journal.torn:
            self.problems.append(
                f"the last line of {CASES_FILE} was incomplete ({torn} bytes) and was removed: "
                "the campaign was killed, or the disk was full"
            )
        self.problems.extend(recorded.problems)
        present, foreign = self._verified()
        lost = [case.name for case in recorded.cases if case.name not in present]
        self._take(case for case in recorded.cases if case.name in present)
        for case in recorded.cases:
            self.covered.update(case.pcs)
        if lost:
            self.problems.append(
                f"{len(lost)} cases of {CASES_FILE} have no file in the corpus, or a damaged one: "
                + _some(lost)
            )
        if foreign:
            self.problems.append(
                f"{len(foreign)} files in the corpus are not named by their content and were left "
                f"out: {_some(foreign)}"
            )
        # The last run was killed before it wrote their lines.
        listed = {case.name for case in recorded.cases}
        if unlisted := sorted(present - listed):
            cases = [Case(name, self.elapsed, self.executions) for name in unlisted]
            self._journal.append([case.as_dict() for case in cases])
            self._take(cases)
            self.problems.append(
                f"{len(unlisted)} cases were written but not announced, and were taken"
            )

    def _verified(self) -> tuple[set[str], list[str]]:
        present: set[str] = set()
        foreign: list[str] = []
        try:
            for path in self.corpus.iterdir():
                if path.name.startswith("."):
                    continue
                whole = (
                    _NAME.fullmatch(path.name)
                    and path.is_file()
                    and case_name(path.read_bytes()) == path.name
                )
                if whole:
                    present.add(path.name)
                else:
                    foreign.append(path.name)
        except OSError as error:
            raise InfrastructureError(f"cannot read {self.corpus}: {error.strerror}") from error
        return present, sorted(foreign)


class _Journal:
    """``cases.jsonl``, open to append; an append that fails leaves it as it was."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.torn = 0
        """How many bytes of an incomplete last line were removed."""
        with _writing(path):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            with _writing(path):
                size = os.fstat(self._fd).st_size
                self._size = _end_of_lines(self._fd, size)
                self.torn = size - self._size
                if self.torn:
                    os.ftruncate(self._fd, self._size)
            if not self._size:
                self.append([{"format": CASES_FORMAT, "version": VERSION}])
                _sync(path.parent)
        except BaseException:
            os.close(self._fd)
            raise

    def append(self, objects: Iterable[Mapping[str, Any]]) -> None:
        data = b"".join(
            json.dumps(each, separators=(",", ":"), allow_nan=False).encode() + b"\n"
            for each in objects
        )
        with _writing(self._path):
            try:
                _write_all(self._fd, data, self._size)
                os.fsync(self._fd)
            except BaseException:
                os.ftruncate(self._fd, self._size)
                raise
        self._size += len(data)

    def close(self) -> None:
        os.close(self._fd)


def read_campaign(directory: Path) -> Campaign:
    """Read ``campaign.json``; the campaign may be running.

    Raises:
        UsageError: there is no campaign in the directory.
        InfrastructureError: the file cannot be read, is damaged, or is of another version.
    """
    path = directory / CAMPAIGN_FILE
    try:
        values = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise _no_campaign(directory) from None
    except OSError as error:
        raise InfrastructureError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InfrastructureError(f"{path} is damaged: it is not JSON") from error
    if not isinstance(values, dict):
        raise InfrastructureError(f"{path} is damaged: it is not a JSON object")
    _check_format(path, values, FORMAT)
    own = {"format", "version", "id", "began", "resumed"}
    try:
        return Campaign(
            str(values["id"]),
            _number(values["began"]),
            {key: value for key, value in values.items() if key not in own},
            tuple(_number(each) for each in values["resumed"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InfrastructureError(f"{path} is damaged: wrong or no value of {error}") from error


def read_cases(directory: Path) -> Cases:
    """Read ``cases.jsonl``; the campaign may be running.

    Lines that are damaged are left out, and :attr:`Cases.problems` says so. An incomplete last line
    is no problem: the campaign may be writing it.

    Raises:
        InfrastructureError: the file cannot be read, is no such file, or is of another version.
    """
    path = directory / CASES_FILE
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InfrastructureError(f"cannot read {path}: {error.strerror}") from error
    lines = data.split(b"\n")[:-1]
    if not lines:
        return Cases()
    try:
        header = json.loads(lines[0])
    except (ValueError, RecursionError):
        header = None
    _check_format(path, header if isinstance(header, dict) else {}, CASES_FORMAT)
    cases: list[Case] = []
    damaged: list[str] = []
    for number, line in enumerate(lines[1:], 2):
        try:
            cases.append(_case(json.loads(line)))
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            damaged.append(str(number))
    problems = []
    if damaged:
        problems.append(
            f"{len(damaged)} lines of {path} are damaged and were left out: {_some(damaged)}"
        )
    return Cases(tuple(cases), tuple(problems))


def _case(values: Any) -> Case:
    name, executions, pcs = values["name"], values["executions"], values["pcs"]
    if not _NAME.fullmatch(name) or not isinstance(executions, int) or executions < 0:
        raise ValueError(name)
    if not isinstance(pcs, list):
        raise TypeError(pcs)
    return Case(
        name,
        _number(values["seconds"]),
        executions,
        values["seed"] is True,
        tuple(int(pc, 16) for pc in pcs),
    )


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(value)
    return float(value)


def _check_format(path: Path, values: Mapping[str, Any], form: str) -> None:
    if values.get("format") != form:
        raise InfrastructureError(
            f"{path} has no format {form!r}: another program may have written it"
        )
    if values.get("version") != VERSION:
        raise InfrastructureError(
            f"{path} has version {values.get('version')}, this program reads version {VERSION}",
            hint="read it with the version of the bridge that wrote it",
        )


def check_unused(directory: Path) -> None:
    """Refuse a directory that belongs to a campaign or contains something else.

    Raises:
        UsageError: it does.
    """
    if (directory / CAMPAIGN_FILE).exists():
        holder = _holder(directory)
        raise UsageError(
            f"{directory} belongs to a campaign"
            + (f", which is running: {holder}" if holder else ""),
            hint="give another directory with --out"
            if holder
            else "go on with it by --resume, or give another directory with --out",
        )
    # What a campaign has left that was killed before it had begun.
    begun = {CASES_FILE, LOCK_FILE, CORPUS_DIRECTORY, FINDINGS_DIRECTORY, JOBS_DIRECTORY, _PARTIAL}
    try:
        others = sorted({path.name for path in directory.iterdir()} - begun)
        filled = sorted(path.name for path in (directory / CORPUS_DIRECTORY).glob("*"))
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"cannot use {directory}: {error.strerror}") from error
    others = [each for each in others if not each.startswith(f".{CAMPAIGN_FILE}.")]
    if others or filled:
        raise UsageError(
            f"{directory} is no campaign and not empty: {_some(others or filled)}",
            hint="give another directory with --out; seeds come from --corpus",
        )


def _no_campaign(directory: Path) -> UsageError:
    return UsageError(
        f"{directory} holds no campaign",
        hint="name the directory that --out gave to one, or begin one without --resume",
    )


def _lock(directory: Path) -> int:
    """Take the lock and return its descriptor; it ends with this process."""
    path = directory / LOCK_FILE
    with _writing(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{directory} is in use by another campaign: {_text_of(fd) or 'unknown process'}",
                hint="stop that process, or give another directory with --out",
            ) from None
        except OSError as error:
            raise InfrastructureError(f"cannot lock {path}: {error.strerror}") from error
        # The text is for those that are refused; on a full disk it is left out.
        with contextlib.suppress(OSError):
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            os.ftruncate(fd, 0)
            os.pwrite(
                fd, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode(), 0
            )
    except BaseException:
        os.close(fd)
        raise
    return fd


def _holder(directory: Path) -> str:
    """Return who holds the lock; empty if it is free."""
    try:
        fd = os.open(directory / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return _text_of(fd) or "unknown process"
    finally:
        os.close(fd)
    return ""


def _text_of(fd: int) -> str:
    text = os.pread(fd, 200, 0).decode(errors="replace").strip()
    return text if text.isprintable() else ""


def _end_of_lines(fd: int, size: int) -> int:
    """Return where the last complete line of a file ends."""
    end = size
    while end:
        begin = max(0, end - 65536)
        found = os.pread(fd, end - begin, begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0


def _write_new(path: Path, data: bytes) -> None:
    """Write a file."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        _write_all(fd, data, 0)
    finally:
        os.close(fd)


def _write_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        if not written:
            raise OSError(errno.EIO, "nothing was written")
        view, offset = view[written:], offset + written


def _sync(path: Path) -> None:
    """Write a file, or the names in a directory, to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn each OSError inside into an :class:`bridge.errors.InfrastructureError`."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise InfrastructureError(
            f"cannot write {path}: {error.strerror}",
            hint=_ROOM if full else "check that its directory exists and is writable",
        ) from error


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown}, and {len(names) - 3} more" if len(names) > 3 else shown
