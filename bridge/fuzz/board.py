# SPDX-License-Identifier: Apache-2.0
"""The board: one page of memory between a slot and its shim, which the guest never sees.

``shim/board.h`` describes the words; ``tests/fuzz/test_board.py`` compares the two.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from bridge.errors import UsageError

__all__ = [
    "AREAS",
    "BOARD_BYTES",
    "MAGIC",
    "MAP_CELLS",
    "SLOT_VARIABLE",
    "VERSION",
    "Board",
    "BoardLayout",
    "BoardState",
    "BoardWord",
    "Fold",
    "TraceArea",
]

MAGIC: Final = 0x4452414F4256434B
"""``KCVBOARD``"""
VERSION: Final = 1
BOARD_BYTES: Final = 4096
AREAS: Final = 64
"""Limit of trace areas."""
SLOT_VARIABLE: Final = "KCOV_BRIDGE_SLOT"
"""The environment variable that tells the shim the path of the slot's socket."""

_AREA_WORDS = 2
_MAP_SIZES = range(64, (1 << 24) + 1)


class BoardWord(IntEnum):
    """Numbers of the board's words; ``struct kb_board`` says what each means."""

    MAGIC = 0
    VERSION = 1
    MAP_SIZE = 2
    FOLD = 3
    RESET_EVERY = 4
    BLIND = 5
    SPIN_NS = 6
    AREAS = 7
    LANE_OFFSET = 8
    LANE_BYTES = 9
    INPUT_OFFSET = 10
    INPUT_BYTES = 11
    OUTPUT_OFFSET = 12
    OUTPUT_BYTES = 13
    EXIT_IS_SUSPECT = 14
    STATE = 16
    EPOCH = 17
    FAULTS = 18
    LAST_CASE = 19
    EXECUTIONS = 24
    NS_ENGINE = 25
    NS_GUEST = 26
    NS_FOLD = 27
    NS_SLOT = 28
    NEW_CASES = 29
    SUSPECTS = 30
    TIMEOUTS = 31
    CELLS = 32
    RESETS = 33
    REPEATED = 34
    OVERFLOWS = 35
    INPUT_CUT = 36
    STAND_IN = 37
    AREA = 40


class BoardState(IntEnum):
    """What the slot is doing."""

    STARTING = 0
    READY = 1
    RESETTING = 2
    GONE = 3


class Fold(IntEnum):
    """How PCs become cells of the engine's map."""

    EDGES = 0
    """Pairs of PCs that follow one another, for sources whose order is the order of execution."""
    BLOCKS = 1
    """Single PCs, for sources that only say what was covered."""


MAP_CELLS: Final = {Fold.EDGES: 1 << 18, Fold.BLOCKS: 1 << 16}
"""Sizes of the map that fit: docs/fuzzing.md, "The map", has what each loses."""


@dataclass(frozen=True)
class TraceArea:
    """A trace area of the lane: its place in the region in bytes, and its words with the count."""

    offset: int
    words: int


@dataclass(frozen=True)
class BoardLayout:
    """What a slot writes on the board before the shim sees it, and never changes.

    Attributes:
        map_size: cells of the engine's map that the fold uses.
        reset_every: executions between two resets that the shim asks for; 0 for never.
        spin_ns: the shim polls so long for the end of a case before it sleeps.
        blind: the engine sees a map that never changes, so it mutates without feedback. New cells
            are counted and reported as always.
        exit_is_suspect: a harness that exits with another status than 0 is as bad as one that
            dies of a signal.
        lane_offset: the lane's control page, in bytes from the region's start, as all offsets.
        areas: the trace areas, in the order of their indices.
    """

    lane_offset: int
    lane_bytes: int
    input_offset: int
    input_bytes: int
    output_offset: int
    output_bytes: int
    areas: Sequence[TraceArea]
    map_size: int = 1 << 16
    fold: Fold = Fold.EDGES
    reset_every: int = 0
    spin_ns: int = 50_000
    blind: bool = False
    exit_is_suspect: bool = False

    def __post_init__(self) -> None:
        if len(self.areas) > AREAS:
            raise UsageError(f"a lane has at most {AREAS} trace areas, not {len(self.areas)}")
        if self.map_size not in _MAP_SIZES:
            raise UsageError(
                f"the engine's map has {_MAP_SIZES[0]} to {_MAP_SIZES[-1]} cells, "
                f"not {self.map_size}"
            )


class Board:
    """The slot's side of a board; a memfd, sealed against resizing. :meth:`close` it once."""

    def __init__(self, layout: BoardLayout) -> None:
        self.layout = layout
        self.fd = os.memfd_create("kcov-bridge-board", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, BOARD_BYTES)
            _seal(self.fd)
            self._memory = mmap.mmap(self.fd, BOARD_BYTES)
        except BaseException:
            os.close(self.fd)
            raise
        self._words = memoryview(self._memory).cast("Q")
        for word, value in (
            (BoardWord.MAGIC, MAGIC),
            (BoardWord.VERSION, VERSION),
            (BoardWord.MAP_SIZE, layout.map_size),
            (BoardWord.FOLD, layout.fold),
            (BoardWord.RESET_EVERY, layout.reset_every),
            (BoardWord.BLIND, layout.blind),
            (BoardWord.SPIN_NS, layout.spin_ns),
            (BoardWord.EXIT_IS_SUSPECT, layout.exit_is_suspect),
            (BoardWord.AREAS, len(layout.areas)),
            (BoardWord.LANE_OFFSET, layout.lane_offset),
            (BoardWord.LANE_BYTES, layout.lane_bytes),
            (BoardWord.INPUT_OFFSET, layout.input_offset),
            (BoardWord.INPUT_BYTES, layout.input_bytes),
            (BoardWord.OUTPUT_OFFSET, layout.output_offset),
            (BoardWord.OUTPUT_BYTES, layout.output_bytes),
        ):
            self._words[word] = value
        for number, area in enumerate(layout.areas):
            place = BoardWord.AREA + number * _AREA_WORDS
            self._words[place] = area.offset
            self._words[place + 1] = area.words

    def __getitem__(self, word: BoardWord) -> int:
        """Return a word's present value."""
        return int(self._words[word])

    @property
    def state(self) -> BoardState:
        """What the shim sees the slot doing."""
        return BoardState(self[BoardWord.STATE])

    @state.setter
    def state(self, state: BoardState) -> None:
        self._words[BoardWord.STATE] = state

    @property
    def epoch(self) -> int:
        """Resets so far."""
        return self[BoardWord.EPOCH]

    def add_epoch(self) -> None:
        """Count a reset. Call it while the state is not ready."""
        self._words[BoardWord.EPOCH] += 1

    @property
    def faults(self) -> int:
        """What the target, the console or the machine did wrong so far."""
        return self[BoardWord.FAULTS]

    def add_fault(self) -> None:
        """Count a fault: the shim reports the running case, or the last one, as a suspect.

        Only one thread of the slot may count them.
        """
        self._words[BoardWord.FAULTS] += 1

    @property
    def last_case(self) -> int:
        """The number of the last case that the slot put into the lane itself."""
        return self[BoardWord.LAST_CASE]

    @last_case.setter
    def last_case(self, number: int) -> None:
        self._words[BoardWord.LAST_CASE] = number

    def close(self) -> None:
        """Unmap the memory and close its descriptor."""
        self._words.release()
        self._memory.close()
        os.close(self.fd)

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _seal(fd: int) -> None:
    """Forbid resizing, so that no access of the other side can fault."""
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
