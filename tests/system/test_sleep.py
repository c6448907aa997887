# SPDX-License-Identifier: Apache-2.0
"""A guest that would sleep: it does not, or is lost at once and can be reset."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import bridge
from bridge.errors import GuestStoppedError
from tests.support import run
from tests.support.programs import guest_program

pytestmark = pytest.mark.vm

_PROGRAM = Path(__file__).with_name("suspend.c")


shared_guest = pytest.mark.guest(target="none", source="python", syscall_pcs=True)


@pytest.fixture(scope="module")
def suspend() -> Path:
    """A program that suspends the guest without asking its kernel."""
    return guest_program(_PROGRAM)


@shared_guest
@pytest.mark.parametrize("state", ["mem", "freeze", "standby", "disk"])
def test_guest_asked_to_sleep_refuses(session: bridge.Session, state: str) -> None:
    supported = session.run("cat /sys/power/state").text.split()
    result = session.kcov(["sh", "-c", f"echo {state} >/sys/power/state"], timeout=60)
    assert result.exit_status != 0
    refused = "refusing to sleep" in session.run("dmesg").text
    assert refused == (state in supported)
    assert session.kcov(["true"]).exit_status == 0


@shared_guest
def test_suspended_guest_is_lost_at_once_and_reset_rescues_it(
    session: bridge.Session, suspend: Path
) -> None:
    for _ in range(2):
        session.reset()
        session.put(suspend, "/tmp/suspend", 0o755)
        with pytest.raises(GuestStoppedError, match="suspended itself to memory") as caught:
            session.kcov(["/tmp/suspend"], timeout=90)
        assert "reset()" in caught.value.hint
        with pytest.raises(GuestStoppedError):
            session.run(["true"])
    session.reset()
    assert session.kcov(["cat", "/proc/uptime"]).exit_status == 0


@shared_guest
def test_guest_that_is_silent_is_lost_and_reset_rescues_it(
    session: bridge.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the module a guest may suspend itself to idle, of which QEMU knows nothing."""
    monkeypatch.setattr("bridge.guest.channel.SILENCE_SECONDS", 12.0)
    session.reset()
    with pytest.raises(GuestStoppedError, match="has not answered for 12 s") as caught:
        session.run("rmmod kcov_bridge && echo freeze >/sys/power/state")
    assert "suspended itself to idle" in caught.value.hint
    with pytest.raises(GuestStoppedError):
        session.run(["true"])
    session.reset()
    # A command may be silent for longer, as long as the agent is not; it needs nobody else.
    session.run("pkill -STOP sshd; kill -STOP -1")
    assert session.run("sleep 24").exit_status == 0


def test_run_guest_suspends_itself_ends_with_status_123(tmp_path: Path, suspend: Path) -> None:
    """The program reaches the guest by way of the target that serves it."""
    served = tmp_path / "served"
    served.mkdir()
    shutil.copy(suspend, served / "suspend")
    out = tmp_path / "out"
    script = "cp /mnt/target/suspend /tmp && chmod +x /tmp/suspend && /tmp/suspend"
    words = ["--source", "python", "--target-dir", str(served), "--", "sh", "-c", script]
    done = run(out, *words)
    assert done.returncode == 123, done.stderr
    assert "the guest suspended itself to memory (ACPI S3)" in done.stderr
