# SPDX-License-Identifier: Apache-2.0
"""``kcov-bridge status``: asks the bridges that run, and nobody else."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from typing import Any

import pytest

from bridge.errors import DoorbellError
from bridge.session.session import Session
from bridge.session.status import StatusServer, ask_all


def _mine(answers: list[dict[str, object]]) -> list[dict[str, object]]:
    return [answer for answer in answers if answer.get("test") == os.getpid()]


def test_status_server_answers_until_closed() -> None:
    def describe() -> dict[str, object]:
        return {"pid": os.getpid(), "test": os.getpid()}

    with StatusServer(describe), StatusServer(describe):
        assert len(_mine(ask_all())) == 2
    assert _mine(ask_all()) == []


def test_status_bridge_in_trouble_says_so() -> None:
    def describe() -> dict[str, object]:
        raise DoorbellError("the doorbell's thread does not run")

    with StatusServer(describe):
        assert {"error": "the doorbell's thread does not run"} in ask_all()


def test_status_of_a_bridge_that_knows_fewer_figures_is_shown() -> None:
    def describe() -> dict[str, object]:
        return {"pid": os.getpid(), "returns": 12345}

    with StatusServer(describe):
        command = [sys.executable, "-m", "bridge", "status"]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"bridge {os.getpid()}:" in shown
    assert "12,345 returns, 0 PCs" in shown


def test_status_silent_bridge_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridge.session.status._SECONDS", 0.2)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as mute:
        mute.bind(f"\0kcov-bridge-status/{os.getpid()}.mute")
        mute.listen()
        assert _mine(ask_all()) == []


def test_status_client_goes_away_does_no_harm() -> None:
    entered = threading.Event()

    def describe() -> dict[str, object]:
        entered.set()
        return {"pid": 1, "test": os.getpid(), "much": "x" * (1 << 20)}

    with StatusServer(describe) as server:
        for _ in range(5):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.connect(server._socket.getsockname())
            assert entered.wait(10)
        assert server._thread.is_alive()


@pytest.mark.vm
@pytest.mark.guest(target="none", source="python", syscall_pcs=True)
def test_status_running_bridge_is_shown(session: Session) -> None:
    def ask(*options: str) -> str:
        command = [sys.executable, "-m", "bridge", "status", *options]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    lost = session.status()["lost_pcs"]
    seen: list[dict[str, Any]] = []

    def look(_: bytes) -> None:
        if not seen:
            seen.extend(map(json.loads, ask("--json").splitlines()))
            session.run("touch /tmp/seen")

    script = "echo ready; while [ ! -e /tmp/seen ]; do sleep 0.1; done"
    session.kcov(["sh", "-c", script], follow=False, stdout=look)
    (status,) = [each for each in seen if each["pid"] == os.getpid()]
    (instance,) = status["instances"]
    assert instance["mode"] == "trace-pc"
    assert instance["appended"] > 0
    assert status["lost_pcs"] == lost
    assert f"bridge {os.getpid()}: target none" in ask()
