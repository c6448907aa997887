# SPDX-License-Identifier: Apache-2.0
"""Sessions whose target is Python: two in one process, and one that nothing measures."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import bridge
from bridge.session.session import Session
from bridge.targets import TARGET_ADDRESS, Endpoint

pytestmark = pytest.mark.vm

WARNING = "no line of its packages ran"
READ = ("cat", "/mnt/target/README")

SERVER = """
import socket, sys
listener = socket.socket(fileno=int(sys.argv[1]))
while True:
    connection, _ = listener.accept()
    connection.sendall(b"answer\\n")
    connection.close()
"""


class Elsewhere:
    """A target whose answers come from a program that ignores the environment (``python -I``)."""

    name = "elsewhere"
    packages = ("wsgiref",)
    guest_modules = ()
    guest_setup = guest_teardown = ""

    def __init__(self, directory: Path | None) -> None:
        self.endpoints: tuple[Endpoint, ...] = ()

    def start(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.endpoints = (Endpoint("elsewhere", listener.getsockname()[1], 80),)
            self.server = subprocess.Popen(
                [sys.executable, "-I", "-c", SERVER, str(listener.fileno())],
                pass_fds=(listener.fileno(),),
            )

    def stop(self) -> None:
        self.server.kill()
        self.server.wait()


@pytest.mark.guest(target="plan9", source="python")
def test_session_with_the_same_target_inside_another_gets_its_own_pcs(
    session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    with bridge.boot(source="python") as inner:
        before = session.stats().pcs
        result = inner.kcov(READ)
        assert result.exit_status == 0
        assert len(result.pcs) > 10
        assert session.stats().pcs == before
        assert all(inner.symbolize(pc) for pc in result.pcs)
        outer = session.kcov(READ)
        assert outer.exit_status == 0
        assert set(outer.pcs) & set(result.pcs), "the same source text has the same PCs"
        inner.reset()
        assert inner.kcov(READ).pcs
    assert inner.stats().target_answered
    assert WARNING not in caplog.text
    after = session.kcov(READ)
    assert after.exit_status == 0
    assert after.pcs


def test_target_that_answers_and_is_not_measured_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with (
        caplog.at_level(logging.WARNING),
        bridge.boot(target=f"{__name__}:Elsewhere", source="python") as session,
    ):
        session.reset()
        assert not session.stats().target_answered, "nobody has asked it yet"
        result = session.kcov(["bash", "-c", f"cat </dev/tcp/{TARGET_ADDRESS}/80"])
        assert result.stdout == b"answer\n"
        assert len(result.pcs) == 0
        assert session.status()["target_answered"]
        assert WARNING not in caplog.text
    assert caplog.text.count(WARNING) == 1
    assert session.stats().target_answered
