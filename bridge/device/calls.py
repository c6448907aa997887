# SPDX-License-Identifier: Apache-2.0
"""The system calls that the owners of a stream log, with the place of their PCs in the stream.

Each owner writes a record of each call into a ring of its own, a :class:`CallLog` in the region.
The doorbell's thread empties it before it takes PCs out of the owner's area, when the ring is half
full, and when the owner ends; it only copies. What the records say is looked at once the stream has
ended, in a :class:`CallBook`.

*Which PCs belong to a call.* A record has the count of the owner's area when the call was entered.
The host adds how many PCs of the owner it had taken out of that area before, which gives the place
of the call's first PC among those of the owner. A call's PCs end where those of the owner's next
call begin, so work that the kernel does for a call after its return is the call's too.
"""

from __future__ import annotations

import errno
import itertools
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, overload

from bridge.device.abi import (
    CALL_CUT_SHIFT,
    CALL_MOST_WORDS,
    CALL_WORDS_BITS,
    WORD,
    CallFlag,
    CallLogWord,
    CallWord,
)
from bridge.device.region import Area
from bridge.device.streams import AreaSource, WordLog
from bridge.errors import IncompleteError

__all__ = ["CallBook", "CallLog", "HostThread", "LoggedCall", "LoggedCalls"]

_RING_WORDS: Final = (1 << 15, 1 << 12)
"""Sizes of an owner's ring, for some 2,000 and some 250 calls. Each time that half of it is full
costs as much as a wake-up of the host."""
_SHARE: Final = 64
"""A ring takes at most 1/64 of the free room, unless it has the smallest size."""

ThreadOf = Mapping[int, "HostThread"]
"""The thread of the target that ran a block last, by the block's PC; not of all."""

_LEAST: Final = int(CallWord.STRINGS)
_SIZE_MASK: Final = (1 << CALL_WORDS_BITS) - 1
_MASK: Final = 2**64 - 1
_ARGUMENTS: Final = 6
_TASK_ID: Final = 0xFFFFFFFF
_CHUNK_HEADER: Final = 3
"""Words before the records in the book's log: thread, PCs before, words."""
_NOBODY: Final = 0
_MIXED: Final = _MASK
_MOST_WORDS: Final = 1 << 24
"""The most words of a stream's records (128 MiB): a million calls."""


class CallLog:
    """The ring into which one owner logs its calls.

    Args:
        area: holds the ring.
        traced: the area into which the owner traces.
        clear_bitmap: the guest clears the bitmap of ``traced`` at each call, so that each call has
            all of its PCs, each once.
    """

    @staticmethod
    def allocate(areas: AreaSource) -> Area | None:
        """Return an area for a log, smaller if little room is left for others."""
        for ring in _RING_WORDS:
            size = CallLogWord.RING + ring
            if size * WORD * _SHARE <= areas.bytes_free or ring == _RING_WORDS[-1]:
                area = areas.allocate(size)
                if area is not None:
                    return area
        return None

    def __init__(self, area: Area, traced: Area, *, clear_bitmap: bool) -> None:
        self.area = area
        self._ring_words = area.size - CallLogWord.RING
        self._words = words = area.words
        self._taken = 0
        self._lost = 0
        words[CallLogWord.RING_WORDS] = self._ring_words
        words[CallLogWord.COUNT_OFFSET] = traced.offset + traced.bitmap_words * WORD
        words[CallLogWord.BITMAP_OFFSET] = traced.offset
        words[CallLogWord.BITMAP_WORDS] = traced.bitmap_words if clear_bitmap else 0

    def take(self, *, last: bool = False) -> tuple[bytes, int]:
        """Empty the ring.

        Args:
            last: take the call in which the owner is, too.

        Returns:
            The words of the records, and how many records were lost since the last time.
        """
        words = self._words
        head = words[CallLogWord.HEAD]
        lost = words[CallLogWord.LOST]
        missing, self._lost = (lost - self._lost) & _MASK, lost
        start, self._taken = self._taken, head
        size = (head - start) & _MASK
        taken = b""
        ring = self._ring_words
        if size > ring:
            # Nothing of this makes sense: the guest has overwritten it.
            missing += 1
        elif size:
            first = start % ring
            end = min(first + size, ring)
            base = int(CallLogWord.RING)
            taken = words[base + first : base + end].tobytes()
            taken += words[base : base + size - (end - first)].tobytes()
        words[CallLogWord.TAIL] = head
        if last and words[CallLogWord.ENTERED]:
            start = int(CallLogWord.CALL)
            size = words[start] & _SIZE_MASK
            if _LEAST <= size <= CALL_MOST_WORDS:
                taken += words[start : start + size].tobytes()
        # More than there can be: a hostile number, which only has to be counted.
        return taken, min(missing, _MASK >> 1)


@dataclass(frozen=True, slots=True)
class HostThread:
    """A thread of the target.

    Attributes:
        process: the id of its process on the host.
        id: its own id there.
        name: its name in Python, cut to 54 bytes; "" if it has none.
    """

    process: int
    id: int
    name: str


@dataclass(frozen=True, slots=True)
class LoggedCall:
    """One record. All of it comes from the guest: any numbers, any bytes.

    Attributes:
        thread: id of the thread in the guest.
        command: its name.
        number: of the system call, signed.
        ia32: whether that is a number of 32-bit programs.
        result: signed; None if the call did not return.
        entered: time in nanoseconds of the guest's monotonic clock.
        returned: the same; None if the call did not return.
        arguments: six numbers, unsigned.
        strings: the strings to which arguments point, by the argument's index, and whether each was
            cut.
        start, stop: the place of the call's PCs in those of the stream.
        threads: the threads of the target that ran the call's blocks: each from a place in the PCs
            of the stream on. Of several that ran at a time, a mapping from PC to thread.
    """

    thread: int
    command: bytes
    number: int
    ia32: bool
    result: int | None
    entered: int
    returned: int | None
    arguments: tuple[int, ...]
    strings: dict[int, tuple[bytes, bool]]
    start: int
    stop: int
    threads: tuple[tuple[int, HostThread | Mapping[int, HostThread] | None], ...] = ()

    def thread_at(self, place: int, pc: int) -> HostThread | None:
        """Return the thread that ran a block, by its place in the PCs of the stream."""
        found: HostThread | None = None
        for start, thread in self.threads:
            if start > place:
                break
            found = thread.get(pc) if isinstance(thread, Mapping) else thread
        return found


class _Thread:
    """A thread in the book.

    Attributes:
        number: its index in the book.
        task: the thread's id in the guest.
        recorded: how many PCs the stream has of it so far.
        first: the place of its PCs in the stream; -1 while it has not ended.
        ran: the target's thread from the last entry in the book on; _MIXED for several.
        starts, entries: from which place in its PCs on an entry says which thread of the target
            ran them, and the place of that entry in the book.
    """

    __slots__ = ("entries", "first", "number", "ran", "recorded", "starts", "task")

    def __init__(self, number: int, task: int) -> None:
        self.number = number
        self.task = task
        self.recorded = 0
        self.first = -1
        self.ran = _NOBODY
        self.starts = array("Q")
        self.entries = array("Q")


class CallBook:
    """The calls of one stream's threads. Only for the doorbell's thread until :meth:`finish`.

    Args:
        directory: for the temporary file of many calls.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._log = WordLog(directory)
        # Which threads of the target ran: a word, the thread's number or _MIXED; with _MIXED the
        # number of pairs and that many pairs of PC and number.
        self._ran = WordLog(directory)
        self._target_threads: dict[HostThread | None, int] = {None: _NOBODY}
        self._threads: list[_Thread] = []
        self._open: dict[object, _Thread] = {}
        self._lost = 0
        self._calls: LoggedCalls | None = None

    def begin(self, thread: object, task: int) -> None:
        """Add a thread, any object, which has the id ``task`` in the guest."""
        entry = _Thread(len(self._threads), task & _TASK_ID)
        self._threads.append(entry)
        self._open[thread] = entry

    def add(self, thread: object, log: CallLog, *, last: bool = False) -> None:
        """Empty the log of a thread into the book, before PCs of the thread are recorded.

        Args:
            last: with the call in which the thread is.
        """
        records, lost = log.take(last=last)
        self._lost += lost
        entry = self._open.get(thread)
        if not records or entry is None:
            return
        header = array("Q", (entry.number, entry.recorded, len(records) // WORD))
        if len(self._log) * WORD + len(records) > _MOST_WORDS * WORD:
            if self._log.error is None:
                self._log.error = OSError(errno.EFBIG, "there are more than a trace can hold")
            self._lost += _count(array("Q", records))
        elif not self._log.append(header.tobytes() + records):
            self._lost += _count(array("Q", records))

    def recorded(self, thread: object, pcs: int) -> None:
        """Note that the stream recorded so many more PCs of a thread."""
        if (entry := self._open.get(thread)) is not None:
            entry.recorded += pcs

    def ran(self, thread: object, count: int, pcs: Sequence[int], by: ThreadOf) -> None:
        """Note which threads of the target ran the PCs that a thread is about to be given.

        Args:
            count: how many PCs are in the thread's area.
            by: the target's thread for a PC.
        """
        entry = self._open.get(thread)
        if entry is None:
            return
        numbers = self._target_threads
        several = {by.get(pc) for pc in pcs}
        for each in several:
            if each not in numbers:
                numbers[each] = len(numbers)
        if len(several) == 1:
            number = numbers[several.pop()]
            if number == entry.ran:
                return
            words = array("Q", (number,))
        else:
            known = [(pc, numbers[each]) for pc in pcs if (each := by.get(pc)) is not None]
            number = _MIXED
            words = array("Q", (number, len(known), *itertools.chain.from_iterable(known)))
        place = len(self._ran)
        # What is lost here has no thread; the calls and their code are all there.
        if self._ran.append(words.tobytes()):
            entry.ran = number
            entry.starts.append(entry.recorded + count)
            entry.entries.append(place)

    def end(self, thread: object, first: int) -> None:
        """End a thread, whose PCs begin at ``first`` in those of the stream."""
        if (entry := self._open.pop(thread, None)) is not None:
            entry.first = first

    def finish(self) -> None:
        """Write everything once all threads have ended; not on the doorbell's thread."""
        self._log.finish()
        self._ran.finish()

    @property
    def calls(self) -> LoggedCalls:
        """The calls in the order in which they were entered, after :meth:`finish`.

        Raises OSError.
        """
        if self._calls is None:
            self._calls = LoggedCalls(
                self._log, self._threads, self._ran, list(self._target_threads)
            )
        return self._calls

    def check(self) -> None:
        """Raise IncompleteError if calls were lost; after :meth:`finish`."""
        try:
            lost = self._lost + self.calls.damaged
        except OSError as failure:
            raise IncompleteError(
                f"the trace is incomplete: its temporary file cannot be read: {failure.strerror}"
            ) from failure
        if not lost:
            return
        error = self._log.error
        reason = f": {error.strerror}" if error is not None else ""
        raise IncompleteError(
            f"the trace is incomplete: {lost:,} system calls were lost{reason}",
            hint="trace less at a time, or run the command without a trace",
        )


def _count(words: array[int]) -> int:
    """Return the number of records, the damaged rest as one."""
    return sum(1 for _ in _records(words))


def _records(words: array[int]) -> Iterator[tuple[int, int]]:
    """Yield index and length of each record; the length is 0 for a damaged rest."""
    at = 0
    while at < len(words):
        size = words[at] & _SIZE_MASK
        if not _LEAST <= size <= min(CALL_MOST_WORDS, len(words) - at):
            yield at, 0
            return
        yield at, size
        at += size


class LoggedCalls(Sequence[LoggedCall]):
    """The calls of a stream, read from memory and file as needed.

    Args:
        log: the records.
        threads: the threads of the guest.
        ran: which threads of the target ran; see :class:`CallBook`.
        target_threads: the threads of the target, by their number in ``ran``.

    Attributes:
        damaged: how many records made no sense.
    """

    def __init__(
        self,
        log: WordLog,
        threads: Sequence[_Thread],
        ran: WordLog,
        target_threads: Sequence[HostThread | None],
    ) -> None:
        self._log = log
        self._threads = threads
        self._ran = ran
        self._target_threads = target_threads
        self.damaged = 0
        # By record, in the order of the log.
        self._at = array("Q")
        self._thread = array("Q")
        self._start = array("Q")
        self._stop = array("Q")
        entered = array("Q")
        last: dict[int, int] = {}
        at = 0
        while at + _CHUNK_HEADER <= len(log):
            number, before, size = log.read(at, at + _CHUNK_HEADER)
            at += _CHUNK_HEADER
            words = log.read(at, at + size)
            if number >= len(threads) or not size or len(words) != size:
                # The file was cut.
                self.damaged += 1
                break
            thread = threads[number]
            for index, length in _records(words):
                if not length:
                    self.damaged += 1
                    break
                count = before + words[index + CallWord.COUNT]
                start = max(thread.first, 0) + min(count, thread.recorded)
                previous = last.get(number)
                if previous is not None:
                    start = max(start, self._start[previous])
                    self._stop[previous] = start
                last[number] = len(self._at)
                self._at.append(at + index)
                self._thread.append(number)
                self._start.append(start)
                self._stop.append(max(thread.first, 0) + thread.recorded)
                entered.append(words[index + CallWord.ENTERED])
            at += size
        self._order = array("Q", sorted(range(len(entered)), key=entered.__getitem__))

    def __len__(self) -> int:
        return len(self._at)

    @overload
    def __getitem__(self, index: int) -> LoggedCall: ...
    @overload
    def __getitem__(self, index: slice) -> list[LoggedCall]: ...
    def __getitem__(self, index: int | slice) -> LoggedCall | list[LoggedCall]:
        if isinstance(index, slice):
            return [self._read(number) for number in self._order[index]]
        return self._read(self._order[index])

    def _read(self, number: int) -> LoggedCall:
        at = self._at[number]
        words = self._log.read(at, at + CALL_MOST_WORDS)
        size = words[0] & _SIZE_MASK
        flags = words[0] >> CALL_WORDS_BITS
        returned = bool(flags & CallFlag.RETURNED)
        strings = {}
        rest = words[_LEAST:size].tobytes()
        for argument in range(_ARGUMENTS):
            if flags >> argument & 1 and rest:
                text, nul, _ = rest.partition(b"\0")
                cut = bool(flags >> CALL_CUT_SHIFT + argument & 1) or not nul
                strings[argument] = text, cut
                rest = rest[(len(text) // WORD + 1) * WORD :]
        command = words[CallWord.COMMAND : CallWord.STRINGS].tobytes()
        return LoggedCall(
            thread=self._threads[self._thread[number]].task,
            command=command.partition(b"\0")[0],
            number=_signed(words[CallWord.NUMBER]),
            ia32=bool(flags & CallFlag.IA32),
            result=_signed(words[CallWord.RESULT]) if returned else None,
            entered=words[CallWord.ENTERED],
            returned=words[CallWord.RETURNED] if returned else None,
            arguments=tuple(words[CallWord.ARGUMENTS : CallWord.ARGUMENTS + _ARGUMENTS]),
            strings=strings,
            start=self._start[number],
            stop=self._stop[number],
            threads=self._threads_of(number),
        )

    def _threads_of(
        self, number: int
    ) -> tuple[tuple[int, HostThread | Mapping[int, HostThread] | None], ...]:
        thread = self._threads[self._thread[number]]
        first = max(thread.first, 0)
        start, stop = self._start[number] - first, self._stop[number] - first
        if start >= stop:
            return ()
        # From the entry on that holds at the call's first PC.
        index = max(bisect_right(thread.starts, start) - 1, 0)
        return tuple(
            (first + thread.starts[at], self._entry(thread.entries[at]))
            for at in range(index, bisect_left(thread.starts, stop))
        )

    def _entry(self, place: int) -> HostThread | Mapping[int, HostThread] | None:
        head = self._ran.read(place, place + 2)
        if not head:
            return None  # it could not be written
        if head[0] != _MIXED:
            return self._target_threads[head[0]]
        pairs = self._ran.read(place + 2, place + 2 + 2 * head[1])
        threads: dict[int, HostThread] = {}
        for pc, number in zip(pairs[::2], pairs[1::2], strict=False):
            if (thread := self._target_threads[number]) is not None:
                threads[pc] = thread
        return threads


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
