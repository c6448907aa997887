# SPDX-License-Identifier: Apache-2.0
"""The host's side of the kcov device: region, ivshmem server, device and doorbell in one."""

from __future__ import annotations

import contextlib
import functools
import logging
import socket
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import NamedTuple, TypeVar

from bridge.device.abi import WORD, HeaderWord
from bridge.device.doorbell import CALL_SECONDS, Doorbell
from bridge.device.ivshmem import IvshmemServer
from bridge.device.kcov import Device, Personality
from bridge.device.lanes import LaneAreas
from bridge.device.region import Region
from bridge.device.streams import Stream
from bridge.errors import BridgeError, DoorbellError, RegionError, SourceError
from bridge.session.stats import InstanceStats, Stats
from bridge.sources import Consumed
from bridge.sources.by_thread import ByThread
from bridge.sources.comparisons import (
    Comparing,
    ComparisonLedger,
    NoComparisons,
    syscall_comparison,
)
from bridge.sources.guest_kernel.source import GuestKernel
from bridge.sources.ledger import Cursor, Ledger
from bridge.sources.pcs import syscall_pc
from bridge.targets import AnyEndpoint
from bridge.vm.network import EpochWord
from bridge.vm.wires import WireRelay

__all__ = ["DeviceHost", "Unanswered", "reason_of"]

logger = logging.getLogger(__name__)
T = TypeVar("T")

_OWNER_ID = 0xFFFFFFFF
"""Of the number that names an owner, the thread id in the guest."""


class Unanswered(NamedTuple):
    """What a guest counts that gets no answer in time. The guest writes it: any numbers."""

    gave_up: int
    """How often it went on without an answer."""
    untraced: int
    """Threads of streams that were not traced because of that."""


def reason_of(failure: BaseException) -> tuple[str, str]:
    """Return message and evidence for what a source raised."""
    if isinstance(failure, BridgeError):
        return failure.message, failure.evidence
    reason = f"the coverage source raised {type(failure).__name__}: {failure}"
    return reason, "".join(traceback.format_exception(failure))


class DeviceHost:
    """A kcov device that answers a guest from its construction to :meth:`close`.

    Args:
        region_bytes: size of the memory shared with the guest.
        source: what is consumed at each return of an owner.
        native: another source, which is consumed after it.
        comparing: what hands over comparisons; None refuses TRACE_CMP.
        threads: what tells which thread of the target ran a block; None where that is not known.
        kernel: the guest kernel as a source, which writes into areas by itself.
        personality: whose kcov rules the device follows.
        syscall_pcs: whether each return appends a PC for the system call.
        syscall_comparisons: the same for comparisons, and TRACE_CMP is allowed without
            ``comparing``.
        poll_seconds: how long the doorbell polls after a request before it sleeps.
        soonest_ns: as for :class:`bridge.device.doorbell.Doorbell`.

    Raises:
        RegionError: there is no memory for the region.
        DoorbellError: the doorbell cannot be made.
    """

    def __init__(
        self,
        region_bytes: int,
        *,
        source: Consumed | None = None,
        native: Consumed | None = None,
        comparing: Comparing | None = None,
        threads: ByThread | None = None,
        kernel: GuestKernel | None = None,
        personality: Personality = Personality.LINUX,
        syscall_pcs: bool = False,
        syscall_comparisons: bool = False,
        poll_seconds: float = 0.0,
        soonest_ns: int = 0,
    ) -> None:
        self._closed = False
        self._wires: WireRelay | None = None
        with ExitStack() as stack:
            self.region = Region(region_bytes)
            stack.callback(self.region.close)
            self._server = IvshmemServer(self.region)
            stack.callback(self._server.close)
            if comparing is None and syscall_comparisons:
                comparing = NoComparisons()
            sources = [each for each in (source, native) if each is not None]
            self._ledger = Ledger(sources, self._source_failed, self._coverage_position_changed)
            self.device: Device[Cursor] = Device(
                self.region,
                self._ledger,
                personality,
                syscall_pc if syscall_pcs else None,
                kernel,
                ComparisonLedger(comparing, self._source_failed) if comparing is not None else None,
                threads,
                syscall_comparison if syscall_comparisons else None,
            )
            self.doorbell: Doorbell[Cursor] = Doorbell(
                self.region,
                self.device,
                self._server.bell,
                poll_seconds=poll_seconds,
                kernel=kernel,
                silent=kernel is not None and not sources and not syscall_pcs,
                soonest_ns=soonest_ns,
            )
            self.doorbell.start()
            stack.callback(self.doorbell.stop)
            self._stack = stack.pop_all()

    def __enter__(self) -> DeviceHost:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the doorbell and give the region back. Safe to call twice."""
        try:
            self._stack.close()
        finally:
            self._closed = True

    def connect(self) -> socket.socket:
        """As :meth:`bridge.device.ivshmem.IvshmemServer.connect`."""
        return self._server.connect()

    def call(self, function: Callable[[], T]) -> T:
        """Run ``function`` on the doorbell's thread, which alone may touch the device.

        Raises:
            DoorbellError: the doorbell does not run, or does not answer.
        """
        try:
            return self.doorbell.call(function, CALL_SECONDS)
        except TimeoutError as error:
            raise DoorbellError(
                "the doorbell does not answer", hint="is this machine, or a disk of it, overloaded?"
            ) from error

    @property
    def coverage_epoch(self) -> EpochWord:
        """The word that the tracer and the relays change."""
        return EpochWord(self.region.path, HeaderWord.COVERAGE_EPOCH * WORD)

    def serve_wires(self, endpoints: Sequence[AnyEndpoint], *, changes_epoch: bool) -> None:
        """Let the guest connect to these endpoints through the region; call it once.

        Args:
            endpoints: of the target.
            changes_epoch: whether owners are to rely on the epoch (:meth:`rely_on_epoch`).

        Raises:
            MissingDependencyError: there is no C compiler.
            InfrastructureError: the process that carries the connections cannot be started.
            DoorbellError: as :meth:`call`.
        """
        server = self._server
        wires = WireRelay(
            self.region,
            server.wire_bell,
            server.wire_guest_bell,
            endpoints,
            changes_epoch=changes_epoch,
        )
        self._stack.callback(wires.close)
        self._wires = wires
        self.call(functools.partial(setattr, self.device, "wires", wires))

    @property
    def serves_wires(self) -> bool:
        """Whether the guest can connect through the region."""
        return self._wires is not None

    def move_wires(self, endpoints: Sequence[AnyEndpoint]) -> None:
        """Have connections through the region, if there are any, lead to these from now on.

        Raises:
            DoorbellError: as :meth:`call`.
        """
        if self._wires is not None:
            self.call(functools.partial(self._wires.set, endpoints))

    def rely_on_epoch(self) -> None:
        """Have no return reported that finds the coverage epoch unchanged."""
        self.doorbell.rely_on_epoch()

    def reset(self) -> None:
        """End all instances and clear the region: the guest goes on as another."""
        if self._wires is not None:
            # At once: what the guest has written and the target has not read is dropped.
            self.call(self._wires.reset)
        self.call(self.doorbell.reset)

    def deliver(self, handle: int, pcs: Sequence[int]) -> None:
        """Append coverage on behalf of a handle; return when it is in the area."""
        try:
            self.call(functools.partial(self.device.remote_coverage, handle, pcs))
        except DoorbellError as error:
            self._source_failed(SourceError(f"coverage for handle {handle:#x} is lost: {error}"))

    def consume(self) -> None:
        """Consume the source for whoever traces now; raises as :meth:`call`.

        What the source raises counts as its failure.
        """
        self.call(self._ledger.drain)

    def open_stream(self, stream: Stream) -> None:
        """Let threads of the guest trace into the stream; raises as :meth:`call`."""
        self.call(functools.partial(self.device.open_stream, stream))

    def unanswered(self) -> Unanswered:
        """Return what the guest did without an answer so far; raises as :meth:`call`."""

        def look() -> Unanswered:
            doorbell = self.doorbell
            doorbell.look_at_guest()
            return Unanswered(
                doorbell.guest_timeouts + doorbell.guest_skipped, doorbell.guest_untraced
            )

        return self.call(look)

    @property
    def source_failures(self) -> int:
        """How often a source raised so far."""
        return self.doorbell.counters.source_failures

    def close_stream(self, stream: Stream) -> None:
        """End the stream, which has what its threads covered so far; raises as :meth:`call`."""
        # Other requests are answered in between.
        while not self.call(functools.partial(self.device.close_some, stream)):
            pass

    def open_lane(self, sizes: Sequence[int]) -> LaneAreas:
        """Make a lane with areas of these sizes in words; they stay over resets, which zero them.

        Raises:
            RegionError: the region has no room.
            DoorbellError: as :meth:`call`.
        """
        lane = self.call(functools.partial(self.device.open_lane, sizes))
        if lane is None:
            need = sum(sizes) * WORD >> 20
            raise RegionError(
                f"the memory shared with the guest has no room for a lane of {need} MiB",
                hint="take a larger region: --region MIB",
            )
        return lane

    def close_lane(self, lane: LaneAreas) -> None:
        """End a lane, also without a doorbell, with which its areas go; safe to call twice."""
        with contextlib.suppress(DoorbellError):
            self.call(functools.partial(self.device.close_lane, lane))

    def fill(self, stats: Stats) -> None:
        """As :class:`bridge.session.stats.Measured`.

        Where the doorbell does not answer, the figures are those of its last work.
        """
        if self._closed:
            self._fill(stats)
            return
        try:
            self.call(functools.partial(self._look, stats))
        except DoorbellError as error:
            stats.problem = str(error)
            self._fill(stats)

    def _look(self, stats: Stats) -> None:
        self.doorbell.look_at_guest()
        for _, kcov in self.doorbell.instances():
            self.device.count_watched(kcov)
        self._fill(stats)

    def _fill(self, stats: Stats) -> None:
        device, doorbell = self.device, self.doorbell
        stats.personality = device.personality.value
        stats.returns = device.totals.returns
        stats.pcs = device.totals.appended
        stats.pcs_unique += len(device.unique)
        stats.lost_pcs = device.totals.dropped
        stats.untraced = device.untraced + doorbell.guest_untraced
        stats.comparisons = device.totals.comparisons
        stats.lost_comparisons = device.totals.comparisons_dropped
        stats.guest_timeouts = doorbell.guest_timeouts
        stats.guest_skipped = doorbell.guest_skipped
        stats.target_answered = doorbell.target_answered
        stats.source_failures = doorbell.counters.source_failures
        if self._closed:
            return
        stats.instances = [
            InstanceStats(
                slot=slot,
                owner=None if kcov.owner is None else kcov.owner & _OWNER_ID,
                mode=kcov.mode.value,
                words=kcov.size,
                appended=kcov.appended,
                dropped=kcov.dropped,
            )
            for slot, kcov in doorbell.instances()
        ]

    def _coverage_position_changed(self, position: int) -> None:
        self.doorbell.set_coverage_position(position)

    def _source_failed(self, failure: Exception) -> None:
        """A device without coverage is still a device: the guest's calls must go on."""
        self.doorbell.source_failed(failure)
