# SPDX-License-Identifier: Apache-2.0
"""Standard input, whatever it is, as a command in the guest gets it."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.cli.streams import StandardInput, own_streams


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    yield reading, writing
    for each in (reading, writing):
        try:
            os.close(each)
        except OSError:
            continue


def test_read_gives_what_there_is_then_the_end(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    os.write(writing, b"a\0\xff")
    stdin = StandardInput(reading)
    assert stdin.read(1000) == b"a\0\xff"
    os.close(writing)
    assert stdin.read(1000) == b""


def test_read_pipe_that_does_not_block_waits(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    os.set_blocking(reading, False)
    timer = threading.Timer(0.2, os.write, (writing, b"late"))
    timer.start()
    assert StandardInput(reading).read(10) == b"late"
    timer.join()


def test_read_file_that_can_only_be_written_is_the_end() -> None:
    descriptor = os.open(os.devnull, os.O_WRONLY)
    try:
        assert StandardInput(descriptor).read(10) == b""
    finally:
        os.close(descriptor)


def test_read_directory_is_an_error(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(IsADirectoryError):
            StandardInput(descriptor).read(10)
    finally:
        os.close(descriptor)


_JOB = """
import os, threading
from bridge.cli.streams import StandardInput

def read():
    line = StandardInput(0).read(100)
    print("read", line.decode().strip(), flush=True)

thread = threading.Thread(target=read)
thread.start()
thread.join(1)
print("waits" if thread.is_alive() else "has read", flush=True)
thread.join()
"""

_SHELL = """
import os, signal, sys, time
# Of this session, whose terminal the job gets only after a while.
pid = os.fork()
if pid == 0:
    os.setpgid(0, 0)
    os.execv(sys.executable, [sys.executable, "-c", sys.argv[1]])
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
time.sleep(3)
stopped, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
assert stopped == 0, hex(status)
os.tcsetpgrp(0, pid)
print("foreground", flush=True)
assert os.waitpid(pid, 0)[1] == 0
"""


def test_read_job_in_the_background_waits_for_the_terminal() -> None:

    pid, ours = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", _SHELL, _JOB])
    seen = b""
    try:
        os.write(ours, b"hello\n")
        while b"read hello" not in seen:
            seen += os.read(ours, 1000)
        assert os.waitpid(pid, 0)[1] == 0
    finally:
        os.close(ours)
    assert seen.index(b"waits") < seen.index(b"foreground") < seen.index(b"read hello")


def test_own_streams_input_outlives_what_a_target_closes() -> None:
    script = (
        "import os\nfrom bridge.cli.streams import own_streams\n"
        "with own_streams() as streams:\n"
        "    os.close(0)\n"
        "    print(streams.stdin.read(100).decode(), end='')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], input="kept", capture_output=True, text=True, check=True
    )
    assert done.stdout == "kept"


def test_own_streams_without_a_file_has_no_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with own_streams() as streams:
        assert streams.stdin == b""
