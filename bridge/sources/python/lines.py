# SPDX-License-Identifier: Apache-2.0
"""The lines that have run, in memory that several processes share.

Forked children of a target, and Python programs that it starts, cover code for the same guest. So
the lines are bytes of a memfd. A process stores a number when a line runs; the bridge reads that,
and stores 0 for what it has given to the guest. No lock is needed, because each byte means one
thing and a store can be repeated.

The layout is little-endian; offsets and lengths are in bytes:

======================  =========================================================
0                       ``MAGIC``, which names the version of the layout too
8                       ``ACTIVE``: 1 while the source measures
9                       ``CHANGED``: 1 if a ``dirty`` byte may be 1, or after a fault
10                      ``MISSED``: 1 if a process ran a file that is not here
11                      ``FAULTED``: whether the tracer failed; see :mod:`.faults`
12                      ``BY_THREAD``: 1 while the reader asks for the thread of each block
16, 24                  u64: offset and length of the index
32                      u64: the number of faults
40                      u16: the length of the first fault's text
64                      the text of the first fault
512                     the threads; see :mod:`.threads`
16896                   ``dirty``: a byte for each file
then, for each file     ``block_of``: u32 for each line: number of its block, or 0
                        ``taken``: for each line, whether it ever ran
                        ``hit``: for each block, the number of the thread that ran it last
                        since the last look, or 0
======================  =========================================================

The index is JSON, as :meth:`LineMemory.create` writes it. Stores come in the order taken, hit,
dirty, CHANGED, and last the coverage epoch. The reader clears in the opposite order, each level
before it reads the next.

The coverage epoch is a word of the region that the guest reads too: a system call in the guest has
its coverage fetched only if that word has changed. So each line that runs gives it a new value,
before the code after that line can answer the guest, in whatever way. A value consists of a count
of this process above the process id, and is even: the values of :mod:`bridge.device.coverage_epoch`
are odd.

Programs that a target starts use this module, ``faults``, ``hooks``, ``threads`` and ``tracer``,
and may not have this project installed. So these import only the standard library and each other.
"""

from __future__ import annotations

import json
import mmap
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from .faults import ACTIVE, CHANGED, MAGIC
from .threads import TABLE_END

__all__ = ["ACTIVE", "CHANGED", "DIRTY", "MISSED", "FileLines", "LineMemory"]

MISSED: Final = 10
DIRTY: Final = TABLE_END
_INDEX: Final = 16


@dataclass(frozen=True, slots=True)
class FileLines:
    """Offsets of a file's bytes. ``lines`` is one more than the last line's number."""

    path: str
    lines: int
    blocks: int
    block_of: int
    taken: int
    hit: int


class LineMemory:
    """The memory of one source; created by :meth:`create`, opened elsewhere by :meth:`attach`.

    ``roots`` are the directories and files whose code belongs to the source.
    """

    def __init__(
        self,
        descriptor: int,
        path: str,
        buffer: mmap.mmap,
        files: list[FileLines],
        roots: Sequence[str],
        epoch: tuple[mmap.mmap, int],
    ) -> None:
        self.descriptor = descriptor
        self.path = path
        """Path by which other processes of this user open the memory while the source measures."""
        self.buffer = buffer
        self.files = files
        self.roots = tuple(roots)
        self.epoch, self.epoch_at = epoch
        """The page of the coverage epoch, and its offset; a page of our own where there is none."""

    @classmethod
    def create(
        cls,
        files: Sequence[tuple[str, Sequence[tuple[int, int]]]],
        roots: Sequence[str] = (),
        epoch: tuple[str, int] | None = None,
    ) -> LineMemory:
        """Create memory for files.

        Args:
            files: path, and first and last line of each block in order.
            roots: see the class.
            epoch: the file with the coverage epoch, and the word's offset in it.

        Raises:
            OSError: there is no memory.
        """
        laid_out = []
        end = _aligned(DIRTY + len(files))
        for path, blocks in files:
            lines = blocks[-1][1] + 1 if blocks else 1
            block_of, taken = end, end + 4 * lines
            hit = _aligned(taken + lines)
            end = _aligned(hit + len(blocks))
            laid_out.append(FileLines(path, lines, len(blocks), block_of, taken, hit))
        index = json.dumps(
            {
                "roots": list(roots),
                "epoch": epoch,
                "files": [
                    [file.path, file.lines, file.blocks, file.block_of, file.taken, file.hit]
                    for file in laid_out
                ],
            }
        ).encode()
        descriptor = os.memfd_create("kcov-bridge-lines", os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, end + len(index))
            buffer = mmap.mmap(descriptor, end + len(index))
            word = _epoch_word(epoch)
        except BaseException:
            os.close(descriptor)
            raise
        for file, (_, blocks) in zip(laid_out, files, strict=True):
            numbers = array("I", bytes(4 * file.lines))
            for number, (first, last) in enumerate(blocks, 1):
                for line in range(first, last + 1):
                    numbers[line] = number
            buffer[file.block_of : file.block_of + 4 * file.lines] = numbers.tobytes()
        buffer[end : end + len(index)] = index
        buffer[_INDEX : _INDEX + 8] = end.to_bytes(8, "little")
        buffer[_INDEX + 8 : _INDEX + 16] = len(index).to_bytes(8, "little")
        buffer[ACTIVE] = 1
        buffer[: len(MAGIC)] = MAGIC
        path = f"/proc/{os.getpid()}/fd/{descriptor}"
        return cls(descriptor, path, buffer, laid_out, roots, word)

    @classmethod
    def attach(cls, path: str) -> LineMemory:
        """Open the memory of another process; raises OSError and ValueError."""
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            buffer = mmap.mmap(descriptor, 0)
        except BaseException:
            os.close(descriptor)
            raise
        if buffer[: len(MAGIC)] != MAGIC:
            os.close(descriptor)
            raise ValueError(f"{path} holds no lines of this version")
        at = int.from_bytes(buffer[_INDEX : _INDEX + 8], "little")
        length = int.from_bytes(buffer[_INDEX + 8 : _INDEX + 16], "little")
        index = json.loads(buffer[at : at + length])
        files = [FileLines(*file) for file in index["files"]]
        try:
            word = _epoch_word(index["epoch"])
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor, path, buffer, files, index["roots"], word)

    @property
    def active(self) -> bool:
        """Whether processes still record lines."""
        return self.buffer[ACTIVE] != 0

    def end(self) -> None:
        """Stop the recording in all processes. The bytes stay readable."""
        self.buffer[ACTIVE] = 0
        self.close()

    def close(self) -> None:
        """Close the descriptor, so that no process can attach. Safe to call twice."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def covers(self, path: str) -> bool:
        """Return whether a source file, by its canonical path, is below one of the roots."""
        return any(path == root or path.startswith(root + os.sep) for root in self.roots)

    def lines_run(self, file: FileLines) -> list[int]:
        """Return the lines of a file that ever ran."""
        taken = self.buffer[file.taken : file.taken + file.lines]
        return [line for line, ran in enumerate(taken) if ran]

    def take_lines(self, file: FileLines) -> list[int]:
        """Return the lines of a file that ran since the last call, and forget them."""
        buffer, start, end = self.buffer, file.taken, file.taken + file.lines
        lines = []
        at = buffer.find(b"\1", start, end)
        while at >= 0:
            buffer[at] = 0
            lines.append(at - start)
            at = buffer.find(b"\1", at + 1, end)
        return lines


def _epoch_word(place: Sequence[Any] | None) -> tuple[mmap.mmap, int]:
    """Map the coverage epoch; raises OSError."""
    if place is None:
        return mmap.mmap(-1, mmap.PAGESIZE), 0
    path, offset = place
    start = offset // mmap.PAGESIZE * mmap.PAGESIZE
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        page = mmap.mmap(descriptor, mmap.PAGESIZE, offset=start)
    finally:
        os.close(descriptor)
    return page, offset - start


def _aligned(offset: int) -> int:
    """Round up to a multiple of 8, because the reader looks at eight blocks at a time."""
    return (offset + 7) & ~7
