# SPDX-License-Identifier: Apache-2.0
"""The doorbell: the loop that answers the guest's requests.

The loop does not trust the guest: a request is an op code, three ids and three numbers, each
bounded by the host's own tables, and each failure becomes an errno and is counted. The guest may
also overwrite the host's words. So a few times a second the loop repairs them and looks at all
slots: a guest that scribbled over the region is served again once it stops.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import struct
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, cast

from bridge.device.abi import (
    KCOV_REMOTE_MAX_HANDLES,
    KICK_SLOT_BITS,
    PAGE_SIZE,
    PAYLOAD_OFFSET,
    REQUESTS_OFFSET,
    RESPONSES_OFFSET,
    SLOT_WORDS,
    SLOTS,
    UNREPORTED_MASK,
    WORD,
    Answer,
    HeaderWord,
    HostState,
    Op,
    RequestWord,
    ResponseWord,
)
from bridge.device.coverage_epoch import coverage_epoch_value
from bridge.device.fastpath import ReturnPoller
from bridge.device.kcov import Device, Kcov
from bridge.device.polling import PREEMPTED_NS, CpuContention, PollPolicy
from bridge.device.region import Region
from bridge.errors import DoorbellError

__all__ = ["CALL_SECONDS", "Doorbell", "DoorbellCounters", "KernelListener"]

C = TypeVar("C")
T = TypeVar("T")
logger = logging.getLogger(__name__)

CALL_SECONDS = 30.0
"""How long a caller waits for the doorbell's thread, which may be busy with earlier requests: on a
busy machine a second or two."""

_REQUESTS = REQUESTS_OFFSET // WORD
_RESPONSES = RESPONSES_OFFSET // WORD
_PAYLOAD = PAYLOAD_OFFSET // WORD
_UNREADABLE = 2**64 - 1
_NAME_WORDS = 56 // WORD
"""MODULE_NAME_LEN in include/linux/module.h of Linux."""
# Plain numbers, because looking up a member of an enumeration costs as much as reading the region.
_KICK = int(HeaderWord.KICK)
_HOST_STATE = int(HeaderWord.HOST_STATE)
_COVERAGE_POSITION = int(HeaderWord.COVERAGE_POSITION)
_ERROR = int(ResponseWord.ERROR)
_APPENDED = int(ResponseWord.APPENDED)
_DROPPED = int(ResponseWord.DROPPED)
_RETURN = int(Op.RETURN)
_read_request = struct.Struct(f"{SLOT_WORDS}Q").unpack_from
_SLOT_MASK = (1 << KICK_SLOT_BITS) - 1
_MAX_ERRNO = 4095
_OPENING = frozenset(
    {
        Op.INIT,
        Op.LANE,
        Op.WIRE,
        Op.MAP,
        Op.ENABLE,
        Op.DISABLE,
        Op.RESET,
        Op.UNIQUE,
        Op.REMOTE,
        Op.STREAM,
    }
)
"""The possible first requests of an instance, by which the host learns of an open."""
_IN_THE_WAY = frozenset({errno.ENOMEM, errno.EBUSY, errno.EEXIST})
"""Errors that the holdings of other instances may cause."""
_REPAIR_NS = 250_000_000
"""The time between two repairs of the region, well below the guest's time-out."""
_EPOCH_CHANGES = 8
"""Number of repairs in a row that change the epoch for a guest that considers the host gone."""


class KernelListener(Protocol):
    """Learns about the guest's kernel: ``bridge.sources.guest_kernel``.

    All of it comes from the guest and is not to be trusted. Called on the doorbell's thread.
    """

    def describe(self, payload: Sequence[int], /) -> int:
        """Take the words of KERNEL's payload; return an errno."""

    def module(self, name: str, comes: bool, start: int, size: int, /) -> int:
        """Note that a module's code was loaded or unloaded; return an errno."""

    def rewound(self) -> None:
        """Note that the paused guest was brought back to its saved state."""

    def tick(self) -> None:
        """Do periodic work; called a few times a second."""


@dataclass(slots=True)
class DoorbellCounters:
    """Counters of the loop.

    Attributes:
        requests: requests that were carried out.
        refused: requests with an unknown op or for an unknown instance.
        wakeups: wake-ups from sleep by the bell.
        scans: looks at all slots, because requests came at the same time or the guest's hint was
            wrong.
        source_failures: exceptions of sources.
        repaired: words of the host that the guest had overwritten.
        reclaimed: instances that were ended because their slots no longer named them when other
            instances needed what they held.
    """

    requests: int = 0
    refused: int = 0
    wakeups: int = 0
    scans: int = 0
    source_failures: int = 0
    repaired: int = 0
    reclaimed: int = 0


class Doorbell(Generic[C]):
    """The thread that turns requests in the region into calls of the device.

    Args:
        region: the shared memory.
        device: carries out the requests.
        bell: the eventfd that the guest rings.
        poll_seconds: how long the loop polls for the next request before it sleeps on the bell.
        epoch: shows the guest a new host; never 0. It grows when the guest considers the host gone.
        kernel: gets the guest's reports about its kernel.
        silent: owners need not report their returns, because no source is consumed at them. It
            does not concern those that :meth:`bridge.device.kcov.Device.needs_each_return`.
        soonest_ns: the shortest time in which a target can answer the guest, nanoseconds: shorter
            calls that did not sleep get no coverage while several owners trace. 0: each call gets
            all coverage since its owner's last one.

    Attributes:
        polling: decides when to poll.
        failure: the first exception of a source; the guest gets no PCs then, and continues.
        last_failure: the last one.
        ended_by: the exception that ended the thread, which is a defect of the bridge.
        guest_timeouts: requests that timed out, as the guest counted them, also before resets. This
            and the three below are as of the last :meth:`look_at_guest` or :meth:`stop`.
        guest_skipped: returns that the guest did not report because it considered the host gone.
        guest_untraced: threads that could not trace for that reason.
        target_answered: whether code of the target has run since :meth:`rely_on_epoch`, or a relay
            has passed anything from the target to the guest.
    """

    def __init__(
        self,
        region: Region,
        device: Device[C],
        bell: int,
        *,
        poll_seconds: float = 0.0,
        epoch: int | None = None,
        kernel: KernelListener | None = None,
        silent: bool = False,
        soonest_ns: int = 0,
    ) -> None:
        self.counters = DoorbellCounters()
        self.failure: BaseException | None = None
        self.last_failure: BaseException | None = None
        self.ended_by: BaseException | None = None
        self.guest_timeouts = 0
        self.guest_skipped = 0
        self.guest_untraced = 0
        self.target_answered = False
        self._device = device
        self._kernel = kernel
        self._flags = Answer.SILENT if silent else Answer(0)
        self._soonest_ns = soonest_ns
        self._coverage_position = 0
        self._region = region
        self._control = region.control
        self._bell = bell
        self._epoch = epoch if epoch is not None else (time.time_ns() | 1) & (2**63 - 1)
        self._slots: list[Kcov[C] | None] = [None] * SLOTS
        self._handled: list[int] = self._sequence_numbers()
        # The last SEQ that the host wrote into each response.
        self._answered: list[int] = [0] * SLOTS
        self._repair_at = 0
        self._guest_counts = (0, 0)
        # Its time-outs, skipped returns and untraced threads, when they were looked at.
        self._guest_words = (0, 0, 0)
        self._epoch_changes = 0
        self._relayed = False
        self._coverage_epoch = 0
        self._stopping = False
        self._poller: ReturnPoller[Kcov[C]] = ReturnPoller(
            region.control,
            device.return_handler,
            self._slots,
            self._handled,
            self._answered,
            self.source_failed,
        )
        self._calls: deque[tuple[Callable[[], object], Future[object]]] = deque()
        # Guards _wake, which is -1 once it is closed.
        self._wake_lock = threading.Lock()
        with contextlib.ExitStack() as stack:
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            stack.callback(self._close_wake)
            self.polling = PollPolicy(int(poll_seconds * 1e9), CpuContention(stack).cpu_contended)
            self._stack = stack.pop_all()
        # Taken and released only for its memory barrier: see _sleep().
        self._barrier = threading.Lock()
        self._thread = threading.Thread(target=self._thread_run, name="kcov-doorbell", daemon=True)

    def rely_on_epoch(self) -> None:
        """Let owners report only returns that find ``COVERAGE_EPOCH`` changed.

        The tracer changes it for each line of the target, before the target can answer the guest;
        relays change it for each answer; the doorbell changes it a few times a second for the rest.
        Without this call every return is reported.
        """
        self._relayed = True
        self._coverage_epoch = coverage_epoch_value()
        self._control[HeaderWord.COVERAGE_EPOCH] = self._coverage_epoch

    def set_coverage_position(self, position: int) -> None:
        """Show the guest how many blocks were noted so far; on the doorbell's thread."""
        self._coverage_position = position
        self._control[_COVERAGE_POSITION] = position

    def start(self) -> None:
        """Start to answer the guest, and announce that in the header."""
        self._control[HeaderWord.COVERAGE_EPOCH] = 0
        self._control[HeaderWord.HOST_STATE] = HostState.ASLEEP
        self._control[HeaderWord.HOST_EPOCH] = self._epoch
        self._thread.start()

    def stop(self) -> None:
        """Stop answering and join the thread. Safe to call twice."""
        if self._stopping:
            return
        self._stopping = True
        self._awaken()
        if self._thread.ident is not None:
            self._thread.join()
            self.look_at_guest()
            self._control[HeaderWord.HOST_EPOCH] = 0
            self._control[HeaderWord.HOST_STATE] = HostState.ASLEEP
        self._poller.release()
        self._stack.close()

    def call(self, function: Callable[[], T], timeout: float = CALL_SECONDS) -> T:
        """Run ``function`` on the doorbell's thread, the only one that may use the device.

        Args:
            timeout: seconds to wait for its result.

        Raises:
            DoorbellError: the thread does not run.
            TimeoutError: there is no result in time.
            BaseException: an exception of the function.
        """
        if not self._thread.is_alive():
            raise self._not_running()
        future: Future[object] = Future()
        self._calls.append((function, future))
        self._awaken()
        return cast(T, future.result(timeout))

    def _not_running(self) -> DoorbellError:
        """Return the error for a call without a running thread."""
        error = self.ended_by
        if error is None:
            return DoorbellError("the doorbell's thread does not run")
        return DoorbellError(
            f"the doorbell ended by itself: {type(error).__name__}: {error}",
            evidence="".join(traceback.format_exception(error)),
        )

    def _awaken(self) -> None:
        """Make the thread look for work, whether it sleeps or polls."""
        self._poller.interrupt()
        with self._wake_lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def _close_wake(self) -> None:
        with self._wake_lock:
            wake, self._wake = self._wake, -1
            os.close(wake)

    def reset(self) -> None:
        """Forget the guest, which is paused and will be rewound; on the doorbell's thread.

        All instances end, the region is as at the start, and the epoch changes.
        """
        for slot, kcov in self.instances():
            self._end(slot, kcov)
        # Their words in the header start at 0 again.
        self.look_at_guest()
        self._guest_words = (0, 0, 0)
        self._region.clear()
        # In place, because the compiled part shares these lists.
        self._handled[:] = self._answered[:] = [0] * SLOTS
        self._guest_counts = (0, 0)
        self._epoch_changes = 0
        self._epoch = self._epoch + 2 & (2**63 - 1)
        self._control[HeaderWord.HOST_EPOCH] = self._epoch
        self._control[_COVERAGE_POSITION] = self._coverage_position
        if self._kernel is not None:
            self._kernel.rewound()

    def instances(self) -> list[tuple[int, Kcov[C]]]:
        """Return the open instances with their slots; on the doorbell's thread (:meth:`call`)."""
        return [(slot, kcov) for slot, kcov in enumerate(self._slots) if kcov is not None]

    def look_at_guest(self) -> None:
        """Read the guest's own counters, which may hold any value; they are only shown to people.

        On the doorbell's thread (see :meth:`call`).
        """
        control = self._control
        words = (
            control[HeaderWord.GUEST_TIMEOUTS],
            control[HeaderWord.GUEST_SKIPPED],
            control[HeaderWord.GUEST_UNTRACED],
        )
        # A word is less than before if the module was loaded again, or over what a hostile guest
        # had written. What it counts now is new then.
        timeouts, skipped, untraced = (
            now - before if now >= before else now
            for now, before in zip(words, self._guest_words, strict=True)
        )
        self._guest_words = words
        self.guest_timeouts += timeouts
        self.guest_skipped += skipped
        self.guest_untraced += untraced
        self._look_for_answers()

    def _look_for_answers(self) -> None:
        """Note whether anybody else, maybe a hostile guest, has written ``COVERAGE_EPOCH``."""
        # It is 0 after a reset; nobody else writes 0.
        if self._relayed and self._control[HeaderWord.COVERAGE_EPOCH] not in (
            0,
            self._coverage_epoch,
        ):
            self.target_answered = True

    def _change_coverage_epoch(self) -> None:
        """Have each owner ask at its next return."""
        if self._relayed:
            self._look_for_answers()
            self._coverage_epoch = coverage_epoch_value()
        else:
            self._coverage_epoch = 0
        self._control[HeaderWord.COVERAGE_EPOCH] = self._coverage_epoch

    def _thread_run(self) -> None:
        try:
            self._run()
        except BaseException as error:
            self.ended_by = error
            logger.exception("the doorbell ended by itself; the guest gets no further PCs")
        while self._calls:
            self._calls.popleft()[1].set_exception(self._not_running())

    def _run(self) -> None:
        control = self._control
        calls = self._calls
        polling = self.polling
        poller = self._poller
        clock = time.perf_counter_ns
        with select.epoll() as epoll:
            epoll.register(self._bell, select.EPOLLIN)
            epoll.register(self._wake, select.EPOLLIN)
            last = control[_KICK]
            self._scan()
            while not self._stopping:
                kick = control[_KICK]
                if calls:
                    # First, because a guest that kicks endlessly must not delay calls.
                    self._call_next()
                    polling.looked = clock()
                elif kick != last:
                    slot = kick & _SLOT_MASK
                    # After one request since the last look its slot is known; else look at all.
                    if kick >> KICK_SLOT_BITS == (last >> KICK_SLOT_BITS) + 1 and slot < SLOTS:
                        self._serve(slot)
                    else:
                        self._scan()
                    last = kick
                    now = clock()
                    if polling.served(now):
                        control[_HOST_STATE] = HostState.AWAKE
                    if now >= self._repair_at:
                        self._repair(now)
                        polling.looked = clock()
                elif polling.keep_polling(clock()):
                    poller.poll(
                        last, polling.poll_until, self._repair_at, polling.poll_ns, PREEMPTED_NS
                    )
                    last = poller.last
                    self.counters.requests += poller.served
                    polling.polled(poller.served, poller.looked, poller.until)
                    if (now := clock()) >= self._repair_at:
                        self._repair(now)
                        polling.looked = clock()
                else:
                    # While polling is paused, the next request must ring the bell.
                    self._sleep(epoll, last, not polling.paused)

    def _sleep(self, epoll: select.epoll, last: int, awake_then: bool) -> None:
        """Sleep until the guest rings, unless it kicked in the meantime.

        The guest writes KICK and then reads HOST_STATE; we write HOST_STATE and then read KICK.
        Both have a full barrier between the two, so at least one sees the other's write, and no
        kick is missed. On x86, taking a lock is a locked instruction and so a full barrier; the
        guest has one in the compare-and-exchange that moves KICK.

        Args:
            awake_then: whether the guest need not ring after this sleep, until the next one.
        """
        control = self._control
        now = time.perf_counter_ns()
        if now >= self._repair_at:
            self._repair(now)
        control[HeaderWord.HOST_STATE] = HostState.ASLEEP
        with self._barrier:
            pass
        if control[HeaderWord.KICK] == last:
            # The time limit helps if the guest overwrote HOST_STATE and does not ring.
            events = [fd for fd, _ in epoll.poll(_REPAIR_NS / 1e9)]
            if self._wake in events:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
            if self._bell in events:
                self.counters.wakeups += 1
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._bell)
                # A bell without a kick comes from a confused or hostile guest.
                if control[HeaderWord.KICK] == last:
                    self._scan()
        if awake_then and self.polling.poll_ns:
            control[HeaderWord.HOST_STATE] = HostState.AWAKE

    def _repair(self, now: int) -> None:
        """Restore the host's words, and look at all slots regardless of the guest's hints."""
        self._repair_at = now + _REPAIR_NS
        control = self._control
        counters = self.counters
        counters.repaired += self._region.restore_header()
        counts = (control[HeaderWord.GUEST_TIMEOUTS], control[HeaderWord.GUEST_SKIPPED])
        if counts != self._guest_counts:
            # The guest considers the host gone until the missing answer arrives, which never
            # happens if the request was overwritten. A new epoch shows it that the host is back.
            # Several changes follow, because the guest counts before it reads the epoch.
            self._guest_counts = counts
            self._epoch_changes = _EPOCH_CHANGES
        elif control[HeaderWord.HOST_EPOCH] != self._epoch:
            counters.repaired += 1
        if self._epoch_changes:
            self._epoch_changes -= 1
            self._epoch = self._epoch + 2 & (2**63 - 1)
        control[HeaderWord.HOST_EPOCH] = self._epoch
        self._change_coverage_epoch()
        control[_COVERAGE_POSITION] = self._coverage_position
        if self._kernel is not None:
            try:
                self._kernel.tick()
            except BaseException as failure:
                self.source_failed(failure)
        self._scan()
        answers = control[_RESPONSES : _RESPONSES + SLOTS * SLOT_WORDS : SLOT_WORDS].tolist()
        if answers != self._answered:
            for slot, (seen, ours) in enumerate(zip(answers, self._answered, strict=True)):
                if seen != ours:
                    counters.repaired += 1
                    control[_RESPONSES + slot * SLOT_WORDS + ResponseWord.SEQ] = ours

    def _call_next(self) -> None:
        function, future = self._calls.popleft()
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    def _sequence_numbers(self) -> list[int]:
        end = _REQUESTS + SLOTS * SLOT_WORDS
        return self._control[_REQUESTS:end:SLOT_WORDS].tolist()

    def _scan(self) -> None:
        """Serve every slot whose request is new."""
        self.counters.scans += 1
        current = self._sequence_numbers()
        if current == self._handled:
            return
        for slot, (now, before) in enumerate(zip(current, self._handled, strict=True)):
            if now != before:
                self._serve(slot)

    def _serve(self, slot: int) -> None:
        """Carry out the request in ``slot``, if it is new, and answer it."""
        if self._poller.serve(slot):
            self.counters.requests += 1
            return
        control = self._control
        sequence, op, generation, task, arg0, arg1, arg2, _ = _read_request(
            control, REQUESTS_OFFSET + slot * (SLOT_WORDS * WORD)
        )
        if sequence == self._handled[slot]:
            return
        self._handled[slot] = sequence
        answer = _RESPONSES + slot * SLOT_WORDS
        kcov = self._slots[slot]
        if op == _RETURN and kcov is not None and kcov.generation == generation:
            try:
                error = self._device.return_in_other_mode(
                    kcov, task, arg0, arg1 & UNREPORTED_MASK, arg2
                )
            except BaseException as failure:
                error = self._source_failed(failure)
        else:
            try:
                error = self._carry_out(slot, op, generation, task, (arg0, arg1, arg2))
            except BaseException as failure:
                error = self._source_failed(failure)
            kcov = self._slots[slot]
            control[answer + ResponseWord.FLAGS] = self._answer_flags(op, kcov)
            control[answer + ResponseWord.SOONEST_NS] = self._soonest(kcov)
        if kcov is not None and self._device.needs_each_return(kcov):
            # The owner has read the epoch before it asked.
            self._change_coverage_epoch()
        self.counters.requests += 1
        control[answer + _ERROR] = error if 0 <= error <= _MAX_ERRNO else errno.EIO
        if kcov is not None:
            control[answer + _APPENDED] = kcov.appended
            control[answer + _DROPPED] = kcov.dropped
        # SEQ last: it makes the answer valid. It is the first word of the response.
        control[answer] = sequence
        self._answered[slot] = sequence

    def _answer_flags(self, op: int, kcov: Kcov[C] | None) -> Answer:
        if op == Op.STREAM:
            # The doorbell needs the owner's returns to empty the area before it is full.
            return Answer.CALLS if kcov is not None and kcov.calls is not None else Answer(0)
        if kcov is not None and self._device.needs_each_return(kcov):
            return Answer(0)
        return Answer.SILENT if op == Op.REMOTE else self._flags

    def _soonest(self, kcov: Kcov[C] | None) -> int:
        if kcov is None or self._device.needs_each_return(kcov):
            return 0
        # The threads of a stream, or of a lane's case, are read as one, and are to miss nothing.
        return self._soonest_ns if kcov.stream is None and kcov.lane is None else 0

    def _end(self, slot: int, kcov: Kcov[C]) -> None:
        """Do :meth:`_release` for no request; what a source raises is counted."""
        try:
            self._release(slot, kcov)
        except BaseException as failure:
            self.source_failed(failure)

    def _release(self, slot: int, kcov: Kcov[C]) -> None:
        """End the instance in ``slot``, which has ended even if a source raises."""
        self._slots[slot] = None
        self._device.release(kcov)

    def _carry_out(
        self, slot: int, op: int, generation: int, task: int, args: tuple[int, int, int]
    ) -> int:
        """Carry out a request; exceptions of sources pass through."""
        device = self._device
        kcov = self._slots[slot]
        if op in (Op.KERNEL, Op.MODULE):
            return self._hear_kernel(op, args)
        if op == Op.UNTRACED:
            return device.count_untraced(args[0], args[1] & UNREPORTED_MASK)
        if kcov is not None and kcov.generation != generation:
            # Its release was lost, and the slot belongs to a new open now.
            self._end(slot, kcov)
            kcov = None
        if op == Op.RELEASE:
            if kcov is not None:
                self._release(slot, kcov)
            return 0
        if kcov is None:
            if op not in _OPENING:
                self.counters.refused += 1
                return errno.EINVAL
            kcov = self._slots[slot] = device.open(generation, slot)
        error = self._operate(slot, kcov, op, task, args)
        if error in _IN_THE_WAY and self._reclaim(slot):
            error = self._operate(slot, kcov, op, task, args)
        return error

    def _operate(
        self, slot: int, kcov: Kcov[C], op: int, task: int, args: tuple[int, int, int]
    ) -> int:
        device = self._device
        if op == Op.INIT:
            return device.init_trace(kcov, args[0])
        if op == Op.MAP:
            error, offset = device.map(kcov, *args)
            at = _RESPONSES + slot * SLOT_WORDS
            self._control[at + ResponseWord.AREA_OFFSET] = offset
            return error
        if op == Op.ENABLE:
            return device.enable(kcov, task, args[0], args[1])
        if op == Op.UNIQUE:
            return device.unique_enable(kcov, task, args[0], args[1])
        if op == Op.REMOTE:
            mode = args[0] & 0xFFFFFFFF
            return device.remote_enable(kcov, task, mode, self._handles(args[1]), args[2])
        if op == Op.STREAM:
            error = device.join_stream(kcov, task, args[0], args[1])
            if kcov.calls is not None:
                at = _RESPONSES + slot * SLOT_WORDS
                self._control[at + ResponseWord.AREA_OFFSET] = kcov.calls.area.offset
            return error
        if op == Op.CALLS:
            return device.take_calls(kcov, task)
        if op == Op.WIRE:
            error, offset = device.connect_wire(kcov, args[0])
            self._control[_RESPONSES + slot * SLOT_WORDS + ResponseWord.AREA_OFFSET] = offset
            return error
        if op == Op.LANE:
            return device.join_lane(kcov, args[0])
        if op == Op.DISABLE:
            return device.disable(kcov, task, args[0], args[1] & UNREPORTED_MASK)
        if op == Op.RESET:
            return device.reset_trace(kcov, task, args[0])
        if op == Op.EXIT:
            return device.task_exit(kcov, task, args[1] & UNREPORTED_MASK)
        if op == Op.CLOSE:
            return device.last_close(kcov, task, args[1] & UNREPORTED_MASK)
        self.counters.refused += 1
        return errno.EINVAL

    def _hear_kernel(self, op: int, args: tuple[int, int, int]) -> int:
        """Pass on a report of the guest's module about its kernel."""
        if self._kernel is None:
            return errno.EOPNOTSUPP
        payload = self._control[_PAYLOAD : _PAYLOAD + PAGE_SIZE // WORD]
        if op == Op.KERNEL:
            return self._kernel.describe(payload.tolist())
        name = payload[:_NAME_WORDS].tobytes().partition(b"\0")[0].decode("ascii", "replace")
        return self._kernel.module(name, args[0] == 1, args[1], args[2])

    def _reclaim(self, asking: int) -> int:
        """End the instances that their slots no longer name, except in the slot ``asking``.

        The slot's next request would end such an instance, but there may be none. These instances
        come from requests that the guest's module did not write, and hold room, handles or the name
        of another task.

        Returns:
            Their number.
        """
        generations = self._control[
            _REQUESTS + RequestWord.GENERATION : _RESPONSES : SLOT_WORDS
        ].tolist()
        ended = 0
        for slot, kcov in enumerate(self._slots):
            if kcov is not None and slot != asking and kcov.generation != generations[slot]:
                self._end(slot, kcov)
                ended += 1
        self.counters.reclaimed += ended
        return ended

    def _handles(self, count: int) -> list[int] | None:
        """Return the payload of a REMOTE request, cut after one handle too many.

        None if the guest could not read the argument.
        """
        if count == _UNREADABLE:
            return None
        handles: list[int] = self._control[
            _PAYLOAD : _PAYLOAD + min(count, KCOV_REMOTE_MAX_HANDLES + 1)
        ].tolist()
        return handles

    def source_failed(self, failure: BaseException) -> None:
        """Count an exception of a source, and keep the first; on the doorbell's thread."""
        self.counters.source_failures += 1
        self.last_failure = failure
        # The owner has seen the epoch of what the source still has.
        self._change_coverage_epoch()
        if self.failure is None:
            self.failure = failure
            logger.error("a coverage source failed, so PCs are missing: %r", failure)

    def _source_failed(self, failure: BaseException) -> int:
        """Turn a source's exception into an errno: it must not end the loop or hang the guest."""
        self.source_failed(failure)
        return errno.EIO
