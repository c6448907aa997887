# SPDX-License-Identifier: Apache-2.0
"""A job of a campaign, as those that start it see it.

A *job* is one engine with its slot. It runs on some machine of a campaign, beside
:func:`bridge.fuzz.job_runner.run_job`, which starts it, carries its news to the campaign and what
the other jobs found to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

__all__ = [
    "STARTING",
    "Figures",
    "FoundCase",
    "FoundFinding",
    "Job",
    "JobFactory",
    "JobSettings",
    "News",
]


STARTING: Final = "starting"
"""The state of a job until :meth:`Job.start` returns; it sends no reports meanwhile."""


@dataclass(frozen=True, slots=True)
class JobSettings:
    """What a job is to do.

    Attributes:
        campaign: the campaign's :attr:`bridge.fuzz.store.Campaign.id`.
        number: its number in the campaign, from 0.
        directory: its own directory, on the machine where it runs; exists, may contain what an
            earlier run of this job left behind.
        values: settings of the campaign; values of JSON.
    """

    campaign: str
    number: int
    directory: Path
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FoundCase:
    """A case that covered something that no case before it in this job did.

    Attributes:
        traces: for each task of the harness, its PCs in order.
        again: the same when it was executed once more; None if it was not.
    """

    data: bytes
    traces: tuple[tuple[int, ...], ...] = ()
    again: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True, slots=True)
class FoundFinding:
    """A finding.

    Attributes:
        name: of its directory; the same finding has the same name in every job.
        files: the files of that directory; may be empty if the job sent them before.
        times: how often it was seen since the job last told.
    """

    name: str
    files: Mapping[str, bytes]
    times: int = 1


@dataclass(frozen=True, slots=True)
class Figures:
    """How a job does.

    Attributes:
        executions: since the job started.
        vms: VMs that run.
        stability: how often the same case gives the same map, 0 to 1; None if not known.
        state: what it does now, in one or two words.
        more: further figures by name, for the screen.
    """

    executions: int = 0
    vms: int = 0
    stability: float | None = None
    state: str = ""
    more: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class News:
    """What happened in a job since it was last asked."""

    cases: Sequence[FoundCase] = ()
    findings: Sequence[FoundFinding] = ()
    figures: Figures = field(default_factory=Figures)


class Job(Protocol):
    """One engine with its slot.

    All methods are called on one thread, which lives as long as the job, so programs that the job
    starts may have a parent-death signal. Only :meth:`start` may take long. What a method raises
    ends the job; :meth:`stop` is called then too.
    """

    def start(self, settings: JobSettings, seeds: Sequence[bytes], /) -> None:
        """Start the engine with these cases; the list is empty if the campaign has none."""

    def take_news(self) -> News:
        """Return what happened since the last call; called about once a second.

        After :meth:`stop` it is called once more.
        """

    def give(self, cases: Sequence[bytes], /) -> None:
        """Take cases that other jobs found."""

    def stop(self) -> None:
        """End everything that the job started. May be called twice, and before :meth:`start`."""


class JobFactory(Protocol):
    """Makes a job where it is to run. It travels there by pickle: a function of a module, or an
    object that can be pickled."""

    def __call__(self) -> Job:
        """Return a job that is not started."""
