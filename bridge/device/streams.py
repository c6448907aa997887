# SPDX-License-Identifier: Apache-2.0
"""Streams: the coverage of one command's processes, collected on the host while they run.

A *stream* is opened by the host for one command. Each thread that joins it (KCOV_BRIDGE_STREAM, and
with KCOV_BRIDGE_FOLLOW every child of such a thread) traces into its own area, which no process of
the guest maps. The host takes the words out of that area when the thread ends, and whenever the
area fills up before that. So the guest's memory limits neither the number of processes nor the time
that they run.

The words go into a :class:`WordLog`: the first ones stay in memory, the others go into an unnamed
temporary file. A separate thread writes it, because the doorbell's thread must not wait for a disk.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import tempfile
import threading
import weakref
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, overload

from bridge.device.abi import KCOV_WORDS_PER_CMP, PAGE_SIZE, STREAM_MASK, WORD, Comparison
from bridge.device.region import Area
from bridge.errors import IncompleteError, SourceError

if TYPE_CHECKING:
    from bridge.device.calls import CallBook

__all__ = ["ComparisonLog", "PcLog", "Stream", "WordLog"]

logger = logging.getLogger(__name__)

_IN_MEMORY_BYTES = 256 << 10
"""The largest log without a file."""
_QUEUE_BYTES = 64 << 20
"""How many bytes may wait for the disk."""
_QUEUE_SECONDS = 0.5
"""How long the doorbell's thread waits for room in that queue, well below the guest's time-out."""
_CHUNK_WORDS = 1 << 16
"""Words of a log that are read at a time."""
_SHARE = 256
"""An area takes at most 1/256 of the free room, unless it has the smallest size."""
_FEW = 8
_SHARE_OF_FEW = 12
"""Instead of _SHARE, for the first _FEW threads at a time: the guest kernel fills much at once."""
_SMALLEST_AREA_WORDS = 2 * PAGE_SIZE // WORD


class WordLog:
    """64-bit words in the order in which they were appended, in memory and in an unnamed file.

    :meth:`append` is for one thread, and waits for the disk once, at most half a second.
    :meth:`finish` and :meth:`read` are for other threads.

    Args:
        directory: for the file; None for the system's directory for temporary files.

    Attributes:
        error: the first failure.
        lost: number of words that were lost.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.error: OSError | None = None
        self.lost = 0
        self._directory = directory
        self._length = 0
        self._memory = bytearray()
        self._fd = -1
        self._changed = threading.Condition()
        # All guarded by _changed.
        self._queue: deque[bytes] = deque()
        self._queued = 0
        self._written = 0
        self._finished = False
        self._broken = False
        self._writer: threading.Thread | None = None

    def __len__(self) -> int:
        """Return the number of words."""
        return self._length

    def append(self, words: bytes) -> bool:
        """Append whole words.

        Returns False if they are lost because of the file, or without memory or a thread.
        """
        try:
            return self._append(words)
        except (MemoryError, RuntimeError) as error:
            # RuntimeError: no thread can be started.
            if self.error is None:
                self.error = OSError(errno.ENOMEM, str(error) or os.strerror(errno.ENOMEM))
            self.lost += len(words) // WORD
            return False

    def _append(self, words: bytes) -> bool:
        if self._writer is None:
            if len(self._memory) + len(words) <= _IN_MEMORY_BYTES:
                self._memory += words
                self._length += len(words) // WORD
                return True
            writer = threading.Thread(target=self._write, name="pc-log", daemon=True)
            writer.start()
            self._writer = writer
        with self._changed:
            # Only once, because many threads of the guest may have words, and each would wait.
            if self._queued > _QUEUE_BYTES and self.error is None:
                self._changed.wait_for(
                    lambda: self._queued <= _QUEUE_BYTES or self._broken, _QUEUE_SECONDS
                )
            slow = self._queued > _QUEUE_BYTES
            if slow and self.error is None:
                self.error = OSError(errno.EAGAIN, "the disk is slower than the stream of PCs")
            if slow or self._broken or self._finished:
                self.lost += len(words) // WORD
                return False
            self._queue.append(words)
            self._queued += len(words)
            self._length += len(words) // WORD
            self._changed.notify_all()
        return True

    def finish(self) -> None:
        """Write everything that can be written; end the log. Safe to call twice."""
        with self._changed:
            self._finished = True
            self._changed.notify_all()
        if self._writer is not None:
            self._writer.join()
            whole = (len(self._memory) + self._written) // WORD
            if self._length > whole:
                self.lost += self._length - whole
                self._length = whole

    def restore(self, words: array[int]) -> None:
        """Replace the contents by these words, in memory."""
        self._memory = bytearray(words.tobytes())
        self._length = len(words)

    def read(self, start: int, stop: int) -> array[int]:
        """Return the words ``start`` to ``stop``, after :meth:`finish`. Raises OSError."""
        words = array("Q")
        first, last = start * WORD, min(stop, self._length) * WORD
        in_memory = len(self._memory)
        if first < in_memory:
            words.frombytes(self._memory[first : min(last, in_memory)])
            first = in_memory
        while first < last:
            data = os.pread(self._fd, last - first, first - in_memory)
            if not data:
                raise OSError(errno.EIO, "the file of the PCs was truncated")
            words.frombytes(data)
            first += len(data)
        return words

    def _write(self) -> None:
        """Write the queue to the file; on a separate thread."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._finished)
                if not self._queue:
                    return
                words = self._queue.popleft()
            try:
                self._write_out(words)
            except Exception as failure:
                error = (
                    failure if isinstance(failure, OSError) else OSError(errno.EIO, repr(failure))
                )
                logger.error("cannot write PCs to a temporary file: %s", error.strerror)
                with self._changed:
                    self.error = error
                    self._broken = True
                    self._queue.clear()
                    self._queued = 0
                    self._changed.notify_all()
                return
            with self._changed:
                self._queued -= len(words)
                self._changed.notify_all()

    def _write_out(self, words: bytes) -> None:
        if self._fd < 0:
            file = tempfile.TemporaryFile(dir=self._directory, buffering=0)  # noqa: SIM115
            self._fd = os.dup(file.fileno())
            file.close()
            weakref.finalize(self, os.close, self._fd)
        data = memoryview(words)
        while data:
            written = os.pwrite(self._fd, data, self._written)
            self._written += written
            data = data[written:]


class _Segments:
    """Pieces of a log, in another order than they were appended in."""

    def __init__(self, log: WordLog) -> None:
        self._log = log
        self._places = array("Q")  # start of each piece in the log
        self._starts = array("Q")  # start of each piece here
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def add(self, place: int, count: int) -> None:
        """Add the next piece: ``count`` words from ``place`` on."""
        self._places.append(place)
        self._starts.append(self._length)
        self._length += count

    def clip(self, words: int) -> None:
        """Drop the pieces after the first ``words`` words of the log, which were lost."""
        places, starts, length = self._places, self._starts, self._length
        self._places, self._starts, self._length = array("Q"), array("Q"), 0
        for index, place in enumerate(places):
            end = starts[index + 1] if index + 1 < len(starts) else length
            if (count := min(end - starts[index], max(words - place, 0))) > 0:
                self.add(place, count)

    def read(self, start: int, stop: int) -> array[int]:
        """Return the words ``start`` to ``stop``."""
        words = array("Q")
        index = bisect_right(self._starts, start) - 1
        while start < stop:
            last = index + 1 == len(self._starts)
            end = min(self._length if last else self._starts[index + 1], stop)
            place = self._places[index] + start - self._starts[index]
            words += self._log.read(place, place + end - start)
            start = end
            index += 1
        return words


class PcLog(Sequence[int]):
    """The PCs of one command, process by process, read from memory and file as needed.

    A slice is a list. A log equals any sequence of the same numbers. A pickled log is in memory.
    """

    def __init__(self, segments: _Segments) -> None:
        self._segments = segments

    def __len__(self) -> int:
        return len(self._segments)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return self._segments.read(start, stop).tolist() if start < stop else []
            return [self[number] for number in range(start, stop, step)]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError("PC index out of range")
        return self._segments.read(index, index + 1)[0]

    def __iter__(self) -> Iterator[int]:
        for chunk in self.chunks():
            yield from chunk

    def __contains__(self, pc: object) -> bool:
        return any(pc in chunk for chunk in self.chunks())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{len(self)} PCs>"

    def __reduce__(self) -> tuple[object, ...]:
        return _restore, (PcLog, self._segments.read(0, len(self)))

    def chunks(self) -> Iterator[array[int]]:
        """Yield all PCs, 65,536 at a time."""
        for start in range(0, len(self), _CHUNK_WORDS):
            yield self._segments.read(start, min(start + _CHUNK_WORDS, len(self)))


class ComparisonLog(Sequence[Comparison]):
    """The comparisons of one command: (type, first operand, second operand, PC); see PcLog."""

    def __init__(self, segments: _Segments) -> None:
        self._words = PcLog(segments)

    def __len__(self) -> int:
        return len(self._words) // KCOV_WORDS_PER_CMP

    @overload
    def __getitem__(self, index: int) -> Comparison: ...
    @overload
    def __getitem__(self, index: slice) -> list[Comparison]: ...
    def __getitem__(self, index: int | slice) -> Comparison | list[Comparison]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError("comparison index out of range")
        first = index * KCOV_WORDS_PER_CMP
        kind, one, other, pc = self._words[first : first + KCOV_WORDS_PER_CMP]
        return kind, one, other, pc

    def __iter__(self) -> Iterator[Comparison]:
        # A chunk holds whole comparisons.
        for words in self._words.chunks():
            yield from zip(words[::4], words[1::4], words[2::4], words[3::4], strict=True)

    def __repr__(self) -> str:
        return f"<{len(self)} comparisons>"

    def __reduce__(self) -> tuple[object, ...]:
        return _restore, (ComparisonLog, array("Q", self._words))


def _restore(kind: type[PcLog] | type[ComparisonLog], words: array[int]) -> object:
    """Rebuild a pickled log."""
    log = WordLog()
    log.restore(words)
    segments = _Segments(log)
    segments.add(0, len(words))
    return kind(segments)


class AreaSource(Protocol):
    """The provider of areas: :class:`bridge.device.region.Region`."""

    @property
    def bytes_free(self) -> int:
        """Free bytes for areas, perhaps in several pieces."""

    def allocate(self, size: int) -> Area | None:
        """Return a zeroed area of ``size`` words, or None."""


class Stream:
    """The coverage of one command's threads. Only for the doorbell's thread until :meth:`finish`.

    Args:
        area_words: the size of each thread's area; smaller if the region has no room.
        bitmap_words: the size of each thread's bitmap, which keeps out repeated PCs; 0 for none.
        comparisons: whether to collect comparisons instead of PCs.
        calls: the book into which its threads log their system calls; None to log none.
        unique_per_call: the bitmap keeps out PCs that a call repeats, not those of earlier calls;
            only with ``calls``.
        directory: for the temporary file.

    Attributes:
        number: the stream's name for the guest, which cannot guess it.
        joined: whether any thread has traced into it.
        untraced: number of processes and threads that could not be traced.
        dropped: number of comparisons of its threads that are missing, or of PCs that had no room
            in an area.
        failure: why PCs of a thread that ran to the end of the stream may be missing.
    """

    def __init__(
        self,
        area_words: int,
        *,
        bitmap_words: int = 0,
        comparisons: bool = False,
        calls: CallBook | None = None,
        unique_per_call: bool = False,
        directory: Path | None = None,
    ) -> None:
        # Never 0, and without the bit that the guest's module uses as a flag.
        self.number = (int.from_bytes(os.urandom(8), "little") | 1) & STREAM_MASK
        self.bitmap_words = bitmap_words
        self.comparisons = comparisons
        self.calls = calls
        self.unique_per_call = unique_per_call
        self.joined = False
        self.untraced = 0
        self.dropped = 0
        self.failure: SourceError | None = None
        self._area_words = area_words
        self._log = WordLog(directory)
        self._segments = _Segments(self._log)
        # The pieces of each thread that has not ended.
        self._open: dict[object, array[int]] = {}

    def allocate(self, areas: AreaSource) -> Area | None:
        """Return an area for one more thread, smaller if little room is left for others."""
        size, smallest = self._area_words, _SMALLEST_AREA_WORDS + self.bitmap_words
        share = _SHARE_OF_FEW if len(self._open) < _FEW else _SHARE
        most = areas.bytes_free // share // WORD
        while size > most and size // 2 >= smallest:
            size //= 2
        while size >= smallest:
            area = areas.allocate(size)
            if area is not None:
                return area
            size //= 2
        return None

    def begin(self, thread: object) -> None:
        """Add a thread, any object, which traces into the stream from now on."""
        self.joined = True
        self._open[thread] = array("Q")

    def record(self, thread: object, words: bytes) -> None:
        """Record the words of the thread since the last call."""
        place = len(self._log)
        if words and self._log.append(words):
            self._open[thread].extend((place, len(words) // WORD))
            if self.calls is not None:
                self.calls.recorded(thread, len(words) // WORD)

    def end(self, thread: object) -> None:
        """End a thread; its words follow those of threads that ended before."""
        pieces = self._open.pop(thread)
        if self.calls is not None:
            self.calls.end(thread, len(self._segments))
        for index in range(0, len(pieces), 2):
            self._segments.add(pieces[index], pieces[index + 1])

    def finish(self) -> None:
        """Write everything once all threads have ended; not on the doorbell's thread."""
        self._log.finish()
        if self._log.lost:
            self._segments.clip(len(self._log))
        if self.calls is not None:
            self.calls.finish()

    def check(self) -> None:
        """Raise IncompleteError if words or calls were lost; after :meth:`finish`."""
        if self.failure is not None:
            raise IncompleteError(
                f"the PCs of a process that still ran are incomplete: {self.failure.message}"
            )
        if not self._log.lost:
            if self.calls is not None:
                self.calls.check()
            return
        error = self._log.error
        raise IncompleteError(
            f"the PCs are incomplete: {self._log.lost:,} words could not be written to a temporary "
            f"file: {error.strerror if error else 'it was closed'}",
            hint="free disk space where the results go, or choose another directory: --out DIR",
        )

    @property
    def pcs(self) -> PcLog:
        """The PCs, after :meth:`finish`."""
        return PcLog(self._segments)

    @property
    def records(self) -> ComparisonLog:
        """The comparisons, after :meth:`finish`."""
        return ComparisonLog(self._segments)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.finish()
