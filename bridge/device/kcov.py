# SPDX-License-Identifier: Apache-2.0
"""The kcov device: one :class:`Kcov` per open descriptor, and the :class:`Device` that holds them.

Pure logic, without a VM or a socket. Most methods return an errno (0 for success), which is how the
ioctl, mmap or exit in the guest ends. Two personalities:

* ``linux`` follows ``kernel/kcov.c`` in Linux,
* ``gvisor`` follows ``pkg/sentry/kernel/kcov.go`` in gVisor.

The life of an instance::

                INIT_TRACE            ENABLE
    DISABLED ───────────────▶ INIT ───────────▶ TRACE_PC, UNIQUE_PC, TRACE_CMP
                               ▲                   │
                               └── DISABLE, exit ──┘       release ends it from any mode

Not thread-safe: only the doorbell's thread calls the methods.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, Generic, Protocol, TypeVar

from bridge.device.abi import (
    ENOTSUPP,
    GVISOR_MAX_WORDS,
    KCOV_REMOTE_MAX_HANDLES,
    KCOV_TRACE_CMP,
    KCOV_TRACE_PC,
    KCOV_WORDS_PER_CMP,
    LANE_INDEX_SHIFT,
    LANE_MASK,
    LINUX_MAX_WORDS,
    PAGE_SIZE,
    SINCE_NONE,
    WIRE_BYTES,
    WORD,
    Comparison,
)
from bridge.device.calls import CallLog, ThreadOf
from bridge.device.fastpath import KcovState, ReturnHandler, Totals
from bridge.device.lanes import LaneAreas
from bridge.device.region import Area
from bridge.device.streams import AreaSource, Stream
from bridge.errors import SourceError

__all__ = [
    "Areas",
    "Comparisons",
    "Coverage",
    "Device",
    "Kcov",
    "Mode",
    "Personality",
    "Totals",
    "Watcher",
]

Errno = int
Task = int
"""Names a guest thread: never 0, and unique among all threads that ever became owners."""

C = TypeVar("C")

# Handles: include/uapi/linux/kcov.h, KCOV_SUBSYSTEM_* and KCOV_*_MASK.
_SUBSYSTEM_BITS = 0xFF << 56
_INSTANCE_BITS = 0xFFFFFFFF
_HANDLE_BITS = _SUBSYSTEM_BITS | _INSTANCE_BITS
_SUBSYSTEM_USB = 0x01 << 56
_CLOSE_SECONDS = 0.05
"""Time limit for ending threads of a stream in one go, well below the guest's time-out."""


class Personality(Enum):
    """The kcov implementation whose behaviour the device copies where the two differ."""

    LINUX = "linux"
    GVISOR = "gvisor"


class Mode(Enum):
    """``enum kcov_mode`` in Linux' ``kernel/kcov.c``."""

    DISABLED = "disabled"
    INIT = "init"
    TRACE_PC = "trace-pc"
    UNIQUE_PC = "unique-pc"
    TRACE_CMP = "trace-cmp"
    WIRED = "wired"
    """No mode of Linux: the instance is a connection to the target."""


class Areas(AreaSource, Protocol):
    """The provider of areas: :class:`bridge.device.region.Region`."""

    def has_room(self, size: int) -> bool:
        """Return whether an area of ``size`` words can be allocated now."""

    def free(self, area: Area) -> None:
        """Free an area."""


class Coverage(Protocol[C]):
    """The provider of PCs: :class:`bridge.sources.ledger.Ledger`."""

    def open_cursor(self) -> C:
        """Return a cursor that starts now: its owner gets no earlier coverage."""

    def collect(self, cursor: C, since: int = 0) -> Sequence[int]:
        """Return what was covered since the cursor's last collect, each block once.

        ``since`` as for :meth:`bridge.sources.ledger.Ledger.collect`.
        """

    def close_cursor(self, cursor: C) -> None:
        """Close a cursor, which must not be used afterwards."""


ComparisonCursor = Any
"""A cursor of :class:`Comparisons`; the device only passes it back."""


class Comparisons(Protocol):
    """The provider of records: :class:`bridge.sources.comparisons.ComparisonLedger`."""

    def open_cursor(self) -> Any:
        """See :class:`Coverage`."""

    def collect(self, cursor: Any) -> tuple[Sequence[Comparison], int]:
        """Return the comparisons since the last collect, and how many more were dropped."""

    def close_cursor(self, cursor: Any) -> None:
        """See :class:`Coverage`."""


class Threads(Protocol):
    """Tells which thread of the target ran a block: :class:`bridge.sources.by_thread.ByThread`."""

    def record_threads(self, on: bool) -> None:
        """Start or stop to tell."""

    @property
    def thread_of(self) -> ThreadOf:
        """The thread that ran a block last, of those that were consumed meanwhile."""


class Wires(Protocol):
    """What carries the guest's connections: :class:`bridge.vm.wires.WireRelay`."""

    def open(self, port: int, offset: int) -> int:
        """Connect the rings at ``offset``; return an errno."""

    def end(self, offset: int) -> int:
        """End a connection; return 0 once nobody writes to its memory any more."""


class Watcher(Protocol):
    """Writes PCs into areas by itself: :class:`bridge.sources.guest_kernel.source.GuestKernel`.

    Instances are named by their slots.
    """

    def attach(self, slot: int, area: Area, task: int) -> None:
        """Let the task with this address in the guest trace into the area from now on."""

    def counts(self, slot: int) -> tuple[int, int]:
        """Return the PCs appended and dropped since :meth:`attach`."""

    def detach(self, slot: int) -> tuple[int, int]:
        """Stop writing into the area; return the final :meth:`counts`."""


class Kcov(KcovState[Area, C], Generic[C]):
    """One open descriptor. Only the device writes its fields.

    Attributes:
        area: None before INIT_TRACE (linux) or the first mmap (gvisor).
        retired: areas that DISABLE dropped in the gvisor personality and that may still be mapped.
        handles: the handles of KCOV_REMOTE_ENABLE. An instance with handles gets only the coverage
            on their behalf, and has no cursor.
        comparing: in mode TRACE_CMP a cursor for comparisons, instead of ``cursor``; ``appended``
            and ``dropped`` count comparisons then.
        compares: whether the last ENABLE was for comparisons.
        stream: where the area's words go, if no process maps the area.
        lane: the lane that the area belongs to, and the area's index in it; None for others.
        calls: the log of the owner's system calls, if the stream wants them. The guest writes into
            it until it releases the instance.
    """

    __slots__ = (
        "calls",
        "compares",
        "comparing",
        "handles",
        "lane",
        "mode",
        "retired",
        "size",
        "slot",
        "stream",
        "watched",
        "wired",
    )

    def __init__(self, generation: int, slot: int = 0) -> None:
        super().__init__(generation)
        self.slot = slot
        # The part of the watcher's counts that appended and dropped include.
        self.watched = (0, 0)
        self.mode = Mode.DISABLED
        self.size = 0
        self.retired: list[Area] = []
        self.comparing: Any = None
        self.compares = False
        self.handles: tuple[int, ...] = ()
        self.stream: Stream | None = None
        self.lane: tuple[LaneAreas, int] | None = None
        self.calls: CallLog | None = None
        self.wired = False


class Device(Generic[C]):
    """The kcov device of one guest.

    Args:
        areas: the provider of areas.
        coverage: the provider of PCs.
        syscall_pc: maps a system call's number to the PC that stands for it, or None. Each return
            appends that PC first.
        watcher: writes PCs into areas by itself.
        comparisons: the provider of comparisons; without it TRACE_CMP is refused.
        threads: tells which thread of the target ran a block; None where that is not known.
        syscall_comparison: maps a system call's number to the comparison that stands for it, or
            None. Each return in mode TRACE_CMP appends that comparison first.

    Attributes:
        unique: every PC that was appended to any area, except those of ``watcher``.
    """

    def __init__(
        self,
        areas: Areas,
        coverage: Coverage[C],
        personality: Personality = Personality.LINUX,
        syscall_pc: Callable[[int], int | None] | None = None,
        watcher: Watcher | None = None,
        comparisons: Comparisons | None = None,
        threads: Threads | None = None,
        syscall_comparison: Callable[[int], Comparison | None] | None = None,
    ) -> None:
        self.personality = personality
        self._threads = threads
        self._comparisons = comparisons
        self._watcher = watcher
        self.totals = Totals()
        self.unique: set[int] = set()
        self._areas = areas
        self._coverage = coverage
        self._syscall_pc = syscall_pc
        self._syscall_comparison = syscall_comparison
        self._remotes: dict[int, Kcov[C]] = {}
        # The bit of each PC in the bitmaps of UNIQUE_PC; bounded by the number of PCs.
        self._bits: dict[int, int] = {}
        self._owners: dict[Task, Kcov[C]] = {}
        self._streams: dict[int, Stream] = {}
        # Of streams whose threads log calls: see join_stream().
        self._stream_cursors: dict[Stream, C] = {}
        self._lanes: dict[int, LaneAreas] = {}
        self.wires: Wires | None = None
        """What carries connections of the guest to the target."""
        self.untraced = 0
        """Number of threads that should have joined a stream and could not."""
        # A dict, because it keeps the order of opening.
        self._open: dict[Kcov[C], None] = {}
        self.return_handler: ReturnHandler[Kcov[C]] = ReturnHandler(
            coverage,
            self.totals,
            self.unique,
            syscall_pc,
            self._watched_returns if watcher is not None else None,
            self._append_rest,
        )

    @property
    def instances(self) -> int:
        """Number of open instances."""
        return len(self._open)

    @property
    def enabled(self) -> int:
        """Number of instances that trace a task now."""
        return len(self._owners)

    def open(self, generation: int = 0, slot: int = 0) -> Kcov[C]:
        """Open an instance, mode DISABLED, in a slot that no other open instance has."""
        kcov: Kcov[C] = Kcov(generation, slot)
        self._open[kcov] = None
        return kcov

    def init_trace(self, kcov: Kcov[C], size: int) -> Errno:
        """Carry out KCOV_INIT_TRACE for ``size`` words, with the personality's order of checks."""
        if self.personality is Personality.GVISOR:
            if kcov.mode is not Mode.DISABLED:
                return errno.EBUSY
            if size * WORD % PAGE_SIZE or not 2 <= size <= GVISOR_MAX_WORDS:
                return errno.EINVAL
        else:
            if not 2 <= size <= LINUX_MAX_WORDS:
                return errno.EINVAL
            # Linux allocates first, and frees the area if the instance is in use.
            if not self._areas.has_room(size):
                return errno.ENOMEM
            if kcov.mode is not Mode.DISABLED:
                return errno.EBUSY
            kcov.area = self._areas.allocate(size)
        kcov.size = size
        kcov.mode = Mode.INIT
        return 0

    def map(
        self, kcov: Kcov[C], length: int, page_offset: int, live_mappings: int = 1
    ) -> tuple[Errno, int]:
        """Carry out mmap of ``length`` bytes.

        Args:
            live_mappings: the mappings of this instance that the guest still has. Without any,
                retired areas are freed.

        Returns:
            An errno, and the area's offset in the region in bytes.
        """
        if self.personality is Personality.GVISOR:
            if kcov.mode is not Mode.INIT:
                return errno.EINVAL, 0
        elif kcov.mode is Mode.DISABLED:
            return errno.EINVAL, 0
        if page_offset or length != kcov.size * WORD:
            return errno.EINVAL, 0
        if kcov.area is None:
            if live_mappings == 0:
                self._free_retired(kcov)
            kcov.area = self._areas.allocate(kcov.size)
            if kcov.area is None:
                return errno.ENOMEM, 0
        return 0, kcov.area.offset

    def enable(self, kcov: Kcov[C], task: Task, mode: int, address: int = 0) -> Errno:
        """Carry out KCOV_ENABLE by ``task``. Earlier coverage is dropped, word 0 is left alone.

        Args:
            address: the address of the task's task_struct, for the watcher.
        """
        if kcov.mode is not Mode.INIT or kcov.area is None or _is_control(kcov):
            return errno.EINVAL
        busy = kcov.owner is not None or task in self._owners
        if self.personality is Personality.GVISOR:
            # gVisor's kcovFD.Ioctl looks only at the low byte.
            error = _mode_error(mode & 0xFF, errno.EOPNOTSUPP) or (errno.EBUSY if busy else 0)
        else:
            if mode == KCOV_TRACE_CMP and self._comparisons is not None and not busy:
                kcov.comparing = self._comparisons.open_cursor()
                self._own(kcov, task, Mode.TRACE_CMP)
                return 0
            error = errno.EBUSY if busy else _mode_error(mode, ENOTSUPP)
        if error:
            return error
        self._begin(kcov, task, Mode.TRACE_PC, address)
        return 0

    def unique_enable(
        self, kcov: Kcov[C], task: Task, bitmap_words: int, address: int = 0
    ) -> Errno:
        """Carry out KCOV_UNIQUE_ENABLE by ``task``: each PC once, until the next reset.

        The first ``bitmap_words`` words of the area become the bitmap of the PCs already written,
        and the rest a smaller area, like in ``kcov_handle_unique_enable`` of the patches for Linux.
        """
        if self.personality is Personality.GVISOR:
            return errno.ENOTTY
        if kcov.mode is not Mode.INIT or kcov.area is None:
            return errno.EINVAL
        if kcov.owner is not None or task in self._owners:
            return errno.EBUSY
        # Of a lane the host reads the PCs where they are without a bitmap.
        if not 1 <= bitmap_words < kcov.size - 1 or kcov.lane is not None:
            return errno.EINVAL
        kcov.area.bitmap_words = bitmap_words
        self._begin(kcov, task, Mode.UNIQUE_PC, address)
        return 0

    def remote_enable(
        self,
        kcov: Kcov[C],
        task: Task,
        mode: int,
        handles: Sequence[int] | None,
        common_handle: int = 0,
    ) -> Errno:
        """Carry out KCOV_REMOTE_ENABLE by ``task``, like ``kcov_ioctl`` in Linux.

        From then on, coverage on behalf of the handles goes to this instance.

        Args:
            handles: None if the guest could not read the argument; may be longer than allowed.
        """
        if self.personality is Personality.GVISOR:
            return errno.ENOTTY
        if handles is None:
            return errno.EFAULT
        if len(handles) > KCOV_REMOTE_MAX_HANDLES:
            return errno.EINVAL
        if kcov.mode is not Mode.INIT or kcov.area is None:
            return errno.EINVAL
        if kcov.owner is not None or task in self._owners:
            return errno.EBUSY
        if _is_control(kcov):
            return errno.EINVAL
        error = _mode_error(mode, ENOTSUPP) or self._take_handles(kcov, handles, common_handle)
        if error:
            self._leave_handles(kcov)
            return error
        self._own(kcov, task, Mode.TRACE_PC)
        return 0

    def _take_handles(self, kcov: Kcov[C], handles: Sequence[int], common_handle: int) -> Errno:
        for handle in handles:
            if handle & ~_HANDLE_BITS or handle & _SUBSYSTEM_BITS != _SUBSYSTEM_USB:
                return errno.EINVAL
            if handle in self._remotes:
                return errno.EEXIST
            self._remotes[handle] = kcov
            kcov.handles += (handle,)
        if common_handle:
            # It must be of subsystem 0, with an instance other than 0.
            if common_handle & ~_INSTANCE_BITS:
                return errno.EINVAL
            if common_handle in self._remotes:
                return errno.EEXIST
            self._remotes[common_handle] = kcov
            kcov.handles += (common_handle,)
        return 0

    def _leave_handles(self, kcov: Kcov[C]) -> None:
        for handle in kcov.handles:
            del self._remotes[handle]
        kcov.handles = ()

    def remote_coverage(self, handle: int, pcs: Sequence[int]) -> bool:
        """Append PCs that were covered on behalf of ``handle`` to the instance that enabled it.

        Returns whether there is such an instance. Otherwise the PCs are dropped, as in Linux.
        """
        kcov = self._remotes.get(handle)
        if kcov is None or kcov.area is None:
            return False
        self.return_handler.append(kcov, kcov.area, pcs)
        return True

    def _begin(
        self, kcov: Kcov[C], task: Task, mode: Mode, address: int, cursor: C | None = None
    ) -> None:
        kcov.cursor = cursor if cursor is not None else self._coverage.open_cursor()
        self._own(kcov, task, mode)
        if self._watcher is not None and kcov.area is not None:
            self._watcher.attach(kcov.slot, kcov.area, address)

    def _own(self, kcov: Kcov[C], task: Task, mode: Mode) -> None:
        kcov.owner = task
        kcov.mode = mode
        kcov.compares = mode is Mode.TRACE_CMP
        self._owners[task] = kcov

    def count_watched(self, kcov: Kcov[C]) -> None:
        """Bring ``appended`` and ``dropped`` up to date with what the watcher wrote."""
        if self._watcher is not None and kcov.cursor is not None:
            self._add_watched(kcov, self._watcher.counts(kcov.slot))

    def _add_watched(self, kcov: Kcov[C], counts: tuple[int, int]) -> None:
        appended, dropped = counts[0] - kcov.watched[0], counts[1] - kcov.watched[1]
        kcov.watched = counts
        kcov.appended += appended
        kcov.dropped += dropped
        self.totals.appended += appended
        self.totals.dropped += dropped

    # Lanes

    def open_lane(self, sizes: Sequence[int]) -> LaneAreas | None:
        """Make a lane with areas of these sizes in words, the control area's first.

        Returns None if the region has no room.
        """
        lane = LaneAreas.allocate(sizes, self._areas)
        if lane is not None:
            self._lanes[lane.number] = lane
        return lane

    def close_lane(self, lane: LaneAreas) -> None:
        """End a lane. Instances of the guest keep their areas of it. Safe to call twice."""
        self._lanes.pop(lane.number, None)
        lane.close()

    def join_lane(self, kcov: Kcov[C], argument: int) -> Errno:
        """Carry out KCOV_BRIDGE_LANE: the instance gets an area of a lane, and is initialised."""
        lane = self._lanes.get(argument & LANE_MASK)
        if lane is None:
            return errno.ESRCH
        if kcov.mode is not Mode.DISABLED:
            return errno.EBUSY
        index = argument >> LANE_INDEX_SHIFT
        error, kcov.area = lane.take(index, kcov)
        if kcov.area is None:
            return error
        kcov.lane = lane, index
        kcov.size = kcov.area.size
        kcov.mode = Mode.INIT
        return 0

    # Connections

    def connect_wire(self, kcov: Kcov[C], port: int) -> tuple[Errno, int]:
        """Carry out KCOV_BRIDGE_WIRE; return an errno, and the offset of the connection."""
        if self.wires is None:
            return errno.EOPNOTSUPP, 0
        if kcov.mode is not Mode.DISABLED:
            return errno.EBUSY, 0
        area = self._areas.allocate(WIRE_BYTES // WORD)
        if area is None:
            return errno.ENOMEM, 0
        error = self.wires.open(port, area.offset)
        if error:
            self._areas.free(area)
            return error, 0
        kcov.area, kcov.size, kcov.wired = area, area.size, True
        kcov.mode = Mode.WIRED
        return 0, area.offset

    # Streams

    def open_stream(self, stream: Stream) -> None:
        """Let threads of the guest join the stream from now on."""
        self._streams[stream.number] = stream

    def close_stream(self, stream: Stream) -> None:
        """End the stream, with what the threads that still run have covered so far.

        Safe to call twice.
        """
        while not self.close_some(stream):
            pass

    def close_some(self, stream: Stream, seconds: float = _CLOSE_SECONDS) -> bool:
        """Do :meth:`close_stream` for this time at most; return whether all is done.

        The doorbell serves other requests between two calls.
        """
        self._streams.pop(stream.number, None)
        deadline = time.monotonic() + seconds
        for kcov in list(self._open):
            if kcov.stream is stream:
                try:
                    self._reset(kcov)
                except SourceError as error:
                    stream.failure = error
                if time.monotonic() > deadline:
                    return False
        cursor = self._stream_cursors.pop(stream, None)
        if cursor is not None:
            self._coverage.close_cursor(cursor)
            if not self._stream_cursors:
                self._record_threads(False)
        return True

    def _record_threads(self, on: bool) -> None:
        if self._threads is not None:
            self._threads.record_threads(on)
            self.return_handler.on_collected = self._note_threads if on else None

    def _note_threads(self, kcov: Kcov[C], pcs: Sequence[int]) -> None:
        """Note which threads of the target ran PCs that an instance with a log is to be given."""
        if kcov.calls is None or not pcs or kcov.stream is None or self._threads is None:
            return
        area = kcov.area
        if kcov.stream.calls is not None and area is not None:
            # The guest can write any count.
            kcov.stream.calls.ran(kcov, min(area.count, area.size), pcs, self._threads.thread_of)

    def join_stream(self, kcov: Kcov[C], task: Task, number: int, address: int = 0) -> Errno:
        """Carry out KCOV_BRIDGE_STREAM: ``task`` traces into a stream, through an unmapped area.

        This combines init, enable and the choice of a mode. ``address`` as for :meth:`enable`.

        Threads that log their calls share a cursor, so each block belongs to the call that returns
        first after the block was covered, and a thread that waits for another gets none of its
        blocks.
        """
        stream = self._streams.get(number)
        if stream is None:
            return errno.ESRCH
        if kcov.mode is not Mode.DISABLED or task in self._owners:
            return errno.EBUSY
        if stream.comparisons and self._comparisons is None:
            return ENOTSUPP
        kcov.area = stream.allocate(self._areas)
        if kcov.area is None:
            return errno.ENOMEM
        kcov.area.bitmap_words = stream.bitmap_words
        if stream.calls is not None:
            log = CallLog.allocate(self._areas)
            if log is None:
                self._areas.free(kcov.area)
                kcov.area = None
                return errno.ENOMEM
            kcov.calls = CallLog(log, kcov.area, clear_bitmap=stream.unique_per_call)
            stream.calls.begin(kcov, task)
        kcov.size = kcov.area.size
        kcov.mode = Mode.INIT
        kcov.stream = stream
        stream.begin(kcov)
        if stream.comparisons and self._comparisons is not None:
            kcov.comparing = self._comparisons.open_cursor()
            self._own(kcov, task, Mode.TRACE_CMP)
        else:
            mode = Mode.UNIQUE_PC if stream.bitmap_words else Mode.TRACE_PC
            if stream.calls is not None and stream not in self._stream_cursors:
                if not self._stream_cursors:
                    self._record_threads(True)
                self._stream_cursors[stream] = self._coverage.open_cursor()
            self._begin(kcov, task, mode, address, self._stream_cursors.get(stream))
        return 0

    def count_untraced(self, number: int, threads: int) -> Errno:
        """Count threads that should have joined a stream and could not."""
        stream = self._streams.get(number)
        if stream is None:
            return errno.ESRCH
        stream.untraced += threads
        self.untraced += threads
        return 0

    def take_calls(self, kcov: Kcov[C], task: Task) -> Errno:
        """Empty the log of ``task``'s system calls."""
        if kcov.owner is None or kcov.owner != task or kcov.calls is None:
            return errno.EINVAL
        self._take_calls(kcov)
        return 0

    def _take_calls(self, kcov: Kcov[C], *, last: bool = False) -> None:
        stream = kcov.stream
        if kcov.calls is not None and stream is not None and stream.calls is not None:
            stream.calls.add(kcov, kcov.calls, last=last)

    def _hand_over(self, kcov: Kcov[C]) -> None:
        """Move the words in an instance's area to its stream."""
        if kcov.stream is not None and kcov.area is not None:
            # First, because the calls' records name places in the area.
            self._take_calls(kcov)
            each = KCOV_WORDS_PER_CMP if kcov.compares else 1
            kcov.stream.record(kcov, kcov.area.take(each))

    def _end_stream(self, kcov: Kcov[C]) -> None:
        stream = kcov.stream
        if stream is not None:
            if not kcov.compares:
                stream.dropped += kcov.dropped
            try:
                self._take_calls(kcov, last=True)
                self._hand_over(kcov)
            finally:
                kcov.stream = None
                stream.end(kcov)

    def _append_rest(self, kcov: Kcov[C], pcs: Sequence[int]) -> int:
        """Append PCs for which the area had no room; return how many fitted.

        Only an area of a stream can be emptied to make room.
        """
        area = kcov.area
        if kcov.stream is None or area is None:
            return 0
        done = 0
        while done < len(pcs):
            self._hand_over(kcov)
            fitted = area.append(pcs[done:])
            if not fitted:
                # A hostile guest has overwritten the count.
                break
            done += fitted
        return done

    def _watched_returns(self, kcov: Kcov[C]) -> None:
        """Do :meth:`count_watched` while the owner waits, so the watcher writes nothing."""
        self.count_watched(kcov)
        area = kcov.area
        if kcov.stream is None or area is None:
            return
        # The watcher makes the owner report a return when the area is half full.
        if 2 * (area.count + 1) >= area.size - area.bitmap_words:
            self._hand_over(kcov)

    def reset_trace(self, kcov: Kcov[C], task: Task, argument: int) -> Errno:
        """Carry out KCOV_RESET_TRACE by ``task``: clear count and bitmap."""
        if self.personality is Personality.GVISOR:
            return errno.ENOTTY
        if argument or kcov.owner is None or kcov.owner != task or kcov.area is None:
            return errno.EINVAL
        kcov.area.reset()
        return 0

    def disable(self, kcov: Kcov[C], task: Task, argument: int, unreported: int = 0) -> Errno:
        """Carry out KCOV_DISABLE by ``task``, with the ioctl's argument.

        ``unreported`` here and below: returns since the owner's last request.

        Raises:
            SourceError: the watcher did not detach. The instance is in mode INIT anyway, as after
                an exit or a last close that raises this.
        """
        if argument or kcov.owner is None or kcov.owner != task:
            return errno.EINVAL
        try:
            self._reset(kcov, unreported)
        finally:
            self._drop_area(kcov)
        return 0

    def task_exit(self, kcov: Kcov[C], task: Task, unreported: int = 0) -> Errno:
        """Handle the end of ``task``: an instance that it owned returns to INIT with its area."""
        if kcov.owner is not None and kcov.owner == task:
            self._reset(kcov, unreported)
        return 0

    def last_close(self, kcov: Kcov[C], task: Task, unreported: int = 0) -> Errno:
        """Handle the last close while ``task`` owns the instance.

        gVisor clears the instance (``kcovFD.Release``). In Linux the task holds a reference to it
        and continues to trace.

        Returns:
            0 if this ended the ownership, otherwise EPERM.
        """
        if self.personality is not Personality.GVISOR or kcov.stream is not None:
            return errno.EPERM
        if kcov.owner is not None and kcov.owner == task:
            try:
                self._reset(kcov, unreported)
            finally:
                self._drop_area(kcov)
        return 0

    def release(self, kcov: Kcov[C]) -> Errno:
        """End an instance after its last reference was dropped, and free its areas.

        Raises:
            SourceError: as :meth:`disable`; the instance has ended anyway.
        """
        try:
            if kcov.owner is not None:
                self._reset(kcov)
        finally:
            self._free_retired(kcov)
            if kcov.lane is not None:
                lane, index = kcov.lane
                kcov.lane = kcov.area = None
                lane.give_back(index)
            if kcov.wired and kcov.area is not None:
                kcov.wired = False
                # Whoever does not answer may still write there.
                kcov.area.abandoned = self.wires is None or self.wires.end(kcov.area.offset) != 0
            if kcov.area is not None:
                self._areas.free(kcov.area)
                kcov.area = None
            if kcov.calls is not None:
                self._areas.free(kcov.calls.area)
                kcov.calls = None
            kcov.mode = Mode.DISABLED
            kcov.size = 0
            self._open.pop(kcov, None)
        return 0

    def syscall_return(
        self, kcov: Kcov[C], task: Task, number: int, unreported: int = 0, since: int = 0
    ) -> Errno:
        """Append coverage of the owner's call to its area.

        The caller handles exceptions of sources, which leave the area unchanged.

        Args:
            number: system call number.
            unreported: returns since the last request.
            since: the position from which on coverage is the call's; 0: all since the owner's last
                return; SINCE_NONE: none of it.

        Returns:
            0, or EINVAL if ``task`` is not the owner.
        """
        error = self.return_handler.syscall_return(kcov, task, number, unreported, since)
        if error is not None:
            return error
        return self.return_in_other_mode(kcov, task, number, unreported, since)

    def needs_each_return(self, kcov: Kcov[C]) -> bool:
        """Whether each return of the owner appends something, covered or not.

        It is not asked in mode TRACE_PC, of which the same is known when the device is made.
        """
        return kcov.comparing is not None and self._syscall_comparison is not None

    def return_in_other_mode(
        self, kcov: Kcov[C], task: Task, number: int, unreported: int, since: int = 0
    ) -> Errno:
        """Do :meth:`syscall_return` for the modes that ``return_handler`` does not handle."""
        area = kcov.area
        if kcov.owner != task or area is None:
            return errno.EINVAL
        if kcov.cursor is not None:
            self._return_unique(kcov, area, kcov.cursor, number, unreported, since)
        elif kcov.comparing is not None and self._comparisons is not None:
            self._return_comparisons(
                kcov, area, self._comparisons, kcov.comparing, number, unreported, since
            )
        else:
            return errno.EINVAL
        return 0

    def _return_unique(
        self, kcov: Kcov[C], area: Area, cursor: C, number: int, unreported: int, since: int
    ) -> None:
        """Do :meth:`syscall_return` in mode UNIQUE_PC."""
        self.totals.returns += 1 + unreported
        pcs = self._coverage.collect(cursor, since) if since != SINCE_NONE else ()
        if self.return_handler.on_collected is not None:
            self.return_handler.on_collected(kcov, pcs)
        if self._syscall_pc is not None:
            pc = self._syscall_pc(number)
            if pc is not None:
                pcs = [pc, *pcs]
        self.return_handler.append(kcov, area, area.unseen(pcs, self._bits))
        if self._watcher is not None:
            self._watched_returns(kcov)

    def _return_comparisons(
        self,
        kcov: Kcov[C],
        area: Area,
        comparisons: Comparisons,
        cursor: Any,
        number: int,
        unreported: int,
        since: int,
    ) -> None:
        """Do :meth:`syscall_return` in mode TRACE_CMP.

        Comparisons have positions of their own, so a call gets all since the owner's last one.
        """
        totals = self.totals
        totals.returns += 1 + unreported
        if since == SINCE_NONE:
            return
        records, dropped = comparisons.collect(cursor)
        if self._syscall_comparison is not None:
            record = self._syscall_comparison(number)
            if record is not None:
                records = [record, *records]
        fitted = area.append_comparisons(records)
        while fitted < len(records) and kcov.stream is not None:
            self._hand_over(kcov)
            more = area.append_comparisons(records[fitted:])
            if not more:
                break
            fitted += more
        dropped += len(records) - fitted
        if kcov.stream is not None:
            kcov.stream.dropped += dropped
        kcov.appended += fitted
        kcov.dropped += dropped
        totals.comparisons += fitted
        totals.comparisons_dropped += dropped

    def _reset(self, kcov: Kcov[C], unreported: int = 0) -> None:
        """Return an instance to INIT, without an owner."""
        cursor, comparing = kcov.cursor, kcov.comparing
        if kcov.owner is not None:
            self._owners.pop(kcov.owner, None)
        if cursor is not None or comparing is not None:
            self.totals.returns += unreported
        try:
            if cursor is not None and self._watcher is not None:
                self._detach(kcov, self._watcher)
        finally:
            kcov.owner = None
            kcov.cursor = None
            kcov.comparing = None
            kcov.mode = Mode.INIT
            self._leave_handles(kcov)
            shared = kcov.stream is not None and kcov.stream in self._stream_cursors
            if cursor is not None and not shared:
                self._coverage.close_cursor(cursor)
            if comparing is not None and self._comparisons is not None:
                self._comparisons.close_cursor(comparing)
            self._end_stream(kcov)
            if kcov.area is not None:
                kcov.area.bitmap_words = 0

    def _detach(self, kcov: Kcov[C], watcher: Watcher) -> None:
        try:
            self._add_watched(kcov, watcher.detach(kcov.slot))
        except BaseException:
            # The watcher may still write to the area.
            if kcov.area is not None:
                kcov.area.abandoned = True
            raise
        finally:
            kcov.watched = (0, 0)

    def _drop_area(self, kcov: Kcov[C]) -> None:
        """Retire the area in gVisor's personality, so that the next mmap makes a new one.

        In gVisor, DISABLE (``Kcov.DisableTrace``) and the last close (``Kcov.Clear``) do that. An
        owner's exit (``Kcov.OnTaskExit``) keeps it, so a fork server's children need not map again.
        An area of a lane stays.
        """
        if self.personality is Personality.GVISOR and kcov.area is not None and kcov.lane is None:
            kcov.retired.append(kcov.area)
            kcov.area = None

    def _free_retired(self, kcov: Kcov[C]) -> None:
        for area in kcov.retired:
            self._areas.free(area)
        kcov.retired.clear()


def _is_control(kcov: Kcov[Any]) -> bool:
    """Return whether the area is a lane's control area, in which nobody traces."""
    return kcov.lane is not None and kcov.lane[1] == 0


def _mode_error(mode: int, unsupported: Errno) -> Errno:
    if mode == KCOV_TRACE_PC:
        return 0
    return unsupported if mode == KCOV_TRACE_CMP else errno.EINVAL
