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
