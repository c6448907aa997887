# SPDX-License-Identifier: Apache-2.0
"""The trace of a command in a real guest: each system call once, as the program itself saw it."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from bridge.errors import IncompleteError, RunTimeoutError
from bridge.session.session import Session
from bridge.trace import Call
from bridge.trace.text import call_text
from tests.support.guests import complaints, stalled_host
from tests.support.programs import guest_program

pytestmark = [pytest.mark.vm, pytest.mark.guest(target="plan9", source="python")]

TRACED = Path(__file__).with_name("traced.c")
MANY = 2000
"""As in traced.c."""


@dataclass(frozen=True)
class Seen:
    """A call as the program noted it."""

    name: str
    result: int
    error: str | None


def of(call: Call) -> Seen:
    assert call.result is not None, call
    return Seen(call.name, call.result, call.error)


def between_marks(calls: Sequence[Call]) -> list[Call]:
    """The calls of a thread between its two calls of sched_yield."""
    marks = [index for index, call in enumerate(calls) if call.name == "sched_yield"]
    assert len(marks) == 2, marks
    return list(calls[marks[0] + 1 : marks[1]])


@pytest.fixture
def traced(session: Session) -> str:
    session.put(guest_program(TRACED, flags=("-O2", "-static", "-pthread")), "/tmp/traced-c", 0o755)
    return "/tmp/traced-c"


def test_trace_lists_the_calls_that_the_program_made(session: Session, traced: str) -> None:
    before = session.stats().returns
    done = session.kcov([traced], trace=True, timeout=120)
    assert done.exit_status == 0, done.stderr
    program: dict[int, list[Seen]] = {}
    for line in done.stdout.decode().splitlines():
        thread, name, result, error = line.split()
        name = {"nosuchcall": "syscall_9999"}.get(name, name)
        code = errno.errorcode[int(error)] if int(error) else None
        program.setdefault(int(thread), []).append(Seen(name, int(result), code))
    main, second, child = program
    threads: dict[int, list[Call]] = {}
    for call in done.calls:
        threads.setdefault(call.thread, []).append(call)
    killed = (set(threads) - set(program)).pop()

    assert len(program[main]) == 18
    ours = between_marks(threads[main])
    assert [of(call) for call in ours] == program[main]
    ours = between_marks(threads[second])
    assert [of(call) for call in ours if call.name != "getppid"] == program[second]
    assert sum(call.name == "getppid" for call in ours) == MANY
    *ours, last = threads[child]
    assert [of(call) for call in ours] == program[child]
    assert (last.name, last.arguments, last.result, last.seconds) == (
        "exit_group",
        ("3",),
        None,
        None,
    )
    (call,) = threads[killed]
    assert (call.name, call.error) == ("pause", "ERESTARTNOHAND")
    assert set(threads) == {main, second, child, killed}

    # Beside the calls that return, the ioctl by which kcov-exec joined the stream was counted.
    returned = sum(call.result is not None for call in done.calls)
    assert returned == session.stats().returns - before - 1
    starts = [call.start for call in done.calls]
    assert starts[0] == 0.0
    assert starts == sorted(starts)
    assert done.calls[0].name == "execve"
    assert complaints(session) == ""


def test_trace_arguments_are_those_that_strace_prints(session: Session, traced: str) -> None:
    calls = session.kcov([traced], trace=True, timeout=120).calls
    main = calls[0].thread
    texts = [
        call_text(call).partition("  ")[0]
        for call in between_marks([call for call in calls if call.thread == main])
    ]
    buffer = "0x"
    assert texts[0] == 'openat(AT_FDCWD, "/etc/passwd", O_RDONLY|O_CLOEXEC) = 3'
    assert texts[1].startswith(f"read(3, {buffer}")
    assert texts[1].endswith(", 16) = 16")
    assert texts[2] == "lseek(3, 3, SEEK_SET) = 3"
    assert texts[3].endswith(" = -1 ENOTTY (Inappropriate ioctl for device)")
    assert texts[5] == "close(3) = -1 EBADF (Bad file descriptor)"
    assert texts[6] == (
        r'openat(AT_FDCWD, "/no/such \"file\"\n", O_WRONLY|O_CREAT, 0640) '
        "= -1 ENOENT (No such file or directory)"
    )
    assert texts[7] == 'mkdir("/tmp/traced", 0750) = 0'
    assert texts[9] == 'rename("/tmp/traced", "/tmp/traced2") = 0'
    assert texts[10] == 'unlinkat(AT_FDCWD, "/tmp/traced2", AT_REMOVEDIR) = 0'
    assert texts[11] == "openat(AT_FDCWD, 0x8, O_RDONLY) = -1 EFAULT (Bad address)"
    name = "a" * 255
    assert texts[12].startswith(f'openat(AT_FDCWD, "{name}"..., O_RDONLY) = -1 ENAMETOOLONG')
    # Its page was not there when the call was entered.
    assert texts[13] == 'openat(AT_FDCWD, "/etc/group", O_RDONLY) = 3'
    assert texts[15] == "kill(2147483647, 0) = -1 ESRCH (No such process)"
    assert texts[17] == "syscall_9999(...) = -1 ENOSYS (Function not implemented)"


def test_trace_lines_belong_to_the_call_that_reached_them(session: Session) -> None:
    command = "cat /mnt/target/README; cat /mnt/target/README"
    done = session.kcov(command, trace=True, timeout=120)
    opens = [
        call
        for call in done.calls
        if call.arguments is not None and '"/mnt/target/README"' in call.arguments
    ]
    assert [call.name for call in opens] == ["openat", "openat"]
    for call in opens:
        functions = {code.function for code in call.host}
        assert "Plan9ServerProtocol.t_open" in functions
        assert "Plan9ServerProtocol.t_read" not in functions
        assert call.seconds is not None
        assert call.seconds > 0
    reads = [call for call in done.calls if call.name == "read" and call.result == 47]
    assert len(reads) == 2
    for call in reads:
        assert "Plan9ServerProtocol.t_read" in {code.function for code in call.host}
    # The shell that waits for cat asked for nothing itself; what the target does after it answered
    # may fall into that time.
    waits = [call for call in done.calls if call.name == "wait4"]
    assert waits
    for call in waits:
        assert not {"Plan9ServerProtocol.t_open", "Plan9ServerProtocol.t_read"} & {
            code.function for code in call.host
        }
    # Together the calls have all that the command covered.
    lines: dict[str, set[int]] = {}
    for call in done.calls:
        for code in call.host:
            lines.setdefault(code.file, set()).update(code.lines)
    covered: dict[str, set[int]] = {}
    for pc in done.pcs:
        place = session.symbolize(pc)
        assert place is not None
        assert not isinstance(place, str)
        covered.setdefault(place.file, set()).update(place.block.lines)
    assert lines == covered


def test_trace_names_the_thread_of_the_target(session: Session) -> None:
    done = session.kcov(["cat", "/mnt/target/README"], trace=True, timeout=120)
    threads = {code.thread for call in done.calls for code in call.host}
    (thread,) = threads
    assert thread is not None
    # Of pyroute2, which serves on a thread with a loop of its own, in this process.
    assert thread.process == os.getpid()
    assert Path(f"/proc/self/task/{thread.id}").exists()
    (name,) = (each.name for each in threading.enumerate() if each.native_id == thread.id)
    assert thread.name == name


def test_trace_cut_off_ends_with_the_call_that_did_not_return(session: Session) -> None:
    with pytest.raises(RunTimeoutError):
        session.kcov("mkfifo /tmp/fifo; exec cat /tmp/fifo", trace=True, timeout=3)
    last = session.partial_calls[-1]
    assert call_text(last) == 'openat(AT_FDCWD, "/tmp/fifo", O_RDONLY) = ?'
    assert session.partial_calls[0].name == "execve"


def test_trace_not_asked_for_has_no_calls(session: Session) -> None:
    assert session.kcov(["true"], timeout=60).calls == ()


def test_trace_that_could_not_be_kept_is_incomplete(
    session: Session, traced: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge.device.calls._MOST_WORDS", 20_000)
    with pytest.raises(IncompleteError, match=r"the trace is incomplete: [\d,]+ system calls"):
        session.kcov([traced], trace=True, timeout=120)
    assert 0 < len(session.partial_calls) < MANY


def test_trace_host_does_not_answer_lost_calls_are_counted(session: Session) -> None:
    session.guest.run("mkfifo /tmp/start", check=True)
    copy = ">/tmp/ready; read line </tmp/start; exec dd if=/dev/zero of=/dev/null bs=1 count=8000"
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(session.kcov, copy, trace=True, timeout=120)
        # While the host does not answer, no command can join a stream.
        ready = "until [ -e /tmp/ready ]; do sleep 0.1; done"
        session.guest.run(ready, check=True, timeout=60)
        with stalled_host(session, timeout_ms=100):
            # It returns when dd runs: the shell has opened its end.
            session.guest.run("echo >/tmp/start", check=True, timeout=60)
            session.run("sleep 0.5; while pidof dd; do sleep 0.1; done", timeout=120)
        with pytest.raises(IncompleteError, match=r"the trace is incomplete: [\d,]+ system calls"):
            result.result()
    assert len(session.partial_calls) > 1000
    again = session.kcov("exec dd if=/dev/zero of=/dev/null bs=1 count=8000", trace=True)
    assert sum(call.name == "read" and call.result == 1 for call in again.calls) == 8000


@pytest.mark.guest(target="plan9")
def test_trace_of_two_sources_has_the_kernels_functions_of_each_call(session: Session) -> None:
    done = session.kcov("cat /mnt/target/README; cat /mnt/target/README", trace=True, timeout=120)
    opens = [
        call
        for call in done.calls
        if call.arguments is not None and '"/mnt/target/README"' in call.arguments
    ]
    assert len(opens) == 2
    for call in opens:
        assert {"do_sys_openat2", "p9_client_walk", "v9fs_file_open"} <= set(call.kernel)
        assert not {"ksys_read", "__x64_sys_close"} & set(call.kernel)
        assert "Plan9ServerProtocol.t_open" in {code.function for code in call.host}
    assert not [name for call in done.calls for name in call.kernel if name.startswith("kb_")]
    closes = [call for call in done.calls if call.name == "close"]
    assert all("__x64_sys_close" in call.kernel for call in closes)
