# SPDX-License-Identifier: Apache-2.0
"""trace.jsonl: what is written is read again; anything else is an error that says so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bridge.errors import InfrastructureError, UsageError
from bridge.trace import (
    Call,
    HostCode,
    HostThread,
    TraceHeader,
    TraceReader,
    TraceWriter,
    read_traces,
)

CALL = Call(
    start=0.25,
    seconds=0.001234567,
    thread=312,
    command="cat",
    number=257,
    name="openat",
    arguments=("AT_FDCWD", '"/mnt/target/README"', "O_RDONLY"),
    result=-2,
    error="ENOENT",
    host=(HostCode("pkg/server.py", "Session.walk", (120, 121), pcs=(0xFFFFFFFFF0000010,)),),
    kernel=("do_sys_openat2", "ext4_lookup"),
    modules=(("ext4", ("ext4_lookup",)),),
    test="test_x.py::test_y",
)
UNFINISHED = Call(1.5, None, 312, "cat", 231, "exit_group", None, None)


def write(path: Path, *calls: Call, header: TraceHeader | None = None) -> Path:
    with TraceWriter(path, header or TraceHeader()) as writer:
        writer.write_all(calls)
    return path


def test_trace_file_what_was_written_is_read_twice(tmp_path: Path) -> None:
    header = TraceHeader("kernel,python", "bookworm", "6.1.0-56-amd64", ("cat", "a b"))
    path = write(tmp_path / "trace.jsonl", CALL, UNFINISHED, header=header)
    reader = TraceReader(path)
    assert reader.header == header
    assert list(reader) == [CALL, UNFINISHED]
    assert list(reader) == [CALL, UNFINISHED]


def test_trace_file_lines_have_the_documented_keys(tmp_path: Path) -> None:
    path = write(tmp_path / "trace.jsonl", CALL)
    first, second = map(json.loads, path.read_text().splitlines())
    assert first["format"] == "kcov-bridge trace"
    assert first["version"] == 1
    assert {"source", "image", "kernel"} <= set(first)
    assert second == {
        "start": 0.25,
        "seconds": 0.001234567,
        "thread": 312,
        "command": "cat",
        "number": 257,
        "name": "openat",
        "arguments": ["AT_FDCWD", '"/mnt/target/README"', "O_RDONLY"],
        "result": -2,
        "error": "ENOENT",
        "host": [
            {
                "file": "pkg/server.py",
                "function": "Session.walk",
                "lines": [120, 121],
                "thread": None,
                "pcs": ["0xfffffffff0000010"],
            }
        ],
        "kernel": ["do_sys_openat2", "ext4_lookup"],
        "modules": {"ext4": ["ext4_lookup"]},
        "test": "test_x.py::test_y",
    }


@pytest.mark.parametrize("text", ["a\u2028b\x85c", "\ud800", "\r\n", "\x00", '"\\'])
def test_trace_file_any_text_of_a_guest_stays_one_line(tmp_path: Path, text: str) -> None:
    calls = [replace(CALL, command=text), UNFINISHED]
    read = list(TraceReader(write(tmp_path / "trace.jsonl", *calls)))
    assert len(read) == 2
    assert read[1] == UNFINISHED
    if text != "\ud800":
        assert read == calls


def test_trace_file_of_older_calls_without_threads_is_read(tmp_path: Path) -> None:
    call = replace(CALL, host=(replace(CALL.host[0], thread=HostThread(4711, 4712, "wörker")),))
    path = write(tmp_path / "trace.jsonl", call)
    assert list(TraceReader(path)) == [call]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[1]["host"][0]["thread"] == {"process": 4711, "id": 4712, "name": "wörker"}
    del lines[1]["host"][0]["thread"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert list(TraceReader(path)) == [CALL]


def test_trace_file_newer_keys_are_ignored(tmp_path: Path) -> None:
    path = write(tmp_path / "trace.jsonl", CALL)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**line, "later": [1]}) + "\n" for line in lines))
    assert list(TraceReader(path)) == [CALL]


@pytest.mark.parametrize(
    "text",
    ["", "{}\n", "no JSON\n", "[]\n", '{"format": "kcov-bridge-summary", "version": 1}\n'],
)
def test_trace_file_another_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(InfrastructureError, match="is no trace"):
        TraceReader(path)


def test_trace_file_of_another_version_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "trace.jsonl")
    path.write_text(path.read_text().replace('"version":1', '"version":99'))
    with pytest.raises(InfrastructureError, match="version 99"):
        TraceReader(path)


def test_trace_file_modules_that_are_none_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "trace.jsonl", CALL)
    path.write_text(path.read_text().replace('"modules":{"ext4":["ext4_lookup"]}', '"modules":[1]'))
    with pytest.raises(InfrastructureError, match=r"line 2 of .*trace.jsonl is damaged"):
        list(TraceReader(path))


@pytest.mark.parametrize("line", ["{", "[]", '{"start": 1}', "null", '{"start": "x"}'])
def test_trace_file_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "trace.jsonl", CALL)
    with path.open("a") as file:
        file.write(line + "\n")
    calls = iter(TraceReader(path))
    assert next(calls) == CALL
    with pytest.raises(InfrastructureError, match=r"line 3 of .*trace.jsonl is damaged"):
        next(calls)


def test_trace_file_missing_says_how_to_record_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        TraceReader(tmp_path / "trace.jsonl")
    assert "--trace" in caught.value.hint


def test_trace_file_on_a_full_disk_is_an_error() -> None:
    with (
        pytest.raises(InfrastructureError, match="No space left on device"),
        TraceWriter(Path("/dev/full"), TraceHeader()) as writer,
    ):
        writer.write_all([CALL])


def test_read_traces_of_workers_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    write(tmp_path / "trace.gw1.jsonl", UNFINISHED)
    write(tmp_path / "trace.gw0.jsonl", CALL)
    (tmp_path / "tracer.jsonl").write_text("other")
    assert [list(reader) for reader in read_traces(tmp_path)] == [[CALL], [UNFINISHED]]
