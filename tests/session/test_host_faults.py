# SPDX-License-Identifier: Apache-2.0
"""A host that is slow, stopped or broken: no guest task waits for longer than the bound."""

from __future__ import annotations

import re
import signal
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import bridge
from bridge.device import abi
from bridge.guest.guest import CommandResult
from bridge.session.session import Session
from bridge.sources.ledger import Cursor
from bridge.targets import TARGET_ADDRESS, Endpoint
from tests.support import Program
from tests.support.guests import complaints
from tests.support.programs import guest_program

pytestmark = pytest.mark.vm

ROOT = Path(__file__).resolve().parents[2]
BOUND_MS = 1000
"""How long the module waits for an answer."""
SLACK_MS = 1000


class Moody:
    """A target that answers a line, or is told not to: "crash", "hang"."""

    name = "moody"
    packages = ()
    guest_modules = ()
    guest_setup = f"echo {TARGET_ADDRESS} target >>/etc/hosts"
    guest_teardown = ""

    def __init__(self, directory: Path | None) -> None:
        self.over = threading.Event()

    def start(self) -> None:
        over = self.over

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                word = self.rfile.readline().strip()
                if word == b"crash":
                    raise ConnectionAbortedError("as asked")
                if word == b"hang":
                    over.wait()
                self.wfile.write(b"answer\n")

        class Server(socketserver.ThreadingTCPServer):
            def handle_error(self, request: object, client_address: object) -> None:
                """What was raised on purpose is no news."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        return (Endpoint("moody", self.server.server_address[1], 80),)

    def stop(self) -> None:
        self.over.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture(scope="module")
def patience() -> Path:
    source = ROOT / "tests/system/patience.c"
    return guest_program(source)


@pytest.fixture(scope="module")
def session(patience: Path) -> Iterator[Session]:
    with bridge.boot(
        target="tests.session.test_host_faults:Moody", source="python", syscall_pcs=True
    ) as session:
        session.put(patience, "/tmp/patience", 0o755)
        yield session
        assert complaints(session) == ""


def numbers(report: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"^(\w+) (\d+)$", report, re.M)}


def waits(session: Session, milliseconds: int) -> dict[str, int]:
    result = session.run(["/tmp/patience", str(milliseconds)], timeout=60)
    assert result.exit_status == 0, result.stderr.decode()
    return numbers(result.text)


def test_host_slow_no_request_is_lost(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    device = session.device
    assert device is not None
    collect = device._coverage.collect

    def slow(cursor: Cursor) -> Sequence[int]:
        time.sleep(0.05)
        return collect(cursor)

    with monkeypatch.context() as patch:
        patch.setattr(device._coverage, "collect", slow)
        found = waits(session, 1000)
    assert found["longest_ms"] >= 50
    assert found["longest_ms"] < BOUND_MS + SLACK_MS
    assert found["empty"] == 0, "late, but none lost"
    assert waits(session, 200)["empty"] == 0


def test_source_raises_guest_continues_without_pcs(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, doorbell = session.device, session.doorbell
    assert device is not None
    assert doorbell is not None

    def collect(cursor: object, since: int = 0) -> Sequence[int]:
        raise RuntimeError("no such luck")

    with monkeypatch.context() as patch:
        patch.setattr(device._coverage, "collect", collect)
        found = waits(session, 500)
        assert found["calls"] > 100
        assert found["longest_ms"] < BOUND_MS
    assert isinstance(doorbell.failure, RuntimeError)
    assert waits(session, 200)["empty"] == 0


@pytest.mark.parametrize("mood", ["crash", "hang"])
def test_handler_hangs_or_breaks_others_are_served(session: Session, mood: str) -> None:
    device = session.device
    assert device is not None
    ask = f"set -e; exec 3<>/dev/tcp/target/80; echo {mood} >&3; timeout 1 cat <&3 || echo $?"
    stuck = session.kcov(["bash", "-c", ask], timeout=60)
    # timeout(1) has its own status for a command that it had to end.
    assert stuck.stdout == (b"124\n" if mood == "hang" else b"")
    assert stuck.exit_status == 0, stuck.stderr.decode()
    assert stuck.pcs
    # Others are served while the handler hangs, and the target is there for the next one.
    assert waits(session, 200)["empty"] == 0
    ask = "set -e; exec 3<>/dev/tcp/target/80; echo please >&3; cat <&3"
    assert session.kcov(["bash", "-c", ask], timeout=60).stdout == b"answer\n"
    assert device.enabled == 0


def test_requests_that_are_overwritten_on_their_way(session: Session) -> None:
    doorbell = session.doorbell
    assert doorbell is not None
    stats = "head -n 1 /sys/kernel/debug/kcov_bridge_stats"

    def busy() -> None:
        # The guest asks, and gives up; what it wrote is gone before the host looks.
        time.sleep(BOUND_MS / 1000 + 1)
        for slot in range(abi.SLOTS):
            at = abi.REQUESTS_OFFSET // abi.WORD + slot * abi.SLOT_WORDS
            doorbell._control[at + abi.RequestWord.SEQ] = 0

    asking = threading.Timer(0.2, lambda: given_up.append(session.run("kcov-exec -- true")))
    given_up: list[CommandResult] = []
    asking.start()
    doorbell.call(busy, timeout=30)
    asking.join()
    assert given_up[0].exit_status == 125, given_up
    assert session.run(stats).text.endswith("unreleased 1\n")
    deadline = time.monotonic() + 10
    while not session.run(stats).text.startswith("host here"):
        assert time.monotonic() < deadline, session.run(stats).text
    # One open asks the host again, the next sees the answer.
    for _ in range(2):
        assert session.run("kcov-exec -- true").exit_status == 0
    assert session.run(stats).text.endswith("unreleased 0\n")


STOPPED = """
import os
import sys
from pathlib import Path
import bridge
from tests.support.guests import complaints
with bridge.boot(target="none", source="python", syscall_pcs=True) as session:
    session.put(Path(sys.argv[1]), "/tmp/patience", 0o755)
    session.run(["/tmp/patience", "6000"], timeout=60, stdout=lambda data: os.write(1, data))
    print(session.run(["/tmp/patience", "200"], timeout=60).text.replace("\\n", " "), flush=True)
    print("complaints:", complaints(session))
    print("instances", session.device.instances)
"""


def test_host_stopped_for_three_seconds_recovers(patience: Path) -> None:
    with Program(
        [sys.executable, "-c", STOPPED, str(patience)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.line() == "begun\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(3)
        process.send_signal(signal.SIGCONT)
        report, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    found = numbers(report)
    assert BOUND_MS <= found["longest_ms"] < BOUND_MS + SLACK_MS
    assert found["empty"] > 1, "it went on without the host"
    assert found["last"] > 0, "and with it, once it was back"
    assert re.search(r"begun calls \d+ empty 0 .*last [1-9]", report)
    assert "complaints: \n" in report
    assert found["instances"] == 0
