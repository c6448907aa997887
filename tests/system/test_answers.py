# SPDX-License-Identifier: Apache-2.0
"""After each call that waited for a target's answer, what the target did for it is in the area.

Several threads in a guest with several processors, each with an instance of its own, ask a target
that takes a branch of its code for each request, and make calls in between that nobody answers, of
which the host hears nothing. ``KCOV_BRIDGE_ANSWERS`` is the number of calls (``make answers``
takes ten million for each kind of target). The answers come by each kind of way to the guest.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

import bridge
from bridge.session.session import Session
from bridge.targets import TARGET_ADDRESS
from tests.support.hangs import run_or_tell
from tests.support.programs import guest_program

pytestmark = pytest.mark.vm

PROGRAM = Path(__file__).parent / "answers.c"
CALLS = int(os.environ.get("KCOV_BRIDGE_ANSWERS", "10000"))
SEED = os.environ.get("KCOV_BRIDGE_ANSWERS_SEED", "1")
THREADS = 3
BRANCHES = 64
"""As in answers.c."""

# A thread a connection: one frame that never returns and calls nothing that is measured.
THREADED = """
import socket
import threading


def serve(listener):
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=talk, args=(connection,), daemon=True).start()


def talk(connection):
    while request := connection.recv(2, socket.MSG_WAITALL):
        which = request[0] * 64 + request[1]
@INLINE@
        connection.sendall(b".")
"""

# One thread for all, coroutines that are entered again and again.
ASYNC = """
import asyncio


def serve(listener):
    try:
        asyncio.run(run(listener))
    except (OSError, asyncio.CancelledError):
        pass


async def run(listener):
    server = await asyncio.start_server(talk, sock=listener)
    await server.serve_forever()


def branch(which):
@BRANCH@


async def talk(reader, writer):
    while request := await reader.read(2):
        branch(request[0] * 64 + request[1])
        writer.write(b".")
        await writer.drain()
"""

# One socket for all ports of the guest.
DATAGRAMS = """
def serve(sock):
    while True:
        try:
            request, sender = sock.recvfrom(2)
        except OSError:
            return
        which = request[0] * 64 + request[1]
@INLINE@
        sock.sendto(b".", sender)
"""

TARGET = """
import os
import socket
import threading

from bridge.targets import Endpoint


class Target:
    name = "answers"
    packages = ("answers_@KIND@",)
    guest_modules = ()
    guest_setup = guest_teardown = ""

    def __init__(self, directory):
        self.listener = None
        self.endpoints = ()

    def start(self):
        import answers_@KIND@

        self.listener = socket.create_server(("127.0.0.1", 0))
        self.endpoints = (Endpoint("it", self.listener.getsockname()[1], 80),)
        threading.Thread(
            target=answers_@KIND@.serve, args=(self.listener,), daemon=True
        ).start()

    def stop(self):
        if self.listener is not None:
            self.listener.close()
"""


# The other ways to the guest; @DEVICE@ is the class of three devices.
OTHER_TARGET = """
import pathlib
import socket
import tempfile
import threading

from bridge.targets import SerialPort, UdpEndpoint, UnixEndpoint, VirtioPort


class Target:
    name = "answers"
    packages = ("answers_@KIND@",)
    guest_modules = ()
    guest_setup = guest_teardown = ""
    endpoints = devices = ()

    def __init__(self, directory):
        self.sockets = []

    def start(self):
        import answers_@KIND@

        self.directory = tempfile.TemporaryDirectory()
        if "@KIND@" == "udp":
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.bind(("127.0.0.1", 0))
            self.sockets.append(sock)
            self.endpoints = (UdpEndpoint("it", sock.getsockname()[1], 80),)
        else:
            paths = [pathlib.Path(self.directory.name, f"it{i}") for i in range(3)]
            for path in paths:
                sock = socket.socket(socket.AF_UNIX)
                sock.bind(str(path))
                sock.listen()
                self.sockets.append(sock)
            kind = {"serial": SerialPort, "virtio": VirtioPort}.get("@KIND@")
            if kind is None:
                self.endpoints = (UnixEndpoint("it", paths[0], 80),)
            else:
                self.devices = tuple(kind(path.name, path) for path in paths)
        for sock in self.sockets:
            threading.Thread(target=answers_@KIND@.serve, args=(sock,), daemon=True).start()

    def stop(self):
        for sock in self.sockets:
            sock.close()
        self.directory.cleanup()
"""


def tree(low: int, high: int, indent: int) -> list[str]:
    """Source that does something of its own for each value of ``which`` from ``low`` on."""
    space = " " * indent
    if high - low == 1:
        return [f"{space}done = {low}"]
    middle = (low + high) // 2
    return [
        f"{space}if which < {middle}:",
        *tree(low, middle, indent + 4),
        f"{space}else:",
        *tree(middle, high, indent + 4),
    ]


def branches(session: Session, name: str, source: str) -> list[int]:
    """The PC of each branch in the file ``name``."""
    assert session.source is not None
    file = session.source.table.file(name)
    assert file is not None
    pcs = file.line_pcs()
    found = {}
    for number, line in enumerate(source.splitlines(), 1):
        if match := re.fullmatch(r" +done = (\d+)", line):
            found[int(match[1])] = pcs[number]
    assert sorted(found) == list(range(THREADS * BRANCHES))
    assert len(set(found.values())) == len(found), "each branch is a block of its own"
    return [found[which] for which in sorted(found)]


KINDS = {
    "threads": (THREADED, TARGET),
    "asyncio": (ASYNC, TARGET),
    "isolated": (THREADED, TARGET),
    "always": (THREADED, TARGET),
    "udp": (DATAGRAMS, OTHER_TARGET),
    "unix": (THREADED, OTHER_TARGET),
    "serial": (THREADED, OTHER_TARGET),
    "virtio": (THREADED, OTHER_TARGET),
}
"""Code under test, and its target."""


@pytest.mark.parametrize("kind", KINDS)
def test_answers(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``always``: PCs for the calls themselves, so that every return is told."""
    text, target = KINDS[kind]
    count = THREADS * BRANCHES
    text = text.replace("@INLINE@", "\n".join(tree(0, count, 8)))
    text = text.replace("@BRANCH@", "\n".join(tree(0, count, 4)))
    # A module of its own each time: the target runs in this process.
    (tmp_path / f"answers_{kind}.py").write_text(text)
    (tmp_path / f"answers_target_{kind}.py").write_text(target.replace("@KIND@", kind))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    program = guest_program(PROGRAM)
    calls = CALLS // 10 if kind == "always" else CALLS
    with bridge.boot(
        target=f"answers_target_{kind}:Target",
        source="python",
        isolate=kind == "isolated",
        syscall_pcs=kind == "always",
        cpus=2,
    ) as session:
        assert session.doorbell is not None
        assert session.device is not None
        session.put(program, "/tmp/answers", 0o755)
        pcs = tmp_path / "pcs"
        pcs.write_text("".join(f"{pc:x}\n" for pc in branches(session, f"answers_{kind}.py", text)))
        session.put(pcs, "/tmp/pcs", 0o644)
        before = session.doorbell.counters.requests
        address = "/dev/target/it" if kind in ("serial", "virtio") else TARGET_ADDRESS
        words = ["/tmp/answers", address, "u80" if kind == "udp" else "80", "/tmp/pcs"]
        # Nearly each call is a request where the answers do not come by TCP.
        quiet = 100 if target == TARGET else 4
        words += [str(THREADS), str(calls), SEED, str(quiet)]
        result = run_or_tell(session, words, timeout=120 + calls / 500)
        told = session.doorbell.counters.requests - before
        print(result.text, result.stderr.decode(), f"told {told}")
        assert result.exit_status == 0, result.text + result.stderr.decode()
        found = {name: int(value) for name, value in re.findall(r"(\w+) (\d+)", result.text)}
        assert found["missed"] == 0
        assert found["calls"] >= calls
        session.doorbell.call(session.doorbell.look_at_guest)
        assert session.doorbell.guest_timeouts == session.doorbell.guest_skipped == 0
        # All are counted, whether they were told or not, and DISABLE's own is none.
        assert session.device.totals.returns >= found["calls"]
        if kind == "always":
            assert told >= found["calls"]
        elif target == TARGET:
            # An answer to one thread is news for all of them.
            assert told < found["calls"] / 3
        else:
            assert found["requests"] > calls / 6
