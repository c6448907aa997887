# SPDX-License-Identifier: Apache-2.0
"""Commands under kcov in a real guest: whatever their processes do, their PCs reach the host.

The device gives one PC for each system call here (``syscall_pcs``), so what a program did can be
counted exactly, without any target.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bridge.config import Settings
from bridge.device import streams
from bridge.errors import IncompleteError, RunTimeoutError
from bridge.guest.images import compile_for_guest
from bridge.guest.images.store import base_directory
from bridge.session.session import Session
from bridge.sources.pcs import syscall_pc
from tests.support.guests import stalled_host
from tests.support.programs import guest_image

pytestmark = pytest.mark.vm

SCHED_GETSCHEDULER = 145
"""arch/x86/entry/syscalls/syscall_64.tbl"""

CALLS = 10
"""As in ways.c and follow.c."""
THREADS = 100
"""As in follow.c."""
SLOTS = 1024
MANY = SLOTS + 200

WAYS = (
    "fork",
    "thread",
    "bare-clone",
    "silent-vfork",
    "daemon",
    "cleared-environment",
    "seccomp",
    "no-descriptors",
    "closed-descriptors",
    "no-memory",
    "empty-root",
    "other-user",
    "namespaces",
    "blocked-signals",
)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    out = tmp_path_factory.mktemp("streams")
    here = Path(__file__)
    follow = compile_for_guest(guest_image(), here.with_name("follow.c"), out / "follow")
    ways = compile_for_guest(guest_image(), here.with_name("ways.c"), out / "ways")
    static = compile_for_guest(
        guest_image(), here.with_name("ways.c"), out / "ways-static", flags=("-O2", "-static")
    )
    settings = Settings(target="none", source="python", syscall_pcs=True, region=64)
    with Session(settings, out) as session:
        for program in (follow, ways, static):
            session.put(program, f"/usr/local/bin/{program.name}", 0o755)
        # Not even a machine that is busy with other things makes the guest give up.
        session.run("echo 60000 >/sys/module/kcov_bridge/parameters/timeout_ms")
        yield session


def calls(pcs: Sequence[int]) -> int:
    pc = syscall_pc(SCHED_GETSCHEDULER)
    assert pc is not None
    return pcs.count(pc)


@pytest.mark.parametrize("program", ["ways", "ways-static"])
@pytest.mark.parametrize("way", WAYS)
def test_child_is_followed_and_runs_as_without_kcov(
    session: Session, program: str, way: str
) -> None:
    result = session.kcov([program, way], timeout=60)
    assert (result.exit_status, result.stdout, result.stderr) == (0, b"done\n", b"")
    assert calls(result.pcs) == CALLS
    assert result.untraced == 0


@pytest.mark.parametrize(
    ("how", "expected"),
    [("processes", 4 * CALLS), ("threads", (THREADS + 2) * CALLS), ("exec", CALLS)],
)
def test_nothing_is_lost_to_exit_kill_and_exec(session: Session, how: str, expected: int) -> None:
    result = session.kcov(["follow", how], timeout=60)
    assert result.exit_status == 0, result.stderr
    assert calls(result.pcs) == expected


def test_without_following_children_are_invisible(session: Session) -> None:
    assert calls(session.kcov(["follow", "processes"], follow=False).pcs) == CALLS


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["sh", "-c", "exit 7"], 7),
        (["sh", "-c", "kill -9 $$"], 128 + 9),
        (["/no/such/program"], 127),
        (["no-such-program"], 127),
        (["/etc/hosts"], 126),
    ],
)
def test_exit_status_is_the_commands(session: Session, command: list[str], status: int) -> None:
    assert session.kcov(command, timeout=60).exit_status == status


def test_environment_and_descriptors_are_those_of_a_run_without_kcov(session: Session) -> None:
    script = (
        "env | grep -v ^_= | sort; readlink /proc/self/fd/* | grep -v ^/proc; "
        "cut -c74- /proc/self/maps | sort -u"
    )
    under, without = session.kcov(["sh", "-c", script]), session.run(["sh", "-c", script])
    assert under.stderr == without.stderr
    same = [line for line in without.stdout.splitlines() if b"pipe:" not in line]
    assert [line for line in under.stdout.splitlines() if b"pipe:" not in line] == same


def test_program_with_address_sanitizer_runs_and_is_traced(
    session: Session, tmp_path: Path
) -> None:
    image = guest_image()
    flags = ("-O1", "-fsanitize=address")
    program = compile_for_guest(
        image, Path(__file__).with_name("follow.c"), tmp_path / "follow-asan", flags=flags
    )
    libraries = base_directory(image.recipe, image.base_fingerprint) / "build-root" / "usr" / "lib"
    session.put(program, "/usr/local/bin/follow-asan", 0o755)
    session.put(next(libraries.rglob("libasan.so.?")), "/usr/lib/libasan.so.8", 0o644)
    # LeakSanitizer needs ptrace, which it says where it is not there.
    result = session.kcov(["env", "ASAN_OPTIONS=detect_leaks=0", "follow-asan", "calls"])
    assert (result.exit_status, result.stderr) == (0, b"")
    assert calls(result.pcs) == CALLS


def test_pcs_need_no_room_in_the_guest(session: Session) -> None:
    full = "cat /dev/zero >/run/big; follow processes"
    try:
        result = session.kcov(["sh", "-c", full], timeout=120)
    finally:
        session.run("rm -f /run/big")
    assert b"No space left" in result.stderr
    assert calls(result.pcs) == 4 * CALLS


def test_each_of_many_short_processes_gives_all_of_its_pcs(session: Session) -> None:
    """More than there are slots, one after the other."""
    result = session.kcov(["ways", "many", str(MANY)], timeout=600)
    assert (result.exit_status, result.untraced) == (0, 0)
    assert calls(result.pcs) == MANY * CALLS
    assert session.status()["instances"] == []


def test_processes_forked_while_the_host_stalls_make_the_command_fail(session: Session) -> None:
    """The guest goes on without the host, untraced: the command's PCs are incomplete."""
    script = """
        echo >/tmp/begun; until [ -e /tmp/fork ]; do sleep 0.05; done
        (ways fork); (ways fork); echo >/tmp/forked
        until [ -e /tmp/end ]; do sleep 0.05; done; echo done
    """

    def wait_for(path: str) -> None:
        session.guest.run(f"until [ -e {path} ]; do sleep 0.05; done", check=True, timeout=60)

    output: list[bytes] = []
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(session.kcov, ["sh", "-c", script], timeout=120, stdout=output.append)
        wait_for("/tmp/begun")
        with stalled_host(session, timeout_ms=100):
            session.guest.run("echo >/tmp/fork", check=True)
            wait_for("/tmp/forked")
        session.guest.run("echo >/tmp/end", check=True)
        with pytest.raises(IncompleteError, match=r"[1-9]\d* processes or threads were not traced"):
            run.result(120)
    session.run("rm /tmp/begun /tmp/fork /tmp/forked /tmp/end")
    assert b"".join(output) == b"done\ndone\ndone\n"
    assert session.stats().untraced > 0
    result = session.kcov(["ways", "fork"], timeout=60)
    assert calls(result.pcs) == CALLS


def test_threads_beyond_the_slots_are_counted_as_untraced(session: Session) -> None:
    crowd = SLOTS + 76
    result = session.kcov(["ways", "crowd", str(crowd)], timeout=300)
    assert result.exit_status == 0, result.stderr
    # One slot is the module's own, one the first thread's.
    assert result.untraced == crowd - (SLOTS - 2)
    assert session.status()["instances"] == []


def test_process_that_outlives_the_command_gives_what_it_has(session: Session) -> None:
    script = "(follow calls; exec sleep 1000) & sleep 1"
    result = session.kcov(["sh", "-c", script], timeout=60)
    assert calls(result.pcs) == CALLS
    # It is not traced any more, and is told so at its next return.
    assert [each for each in session.status()["instances"] if each["owner"]] == []
    session.run("pkill -x sleep")
    assert session.status()["instances"] == []


def test_command_that_is_cut_off_leaves_partial_pcs(session: Session) -> None:
    with pytest.raises(RunTimeoutError):
        session.kcov(["sh", "-c", "follow calls; exec sleep 1000"], timeout=3)
    assert calls(session.partial_pcs) == CALLS
    deadline = time.monotonic() + 30
    while session.status()["instances"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_two_commands_at_once_keep_apart(session: Session) -> None:
    results = {}

    def run(how: str) -> None:
        results[how] = session.kcov(["follow", how], timeout=60)

    threads = [threading.Thread(target=run, args=(how,)) for how in ("processes", "threads")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls(results["processes"].pcs) == 4 * CALLS
    assert calls(results["threads"].pcs) == (THREADS + 2) * CALLS


def test_pcs_that_the_host_cannot_write_down_are_told(
    session: Session, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(streams, "_IN_MEMORY_BYTES", 64)
    monkeypatch.setattr(session._running.executor, "_directory", tmp_path / "gone")
    with pytest.raises(IncompleteError, match="the PCs are incomplete") as caught:
        session.kcov(["follow", "processes"], timeout=60)
    assert caught.value.exit_status == 125


def test_stream_of_another_command_cannot_be_joined_by_guessing(session: Session) -> None:
    result = session.run("kcov-exec -s 1 -- true")
    assert result.exit_status == 125
    assert b"no such stream" in result.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("-s 0", "must be a number"),
        ("-s x", "must be a number"),
        ("-s 0x8000000000000001", "must be a number"),
        ("-s 1 -u", "combined with -f only"),
        ("-s 1 -o /tmp/x", "combined with -f only"),
    ],
)
def test_kcov_exec_says_what_is_wrong_with_its_stream(
    session: Session, options: str, said: str
) -> None:
    result = session.run(f"kcov-exec {options} -- true")
    assert result.exit_status == 125
    assert said in result.stderr.decode()


def test_kcov_exec_reports_a_file_that_cannot_take_the_pcs(session: Session) -> None:
    """Without the host's stream: each write is checked."""
    mount = "mkdir -p /tmp/small; mount -t tmpfs -o size=16k none /tmp/small"
    try:
        for options in ("", "-b", "-f"):
            result = session.run(
                f"{mount}; kcov-exec {options} -o /tmp/small/pcs -- sh -c "
                "'i=0; while [ $i -lt 700 ]; do :>/dev/null; i=$((i+1)); done'; "
                "status=$?; umount /tmp/small; exit $status",
                timeout=60,
            )
            assert result.exit_status == 125, options
            assert b"No space left on device; the PCs are incomplete" in result.stderr
    finally:
        session.run("umount /tmp/small")
