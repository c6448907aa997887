# SPDX-License-Identifier: Apache-2.0
"""The lane: shared memory through which test cases go into a guest.

The layout is that of ``guest/agent/lane.h``, which also describes the protocol.
``tests/fuzz/test_lane.py`` compiles that header and compares.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

__all__ = [
    "LANE_BYTES",
    "LANE_CONTROL_BYTES",
    "LANE_INPUT_BYTES",
    "LANE_INPUT_OFFSET",
    "LANE_MAGIC",
    "LANE_MOST_AREAS",
    "LANE_OUTPUT_BYTES",
    "LANE_OUTPUT_OFFSET",
    "LANE_VERSION",
    "LaneFlag",
    "LaneWord",
]

LANE_MAGIC = 0x454E414C56434B
LANE_VERSION = 1
LANE_CONTROL_BYTES = 4096
LANE_INPUT_OFFSET = LANE_CONTROL_BYTES
LANE_INPUT_BYTES = 1 << 20
"""The longest case."""
LANE_OUTPUT_OFFSET = LANE_INPUT_OFFSET + LANE_INPUT_BYTES
LANE_OUTPUT_BYTES = 1 << 16
LANE_BYTES = LANE_OUTPUT_OFFSET + LANE_OUTPUT_BYTES
"""Size of the control area with the case and its output."""
LANE_MOST_AREAS = 16
"""The most trace areas of a lane."""


class LaneWord(IntEnum):
    """Index of each word of the control page. Lines of 8 words have one writer each."""

    MAGIC = 0
    VERSION = 1
    GENERATION = 2
    """Differs for each start of the runner; never 0."""
    AREAS = 3
    """Number of trace areas."""
    AREA_WORDS = 4
    """Size of each."""
    SPIN_NS = 5
    """How long the runner polls for the next case before it sleeps."""
    CASE_NUMBER = 8
    """A new number for each case; written last."""
    LENGTH = 9
    """Length of the case in bytes."""
    FLAGS = 10
    """A :class:`LaneFlag`."""
    DONE = 16
    """GUEST: number of the last case that is done; written last."""
    STATUS = 17
    """GUEST: 0, or a wait status."""
    AREAS_USED = 18
    """GUEST: trace areas that have been in use: 1 to this number."""
    OUTPUT_LENGTH = 19
    """GUEST: bytes of the case's output."""
    NS = 20
    """GUEST: what the harness took, with ``LaneFlag.TIMED``."""
    STARTED = 21
    """GUEST: number of the last case that was begun."""
    READY = 22
    """GUEST: GENERATION, once the harness is loaded."""
    CHILDREN = 23
    """GUEST: how often a child that runs cases was started."""
    AREA_COUNTS = 24
    """GUEST: ``LANE_MOST_AREAS`` words, the count of each trace area when the case was done."""


class LaneFlag(IntFlag):
    """Flags of a case."""

    COMPARISONS = 1
    """The first trace area gets comparisons instead of PCs."""
    TIMED = 2
    """The runner writes NS, which costs two looks at the guest's clock."""
