# SPDX-License-Identifier: Apache-2.0
"""Resets of a guest that is in use: by other threads, and by clients of the target."""

from __future__ import annotations

import threading
from collections import Counter

import pytest

from bridge.errors import GuestResetError
from bridge.session.session import Session

pytestmark = pytest.mark.vm


@pytest.mark.guest(source="python")
def test_reset_command_of_another_thread_runs_after_the_target_is_set_up(session: Session) -> None:
    seen: Counter[str] = Counter()
    done = threading.Event()

    def list_the_target() -> None:
        while not done.is_set():
            try:
                result = session.run("ls /mnt/target/README")
                seen[(result.stdout + result.stderr).decode()] += 1
            except GuestResetError:
                seen["reset"] += 1

    threads = [threading.Thread(target=list_the_target) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(6):
            session.run("sleep 0.2")
            session.reset()
        session.run("sleep 0.2")
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert set(seen) <= {"/mnt/target/README\n", "reset"}, seen
    assert seen["/mnt/target/README\n"] > 6


@pytest.mark.guest(source="python")
def test_reset_relays_that_start_meanwhile_are_reset_too(session: Session) -> None:
    port = session.target.endpoints[0].guest_port
    connect = f"bash -c 'exec 3<>/dev/tcp/10.0.2.100/{port}; sleep 0.2'"
    clients = f"while :; do {connect}; done </dev/null >/dev/null 2>&1 &"
    for turn in range(8):
        session.run(f"{clients} {clients} sleep {0.5 + 0.07 * turn}")
        session.reset()
    assert session.run("cat /mnt/target/README").exit_status == 0


@pytest.mark.guest(target="tests.session.test_python_targets:Elsewhere", source="python")
def test_reset_connections_that_the_target_ended_first_are_forgotten(session: Session) -> None:
    """They wait for the guest to end them too, which it cannot any more."""
    connect = "exec {fd}<>/dev/tcp/10.0.2.100/80; cat <&$fd"
    closed, left_open = f"{connect}; exec {{fd}}>&-", f"{connect}; sleep 60"
    leave = f"bash -c '{left_open}' </dev/null >/dev/null 2>&1 & bash -c '{closed}'"
    for _ in range(3):
        assert session.run(f"{leave}; sleep 0.5").text == "answer\n"
        session.reset()
        # The guest takes the same ports as before the reset.
        assert session.run(f"bash -c '{closed}'").text == "answer\n"
