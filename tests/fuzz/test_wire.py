# SPDX-License-Identifier: Apache-2.0
"""Messages between jobs and hub, and what a case covers that is new."""

from __future__ import annotations

import zlib

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.fuzz.job import Figures, FoundFinding
from bridge.fuzz.novelty import Coverage, CoverageSet, edge
from bridge.fuzz.wire import (
    Reply,
    Report,
    ReportedCase,
    Segment,
    WireError,
    decode_reply,
    decode_report,
    decode_segment,
    encode_reply,
    encode_report,
    encode_segment,
)

WORD = st.integers(0, 2**64 - 1)
COVERAGE = st.builds(Coverage.of, st.lists(WORD), st.lists(WORD))
COUNT = st.integers(0, 2**63)
FIGURES = st.builds(
    Figures,
    COUNT,
    COUNT,
    st.none() | st.floats(0, 1),
    st.text(),
    st.dictionaries(st.text(), st.floats(allow_nan=False)),
)
REPORT = st.builds(
    Report,
    COUNT,
    st.text(),
    COUNT,
    COUNT,
    st.text(),
    st.lists(st.builds(ReportedCase, st.binary(), COVERAGE)),
    st.lists(st.builds(FoundFinding, st.text(), st.dictionaries(st.text(), st.binary()), COUNT)),
    FIGURES,
    st.booleans(),
    st.text(),
)
REPLY = st.builds(
    Reply,
    COUNT,
    st.lists(st.binary()),
    COUNT,
    st.booleans(),
    st.booleans(),
    st.floats(0, 60),
    st.booleans(),
)
SEGMENT = st.builds(Segment, st.lists(st.binary()), COVERAGE)


@given(REPORT)
def test_report_survives_the_way(report: Report) -> None:
    assert decode_report(encode_report(report)) == report


@given(REPLY)
def test_reply_survives_the_way(reply: Reply) -> None:
    assert decode_reply(encode_reply(reply)) == reply


@given(SEGMENT)
def test_segment_survives_the_way(segment: Segment) -> None:
    assert decode_segment(encode_segment(segment)) == segment


@given(st.binary(), st.integers(0, 200))
def test_other_bytes_are_refused(noise: bytes, cut: int) -> None:
    message = encode_report(Report(1, "r", 2, 3, cases=[ReportedCase(b"x" * 999, Coverage.of())]))
    for bad in (noise, message[:cut], message[:cut] + noise + b"?"):
        if bad != message:
            for decode in (decode_report, decode_reply, decode_segment):
                with pytest.raises(WireError):
                    decode(bad)


def test_message_of_another_version_says_what_to_do() -> None:
    with pytest.raises(WireError, match=r"version 99 .*install the same kcov-bridge"):
        decode_reply(b"\0" + msgpack.packb([99, 1, [], 0, False, False, 1.0, True]))


def test_message_that_grows_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridge.fuzz.wire._LARGEST", 10_000)
    with pytest.raises(WireError, match="too large"):
        decode_segment(b"\1" + zlib.compress(bytes(100_000)))


def test_take_returns_new_pcs_and_edges_once() -> None:
    covered = CoverageSet()
    first = covered.take([(1, 2, 3), (2, 3, 1)], ordered=True)
    assert set(first.pcs) == {1, 2, 3}
    assert set(first.edges) == {edge(1, 2), edge(2, 3), edge(3, 1)}
    assert len(first.edges) == 3
    assert not covered.take([(2, 3, 1, 2)], ordered=True)
    then = covered.take([(3, 2, 4)], ordered=True)
    assert (list(then.pcs), set(then.edges)) == ([4], {edge(3, 2), edge(2, 4)})


def test_take_of_sets_counts_no_edges() -> None:
    covered = CoverageSet({5})
    found = covered.take([(1, 2, 5)], ordered=False)
    assert set(found.pcs) == {1, 2}
    assert not found.edges


def test_edges_of_kernel_addresses_do_not_collide() -> None:
    places = [0xFFFFFFFF81000000 + 16 * each for each in range(600)]
    assert len({edge(first, then) for first in places for then in places}) == 600 * 600
