# SPDX-License-Identifier: Apache-2.0
"""The ledger against a naive model."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from bridge.errors import SourceError
from bridge.sources import PC
from bridge.sources.ledger import Cursor, Ledger
from tests.support.examples import examples


class Fountain:
    """A source that is covered by hand, and can be told to fail."""

    def __init__(self, name: str = "fountain") -> None:
        self.name = name
        self.covered: list[PC] = []
        self.consumed = 0
        self.broken = False

    def start(self) -> None:
        self.covered.clear()

    def stop(self) -> None:
        self.covered.clear()

    @property
    def blocks_total(self) -> int:
        return 100

    @property
    def blocks_covered(self) -> int:
        return len(self.covered)

    def consume(self) -> list[PC]:
        if self.broken:
            raise SourceError("the fountain is dry")
        self.consumed += 1
        news, self.covered = self.covered, []
        return list(dict.fromkeys(news))


def last_occurrences(events: list[PC]) -> list[PC]:
    """Each PC once, in the order in which it was covered last."""
    return list(reversed(dict.fromkeys(reversed(events))))


class LedgerMachine(RuleBasedStateMachine):
    """Every cursor's model is the list of all that was covered since it last asked."""

    cursors = Bundle("cursors")

    def __init__(self) -> None:
        super().__init__()
        self.sources = [Fountain("a"), Fountain("b")]
        self.ledger = Ledger(self.sources)
        self.expected: dict[Cursor, list[PC]] = {}
        self.pending: tuple[list[PC], list[PC]] = ([], [])

    def consumed(self) -> None:
        """What the ledger takes from the sources, in its order."""
        for at in (0, 1):
            news = list(dict.fromkeys(self.pending[at]))
            self.pending[at].clear()
            for events in self.expected.values():
                events.extend(news)

    @rule(at=st.sampled_from([0, 1]), pcs=st.lists(st.integers(0, 12), max_size=6))
    def cover(self, at: int, pcs: list[PC]) -> None:
        self.sources[at].covered += pcs
        self.pending[at].extend(pcs)

    @rule(target=cursors)
    def open(self) -> Cursor:
        cursor = self.ledger.open_cursor()
        self.consumed()
        self.expected[cursor] = []
        return cursor

    @rule(cursor=cursors)
    def collect(self, cursor: Cursor) -> None:
        news = self.ledger.collect(cursor)
        self.consumed()
        assert news == last_occurrences(self.expected[cursor])
        self.expected[cursor].clear()

    @rule()
    def drain(self) -> None:
        self.ledger.drain()
        self.consumed()

    @rule(cursor=consumes(cursors))
    def close(self, cursor: Cursor) -> None:
        self.ledger.close_cursor(cursor)
        del self.expected[cursor]

    @rule(cursor=cursors)
    def fail(self, cursor: Cursor) -> None:
        self.sources[1].broken = True
        with pytest.raises(SourceError):
            self.ledger.collect(cursor)
        self.sources[1].broken = False
        # The first source was consumed: that must not be lost.
        news = list(dict.fromkeys(self.pending[0]))
        self.pending[0].clear()
        for events in self.expected.values():
            events.extend(news)

    @invariant()
    def memory_is_bounded(self) -> None:
        assert len(self.ledger._covered) <= 13


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(
    max_examples=examples(50), stateful_step_count=40, deadline=None
)


class WorkMachine(RuleBasedStateMachine):
    """Readers whose work begins and ends: each covers blocks during it, others are nobody's work.

    The model knows which readers were open when a block was covered. No block is covered twice, so
    a PC stands for that event.
    """

    readers = Bundle("readers")

    def __init__(self) -> None:
        super().__init__()
        self.source = Fountain()
        self.position = 0
        self.ledger = Ledger([self.source], on_position=self.set_position)
        self.next = 0
        # By reader: the position when its work began, what it covered since, what it was given.
        self.since: dict[Cursor, int] = {}
        self.own: dict[Cursor, set[PC]] = {}
        self.given: dict[Cursor, set[PC]] = {}
        self.could_get: dict[PC, set[Cursor]] = {}
        # What was consumed by another's collect, and so given, before the reader's work began.
        self.foreign: dict[Cursor, set[PC]] = {}
        self.pending: set[PC] = set()
        self.claimed: set[PC] = set()

    def set_position(self, position: int) -> None:
        assert position > self.position
        self.position = position

    def cover(self, count: int) -> set[PC]:
        pcs = set(range(self.next, self.next + count))
        self.next += count
        self.source.covered += sorted(pcs)
        self.pending |= pcs
        for pc in pcs:
            self.could_get[pc] = set(self.given)
        return pcs

    @rule(target=readers)
    def open(self) -> Cursor:
        cursor = self.ledger.open_cursor()
        self.pending.clear()
        self.given[cursor], self.own[cursor], self.foreign[cursor] = set(), set(), set()
        self.since[cursor] = self.position
        return cursor

    @rule(reader=readers)
    def begin(self, reader: Cursor) -> None:
        """Work after which the reader did not ask, because it covered nothing, ends here."""
        if self.own[reader]:
            self.end(reader)
        self.since[reader] = self.position
        self.foreign[reader] = set(self.claimed)

    @rule(reader=readers, count=st.integers(1, 4))
    def work(self, reader: Cursor, count: int) -> None:
        self.own[reader] |= self.cover(count)

    @rule(count=st.integers(1, 3))
    def cover_for_nobody(self, count: int) -> None:
        self.cover(count)

    @rule(reader=readers)
    def end(self, reader: Cursor) -> None:
        news = self.ledger.collect(reader, self.since[reader])
        assert len(set(news)) == len(news)
        assert news == sorted(news), "in the order in which they were covered"
        assert self.own[reader] <= set(news), "what it covered"
        assert not self.given[reader] & set(news), "nothing twice"
        assert self.pending <= set(news), "what it consumed"
        assert not self.foreign[reader] & set(news), "nothing that another was given before"
        assert all(reader in self.could_get[pc] for pc in news)
        self.given[reader] |= set(news)
        self.claimed |= set(news)
        self.pending.clear()
        self.own[reader].clear()
        self.since[reader] = self.position
        self.foreign[reader] = set(self.claimed)

    @rule()
    def drain(self) -> None:
        self.ledger.drain()
        self.pending.clear()

    @rule(reader=readers)
    def fail(self, reader: Cursor) -> None:
        self.source.broken = True
        with pytest.raises(SourceError):
            self.ledger.collect(reader, self.since[reader])
        self.source.broken = False

    @rule(reader=consumes(readers))
    def close(self, reader: Cursor) -> None:
        self.ledger.close_cursor(reader)
        for by_reader in (self.own, self.foreign, self.given):
            del by_reader[reader]
        del self.since[reader]
        for readers in self.could_get.values():
            readers.discard(reader)

    @rule(data=st.data())
    def all_end(self, data: st.DataObject) -> None:
        """Once all have asked, each block has been given to a reader that was open, if one is."""
        for reader in data.draw(st.permutations(list(self.given))):
            self.end(reader)
        given = set[PC]().union(*self.given.values()) if self.given else set()
        for pc, readers in self.could_get.items():
            assert not readers or pc in given | self.claimed


TestWorkMachine = WorkMachine.TestCase
TestWorkMachine.settings = settings(
    max_examples=examples(100), stateful_step_count=40, deadline=None
)


def test_work_that_asks_gets_nothing_that_another_was_given_before() -> None:
    positions: list[int] = []
    source = Fountain()
    ledger = Ledger([source], on_position=positions.append)
    one, two = ledger.open_cursor(), ledger.open_cursor()
    source.covered = [1, 2]
    assert ledger.collect(one) == [1, 2]
    since = positions[-1]
    assert since == ledger.position == 2
    source.covered = [3]
    assert ledger.collect(two, since) == [3]
    # Work that overlaps.
    assert ledger.collect(one, since) == [3]


def test_work_that_asks_gets_what_nobody_was_given() -> None:
    source = Fountain()
    ledger = Ledger([source])
    one, two = ledger.open_cursor(), ledger.open_cursor()
    source.covered = [1]
    ledger.drain()
    source.covered = [2]
    late = ledger.open_cursor()
    # Not from before it was opened.
    assert ledger.collect(late, ledger.position) == []
    source.covered = [3]
    assert ledger.collect(two, ledger.position) == [1, 2, 3]
    assert ledger.collect(one, ledger.position) == []


def test_a_block_that_is_covered_again_and_given_is_nobodys_no_more() -> None:
    source = Fountain()
    ledger = Ledger([source])
    one, two = ledger.open_cursor(), ledger.open_cursor()
    source.covered = [1, 2]
    ledger.drain()
    source.covered = [1]
    since = ledger.position
    assert ledger.collect(one, since) == [2, 1]
    assert ledger.collect(two, ledger.position) == []


def test_a_position_that_is_not_there_yet_counts_as_now() -> None:
    source = Fountain()
    ledger = Ledger([source])
    one, two = ledger.open_cursor(), ledger.open_cursor()
    source.covered = [1]
    assert ledger.collect(one, 2**64 - 2) == [1]
    source.covered = [2]
    assert ledger.collect(two, 2**64 - 2) == [2]


def test_the_last_cursor_gets_nothing_that_another_was_given_before() -> None:
    source = Fountain()
    ledger = Ledger([source])
    one, two = ledger.open_cursor(), ledger.open_cursor()
    source.covered = [1]
    assert ledger.collect(two) == [1]
    ledger.close_cursor(two)
    source.covered = [2]
    assert ledger.collect(one, ledger.position) == [2]
    # From here on there is nothing to tell apart.
    source.covered = [3]
    assert ledger.collect(one, 2**64 - 2) == [3]
    assert not ledger._covered


def test_coverage_from_before_is_dropped_for_a_new_cursor() -> None:
    source = Fountain()
    ledger = Ledger([source])
    source.covered = [1, 2]
    cursor = ledger.open_cursor()
    source.covered = [2, 3]
    assert ledger.collect(cursor) == [2, 3]
    assert ledger.collect(cursor) == []


def test_each_cursor_is_given_every_block_and_none_steals() -> None:
    source = Fountain()
    ledger = Ledger([source])
    cursors = [ledger.open_cursor() for _ in range(64)]
    for step in range(10):
        source.covered = [step, 100 + step]
        news = ledger.collect(cursors[0])
        assert news == [step, 100 + step]
    for cursor in cursors[1:]:
        assert sorted(ledger.collect(cursor)) == [*range(10), *range(100, 110)]


def test_a_repeated_block_is_given_again_and_at_its_last_place() -> None:
    source = Fountain()
    ledger = Ledger([source])
    one, two = ledger.open_cursor(), ledger.open_cursor()
    source.covered = [1, 2, 3]
    assert ledger.collect(one) == [1, 2, 3]
    source.covered = [2]
    assert ledger.collect(one) == [2]
    assert ledger.collect(two) == [1, 3, 2]


def test_a_single_cursor_keeps_nothing() -> None:
    source = Fountain()
    ledger = Ledger([source])
    cursor = ledger.open_cursor()
    for step in range(100):
        source.covered = [step]
        assert ledger.collect(cursor) == [step]
        assert not ledger._covered
    second = ledger.open_cursor()
    source.covered = [7]
    assert ledger.collect(cursor) == [7]
    assert ledger.collect(second) == [7]
    ledger.close_cursor(second)
    source.covered = [8]
    assert ledger.collect(cursor) == [8]
    assert not ledger._covered


def test_without_a_cursor_coverage_is_dropped() -> None:
    source = Fountain()
    ledger = Ledger([source])
    source.covered = [1]
    ledger.drain()
    assert not ledger._covered
    cursor = ledger.open_cursor()
    ledger.close_cursor(cursor)
    ledger.close_cursor(cursor)
    with pytest.raises(ValueError, match="not open"):
        ledger.collect(cursor)


@given(st.lists(st.lists(st.integers(0, 5), max_size=5), max_size=8))
def test_two_sources_that_share_a_block_give_it_once(rounds: list[list[PC]]) -> None:
    first, second = Fountain(), Fountain()
    ledger = Ledger([first, second])
    cursor = ledger.open_cursor()
    for pcs in rounds:
        first.covered, second.covered = list(pcs), list(pcs)
        assert sorted(ledger.collect(cursor)) == sorted(set(pcs))


def test_a_source_that_fails_is_reported_and_the_others_go_on() -> None:
    good, bad = Fountain("good"), Fountain("bad")
    failures: list[Exception] = []
    ledger = Ledger([bad, good], failures.append)
    bad.broken = True
    cursor = ledger.open_cursor()
    good.covered = [1, 2]
    assert ledger.collect(cursor) == [1, 2]
    assert [str(failure) for failure in failures] == ["the fountain is dry"] * 2
    bad.broken = False
    bad.covered, good.covered = [7], [8]
    assert sorted(ledger.collect(cursor)) == [7, 8]
