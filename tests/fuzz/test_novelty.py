# SPDX-License-Identifier: Apache-2.0
"""What is new: PCs once, and edges that are there again when a case is executed once more."""

from __future__ import annotations

import random

from bridge.fuzz.novelty import CoverageSet, edge


def test_take_edges_that_vary_are_no_news() -> None:
    """A guest whose interrupts fall anywhere: the same case has another edge each time."""
    stable = list(range(1, 50))
    chance = random.Random(1)

    def execution() -> tuple[tuple[int, ...], ...]:
        trace = list(stable)
        trace.insert(chance.randrange(1, 49), chance.choice(stable))
        return (tuple(trace),)

    confirmed, believed = CoverageSet(), CoverageSet()
    new = [0, 0]
    for _ in range(200):
        first, again = execution(), execution()
        new[0] += bool(confirmed.take(first, ordered=True, again=again))
        new[1] += bool(believed.take(first, ordered=True))
    assert new[1] > 150
    assert new[0] < new[1] / 4


def test_take_edge_that_is_there_again_is_news_once() -> None:
    covered = CoverageSet()
    covered.take([[1, 2, 3]], ordered=True)
    assert list(covered.take([[2, 1]], ordered=True, again=[[2, 1]]).edges) == [edge(2, 1)]
    assert not covered.take([[2, 1]], ordered=True, again=[[2, 1]])
    assert not covered.take([[3, 1]], ordered=True, again=[[1, 2]])
    assert list(covered.take([[3, 1]], ordered=True).edges) == [edge(3, 1)]


def test_take_pc_of_one_execution_is_news() -> None:
    covered = CoverageSet()
    covered.take([[1, 2, 3]], ordered=True)
    found = covered.take([[1, 9, 2]], ordered=True, again=[[1, 2]])
    assert (list(found.pcs), list(found.edges)) == ([9], [])
    assert not covered.take([[1, 9, 2]], ordered=True, again=[[1, 2]])
