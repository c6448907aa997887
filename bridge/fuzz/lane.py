# SPDX-License-Identifier: Apache-2.0
"""The lane: shared memory through which test cases go into a guest.

The layout is that of ``guest/agent/lane.h``, which also describes the protocol.
``tests/fuzz/test_lane.py`` compiles that header and compares.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from bridge.device.abi import KCOV_WORDS_PER_CMP, WORD, Comparison
from bridge.device.lanes import LaneAreas
from bridge.errors import UsageError

__all__ = [
    "LANE_BYTES",
    "LANE_CONTROL_BYTES",
    "LANE_INPUT_BYTES",
    "LANE_INPUT_OFFSET",
    "LANE_KEPT_BYTES",
    "LANE_KEPT_OFFSET",
    "LANE_MAGIC",
    "LANE_MOST_AREAS",
    "LANE_OUTPUT_BYTES",
    "LANE_OUTPUT_OFFSET",
    "LANE_VERSION",
    "Execution",
    "Lane",
    "LaneFlag",
    "LaneWord",
]

LANE_MAGIC = 0x454E414C56434B
LANE_VERSION = 2
LANE_CONTROL_BYTES = 4096
LANE_INPUT_OFFSET = LANE_CONTROL_BYTES
LANE_INPUT_BYTES = 1 << 20
"""The longest case."""
LANE_OUTPUT_OFFSET = LANE_INPUT_OFFSET + LANE_INPUT_BYTES
LANE_OUTPUT_BYTES = 1 << 16
LANE_KEPT_OFFSET = LANE_OUTPUT_OFFSET + LANE_OUTPUT_BYTES
LANE_KEPT_BYTES = 3 << 16
"""What a harness may keep from one start of the runner to the next."""
LANE_BYTES = LANE_KEPT_OFFSET + LANE_KEPT_BYTES
"""Size of the control area with the case, its output and what is kept."""
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
    KEPT = 6
    """Bytes that an earlier runner has kept."""
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
    KEEP = 40
    """GUEST: bytes that the harness keeps for later runners; before READY."""


class LaneFlag(IntFlag):
    """Flags of a case."""

    COMPARISONS = 1
    """The first trace area gets comparisons instead of PCs."""
    TIMED = 2
    """The runner writes NS, which costs two looks at the guest's clock."""


_PLAIN = LaneFlag(0)
_SPIN_NS = 50_000
_POLL_SECONDS = 200e-6
"""How long the host polls for the end of a case before it sleeps."""
_SLEEP_SECONDS = 50e-6
_LONGEST_SLEEP_SECONDS = 1e-3
_CHECK_SECONDS = 20e-3
"""The time between two looks at whether the guest is still there."""
_GENERATION_BITS = 62
_MOST_CASES = 1 << 40
"""More than a shim executes."""


@dataclass(frozen=True, slots=True)
class Execution:
    """What one case did.

    Attributes:
        status: 0, or a wait status; None if the case did not end in time.
        pcs: for each trace area that was in use, its PCs in order.
        output: what the harness said, or the end of its stderr if ``status`` is not 0.
        seconds: from here to the guest and back.
        harness_ns: what the harness took by the guest's clock, if the case was timed.
        comparisons: what was compared, in place of the first area's PCs, if that was asked for.
        overflowed: whether an area was full at the end.
    """

    status: int | None
    pcs: tuple[tuple[int, ...], ...]
    output: bytes
    seconds: float
    harness_ns: int = 0
    comparisons: tuple[Comparison, ...] = ()
    overflowed: bool = False


class Lane:
    """The host's side of a lane; for one thread at a time, and not while a shim drives it.

    Args:
        areas: the memory; :meth:`sizes` says of which sizes.
        spin_ns: how long the runner polls for the next case before it sleeps.

    Attributes:
        last_case: the number of the last case that was put in.
    """

    def __init__(self, areas: LaneAreas, *, spin_ns: int = _SPIN_NS) -> None:
        self.areas = areas
        self.last_case = 0
        self._spin_ns = spin_ns
        self._generation = 0
        self._kept: bytes | None = None
        control, *traces = areas.areas
        self._words = control.words
        self._bytes = self._words.cast("B")
        self._traces = [trace.words for trace in traces]

    @staticmethod
    def sizes(areas: int, area_words: int) -> list[int]:
        """Return the sizes in words for :meth:`Session.open_lane`.

        Args:
            areas: number of trace areas.
            area_words: size of each.
        """
        if not 1 <= areas <= LANE_MOST_AREAS:
            raise UsageError(f"a lane has 1 to {LANE_MOST_AREAS} trace areas, not {areas}")
        return [LANE_BYTES // WORD, *[area_words] * areas]

    @property
    def number(self) -> int:
        """The lane's name for the guest."""
        return self.areas.number

    def prepare(self) -> None:
        """Make the lane as a runner that starts now expects it; no runner uses it.

        The numbers of cases go on, so that none is used twice. A later runner gets what the first
        one has kept, whatever cases wrote there since.
        """
        words = self._words
        kept = self._kept or b""
        self._bytes[LANE_KEPT_OFFSET : LANE_KEPT_OFFSET + len(kept)] = kept
        words[: LANE_CONTROL_BYTES // WORD] = memoryview(bytes(LANE_CONTROL_BYTES)).cast("Q")
        self._generation = secrets.randbits(_GENERATION_BITS) | 1
        for word, value in (
            (LaneWord.VERSION, LANE_VERSION),
            (LaneWord.GENERATION, self._generation),
            (LaneWord.AREAS, len(self._traces)),
            (LaneWord.AREA_WORDS, len(self._traces[0])),
            (LaneWord.SPIN_NS, self._spin_ns),
            (LaneWord.KEPT, len(kept)),
            # Last: a runner that finds it finds a complete page.
            (LaneWord.MAGIC, LANE_MAGIC),
        ):
            words[word] = value

    @property
    def ready(self) -> bool:
        """Whether the runner that was started after :meth:`prepare` has loaded its harness."""
        ready: int = self._words[LaneWord.READY]
        return ready == self._generation != 0

    def keep(self) -> None:
        """Take what the runner that has just become ready keeps for later ones, of the first one.

        It knows by itself then what it would have to find out again after each reset. No case has
        run yet.
        """
        if self._kept is None:
            length = min(self._words[LaneWord.KEEP], LANE_KEPT_BYTES)
            self._kept = self._bytes[LANE_KEPT_OFFSET : LANE_KEPT_OFFSET + length].tobytes()

    @property
    def idle(self) -> bool:
        """Whether the last case that was put in is done."""
        words = self._words
        return bool(words[LaneWord.DONE] == words[LaneWord.CASE_NUMBER])

    def catch_up(self) -> bool:
        """Number the next case after those of a shim that did not tell its last one.

        Returns:
            False if the guest has written numbers that make no sense: the lane needs a reset.
        """
        words = self._words
        last = max(words[LaneWord.DONE], words[LaneWord.CASE_NUMBER])
        if last > self.last_case + _MOST_CASES:
            return False
        self.last_case = max(self.last_case, last)
        return True

    def execute(
        self,
        case: bytes,
        timeout: float,
        *,
        flags: LaneFlag = _PLAIN,
        check: Callable[[], object] = lambda: None,
    ) -> Execution:
        """Have the guest run a case, and return what it did.

        After a case that did not end the lane is of no use before the next reset.

        Args:
            timeout: in seconds.
            check: called now and then; what it raises passes through.

        Raises:
            UsageError: the case is too long.
        """
        if len(case) > LANE_INPUT_BYTES:
            raise UsageError(
                f"a case of {len(case):,} bytes is too long: {LANE_INPUT_BYTES:,} bytes fit"
            )
        words = self._words
        self._bytes[LANE_INPUT_OFFSET : LANE_INPUT_OFFSET + len(case)] = case
        words[LaneWord.LENGTH] = len(case)
        words[LaneWord.FLAGS] = flags
        self.last_case += 1
        begun = time.perf_counter()
        words[LaneWord.CASE_NUMBER] = self.last_case
        done = self._wait(begun, timeout, check)
        return self._read(done, flags, time.perf_counter() - begun)

    def _wait(self, begun: float, timeout: float, check: Callable[[], object]) -> bool:
        words = self._words
        sleep = 0.0
        checked = begun
        while words[LaneWord.DONE] != self.last_case:
            now = time.perf_counter()
            if now - begun >= timeout:
                return False
            if now - checked >= _CHECK_SECONDS:
                check()
                checked = now
            if now - begun >= _POLL_SECONDS:
                sleep = min(max(_SLEEP_SECONDS, sleep * 1.25), _LONGEST_SLEEP_SECONDS)
            # Also at first, so that other threads of this process run.
            time.sleep(sleep)
        return True

    # The guest writes what these read: any values, which change at any time. Each is read once.

    def read_case(self) -> bytes:
        """Return the case that is in the lane."""
        length = min(self._words[LaneWord.LENGTH], LANE_INPUT_BYTES)
        return self._bytes[LANE_INPUT_OFFSET : LANE_INPUT_OFFSET + length].tobytes()

    def read_output(self) -> bytes:
        """Return the output of the case that is done."""
        length = min(self._words[LaneWord.OUTPUT_LENGTH], LANE_OUTPUT_BYTES)
        return self._bytes[LANE_OUTPUT_OFFSET : LANE_OUTPUT_OFFSET + length].tobytes()

    def read_pcs(self) -> tuple[tuple[int, ...], ...]:
        """Return the PCs of the case that is done, for each trace area that was in use."""
        return tuple(tuple(trace[1 : 1 + count]) for trace, count in self._counted())

    def _counted(self) -> list[tuple[memoryview, int]]:
        used = min(self._words[LaneWord.AREAS_USED], len(self._traces))
        return [
            (trace, min(self._words[LaneWord.AREA_COUNTS + index], len(trace) - 1))
            for index, trace in enumerate(self._traces[:used])
        ]

    def _read_comparisons(self) -> tuple[Comparison, ...]:
        trace = self._traces[0]
        most = (len(trace) - 1) // KCOV_WORDS_PER_CMP
        count = min(self._words[LaneWord.AREA_COUNTS], most)
        flat: Sequence[int] = trace[1 : 1 + count * KCOV_WORDS_PER_CMP].tolist()
        return tuple(zip(flat[::4], flat[1::4], flat[2::4], flat[3::4], strict=True))

    def _read(self, done: bool, flags: LaneFlag, seconds: float) -> Execution:
        if not done:
            return Execution(None, (), b"", seconds)
        words = self._words
        counted = self._counted()
        pcs = tuple(tuple(trace[1 : 1 + count]) for trace, count in counted)
        comparisons: tuple[Comparison, ...] = ()
        if flags & LaneFlag.COMPARISONS:
            comparisons, pcs = self._read_comparisons(), ((), *pcs[1:])
        return Execution(
            status=words[LaneWord.STATUS] & 0xFFFFFFFF,
            pcs=pcs,
            output=self.read_output(),
            seconds=seconds,
            harness_ns=words[LaneWord.NS] if flags & LaneFlag.TIMED else 0,
            comparisons=comparisons,
            overflowed=any(count == len(trace) - 1 for trace, count in counted),
        )

    def close(self) -> None:
        """Let go of the memory, before the lane is closed. Safe to call twice."""
        self._bytes.release()
        self._traces.clear()
