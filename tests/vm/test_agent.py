# SPDX-License-Identifier: Apache-2.0
"""The agent's reports, and everything that a hostile guest may send in their place."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bridge.vm.agent import LINE_LIMIT, Ready, ReportReader, Unhealthy, parse_report

READY = {
    "state": "ready",
    "kernel": "6.1.0-50-amd64",
    "device": "/sys/kernel/debug/kcov",
    "uptime_ms": 4120,
    "mem_available_kib": 150000,
}


def line(report: object) -> bytes:
    return json.dumps(report).encode() + b"\n"


def test_ready() -> None:
    assert ReportReader().feed(line(READY)) == [
        Ready("6.1.0-50-amd64", "/sys/kernel/debug/kcov", 4120, 150000)
    ]


def test_unhealthy() -> None:
    report = {"state": "unhealthy", "what": "module", "why": "finit_module: No such device"}
    assert ReportReader().feed(line(report)) == [
        Unhealthy("module", "finit_module: No such device")
    ]


def test_reader_pieces_and_several_lines_gives_all_reports() -> None:
    reader = ReportReader()
    raw = line(READY) + b"\r\n" + line({"state": "unhealthy", "what": "a", "why": "b"})
    reports = [report for byte in raw for report in reader.feed(bytes([byte]))]
    assert reports == ReportReader().feed(raw)
    assert [type(report) for report in reports] == [Ready, Unhealthy]
    assert reader.ignored == 0


@pytest.mark.parametrize(
    "raw",
    [
        b"hello\n",
        b"[]\n",
        b"{}\n",
        b'{"state":"ready"\n',
        b'{"state":["ready"]}\n',
        b"[" * 4000 + b"\n",
        b'{"state":' + b"1" * 4060 + b"}\n",
        b"\xff\xfe\n",
        b'{"state":"ready"}' + b" " * LINE_LIMIT + b"x\n",
        b"x" * (3 * LINE_LIMIT) + b"\n",
    ],
)
def test_reader_bad_line_is_counted_and_the_next_report_is_read(raw: bytes) -> None:
    reader = ReportReader()
    assert reader.feed(raw) == []
    assert reader.ignored == 1
    assert len(reader.feed(line(READY))) == 1


def test_fields_of_a_wrong_kind_are_made_harmless() -> None:
    report = {"state": "ready", "kernel": 7, "device": "a\x1b[2Jb\n" + "c" * 9000}
    report |= {"uptime_ms": -1, "mem_available_kib": True}
    assert parse_report(json.dumps(report | {"device": "a\x1b[2Jb\nc"}).encode()) == Ready(
        "?", "ab c", 0, 0
    )
    assert parse_report(json.dumps(report).encode()) is None
    assert parse_report(b'{"state":"ready","uptime_ms":1e999}') == Ready("?", "?", 0, 0)


def test_reader_endless_line_takes_no_memory() -> None:
    reader = ReportReader()
    for _ in range(1000):
        assert reader.feed(b"x" * 65536) == []
        assert len(reader._line) <= LINE_LIMIT
    assert reader.ignored == 0
    reader.feed(b"\n")
    assert reader.ignored == 1


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.binary(max_size=400) | st.just(line(READY)), max_size=20))
def test_reader_random_bytes_never_raises(chunks: list[bytes]) -> None:
    reader = ReportReader()
    for chunk in chunks:
        reader.feed(chunk)
    assert reader.feed(b"\n" + line(READY))[-1:] == [parse_report(line(READY))]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(st.sampled_from([*READY, "what", "why"]), json_values)
    | st.fixed_dictionaries({"state": st.just("ready")}, optional={"uptime_ms": json_values})
)
def test_parse_report_random_json_never_raises(report: dict[str, object]) -> None:
    parsed = parse_report(json.dumps(report).encode())
    if isinstance(parsed, Ready):
        assert 0 <= parsed.uptime_ms <= 1 << 62
        assert parsed.kernel.isprintable()
