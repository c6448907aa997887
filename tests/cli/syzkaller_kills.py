# SPDX-License-Identifier: Apache-2.0
"""What syzkaller's manager starts is killed with SIGKILL again and again: nothing is left or lost.

And guests break themselves: they end, or go on with all that programs need.

``make syzkaller-kills`` runs it: it takes minutes, and is no part of the whole suite.
``KCOV_BRIDGE_SYZKALLER_KILLS`` is the number of kills, ``KCOV_BRIDGE_KILLS_SEED`` repeats the
moments of a run that failed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from bridge.cli.main import main
from bridge.cli.syzkaller_directory import COVERAGE
from bridge.cli.syzkaller_guest import GUESTS_FILE
from tests.cli.test_syzkaller import Manager, checkout, guests
from tests.support import MARK, held_by, started_by, still_there, wait_until_gone
from tests.support.coverage_data import executed
from tests.support.programs import guest_image

pytestmark = pytest.mark.vm

_DEVICE = "/sys/bus/pci/drivers/kcov_bridge/0000:*"
_GUEST_ENDS = {
    "reboot": ("(sleep 1; reboot -f) & true", "the guest was reset from inside"),
    "power off": ("(sleep 1; poweroff -f) & true", "switched off from inside"),
    "device": (f"for each in {_DEVICE}; do echo 1 >$each/remove; done", "kcov is gone"),
    "module": ("rmmod -f kcov_bridge", "kcov is gone"),
    "mount": ("exec 3</mnt/target; umount -f /mnt/target", "a mount of the target is lost"),
}
"""What a guest does to itself, and why it ends then."""
_GUEST_GOES_ON = {
    "sleep": "echo mem >/sys/power/state; echo freeze >/sys/power/state",
    "sshd": "(sleep 1; pkill -9 sshd) & true",
    "disk": "dd if=/dev/zero of=/fill bs=1M",
}
_END_SECONDS = 120.0

KILLS = int(os.environ.get("KCOV_BRIDGE_SYZKALLER_KILLS", "15"))
SEED = int(os.environ.get("KCOV_BRIDGE_KILLS_SEED", random.SystemRandom().getrandbits(32)))
LATEST = 10.0
"""Seconds after the start until which a machine is killed, for two of three kills."""


def session_of(manager: Manager) -> int:
    """The process that has the session."""
    pid = manager.machine.pid
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a campaign with a target."""
    top = tmp_path_factory.mktemp("guests")
    words = ["syzkaller", str(top / "campaign"), "--syzkaller", str(checkout(top / "s"))]
    words += ["--image", guest_image().name, "--source", "python", "--target", "plan9"]
    assert main([*words, "--memory", "256"]) == 0
    return top / "campaign"


@pytest.mark.parametrize("what", _GUEST_ENDS)
def test_guest_breaks_itself_ends_and_says_why(campaign: Path, what: str) -> None:
    results = campaign / COVERAGE
    before = len(guests(results, 0))
    script, why = _GUEST_ENDS[what]
    manager = Manager(campaign)
    try:
        manager.wait_ssh()
        manager.ssh(script)
        # It says much less than a pipe holds.
        assert manager.machine.wait(_END_SECONDS) == 0
    finally:
        manager.kill()
    assert why in str(guests(results, before + 1)[-1]["end"])


@pytest.mark.parametrize("what", _GUEST_GOES_ON)
def test_guest_breaks_nothing_goes_on(campaign: Path, what: str) -> None:
    manager = Manager(campaign)
    try:
        manager.wait_ssh()
        manager.ssh(_GUEST_GOES_ON[what])
        # Longer than two looks at the guest.
        time.sleep(25)
        # A guest without memory is slow. The calls have PCs, and the target answers.
        deadline = time.monotonic() + _END_SECONDS
        while True:
            done = manager.ssh("kcov-doc /mnt/target/README; cat /mnt/target/README")
            if "0xffffffff" in done.stdout and "Files to read" in done.stdout:
                break
            assert time.monotonic() < deadline, done
            time.sleep(1)
        assert manager.machine.poll() is None
    finally:
        manager.kill()


def test_machines_are_killed_at_any_moment_nothing_is_left_or_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    print(f"\nKCOV_BRIDGE_KILLS_SEED={SEED}")
    chance = random.Random(SEED)
    image = guest_image()
    directory = tmp_path / "campaign"
    results = directory / COVERAGE
    words = ["syzkaller", str(directory), "--syzkaller", str(checkout(tmp_path / "s"))]
    words += ["--image", image.name, "--source", "python", "--target", "plan9", "--memory", "256"]
    assert main(words) == 0
    monkeypatch.setenv(MARK, str(directory))
    held, working, killed = [], 0, 0
    for number in range(KILLS):
        # The one before may still add its results: the manager does not wait, either.
        manager = Manager(directory)
        try:
            if number % 3:
                time.sleep(chance.uniform(0, LATEST))
                held.append(held_by(directory))
            else:
                manager.wait_ssh()
                # Only one of them does this.
                act = "mkdir /mnt/target/made" if number == 3 else "cat /mnt/target/README"
                manager.ssh(f"kcov-exec -u -- {act}")
                held.append(held_by(directory))
                if number % 6 == 3 or number == 0:
                    working += 1
                else:
                    # What happens where the memory of the host ends: the session's own process.
                    os.kill(session_of(manager), signal.SIGKILL)
                    killed += 1
        finally:
            manager.kill()
        print(f"kill {number + 1} of {KILLS}")
    wait_until_gone(directory)
    last = Manager(directory)
    try:
        last.wait_ssh()
    finally:
        last.kill()
    ended = guests(results, 1)
    wait_until_gone(directory)
    assert not started_by(directory)
    for each in held:
        left = still_there(each)
        assert not left
    assert not list(results.glob("guest-*"))
    assert not list(results.glob(".*.????????")), "half-written"
    reasons = [str(line["end"]) for line in ended]
    print(*reasons, sep="\n")
    assert reasons.count("the manager ended the guest") >= working + 1
    total = sum(line["stats"]["returns"] for line in ended)  # type: ignore[index]
    summary = json.loads((results / "summary.json").read_text())
    assert summary["returns"] == total
    assert len((results / GUESTS_FILE).read_text().splitlines()) == len(ended)
    assert summary["lost_pcs"] == 0
    (path,) = (each for each in executed(results / ".coverage") if each.endswith("plan9/server.py"))
    source = Path(path).read_text().splitlines()
    lines = {source[line - 1].strip() for line in executed(results / ".coverage")[path]}
    assert any("msg_rread" in line for line in lines), lines
    if KILLS > 3:
        assert any("permission_denied" in line for line in lines), lines
