# SPDX-License-Identifier: Apache-2.0
"""A target and the source that covers it, in this process.

Both live on one thread, the target's: the target is made on it, then the source starts, so that
the source measures this thread and all that it starts, then the target starts. The end goes the
other way.
"""

from __future__ import annotations

import functools
import logging
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from bridge.errors import BridgeError, TargetError
from bridge.session.stats import Stats
from bridge.sources.remote import Deliver, serving
from bridge.sources.symbolize import BLOCKS_FILE
from bridge.targets import Target
from bridge.targets.description import Description, describe
from bridge.targets.registry import create as create_target
from bridge.targets.thread import TargetThread
from bridge.vm.network import EpochWord

if TYPE_CHECKING:
    # Imported where it is used: a run that covers no Python does without coverage.py.
    from bridge.session.isolated import IsolatedTarget
    from bridge.sources.python.source import PythonSource

__all__ = ["InProcessTarget", "TargetHost", "fill_blocks", "stop_target"]

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
    def thread(self) -> TargetThread | None:
        """The thread on which the target runs, where that is in this process."""

    def start(self, deliver: Deliver, epoch: EpochWord | None = None) -> Description:
        """Start the source, then the target; return when the target serves.

        Args:
            deliver: takes coverage on behalf of handles.
            epoch: the word that each line of the target changes.

        Raises:
            TargetError: the target raised something, whatever it is.
            SourceError: the source did not start.
        """

    def stop(self) -> None:
        """Stop the target, then the source, and write what it covered. Safe to call twice.

        Raises:
            TargetError: the target raised something, whatever it is; all the rest is done.
        """

    def fill(self, stats: Stats) -> None:
        """As :class:`bridge.session.stats.Measured`."""


def fill_blocks(stats: Stats, source: PythonSource | IsolatedTarget | None) -> None:
    """Enter what the source of a target covered."""
    if source is not None:
        stats.sources = sorted({*stats.sources, "python"})
        stats.blocks_total = source.blocks_total
        stats.blocks_covered = source.blocks_covered
        stats.tracer_faults = source.tracer_faults


class InProcessTarget:
    """A target in this process.

    Args:
        target: name and directory as :func:`bridge.targets.registry.create` takes them.
        measured: whether the packages of the target are covered.
        comparisons: whether what they compare is recorded.
        out: directory for ``.coverage`` and ``blocks.tsv``; None for nowhere.

    Raises:
        UsageError: there is no such target.
        TargetError: the target raised something, whatever it is.
    """

    def __init__(
        self,
        target: str,
        directory: Path | None,
        *,
        measured: bool = True,
        comparisons: bool = False,
        out: Path | None = None,
    ) -> None:
        self._out = out
        self.thread = TargetThread()
        self._stack = ExitStack()
        self._stack.callback(self.thread.close)
        try:
            made = self.thread.call(lambda: create_target(target, directory))
            self.target: Target = made
            who, when = f"the target {target}", "when asked for its name and packages"
            self.name, packages = self.thread.call_foreign(
                who, when, lambda: (str(made.name), made.packages)
            )
            self.source: PythonSource | None = None
            if measured and packages:
                from bridge.sources.python.source import PythonSource

                data_file = out / ".coverage" if out is not None else None
                self.source = PythonSource(packages, data_file=data_file, comparisons=comparisons)
        except BaseException:
            # A thread that is stuck says less than what it was left for.
            with suppress(TargetError):
                self._stack.close()
            raise

    def start(self, deliver: Deliver, epoch: EpochWord | None = None) -> Description:
        """As :class:`TargetHost`."""
        thread, source, target = self.thread, self.source, self.target
        who = f"the target {self.name}"
        if source is not None:
            # Which imports packages that others lie in.
            place = (epoch.file, epoch.offset) if epoch is not None else None
            begin = functools.partial(source.start, place)
            thread.call_foreign(who, "while its packages were looked for", begin)
            # In the reverse order: the source writes .coverage, and its table is whole then.
            if self._out is not None:
                self._stack.callback(source.table.save, self._out / BLOCKS_FILE)
            self._stack.callback(thread.call, source.stop)
            self._stack.enter_context(serving(source, deliver))
        logger.debug("starting the target %s", self.name)
        try:
            thread.call_foreign(who, "on start", target.start)
            description = thread.call(lambda: describe(target))
        except BaseException:
            # What a target that never started raises on its end says nothing.
            with suppress(TargetError):
                thread.call_foreign(who, "on stop", target.stop)
            raise
        self._stack.callback(thread.call_foreign, who, "on stop", target.stop)
        return description

    def stop(self) -> None:
        """As :class:`TargetHost`."""
        self._stack.close()

    def fill(self, stats: Stats) -> None:
        """As :class:`bridge.session.stats.Measured`."""
        stats.target = self.name
        fill_blocks(stats, self.source)


def stop_target(host: TargetHost, kind: type[BaseException] | None, *_: object) -> None:
    """Stop a target at the end of a session; its failure does not hide what ended the session."""
    try:
        host.stop()
    except BridgeError as error:
        if kind is None:
            raise
        logger.error("the target was not stopped in order: %s", error.report())
