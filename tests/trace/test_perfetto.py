# SPDX-License-Identifier: Apache-2.0
"""The file for a timeline: the events of Chrome's format, each on its track."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bridge.errors import InfrastructureError
from bridge.trace import Call, HostCode, HostThread
from bridge.trace.perfetto import write_perfetto

CALL = Call(0.5, 0.25, 312, "cat", 257, "openat", ('"/x"',), -2, "ENOENT")
CALLS = [
    CALL,
    replace(CALL, start=1.0, host=(HostCode("p/s.py", "f", (1, 2)),), kernel=("g",)),
    replace(CALL, thread=313, command="sh", start=2.0, seconds=None, result=None, error=None),
]


def written(path: Path, calls: list[Call]) -> list[dict[str, Any]]:
    write_perfetto(calls, path)
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["displayTimeUnit"] == "ns"
    events: list[dict[str, Any]] = document["traceEvents"]
    for event in events:
        # Trace Event Format: each event has these; a complete one ("X") has ts and dur.
        assert event["ph"] in {"X", "M"}
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert isinstance(event["name"], str)
        if event["ph"] == "X":
            assert event["ts"] >= 0
            assert event["dur"] >= 0
        else:
            assert event["name"] in {"process_name", "thread_name"}
            assert isinstance(event["args"]["name"], str)
    return events


def test_perfetto_each_thread_has_a_track(tmp_path: Path) -> None:
    events = written(tmp_path / "trace.perfetto.json", CALLS)
    names = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in events
        if event["name"] == "thread_name"
    }
    assert names == {(1, 312): "cat 312", (1, 313): "sh 313", (2, 312): "for thread 312"}
    slices = [event for event in events if event["ph"] == "X"]
    assert [(event["pid"], event["tid"], event["name"]) for event in slices] == [
        (1, 312, "openat"),
        (1, 312, "openat"),
        (2, 312, "f"),
        (1, 313, "openat"),
    ]
    assert (slices[0]["ts"], slices[0]["dur"]) == (500000.0, 250000.0)
    assert slices[1]["args"]["kernel"] == ["g"]
    assert slices[1]["args"]["error"] == "ENOENT"


def test_perfetto_each_thread_of_the_target_has_a_track(tmp_path: Path) -> None:
    # The process has the number of the guest's, and threads the ids of threads there.
    one, two, child = HostThread(1, 312, "one"), HostThread(1, 313, ""), HostThread(9, 9, "child")
    ran = (
        HostCode("s.py", "f", (1,), one),
        HostCode("s.py", "g", (5,), two),
        HostCode("s.py", "h", (9,), one),
    )
    calls = [
        replace(CALL, start=0.0, seconds=2.0, host=ran),
        replace(CALL, thread=313, start=1.0, seconds=2.0, host=(ran[0],)),
        replace(CALL, thread=313, start=5.0, host=(HostCode("s.py", "f", (1,), child),)),
    ]
    events = written(tmp_path / "trace.perfetto.json", calls)
    names = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in events
        if event["ph"] == "M"
    }
    assert names.items() >= {
        ((3, 312), "one 312"),
        ((3, 313), "313"),
        ((4, 9), "child 9"),
        ((3, 0), "target 1"),
        ((4, 0), "target 9"),
    }
    slices = [event for event in events if event["ph"] == "X" and event["pid"] > 2]
    assert [(event["tid"], event["name"], event["ts"], event["dur"]) for event in slices] == [
        (312, "f", 0, 2e6),
        (313, "g", 0, 2e6),
        # It cannot have begun while the thread was at the call before.
        (312, "f", 2e6, 1e6),
        (9, "f", 5e6, 0.25e6),
    ]
    assert slices[0]["args"] == {
        "call": slices[0]["args"]["call"],
        "s.py:f": "1",
        "s.py:h": "9",
    }


def test_perfetto_no_calls_is_a_valid_file(tmp_path: Path) -> None:
    assert len(written(tmp_path / "trace.perfetto.json", [])) == 2


def test_perfetto_hostile_text_is_valid_json(tmp_path: Path) -> None:
    written(tmp_path / "trace.perfetto.json", [replace(CALL, command='"\\\ud800\u2028\n')])


def test_perfetto_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError, match="cannot write"):
        write_perfetto(CALLS, tmp_path / "missing" / "trace.perfetto.json")
