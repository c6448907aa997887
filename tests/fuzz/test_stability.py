# SPDX-License-Identifier: Apache-2.0
"""Stability: what the same case covers again, and a guest that is no longer what it was."""

from __future__ import annotations

import pytest

from bridge.fuzz.stability import Stability


def test_value_is_the_part_that_is_covered_again() -> None:
    stability = Stability(0.2)
    assert stability.value is None
    stability.add([[1, 2, 3]], [[3, 2, 1]])
    assert stability.value == 1.0
    stability.add([[1, 2]], [[1], [3]])
    # Of six in all, four are the same; the first measurement counts a little less.
    assert stability.value == pytest.approx((3 * 0.98 + 1) / (3 * 0.98 + 3))
    assert stability.measured == 2


def test_value_of_cases_that_cover_nothing_is_unknown() -> None:
    stability = Stability(0.2)
    stability.add([], [[]])
    assert stability.value is None


def test_due_only_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    stability = Stability(0.2)
    assert stability.due()
    assert not stability.due()
    now += 60
    assert stability.due()


@pytest.mark.parametrize(
    ("covered", "drifted"),
    [([1, 2, 3, 4, 5], False), ([1, 2, 3, 4], False), ([1, 2, 3], True), ([], True), ([6], True)],
)
def test_has_drifted_beyond_the_part_that_may_change(covered: list[int], drifted: bool) -> None:
    stability = Stability(0.25)
    stability.set_reference(b"x", [[1, 2], [3, 4, 5]])
    assert stability.has_drifted([covered]) is drifted


def test_has_drifted_unstable_cases_may_differ_by_more() -> None:
    stability = Stability(0.2)
    stability.set_reference(b"x", [[1, 2, 3, 4]])
    assert stability.has_drifted([[1, 2]])
    stability.add([[1, 2]], [[1, 3]])
    assert not stability.has_drifted([[1, 2]])


def test_forget_reference_nothing_drifts() -> None:
    stability = Stability(0.2)
    stability.set_reference(b"x", [[1]])
    stability.forget_reference()
    assert stability.reference is None
    assert not stability.has_drifted([])
