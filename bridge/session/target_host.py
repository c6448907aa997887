# SPDX-License-Identifier: Apache-2.0
"""A target and the source that covers it, in this process.

Both live on one thread, the target's: the target is made on it, then the source starts, so that
the source measures this thread and all that it starts, then the target starts. The end goes the
other way.
"""

from __future__ import annotations

import base64
import enum
import functools
import logging
import pickle
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from bridge.errors import BridgeError, TargetError, UsageError
from bridge.session.stats import Stats
from bridge.sources.remote import Deliver, serving
from bridge.sources.symbolize import BLOCKS_FILE, NATIVE_FILE
from bridge.targets import Target
from bridge.targets.description import Description, describe, member_of
from bridge.targets.faults import ServingThreads, stacks_of
from bridge.targets.registry import TargetMaker
from bridge.targets.registry import create as create_target
from bridge.targets.thread import TargetThread, foreign
from bridge.vm.network import EpochWord

if TYPE_CHECKING:
    # Imported where it is used: a run that covers no Python does without coverage.py.
    from bridge.session.isolated import IsolatedTarget
    from bridge.sources.native.source import NativeSource
    from bridge.sources.python.source import PythonSource

__all__ = [
    "InProcessTarget",
    "TargetHost",
    "TargetState",
    "describe_failure",
    "fill_blocks",
    "read_attribute",
    "stop_target",
]

logger = logging.getLogger(__name__)


class TargetHost(Protocol):
    """A target and its source, wherever they run; made first, then started once."""

    @property
    def name(self) -> str:
        """The target's name."""

    @property
    def source(self) -> PythonSource | IsolatedTarget | None:
        """What covers the target; None where nothing does."""

    @property
    def native(self) -> NativeSource | None:
        """What covers the native programs of the target; None where nothing does."""

    @property
    def thread(self) -> TargetThread | None:
        """The thread on which the target runs, where that is in this process."""

    @property
    def serving_pid(self) -> int | None:
        """The process that serves the guest; None where it is this one, or does not run."""

    @property
    def fault_count(self) -> int:
        """How many exceptions were noted in that process; 0 where it is this one.

        A look at memory, whatever the target does; :meth:`problems` says what they are.
        """

    @property
    def fault_memory(self) -> int | None:
        """A descriptor of the memory whose first word is that number, if there is one."""

    def build_programs(self) -> None:
        """Build programs of the target that are missing; takes minutes, unlike :meth:`start`.

        Raises:
            BridgeError: one cannot be built.
        """

    def start(self, deliver: Deliver, epoch: EpochWord | None = None) -> Description:
        """Start the source, then the target; return when the target serves.

        Args:
            deliver: takes coverage on behalf of handles.
            epoch: the word that each line of the target changes.

        Raises:
            TargetError: the target raised something, whatever it is.
            SourceError: the source did not start.
        """

    def renew(self) -> Description:
        """Give the target the state again that it had when it served first.

        Call it while the guest has no connection to it.

        Returns:
            What the target says of itself; only the ports on the host may differ.

        Raises:
            TargetError: the target raised something, whatever it is.
        """

    def problems(self) -> list[str]:
        """Return what has gone wrong in the target since the last call and raised nothing here.

        Each is a line, and where there is one a traceback below it. Exceptions on threads of this
        process are not among them: see :class:`bridge.targets.faults.TargetFaults`.
        """

    def stacks(self) -> str:
        """Return where the threads of the target are now; empty if that cannot be had."""

    def stop(self) -> None:
        """Stop the target, then the source, and write what it covered. Safe to call twice.

        Raises:
            TargetError: the target raised something, whatever it is; all the rest is done.
        """

    def fill(self, stats: Stats) -> None:
        """As :class:`bridge.session.stats.Measured`."""


def fill_blocks(
    stats: Stats,
    source: PythonSource | IsolatedTarget | None,
    native: NativeSource | None = None,
) -> None:
    """Enter what the sources of a target covered."""
    if source is not None:
        stats.sources = sorted({*stats.sources, "python"})
        stats.blocks_total = source.blocks_total
        stats.blocks_covered = source.blocks_covered
        stats.tracer_faults = source.tracer_faults
    if native is not None:
        stats.sources = sorted({*stats.sources, native.name})
        stats.blocks_total += native.blocks_total
        stats.blocks_covered += native.blocks_covered


class TargetState(enum.Enum):
    """What happens to a target when its guest is reset."""

    KEEP = "keep"
    """It goes on."""
    RESTART = "restart"
    """It is stopped, made and started again."""
    FORK = "fork"
    """The process that serves ends, and another is forked from the one that is ready."""


class InProcessTarget:
    """A target in this process.

    Args:
        target: what makes it, and its directory, as :func:`bridge.targets.registry.create` takes
            them.
        start_seconds: how long it may take to start; None for no limit.
        measured: whether the packages of the target are covered.
        comparisons: whether what they compare is recorded.
        shared: a source that covers other native programs, and is to cover those of the target.
        out: directory for ``.coverage`` and ``blocks.tsv``; None for nowhere.

    Raises:
        UsageError: there is no such target.
        TargetError: the target raised something, whatever it is.
    """

    def __init__(
        self,
        target: str | TargetMaker,
        directory: Path | None,
        *,
        measured: bool = True,
        comparisons: bool = False,
        shared: NativeSource | None = None,
        out: Path | None = None,
        start_seconds: float | None = None,
    ) -> None:
        self._out = out
        self._shared = shared
        self._start_seconds = start_seconds
        self._serving: ServingThreads | None = None
        self._make = functools.partial(create_target, target, directory)
        self.thread = TargetThread()
        self._stack = ExitStack()
        self._stack.callback(self.thread.close)
        try:
            made = self.thread.call(self._make)
            self.target: Target = made
            who, when = f"the target {target}", "when asked for its name and packages"
            self.name, packages, native = self.thread.call_foreign(
                who, when, lambda: (str(made.name), made.packages, member_of(made, "native", False))
            )
            self.source: PythonSource | None = None
            if measured and packages:
                from bridge.sources.python.source import PythonSource

                data_file = out / ".coverage" if out is not None else None
                self.source = PythonSource(packages, data_file=data_file, comparisons=comparisons)
            self.native: NativeSource | None = None
            if measured and native:
                from bridge.sources.native.source import NativeSource

                self.native = shared or NativeSource()
        except BaseException:
            # A thread that is stuck says less than what it was left for.
            with suppress(TargetError):
                self._stack.close()
            raise

    @property
    def serving_pid(self) -> int | None:
        """As :class:`TargetHost`."""
        return None

    @property
    def fault_count(self) -> int:
        """As :class:`TargetHost`."""
        return 0

    @property
    def fault_memory(self) -> int | None:
        """As :class:`TargetHost`."""
        return None

    def build_programs(self) -> None:
        """As :class:`TargetHost`: on the caller's thread, where a Ctrl-C ends the build."""
        build: Callable[[], None] | None = member_of(self.target, "build_programs", None)
        if build is not None:
            with foreign(self._who, "while its programs were built"):
                build()

    def start(self, deliver: Deliver, epoch: EpochWord | None = None) -> Description:
        """As :class:`TargetHost`."""
        thread, source, native = self.thread, self.source, self.native
        place = (epoch.file, epoch.offset) if epoch is not None else None
        if native is not None and native is not self._shared:
            native.start(place, deliver)
            if self._out is not None:
                self._stack.callback(native.save, self._out / NATIVE_FILE)
            self._stack.callback(native.stop)
        if source is not None:
            # Which imports packages that others lie in.
            begin = functools.partial(source.start, place)
            thread.call_foreign(self._who, "while its packages were looked for", begin)
            # In the reverse order: the source writes .coverage, and its table is whole then.
            if self._out is not None:
                self._stack.callback(source.table.save, self._out / BLOCKS_FILE)
            self._stack.callback(self._stop_source, source)
            self._stack.enter_context(serving(source, deliver))
        logger.debug("starting the target %s", self.name)
        description = self._serve()
        self._stack.callback(self._end_service)
        return description

    @property
    def _who(self) -> str:
        return f"the target {self.name}"

    def _stop_source(self, source: PythonSource) -> None:
        """Stop the source on the target's thread, or here if that is stuck; no line is lost."""
        try:
            self.thread.call(source.stop)
        finally:
            # Does nothing if it was stopped there.
            source.stop()

    def _serve(self) -> Description:
        thread, target = self.thread, self.target
        before = ServingThreads.running()
        try:
            if self.native is not None:
                self._cover_programs(self.native.environment)
            thread.call_foreign(self._who, "on start", target.start, self._start_seconds)
            self._serving = ServingThreads(before)
            if self.native is not None:
                for process in thread.call(lambda: _processes_of(target)):
                    self.native.add_process(process)
            return thread.call(lambda: describe(target))
        except BaseException:
            # What a target that never started raises on its end says nothing.
            with suppress(TargetError):
                self._end_service()
            raise

    def _cover_programs(self, environment: Mapping[str, str]) -> None:
        cover: Callable[[Mapping[str, str]], None] | None = member_of(
            self.target, "cover_programs", None
        )
        if cover is not None:
            self.thread.call_foreign(self._who, "on start", lambda: cover(environment))

    def _end_service(self) -> None:
        self._serving = None
        self.thread.call_foreign(self._who, "on stop", self.target.stop)

    def renew(self) -> Description:
        """As :class:`TargetHost`: stops the target, and starts one that is made anew."""
        self._end_service()
        self.target = self.thread.call(self._make)
        return self._serve()

    def read(self, name: str, call: str | None) -> str:
        """As :func:`read_attribute`, on the target's thread."""
        return self.thread.call(lambda: read_attribute(self._who, self.target, name, call))

    def problems(self) -> list[str]:
        """As :class:`TargetHost`."""
        serving = self._serving
        return serving.take_ended() if serving is not None else []

    def stacks(self) -> str:
        """As :class:`TargetHost`."""
        serving = self._serving
        threads = serving.alive if serving is not None else []
        return stacks_of([self.thread.thread, *threads])

    def stop(self) -> None:
        """As :class:`TargetHost`."""
        self._stack.close()

    def fill(self, stats: Stats) -> None:
        """As :class:`bridge.session.stats.Measured`."""
        stats.target = self.name
        fill_blocks(stats, self.source, self.native if self.native is not self._shared else None)


def _processes_of(target: Target) -> Sequence[int]:
    """Return the processes that a target says it has started."""
    found: Sequence[int] = member_of(target, "processes", ())
    return tuple(int(each) for each in found)


def describe_failure(error: BridgeError) -> dict[str, object]:
    """Return an error of a target as JSON can hold it."""
    return {
        "message": error.message,
        "evidence": error.evidence,
        "hint": error.hint,
        "usage": isinstance(error, UsageError),
    }


def read_attribute(who: str, target: Target, name: str, call: str | None) -> str:
    """Return an attribute of a target, or what its method returns, for another process.

    Args:
        who: the target, for messages.
        name: the attribute; with ``.`` between the steps of a longer way, which may be indices.
        call: arguments of the method, by place and by name, pickled, in base64; None reads it.

    Returns:
        ``[whether it can be called, value]``, pickled, in base64.

    Raises:
        UsageError: there is no such attribute, or it cannot be pickled.
        TargetError: it raised something.
    """
    missing: Any = object()
    with foreign(who, f"when asked for {name}"):
        value: Any = target
        for step in name.split("."):
            value = value[int(step)] if step.isdigit() else getattr(value, step, missing)
        if call is not None:
            places, names = pickle.loads(base64.b64decode(call))
            value = value(*places, **names)
        elif callable(value):
            return base64.b64encode(pickle.dumps([True, None])).decode()
    if value is missing:
        raise UsageError(f"{who} has no attribute {name}")
    try:
        return base64.b64encode(pickle.dumps([False, value])).decode()
    except Exception as error:
        raise UsageError(
            f"{who}: {name} cannot be copied out of the target's process: {error}",
            hint="have a method of the target return what the test needs, as plain data",
        ) from error


def stop_target(host: TargetHost, kind: type[BaseException] | None, *_: object) -> None:
    """Stop a target at the end of a session; its failure does not hide what ended the session."""
    try:
        host.stop()
    except BridgeError as error:
        if kind is None:
            raise
        logger.error("the target was not stopped in order: %s", error.report())
