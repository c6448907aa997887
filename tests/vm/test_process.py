# SPDX-License-Identifier: Apache-2.0
"""Programs beside the bridge: real ones, started, killed and orphaned."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bridge.errors import InfrastructureError, MissingDependencyError
from bridge.vm import process as process_module
from bridge.vm.process import STDERR_LIMIT, Process, spawn

ROOT = Path(__file__).resolve().parents[2]

BRIDGE = """
import sys, threading, time
from bridge.vm.process import spawn
def start():
    for _ in range(2):
        print(spawn(["sleep", "300"]).pid, flush=True)
thread = threading.Thread(target=start)
thread.start()
thread.join()
print("ready", flush=True)
time.sleep(300)
"""


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def wait_gone(pids: list[int], seconds: float = 5.0) -> list[int]:
    """The processes that are still there after the time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(alive(pid) for pid in pids):
        time.sleep(0.01)
    return [pid for pid in pids if alive(pid)]


def test_exit_status_and_stderr_are_kept() -> None:
    process = spawn(["sh", "-c", "echo out; echo oops >&2; exit 3"])
    assert process.wait(10)
    assert process.returncode == 3
    assert process.stderr_text == "oops\n"
    assert process.how_it_ended == "exited with status 3"
    assert not process.running
    process.kill()


def test_join_output_keeps_stdout_beside_stderr() -> None:
    process = spawn(["sh", "-c", "echo out; echo oops >&2"], join_output=True)
    assert process.wait(5)
    assert process.stderr_text == "out\noops\n"


def test_spawn_program_gets_the_default_of_sigpipe() -> None:
    with spawn(["grep", "SigIgn", "/proc/self/status"], join_output=True) as process:
        assert process.wait(10)
    ignored = int(process.stderr_text.split()[1], 16)
    assert not ignored & 1 << signal.SIGPIPE - 1


def test_how_it_ended_signal_is_named() -> None:
    with spawn(["sleep", "300"]) as process:
        assert process.running
        assert process.returncode is None
        assert process.how_it_ended == "is still running"
        process.send_signal(signal.SIGTERM)
        assert process.wait(10)
        assert process.returncode == -signal.SIGTERM
        assert process.how_it_ended == "was killed by SIGTERM"


def test_leaving_the_context_kills() -> None:
    with spawn(["sleep", "300"]) as process:
        pid = process.pid
    assert not alive(pid)
    assert process.how_it_ended == "was killed by SIGKILL"


def test_stderr_is_bounded_and_its_end_is_kept() -> None:
    process = spawn(["sh", "-c", f"head -c {STDERR_LIMIT * 8} /dev/zero >&2; echo end >&2"])
    assert process.wait(10)
    assert len(process.stderr_text) == STDERR_LIMIT
    assert process.stderr_text.endswith("end\n")


def test_end_grandchild_holds_stderr_is_noticed() -> None:
    process = spawn(["sh", "-c", "sleep 300 & echo $! >&2"])
    assert process.wait(10)
    grandchild = int(process.stderr_text)
    try:
        assert process.returncode == 0
    finally:
        os.kill(grandchild, signal.SIGKILL)


def test_descriptors_are_inherited_as_given_and_no_others() -> None:
    ours, theirs = socket.socketpair()
    secret = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(secret, True)
    with ours, theirs:
        fd = theirs.fileno()
        command = f"[ -e /proc/self/fd/{secret} ] && exit 9; echo through >&{fd}"
        with spawn(["bash", "-c", command], pass_fds=[fd]) as process:
            theirs.close()
            assert ours.recv(100) == b"through\n"
            assert process.wait(10)
            assert process.returncode == 0
    os.close(secret)


def test_spawn_program_has_a_session_of_its_own() -> None:
    with spawn(["sleep", "300"]) as process:
        assert os.getsid(process.pid) == process.pid != os.getsid(0)


def test_spawn_missing_program_is_a_missing_dependency() -> None:
    with pytest.raises(MissingDependencyError, match="no-such-program is not installed"):
        spawn(["no-such-program"])


def test_spawn_not_executable_is_an_error(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF and then nothing")
    broken.chmod(0o755)
    with pytest.raises(InfrastructureError, match="Exec format error") as caught:
        spawn([broken])
    assert str(broken) in caught.value.evidence


def test_on_end_is_called_once() -> None:
    ended: list[Process] = []
    told = threading.Event()

    def on_end(process: Process) -> None:
        assert process.returncode == 0
        ended.append(process)
        told.set()

    process = spawn(["true"], on_end=on_end)
    assert told.wait(10)
    process.kill()
    assert ended == [process]


def test_spawn_calling_thread_ends_program_lives() -> None:
    # The parent-death signal follows the thread that forked: that must not be this short one.
    started: list[Process] = []
    thread = threading.Thread(target=lambda: started.append(spawn(["sleep", "300"])))
    thread.start()
    thread.join()
    with started[0] as process:
        assert not process.wait(0.3)
        assert process.running


def test_spawn_from_many_threads_at_once_works() -> None:
    statuses: list[int | None] = []

    def work(status: int) -> None:
        process = spawn(["sh", "-c", f"exit {status}"])
        process.wait(20)
        statuses.append(process.returncode)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == list(range(12))  # type: ignore[type-var]


def test_spawn_in_a_forked_child_works() -> None:
    spawn(["true"]).wait(10)
    pid = os.fork()
    if pid == 0:
        process = spawn(["sh", "-c", "exit 5"])
        process.wait(10)
        os._exit(process.returncode or 0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5


def test_spawn_leaves_no_descriptor_open() -> None:
    spawn(["true"]).wait(10)
    before = open_descriptors()
    for _ in range(10):
        with spawn(["true"]) as process:
            process.wait(10)
    assert open_descriptors() == before


def test_programs_die_with_a_bridge_that_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", BRIDGE], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as bridge:
        assert bridge.stdout is not None
        first, second, word = (bridge.stdout.readline().strip() for _ in range(3))
        assert word == "ready"
        pids = [int(first), int(second)]
        assert all(alive(pid) for pid in pids)
        bridge.kill()
    assert wait_gone(pids) == []


def test_twenty_kills_at_random_moments_leave_nothing() -> None:
    pick = random.Random(20)
    mark = f"30{os.getpid()}"
    for _ in range(20):
        with subprocess.Popen(
            [sys.executable, "-c", BRIDGE.replace('"300"', f'"{mark}"')],
            stdout=subprocess.DEVNULL,
            cwd=ROOT,
        ) as bridge:
            time.sleep(pick.uniform(0.0, 0.25))
            bridge.kill()
    deadline = time.monotonic() + 5
    while (left := _with_argument(mark)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left == []


def _with_argument(mark: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if mark.encode() in words:
                found.append(int(entry.name))
    return found


def test_spawn_without_a_thread_that_watches_leaves_no_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with spawn(["sleep", "0"]) as process:
        process.wait(20)
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.endswith("-watch"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    before, files = children(), open_files()
    with pytest.raises(
        InfrastructureError, match="could not be started: can't start new"
    ) as raised:
        spawn(["sleep", "300"], name="QEMU")
    assert "ulimit" in raised.value.hint
    assert children() == before
    assert open_files() == files


def test_spawn_without_a_thread_that_forks_fails_and_later_succeeds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process_module, "_orders", None)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as context:
        context.setattr(threading.Thread, "start", refuse)
        for _ in range(2):
            with pytest.raises(InfrastructureError, match="could not be started"):
                spawn(["true"])
    with spawn(["true"]) as process:
        assert process.wait(20)


def children() -> str:
    """The children of this process."""
    return "".join(sorted(path.read_text() for path in Path("/proc/self/task").glob("*/children")))


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
