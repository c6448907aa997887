# SPDX-License-Identifier: Apache-2.0
"""``kcov-bridge run --trace`` and ``kcov-bridge trace`` from outside."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from bridge.trace import Call, HostCode, TraceHeader, TraceReader, TraceWriter
from tests.support import COMMAND

OPEN = 'openat(AT_FDCWD, "/mnt/target/README", O_RDONLY) = 3  '
CALLS = [
    Call(0.0, 0.001, 101, "cat", 257, "openat", ('"/a"',), 3, None, (HostCode("s.py", "f", (1,)),)),
    Call(0.5, 0.001, 101, "cat", 0, "read", ("3",), -5, "EIO", (), ("vfs_read",)),
    Call(0.7, None, 101, "cat", 231, "exit_group", ("0",), None),
]


def bridge(*arguments: str | Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=500)
    assert done.returncode == status, done.stderr
    return done


@pytest.mark.vm
def test_run_trace_prints_and_leaves_the_calls(tmp_path: Path) -> None:
    out, text = tmp_path / "out", tmp_path / "trace.txt"
    run = ("run", "--source", "python", "--out", out)
    shown = bridge(*run, "--trace", "--", "cat", "/mnt/target/README").stderr
    (line,) = (line for line in shown.splitlines() if line.startswith(OPEN))
    assert " → " in line
    assert "server.py: Plan9ServerProtocol.t_" in line
    reader = TraceReader(out / "trace.jsonl")
    assert reader.header.source == "python"
    assert reader.header.kernel.startswith("6.")
    assert reader.header.command == ("cat", "/mnt/target/README")
    names = [call.name for call in reader]
    assert names[-1] == "exit_group"
    events = json.loads((out / "trace.perfetto.json").read_text())["traceEvents"]
    slices = [each["name"] for each in events if each.get("cat") == "syscall"]
    assert slices == names

    # Printed later, it is the same; without --trace nothing of it is left.
    later = bridge("trace", "--run", out).stdout
    assert line in later.splitlines()
    assert len(later.splitlines()) == len(names)
    bridge(*run, "--", "cat", "/mnt/target/README")
    assert not (out / "trace.jsonl").exists()
    assert not (out / "trace.perfetto.json").exists()

    # A run that is cut off has its calls too, in a file.
    stuck = "mkfifo /tmp/fifo; exec cat /tmp/fifo"
    bridge(*run, f"--trace={text}", "--timeout", "4", "--", "sh", "-c", stuck, status=124)
    assert text.read_text().splitlines()[-1] == 'openat(AT_FDCWD, "/tmp/fifo", O_RDONLY) = ?'


def test_run_trace_that_cannot_be_written_is_said_before_the_boot(tmp_path: Path) -> None:
    for place, status, message in (
        (tmp_path / "missing" / "trace", 2, "there is no directory"),
        (tmp_path, 2, "it is a directory"),
        (tmp_path / ("n" * 300), 125, "File name too long"),
    ):
        said = bridge("run", "--out", tmp_path / "out", f"--trace={place}", status=status).stderr
        assert message in said
        assert "booting" not in said
        assert "accelerator" not in said


def test_trace_table_and_functions(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "trace.jsonl", TraceHeader()) as writer:
        writer.write_all([*CALLS, replace(CALLS[1], kernel=tuple("abcdefgh"))])
    show = ("trace", "--run", tmp_path)
    lines = bridge(*show, "--table").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["system", "openat", "read", "exit_group"]
    assert lines[1].endswith("  f")
    (first, *_) = json.loads(bridge(*show, "--table", "--format", "json").stdout)
    assert (first["name"], first["blocks"], first["functions"]) == ("openat", 1, ["f"])
    assert "f and 2 more" in bridge(*show).stdout
    assert "→ kernel: a and 7 more" in bridge(*show, "--functions", "1").stdout
    assert "g, h" in bridge(*show, "--functions", "all").stdout
    for form in ("json", "perfetto"):
        refused = bridge(*show, "--functions", "all", "--format", form, status=2).stderr
        assert f"--functions is for text: --format {form}" in refused
    assert "neither a number nor all" in bridge(*show, "--functions", "x", status=2).stderr
    assert "--table" in bridge(*show, "--table", "--format", "perfetto", status=2).stderr


def test_trace_without_a_trace_says_how_to_record_one(tmp_path: Path) -> None:
    assert "kcov-bridge run --trace" in bridge("trace", "--run", tmp_path, status=2).stderr


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ([], ["openat", "read", "exit_group"]),
        (["--call", "read", "--call", "exit_group"], ["read", "exit_group"]),
        (["--reached", "s.py:f"], ["openat"]),
        (["--reached", "vfs"], ["read"]),
        (["--reached", "nothing"], []),
    ],
)
def test_trace_shows_the_calls_that_are_asked_for(
    tmp_path: Path, options: list[str], names: list[str]
) -> None:
    with TraceWriter(tmp_path / "trace.jsonl", TraceHeader()) as writer:
        writer.write_all(CALLS)
    lines = bridge("trace", "--run", tmp_path, *options).stdout.splitlines()
    assert [line.partition("(")[0] for line in lines] == names
    lines = bridge("trace", "--run", tmp_path, "--format", "json", *options).stdout.splitlines()
    assert [json.loads(line)["name"] for line in lines] == names
    text = bridge("trace", "--run", tmp_path, "--format", "perfetto", *options).stdout
    events = json.loads(text)["traceEvents"]
    assert [each["name"] for each in events if each.get("cat") == "syscall"] == names
