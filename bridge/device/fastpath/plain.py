# SPDX-License-Identifier: Apache-2.0
"""The fast path in Python: the definition, and the fallback without a C compiler."""

from __future__ import annotations

import errno
import select
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from bridge.device.abi import (
    AREAS_OFFSET,
    KICK_SLOT_BITS,
    REQUESTS_OFFSET,
    RESPONSES_OFFSET,
    SINCE_NONE,
    SLOT_WORDS,
    SLOTS,
    UNREPORTED_MASK,
    WORD,
    HeaderWord,
    Op,
    RequestWord,
    ResponseWord,
)

__all__ = [
    "AreaWords",
    "Collector",
    "KcovState",
    "ReturnHandler",
    "ReturnPoller",
    "Totals",
]

# Plain numbers, because looking up a member of an enumeration costs as much as reading the region.
_KICK = int(HeaderWord.KICK)
_REQUESTS = REQUESTS_OFFSET // WORD
_RESPONSES = RESPONSES_OFFSET // WORD
_SEQ = int(RequestWord.SEQ)
_OP = int(RequestWord.OP)
_GENERATION = int(RequestWord.GENERATION)
_TASK = int(RequestWord.TASK)
_ARG0 = int(RequestWord.ARG0)
_ARG1 = int(RequestWord.ARG1)
_ARG2 = int(RequestWord.ARG2)
_ANSWER_SEQ = int(ResponseWord.SEQ)
_ERROR = int(ResponseWord.ERROR)
_APPENDED = int(ResponseWord.APPENDED)
_DROPPED = int(ResponseWord.DROPPED)
_RETURN = int(Op.RETURN)
_SLOT_MASK = (1 << KICK_SLOT_BITS) - 1
_LOOKS = range(12)
"""Looks at KICK between two releases of the interpreter lock. A release takes as long as half of
them."""


class AreaWords:
    """The words of an area: ``bitmap_words`` of a bitmap, the count, the PCs.

    ``size`` is the number of words, all of which are in ``words``.
    """

    __slots__ = ("_words", "bitmap_words", "size")

    def __init__(self, words: memoryview, size: int) -> None:
        if not 1 <= size <= len(words):
            raise ValueError(f"an area of {size} words does not fit in {len(words)}")
        self._words = words
        self.size = size
        self.bitmap_words = 0

    def append(self, pcs: Sequence[int]) -> int:
        """Append PCs after those that the count counts, and return how many fitted.

        Like ``__sanitizer_cov_trace_pc`` in Linux' ``kernel/kcov.c``, it writes nothing if word 0
        points outside the area, and the count never exceeds ``size - 1``.
        """
        words = self._words
        head = self.bitmap_words
        count = words[head]
        room = self.size - 1 - head - count
        if room <= 0:
            return 0
        fitting = len(pcs)
        if fitting > room:
            fitting = room
            pcs = pcs[:room]
        start = head + count + 1
        if fitting == 1:
            words[start] = pcs[0]
        else:
            words[start : start + fitting] = memoryview(array("Q", pcs))
        words[head] = count + fitting
        return fitting

    def release(self) -> None:
        """Release the words; the area must not be used afterwards."""
        self._words.release()


A = TypeVar("A", bound=AreaWords)
C = TypeVar("C")
C_contra = TypeVar("C_contra", contravariant=True)


class KcovState(Generic[A, C]):
    """The part of an instance that returns need; see :class:`bridge.device.kcov.Kcov`."""

    __slots__ = ("appended", "area", "cursor", "dropped", "generation", "owner")

    def __init__(self, generation: int) -> None:
        self.generation = generation
        self.owner: int | None = None
        self.area: A | None = None
        self.cursor: C | None = None
        self.appended = 0
        self.dropped = 0


@dataclass(slots=True)
class Totals:
    """Sums over all instances, including released ones.

    Attributes:
        returns: system call returns of owners, including unreported ones, whose number comes with
            the owner's next request.
        appended: PCs written into areas.
        dropped: PCs that did not fit.
        comparisons: comparisons written into areas.
        comparisons_dropped: comparisons that did not fit.
    """

    returns: int = 0
    appended: int = 0
    dropped: int = 0
    comparisons: int = 0
    comparisons_dropped: int = 0


K = TypeVar("K", bound=KcovState[Any, Any])


class Collector(Protocol[C_contra]):
    """Returns new coverage for a cursor."""

    def collect(self, cursor: C_contra, since: int = 0) -> Sequence[int]:
        """Return what was covered since the cursor's last collect, each block once.

        ``since`` as for :meth:`bridge.sources.ledger.Ledger.collect`.
        """


class ReturnHandler(Generic[K]):
    """Appends coverage to the areas of instances, above all at the returns of their owners.

    Args:
        coverage: the provider of PCs.
        totals: the sums to add to.
        unique: gets every PC that is appended.
        syscall_pc: maps a system call's number to its PC or None; None without such PCs.
        update_watched: called after each return; None if no watcher writes into areas.
        append_rest: called with PCs that did not fit; returns how many of them fitted after all.

    Attributes:
        on_collected: called with what was collected for an instance before that is appended; None
            while nobody wants to know.
    """

    def __init__(
        self,
        coverage: Collector[Any],
        totals: Totals,
        unique: set[int],
        syscall_pc: Callable[[int], int | None] | None,
        update_watched: Callable[[K], object] | None,
        append_rest: Callable[[K, Sequence[int]], int],
    ) -> None:
        self._coverage = coverage
        self._totals = totals
        self._unique = unique
        self._syscall_pc = syscall_pc
        self._update_watched = update_watched
        self._append_rest = append_rest
        self.on_collected: Callable[[K, Sequence[int]], object] | None = None

    def syscall_return(
        self, kcov: K, task: int, number: int, unreported: int, since: int = 0
    ) -> int | None:
        """Append coverage of the present call of an owner that traces plain PCs.

        Args:
            task: the task that returns.
            number: the system call's number.
            unreported: returns since the last request.
            since: the position from which on coverage is the call's; 0: all since the owner's last
                return; SINCE_NONE: none of it.

        Returns:
            0, or None if nothing was done: another task, or another mode of tracing.
        """
        area = kcov.area
        cursor = kcov.cursor
        if kcov.owner != task or area is None or cursor is None or area.bitmap_words:
            return None
        self._totals.returns += 1 + unreported
        pcs = self._coverage.collect(cursor, since) if since != SINCE_NONE else ()
        if self.on_collected is not None:
            self.on_collected(kcov, pcs)
        if self._syscall_pc is not None:
            pc = self._syscall_pc(number)
            if pc is not None:
                pcs = [pc, *pcs]
        self.append(kcov, area, pcs)
        if self._update_watched is not None:
            self._update_watched(kcov)
        return 0

    def append(self, kcov: K, area: AreaWords, pcs: Sequence[int]) -> None:
        """Append PCs to an instance's area, and count those that fitted and those that did not."""
        totals = self._totals
        total = len(pcs)
        if not total:
            return
        fitted = area.append(pcs)
        if fitted != total:
            fitted += self._append_rest(kcov, pcs[fitted:])
            kcov.dropped += total - fitted
            totals.dropped += total - fitted
            pcs = pcs[:fitted]
        kcov.appended += fitted
        totals.appended += fitted
        self._unique.update(pcs)


class ReturnPoller(Generic[K]):
    """Answers the returns that a :class:`ReturnHandler` can handle, and polls for the next one.

    It is a part of :class:`bridge.device.doorbell.Doorbell`, which owns the lists and serves all
    other requests.

    ``last``, ``until``, ``looked`` and ``served`` say how the last :meth:`poll` ended.

    Args:
        control: the words of the region before its areas.
        handler: handles returns.
        slots: the instance in each slot, or None.
        handled: the last SEQ that was served, by slot.
        answered: the last SEQ that was written as an answer, by slot.
        failed: called with each exception of the handler.
    """

    def __init__(
        self,
        control: memoryview,
        handler: ReturnHandler[K],
        slots: Sequence[K | None],
        handled: list[int],
        answered: list[int],
        failed: Callable[[BaseException], object],
    ) -> None:
        if len(control) < AREAS_OFFSET // WORD:
            raise ValueError(f"the region must have at least {AREAS_OFFSET // WORD} control words")
        if not len(slots) == len(handled) == len(answered) == SLOTS:
            raise ValueError(f"each list must have {SLOTS} entries, one for each slot")
        self._control = control
        self._handler = handler
        self._slots = slots
        self._handled = handled
        self._answered = answered
        self._failed = failed
        self._interrupted = False
        self._released = False
        # Without a descriptor, poll(0) only releases the interpreter lock; time.sleep(0) would also
        # start a timer.
        self._release_lock = select.poll()
        self.last = 0
        """The KICK of the last request that was seen and served."""
        self.until = 0
        """When polling ends."""
        self.looked = 0
        """When KICK was last looked at."""
        self.served = 0
        """How many requests were answered."""

    def release(self) -> None:
        """Release the region; no other method may be called afterwards."""
        self._released = True

    def interrupt(self) -> None:
        """Make the current or next :meth:`poll` return at once; from any thread."""
        self._interrupted = True

    def serve(self, slot: int) -> bool:
        """Answer the request in ``slot`` if it is new and a return; return whether it did."""
        if not 0 <= slot < SLOTS or self._released:
            return False
        control = self._control
        request = _REQUESTS + slot * SLOT_WORDS
        sequence = control[request + _SEQ]
        if control[request + _OP] != _RETURN:
            return False
        kcov = self._slots[slot]
        if kcov is None or sequence == self._handled[slot]:
            return False
        if kcov.generation != control[request + _GENERATION]:
            return False
        error = 0
        try:
            done = self._handler.syscall_return(
                kcov,
                control[request + _TASK],
                control[request + _ARG0],
                control[request + _ARG1] & UNREPORTED_MASK,
                control[request + _ARG2],
            )
            if done is None:
                return False
        except BaseException as failure:
            self._failed(failure)
            error = errno.EIO
        self._handled[slot] = self._answered[slot] = sequence
        answer = _RESPONSES + slot * SLOT_WORDS
        control[answer + _ERROR] = error
        control[answer + _APPENDED] = kcov.appended
        control[answer + _DROPPED] = kcov.dropped
        # SEQ last: it makes the answer valid.
        control[answer + _ANSWER_SEQ] = sequence
        return True

    def poll(self, last: int, until: int, repair_at: int, poll_ns: int, preempted_ns: int) -> None:
        """Answer returns as they come, until ``until``. Times are of :func:`time.perf_counter_ns`.

        It returns earlier for a kick that :meth:`serve` cannot answer, at ``repair_at``, when
        interrupted, and after a gap between two looks, which means that another thread had the
        processor. The interpreter lock is free while there is nothing to do.

        Args:
            last: the KICK that was last served.
            until: when to stop; each answer moves it to ``poll_ns`` from then.
            repair_at: when to stop in any case.
            poll_ns: how long to poll after an answer.
            preempted_ns: the longest gap between two looks.
        """
        if self._released:
            raise ValueError("the region was released")
        control = self._control
        clock = time.perf_counter_ns
        self.served = 0
        looked = clock()
        while not self._interrupted:
            kick = control[_KICK]
            if kick == last:
                now = clock()
                if now >= until or now >= repair_at or now - looked > preempted_ns:
                    break
                looked = now
                self._release_lock.poll(0)
                for _ in _LOOKS:
                    if control[_KICK] != last:
                        break
                continue
            # Several requests at once need a look at all slots.
            if kick >> KICK_SLOT_BITS != (last >> KICK_SLOT_BITS) + 1:
                break
            if not self.serve(kick & _SLOT_MASK):
                break
            last = kick
            self.served += 1
            looked = clock()
            until = looked + poll_ns
            if looked >= repair_at:
                break
        self._interrupted = False
        self.last = last
        self.until = until
        self.looked = looked
