# SPDX-License-Identifier: Apache-2.0
"""The compiled classes do what the plain ones do, and the tests pass with both."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.device import abi, fastpath
from bridge.device.abi import HeaderWord, Op, RequestWord, ResponseWord
from bridge.device.fastpath import plain
from tests.support.examples import VARIABLE

KINDS: list[ModuleType] = [plain]
with contextlib.suppress(ImportError):
    KINDS.append(importlib.import_module("bridge.device.fastpath.compiled"))

ROOT = Path(__file__).resolve().parents[2]
SUITE = (
    "tests/device/test_region.py",
    "tests/device/test_kcov.py",
    "tests/device/test_device_model.py",
    "tests/device/test_doorbell.py",
    "tests/device/test_doorbell_fuzz.py",
    "tests/sources/python/test_faults.py",
    "tests/sources/python/test_hooks.py",
    "tests/sources/python/test_source.py",
    "tests/sources/python/test_threads.py",
    "tests/sources/test_remote.py",
)
"""Tests whose subject calls the classes itself, without a virtual machine."""


def can_be_compiled() -> bool:
    header = Path(sysconfig.get_path("include"), "Python.h")
    return shutil.which("gcc") is not None and header.is_file()


def test_fastpath_with_compiler_is_compiled() -> None:
    if os.environ.get("KCOV_BRIDGE_PLAIN"):
        assert not fastpath.COMPILED
    elif can_be_compiled():
        assert fastpath.COMPILED, fastpath.WHY_PLAIN


STALE = """
import sys

class Stale:
    def find_spec(self, name, path, target=None):
        if name == package + ".compiled":
            raise failure

package, failure = sys.argv[1], {failure}
sys.meta_path.insert(0, Stale())
__import__(package)
module = sys.modules[package]
assert not module.COMPILED
assert module.WHY_PLAIN == str(failure), module.WHY_PLAIN
for name in module.__all__:
    value = getattr(module, name)
    assert getattr(value, "__module__", "").endswith(".plain") or name.isupper(), value
"""


@pytest.mark.parametrize("package", ["bridge.device.fastpath", "bridge.sources.python.tracer"])
@pytest.mark.parametrize("failure", ["ImportError('no such file')", "AttributeError('OLD')"])
def test_compiled_part_that_fails_to_load_gives_way_to_plain(package: str, failure: str) -> None:
    """As one that is older than its source does, or none."""
    environment = {name: os.environ[name] for name in os.environ if name != fastpath.PLAIN_VARIABLE}
    done = subprocess.run(
        [sys.executable, "-c", STALE.replace("{failure}", failure), package],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_suite_with_plain_classes_passes() -> None:
    if not fastpath.COMPILED:
        pytest.skip("this run is with the plain classes itself")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not vm and not bench", *SUITE],
        cwd=ROOT,
        # What is above the classes is the same code.
        env={VARIABLE: "0.3", **os.environ, fastpath.PLAIN_VARIABLE: "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr


both = pytest.mark.skipif(len(KINDS) < 2, reason="nothing was compiled: there is no C compiler")
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__.split(".")[-1])

words = st.one_of(st.integers(0, 20), st.integers(0, 2**64 - 1))
pc_lists = st.lists(st.integers(0, 2**64 - 1), max_size=12)


def containers(pcs: list[int]) -> list[Sequence[int]]:
    return [pcs, tuple(pcs), array("Q", pcs)]


@both
@given(
    st.integers(1, 16),
    st.lists(st.tuples(words, st.integers(0, 15), pc_lists, st.integers(0, 2)), max_size=8),
)
def test_area_words_compiled_appends_as_plain(
    size: int, steps: list[tuple[int, int, list[int], int]]
) -> None:
    memories = [memoryview(bytearray((size + 2) * 8)).cast("Q") for _ in range(2)]
    areas = [
        kind.AreaWords(memory[:size], size) for kind, memory in zip(KINDS, memories, strict=True)
    ]
    for count, bitmap, pcs, container in steps:
        for area, memory in zip(areas, memories, strict=True):
            area.bitmap_words = bitmap % size
            memory[area.bitmap_words] = count
        ours, theirs = (area.append(containers(pcs)[container]) for area in areas)
        assert ours == theirs
        assert memories[0] == memories[1]
    for area in areas:
        area.release()
    with pytest.raises(ValueError, match="released"):
        areas[1].append([1])


@each_kind
@pytest.mark.parametrize("bad", [[1, -1], [1, 2**64], [1, "two"], array("I", [1, 2]), [None, 3]])
def test_append_of_no_pc_raises_and_leaves_count(kind: ModuleType, bad: Sequence[int]) -> None:
    memory = memoryview(bytearray(64)).cast("Q")
    if isinstance(bad, array) and kind is plain:
        return  # It accepts an array of any numbers.
    with pytest.raises((OverflowError, TypeError, ValueError)):
        kind.AreaWords(memory, 8).append(bad)
    assert memory[0] == 0


@each_kind
@pytest.mark.parametrize("size", [0, -1, 9])
def test_area_words_of_wrong_size_raises(kind: ModuleType, size: int) -> None:
    with pytest.raises(ValueError, match="an area of"):
        kind.AreaWords(memoryview(bytearray(64)).cast("Q"), size)


def test_classes_plain_and_compiled_have_the_same_names() -> None:
    names = set(plain.__all__) - {"Collector"}
    assert names <= set(fastpath.__all__)
    for kind in KINDS[1:]:
        assert set(kind.__all__) == names


class Numbers:
    """Hands over lists of PCs one after the other, or raises what is an exception."""

    def __init__(self, steps: Sequence[Sequence[int] | BaseException]) -> None:
        self.steps = iter(steps)
        self.since: list[int] = []

    def collect(self, cursor: object, since: int = 0) -> Sequence[int]:
        self.since.append(since)
        step = next(self.steps)
        if isinstance(step, BaseException):
            raise step
        return step


TASK = 0x1_0000_0010


def syscall_pc(number: int) -> int | None:
    return 0xFFFF_FFFF_F000_0008 + number if number < 100 else None


def no_room(kcov: object, pcs: Sequence[int]) -> int:
    return 0


returns = st.lists(
    st.tuples(
        pc_lists,
        st.integers(0, 2),
        st.sampled_from([TASK, TASK, TASK, TASK + 1, 0]),
        st.integers(0, 200),
        st.integers(0, 3),
        st.sampled_from(["area", "area", "area", "bitmap", "no area", "no cursor", "no owner"]),
        st.sampled_from([0, 0, 1, 2**64 - 2, abi.SINCE_NONE]),
    ),
    max_size=12,
)


@both
@given(st.integers(2, 40), returns, st.booleans(), st.booleans(), st.integers(0, 5))
def test_return_handler_compiled_answers_as_plain(
    size: int,
    steps: list[tuple[list[int], int, int, int, int, str, int]],
    syscall_pcs: bool,
    watched: bool,
    room: int,
) -> None:
    outcomes: list[list[object]] = []
    for kind in KINDS:
        memory = memoryview(bytearray(size * 8)).cast("Q")
        totals, unique, updates = kind.Totals(), set[int](), list[int]()
        state = kind.KcovState(7)
        # What is collected in vain would be missing from the next step's PCs.
        coverage = Numbers([containers(pcs)[container] for pcs, container, *_ in steps])
        handler = kind.ReturnHandler(
            coverage,
            totals,
            unique,
            syscall_pc if syscall_pcs else None,
            (lambda kcov, seen=updates: seen.append(kcov.appended)) if watched else None,
            (lambda kcov, pcs: min(room, len(pcs))),
        )
        area = kind.AreaWords(memory, size)
        answers: list[object] = []
        for _, _, task, number, unreported, what, since in steps:
            state.owner = None if what == "no owner" else TASK
            state.area = None if what == "no area" else area
            state.cursor = None if what == "no cursor" else "cursor"
            area.bitmap_words = 1 if what == "bitmap" else 0
            answers.append(handler.syscall_return(state, task, number, unreported, since))
            if what == "area":
                handler.append(state, area, [1, 2, 3])
        outcomes.append(
            [
                answers,
                memory.tolist(),
                unique,
                updates,
                coverage.since,
                *(state.appended, state.dropped),
                *(totals.returns, totals.appended, totals.dropped),
            ]
        )
    assert outcomes[0] == outcomes[1]


class Slots:
    """The control words, an instance that is traced in one slot, and a poller on both."""

    SLOT = 5
    SECOND = 10**9
    PREEMPTED = 3600 * SECOND

    def __init__(self, kind: ModuleType, *steps: Sequence[int] | BaseException) -> None:
        self.control = memoryview(bytearray(abi.AREAS_OFFSET)).cast("Q")
        self.failures: list[BaseException] = []
        self.handled = [0] * abi.SLOTS
        self.answered = [0] * abi.SLOTS
        self.words = memoryview(bytearray(800)).cast("Q")
        self.state = kind.KcovState(7)
        self.state.area = kind.AreaWords(self.words, 100)
        self.state.cursor = "cursor"
        self.state.owner = TASK
        slots: list[object] = [None] * abi.SLOTS
        slots[self.SLOT] = self.state
        self.totals = kind.Totals()
        self.coverage = Numbers(steps)
        self.poller = kind.ReturnPoller(
            self.control,
            kind.ReturnHandler(self.coverage, self.totals, set(), None, None, no_room),
            slots,
            self.handled,
            self.answered,
            self.failures.append,
        )

    def post(self, sequence: int = 1, slot: int = SLOT, **words: int) -> None:
        """A return of the owner, but for ``words`` of its request."""
        request = {"OP": Op.RETURN, "GENERATION": 7, "TASK": TASK, "ARG0": 39, **words}
        at = abi.REQUESTS_OFFSET // 8 + slot * abi.SLOT_WORDS
        for word, value in request.items():
            self.control[at + RequestWord[word]] = value
        self.control[at + RequestWord.SEQ] = sequence

    def kick(self, count: int, slot: int = SLOT) -> int:
        kick = count << abi.KICK_SLOT_BITS | slot
        self.control[HeaderWord.KICK] = kick
        return kick

    def answer(self, word: ResponseWord) -> int:
        value: int = self.control[abi.RESPONSES_OFFSET // 8 + self.SLOT * abi.SLOT_WORDS + word]
        return value

    def poll(self, until: float = 0.05, repair: float = 3600, poll: float = 0.0) -> float:
        """Poll for so many seconds; return how many it took."""
        start = time.perf_counter_ns()
        self.poller.poll(
            0,
            start + int(until * self.SECOND),
            start + int(repair * self.SECOND),
            int(poll * self.SECOND),
            self.PREEMPTED,
        )
        return (time.perf_counter_ns() - start) / self.SECOND


@each_kind
def test_serve_return_of_owner_answers(kind: ModuleType) -> None:
    slots = Slots(kind, [11, 12])
    slots.post(3, ARG1=2**64 - 1)
    assert slots.poller.serve(Slots.SLOT)
    assert slots.words.tolist()[:3] == [2, 11, 12]
    assert slots.answer(ResponseWord.SEQ) == 3
    assert slots.answer(ResponseWord.ERROR) == 0
    assert slots.answer(ResponseWord.APPENDED) == 2
    assert slots.handled[Slots.SLOT] == slots.answered[Slots.SLOT] == 3
    assert slots.totals.returns == 2**32, "no more than a guest can have made"
    assert not slots.poller.serve(Slots.SLOT), "it is not new any more"


@each_kind
def test_serve_return_of_a_call_that_reached_nothing_collects_nothing(kind: ModuleType) -> None:
    slots = Slots(kind, [11], [12])
    slots.post(1, ARG2=abi.SINCE_NONE)
    assert slots.poller.serve(Slots.SLOT)
    assert slots.words[0] == 0
    assert slots.coverage.since == []
    for sequence, since in ((2, 0), (3, 99)):
        slots.post(sequence, ARG2=since)
        assert slots.poller.serve(Slots.SLOT)
    assert slots.words.tolist()[:3] == [2, 11, 12]
    assert slots.coverage.since == [0, 99]
    assert slots.totals.returns == 3


@each_kind
@pytest.mark.parametrize(
    "words", [{"OP": Op.ENABLE}, {"GENERATION": 8}, {"TASK": TASK + 1}, {"sequence": 0}]
)
def test_serve_other_request_leaves_it_alone(kind: ModuleType, words: dict[str, int]) -> None:
    slots = Slots(kind, [1])
    slots.post(**words)
    before = slots.control.tolist()
    assert not slots.poller.serve(Slots.SLOT)
    assert slots.control.tolist() == before
    assert not any(slots.handled)
    assert slots.totals.returns == 0


@each_kind
@pytest.mark.parametrize("slot", [-1, 0, abi.SLOTS, 2**31])
def test_serve_slot_without_instance_is_refused(kind: ModuleType, slot: int) -> None:
    slots = Slots(kind)
    for each in (0, abi.SLOTS - 1):
        slots.post(slot=each)
    assert not slots.poller.serve(slot)


@each_kind
@pytest.mark.parametrize("failure", [RuntimeError("no"), SystemExit(0)], ids=["error", "exit"])
def test_serve_source_that_raises_answers_eio(kind: ModuleType, failure: BaseException) -> None:
    slots = Slots(kind, failure, [1])
    slots.post(1)
    assert slots.poller.serve(Slots.SLOT)
    assert slots.answer(ResponseWord.ERROR) == errno.EIO
    assert slots.failures == [failure]
    slots.post(2)
    assert slots.poller.serve(Slots.SLOT)
    assert slots.answer(ResponseWord.ERROR) == 0


@each_kind
def test_poll_kick_of_owner_is_served_and_extends_poll(kind: ModuleType) -> None:
    slots = Slots(kind, [1])
    slots.post()
    kick = slots.kick(1)
    assert slots.poll(until=3600, poll=0.02) >= 0.02
    assert slots.poller.served == 1
    assert slots.poller.last == kick
    assert slots.poller.until >= slots.poller.looked


@each_kind
def test_poll_without_kick_ends_in_time(kind: ModuleType) -> None:
    slots = Slots(kind)
    assert slots.poll(until=0.02) >= 0.02
    assert (slots.poller.served, slots.poller.last) == (0, 0)


@each_kind
def test_poll_until_repair_serves_what_comes_first(kind: ModuleType) -> None:
    slots = Slots(kind, [1])
    slots.post()
    slots.kick(1)
    assert 0.02 <= slots.poll(until=3600, repair=0.02, poll=3600) < 1800
    assert slots.poller.served == 1


@each_kind
@pytest.mark.parametrize(
    ("count", "words"), [(2, {}), (0, {}), (1, {"OP": Op.ENABLE})], ids=["two", "wrap", "other"]
)
def test_poll_kick_for_others_returns_without_serving(
    kind: ModuleType, count: int, words: dict[str, int]
) -> None:
    slots = Slots(kind, [1])
    slots.post(**words)
    slots.kick(count)
    assert slots.poll(until=3600) < 1800
    assert (slots.poller.served, slots.poller.last) == (0, 0)
    assert slots.answer(ResponseWord.SEQ) == 0


@each_kind
def test_poll_gap_between_looks_ends_it(kind: ModuleType) -> None:
    slots = Slots(kind)
    slots.PREEMPTED = -1
    assert slots.poll(until=3600) < 1800


@each_kind
def test_poll_interrupted_returns_once(kind: ModuleType) -> None:
    slots = Slots(kind, [1])
    slots.poller.interrupt()
    slots.post()
    slots.kick(1)
    assert slots.poll(until=3600) < 1800
    assert slots.poller.served == 0
    slots.poll()
    assert slots.poller.served == 1


@each_kind
def test_released_poller_touches_nothing(kind: ModuleType) -> None:
    slots = Slots(kind, [1])
    slots.post()
    slots.poller.release()
    assert not slots.poller.serve(Slots.SLOT)
    with pytest.raises(ValueError, match="released"):
        slots.poll()
    slots.control.release()


@each_kind
def test_return_poller_of_too_few_words_or_slots_raises(kind: ModuleType) -> None:
    handler = kind.ReturnHandler(Numbers([]), kind.Totals(), set(), None, None, no_room)
    control = memoryview(bytearray(abi.AREAS_OFFSET)).cast("Q")
    lists: list[list[object]] = [[None] * abi.SLOTS, [0] * abi.SLOTS, [0] * abi.SLOTS]
    with pytest.raises(ValueError, match="control words"):
        kind.ReturnPoller(control[:-1], handler, *lists, None)
    for short in range(3):
        with pytest.raises(ValueError, match="one for each slot"):
            kind.ReturnPoller(
                control,
                handler,
                *(each[: -1 if at == short else None] for at, each in enumerate(lists)),
                None,
            )
