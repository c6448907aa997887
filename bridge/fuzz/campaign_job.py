# SPDX-License-Identifier: Apache-2.0
"""The job of a campaign: an ``afl-fuzz`` and the slot that executes its cases.

The slot has a thread of its own, on which its machine starts, serves and ends. Its events wait in a
queue until :meth:`CampaignJob.take_news` is called.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from bridge.config import Settings
from bridge.errors import BridgeError, GuestLostError, InfrastructureError
from bridge.fuzz.board import MAP_CELLS, Board, BoardWord, Fold
from bridge.fuzz.engine import (
    DEFAULT_SEED,
    EngineJob,
    JobOptions,
    find_engine,
    prepare_seeds,
    start_job,
    time_limit_ms,
)
from bridge.fuzz.findings import CASES_KEPT, Place, files_of, finding_of
from bridge.fuzz.harness import Harness
from bridge.fuzz.job import STARTING, Figures, FoundCase, FoundFinding, JobSettings, News
from bridge.fuzz.monitor import MachineMonitor
from bridge.fuzz.places import keep_places, tidy_places
from bridge.fuzz.slot import RunnerError, Slot, SlotOptions
from bridge.fuzz.slot_events import NewCase, Suspect
from bridge.fuzz.titles import Kind, faults_of
from bridge.session.target_host import TargetState
from bridge.util.files import remove, write_atomically

__all__ = ["CampaignJob", "Plan", "make_job"]

T = TypeVar("T")

logger = logging.getLogger(__name__)

_START_SECONDS: Final = 900.0
"""How long a slot may take to be ready: the first one of an image makes a snapshot."""
_STOP_SECONDS: Final = 60.0
_MEASURED: Final = 8
"""How many seeds are executed to learn how long a case takes."""
_SEED_SECONDS: Final = 30.0
"""How long a seed may take."""
_POLL_SECONDS: Final = 0.05
_KEEP_SECONDS: Final = 60.0
"""How often it is written down what the PCs mean: a kill loses what came after that."""


@dataclass(frozen=True)
class Plan:
    """What the jobs of a campaign do; it travels as JSON (:meth:`as_values`).

    Attributes:
        settings: of the sessions, as :meth:`bridge.config.Settings.changed` describes them.
        harness: the specification of the harness; empty for a command.
        command: the words of a command as harness.
        differential, ignore: what the harness ``files`` is told.
        libraries: what a shared object needs beside it.
        exit_status: whether a command that exits with another status than 0 is a finding.
        target_state: what a reset does to the target.
        zero: when the campaign's clock was 0, in seconds since the epoch.
        engine: the program ``afl-fuzz``.
        dictionary: its text; empty for none.
        learn: add words that the target compares the seeds with.
        case_seconds: limit of a case; None to measure it.
        reset_every: executions between two resets; 0 for never.
        target_memory: MiB that the target may take; 0 for no limit.
        feedback: whether the engine sees what is covered.
        random_seed: of the engines.
        versions: of what takes part, by name.
        path: directories where the modules of target and harness are looked for, after those of
            the Python that runs a job.
    """

    settings: Mapping[str, Any]
    harness: str = ""
    command: tuple[str, ...] = ()
    differential: bool = False
    ignore: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    exit_status: bool = False
    target_state: str = TargetState.FORK.value
    zero: float = 0.0
    engine: str = "afl-fuzz"
    dictionary: str = ""
    learn: bool = True
    case_seconds: float | None = None
    reset_every: int = 2000
    map_size: int = MAP_CELLS[Fold.EDGES]
    target_memory: int = 0
    feedback: bool = True
    random_seed: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    path: tuple[str, ...] = ()

    def as_values(self) -> dict[str, Any]:
        """Return values of JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Return the plan that :meth:`as_values` described."""
        known: dict[str, Any] = dict(values)
        for words in ("command", "ignore", "libraries", "path"):
            known[words] = tuple(known.get(words, ()))
        return cls(**known)

    def find_modules(self) -> None:
        """Have this process find the modules of target and harness."""
        sys.path += [each for each in self.path if each not in sys.path]

    def make_harness(self) -> Harness:
        """Return the harness.

        Raises:
            UsageError: there is no such harness, or it cannot run in the guest.
        """
        return Harness.parse(
            self.harness,
            self.command,
            differential=self.differential,
            ignore=self.ignore,
            libraries=[Path(each) for each in self.libraries],
            exit_status=self.exit_status,
            settings=Settings.of(self.settings),
        )

    def place(self) -> Place:
        """Return what a finding is to be reproduced with."""
        return Place(
            harness=self.harness,
            command=self.command,
            differential=self.differential,
            ignore=self.ignore,
            libraries=self.libraries,
            exit_status=self.exit_status,
            target_state=self.target_state,
            settings=self.settings,
            versions=self.versions,
        )


class CampaignJob:
    """As :class:`bridge.fuzz.job.Job`; also the listener of its slot."""

    def __init__(self) -> None:
        self._plan = Plan({})
        self._readable: Callable[[bytes], str] | None = None
        self._packages: tuple[str, ...] = ()
        self._cases: deque[FoundCase] = deque()
        self._findings: deque[FoundFinding] = deque()
        self._handed_over: dict[str, int] = {}
        self._engine: EngineJob | None = None
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._slot: Slot | None = None
        self._limit_ms = 0
        self._stopped = False
        self._resets = 0
        self._reset_seconds = 0.0

    # From nothing to an engine that runs

    def start(self, settings: JobSettings, seeds: Sequence[bytes], /) -> None:
        """See :class:`bridge.fuzz.job.Job`."""
        plan = self._plan = Plan.of(settings.values)
        plan.find_modules()
        harness = plan.make_harness()
        self._readable = harness.readable
        engine = find_engine(plan.engine)
        directory = settings.directory
        tidy_places(directory)
        folder = directory / "seeds"
        given = directory / "given"
        _write_cases(given, seeds)
        defaults = tuple(harness.seeds) or (DEFAULT_SEED,)
        prepared = prepare_seeds(given, folder, defaults=defaults)
        logger.info("job %d: %s", settings.number, prepared.sentence())
        dictionaries: tuple[Path, ...] = ()
        if plan.dictionary:
            dictionaries = (directory / "dictionary",)
            write_atomically(dictionaries[0], plan.dictionary)
        few = [path.read_bytes() for path in sorted(folder.iterdir())[:_MEASURED]]
        self._thread = threading.Thread(
            target=self._run, args=(plan, harness, directory, few), name="slot", daemon=True
        )
        self._thread.start()
        deadline = time.monotonic() + _START_SECONDS
        while not self._ready.wait(_POLL_SECONDS):
            self._check_slot()
            if time.monotonic() > deadline:
                raise InfrastructureError(f"the slot was not ready after {_START_SECONDS:g} s")
        slot = self._slot
        if slot is None:
            self._check_slot()
            raise InfrastructureError("the slot ended before it was ready")
        number = settings.number
        self._engine = start_job(
            engine,
            Path(slot.socket),
            folder,
            directory / "engine",
            JobOptions(
                name=f"job{number}",
                main=number == 0,
                map_size=plan.map_size,
                time_limit_ms=self._limit_ms,
                dictionaries=dictionaries,
                random_seed=None if plan.random_seed is None else plan.random_seed + number,
                resume=True,
            ),
        )

    def _run(self, plan: Plan, harness: Harness, directory: Path, seeds: Sequence[bytes]) -> None:
        """The slot's thread."""
        options = SlotOptions(
            map_size=plan.map_size, reset_every=plan.reset_every, blind=not plan.feedback
        )
        settings = Settings.of(plan.settings).replace(diagnose=True)
        try:
            with (
                MachineMonitor(memory=plan.target_memory) as monitor,
                Slot(
                    settings,
                    harness,
                    directory,
                    target_state=TargetState(plan.target_state),
                    options=options,
                    listeners=[self],
                    monitor=monitor,
                ) as slot,
            ):
                source = slot.session.source
                self._packages = tuple(source.packages) if source is not None else ()
                self._limit_ms = (
                    round(plan.case_seconds * 1000)
                    if plan.case_seconds is not None
                    else self._measure(slot, seeds)
                )
                slot.case_seconds = self._limit_ms / 1000
                self._slot = slot
                self._ready.set()
                keeper = _PlaceKeeper(slot, directory)
                keeper.keep()

                def stop() -> bool:
                    keeper.keep_now_and_then()
                    return self._stop.is_set()

                slot.serve(stop)
                keeper.keep()
        except BaseException as error:
            self._error = error
        finally:
            self._ready.set()

    def _measure(self, slot: Slot, seeds: Sequence[bytes]) -> int:
        """Execute some seeds; return the limit of a case in milliseconds."""
        took = []
        for seed in seeds:
            if self._stop.is_set():
                break
            try:
                done = slot.execute(seed, _SEED_SECONDS)
                well = done.status == 0 and not slot.trouble()
            except (GuestLostError, RunnerError):
                well = False
            if well:
                took.append(done.seconds)
            else:
                # The engine will find it again, and say so.
                slot.reset("seed")
        return time_limit_ms(took)

    # Events of the slot, on its thread

    def new_case(self, event: NewCase, /) -> None:
        """See :class:`bridge.fuzz.slot_events.SlotListener`."""
        self._cases.append(FoundCase(event.case, event.pcs, event.again))

    def suspect(self, event: Suspect, /) -> bool:
        """See :class:`bridge.fuzz.slot_events.SlotListener`."""
        faults = faults_of(event, self._packages)
        if not faults:
            return False
        known = event.status == 0 and all(
            fault.kind is Kind.TARGET_EXCEPTION and fault.key in self._handed_over
            for fault in faults
        )
        finding = finding_of(
            event,
            faults,
            self._plan.place(),
            seconds=time.time() - self._plan.zero,
        )
        before = self._handed_over.get(finding.name, 0)
        self._handed_over[finding.name] = before + 1
        files = files_of(finding, event, self._readable) if before < CASES_KEPT else {}
        self._findings.append(FoundFinding(finding.name, files))
        return known

    def was_reset(self, reason: str, seconds: float, /) -> None:
        """See :class:`bridge.fuzz.slot_events.SlotListener`."""
        self._resets += 1
        self._reset_seconds += seconds

    def lost(self, error: Exception, /) -> None:
        """See :class:`bridge.fuzz.slot_events.SlotListener`."""
        logger.warning("the slot ends: %s", error)

    # While it runs

    def take_news(self) -> News:
        """See :class:`bridge.fuzz.job.Job`."""
        if not self._stopped:
            self._check_slot()
            if self._engine is not None and not self._engine.running:
                self._engine.check()
                raise InfrastructureError("the fuzzing engine ended by itself")
        return News(_drain(self._cases), _drain(self._findings), self._figures())

    def _figures(self) -> Figures:
        slot = self._slot
        if slot is None:
            return Figures(state=STARTING)
        more: dict[str, float] = {
            "resets": slot.resets,
            "machines": slot.machines,
            "slow": slot.slow,
            "spared": slot.spared,
        }
        if self._resets:
            more["reset seconds"] = self._reset_seconds / self._resets
        more |= _times(slot.board)
        return Figures(
            executions=slot.executions,
            vms=0 if self._stopped else 1,
            stability=slot.stability.value,
            state="ended" if self._stopped else "fuzzing",
            more=more,
        )

    def give(self, cases: Sequence[bytes], /) -> None:
        """See :class:`bridge.fuzz.job.Job`."""
        if self._engine is not None:
            for case in cases:
                self._engine.offer(case)

    def stop(self) -> None:
        """See :class:`bridge.fuzz.job.Job`."""
        self._stop.set()
        if self._engine is not None:
            self._engine.stop()
        thread = self._thread
        if thread is not None:
            thread.join(_STOP_SECONDS)
            if thread.is_alive():
                raise InfrastructureError(f"the slot did not end in {_STOP_SECONDS:g} s")
        self._stopped = True

    def _check_slot(self) -> None:
        """Raise what ended the slot."""
        error = self._error
        if error is None:
            return
        if isinstance(error, BridgeError):
            raise error
        raise InfrastructureError(f"the slot failed: {type(error).__name__}: {error}") from error


class _PlaceKeeper:
    """Writes down what the PCs of a slot mean, on the slot's thread."""

    def __init__(self, slot: Slot, directory: Path) -> None:
        self._slot = slot
        self._directory = directory
        self._due = 0.0

    def keep_now_and_then(self) -> None:
        """Write it down if it is time to."""
        if time.monotonic() >= self._due:
            self.keep()

    def keep(self) -> None:
        """Write it down; a guest that does not answer now is asked again."""
        self._due = time.monotonic() + _KEEP_SECONDS
        try:
            keep_places(self._slot.session, self._directory)
        except InfrastructureError:
            raise
        except BridgeError as error:
            logger.info("what the PCs mean could not be kept: %s", error.message)


def _drain(queue: deque[T]) -> list[T]:
    """Take what is there; the other thread may add meanwhile."""
    return [queue.popleft() for _ in range(len(queue))]


def _times(board: Board | None) -> dict[str, float]:
    """Return where the time of an execution goes, in microseconds."""
    if board is None:
        return {}
    with suppress(ValueError):  # the shim has just ended, and the board with it
        done = board[BoardWord.EXECUTIONS]
        return {
            name: board[word] / done / 1000 if done else 0.0
            for name, word in (
                ("engine", BoardWord.NS_ENGINE),
                ("guest", BoardWord.NS_GUEST),
                ("fold", BoardWord.NS_FOLD),
                ("slot", BoardWord.NS_SLOT),
            )
        }
    return {}


def _write_cases(folder: Path, cases: Sequence[bytes]) -> None:
    """Write cases into a folder that is new.

    Raises:
        InfrastructureError: they cannot be written.
    """
    try:
        if folder.exists():
            remove(folder)
        folder.mkdir(parents=True)
        for number, case in enumerate(cases):
            (folder / f"{number:06}").write_bytes(case)
    except OSError as error:
        raise InfrastructureError(
            f"the seeds cannot be written to {folder}: {error.strerror}",
            hint="make room on the disk of the job's directory",
        ) from error


def make_job() -> CampaignJob:
    """Return a job that is not started; see :class:`bridge.fuzz.job.JobFactory`."""
    return CampaignJob()
