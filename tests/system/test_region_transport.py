# SPDX-License-Identifier: Apache-2.0
"""The 9p target with the guest's connection through the region, in a real guest."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from bridge import Endpoint, Session, Settings, UsageError
from bridge.results.kernel_export import is_kernel_pc
from bridge.session.target_host import TargetState
from bridge.targets import MOUNT_POINT, TARGET_ADDRESS
from bridge.targets.services import Service, Services

pytestmark = pytest.mark.vm

NETWORK = "/mnt/network"
_SECONDS = 120.0
_REMOVE = """
for device in /sys/bus/pci/devices/*; do
    grep -q 0x1110 "$device/device" && echo 1 >"$device/remove"
done
"""


@pytest.fixture(scope="module")
def started() -> Iterator[Session]:
    # Forked for each reset, so that the service is on another port of the host each time.
    settings = Settings(transport="region", source="python")
    with Session(settings, target_state=TargetState.FORK) as session:
        yield session


@pytest.fixture
def session(started: Session) -> Session:
    started.reset()
    return started


def _run(session: Session, command: str) -> tuple[int, str]:
    done = session.guest.run(command, timeout=_SECONDS)
    return done.exit_status, done.text


def _work(directory: str) -> list[str]:
    script = f"ls -l {directory}; stat {directory}/README; cat {directory}/README"
    return ["sh", "-c", script]


def test_region_mount_is_no_tcp_and_works_after_each_reset(session: Session) -> None:
    for _ in range(2):
        status, mounts = _run(session, f"grep ' {MOUNT_POINT} 9p ' /proc/mounts")
        assert status == 0
        assert "trans=fd" in mounts
        assert _run(session, f"cat {MOUNT_POINT}/README")[0] == 0
        session.reset()


def test_region_covers_the_blocks_that_the_network_covers(session: Session) -> None:
    options = "trans=tcp,port=564,version=9p2000,noextend,cache=none"
    mount = f"mkdir -p {NETWORK} && mount -t 9p -o {options} {TARGET_ADDRESS} {NETWORK}"
    assert _run(session, mount)[0] == 0
    blocks = {}
    for directory in (MOUNT_POINT, NETWORK):
        session.kcov(_work(directory))
        blocks[directory] = set(session.kcov(_work(directory)).pcs)
    assert blocks[MOUNT_POINT]
    assert blocks[MOUNT_POINT] == blocks[NETWORK]


def test_region_large_file_comes_back_as_it_was_written(session: Session) -> None:
    """Several times round both rings."""
    status, said = _run(
        session,
        f"""set -e
        head -c 1000000 /dev/urandom >/tmp/big
        dd if=/tmp/big of={MOUNT_POINT}/README bs=65536 conv=notrunc status=none
        head -c 1000000 {MOUNT_POINT}/README | cmp - /tmp/big""",
    )
    assert (status, said) == (0, "")


def test_region_removed_device_fails_calls_and_a_reset_brings_it_back(session: Session) -> None:
    assert _run(session, _REMOVE + f"timeout 60 cat {MOUNT_POINT}/README")[0] not in (0, 124)
    session.reset()
    assert _run(session, f"cat {MOUNT_POINT}/README")[0] == 0


def test_region_target_dies_calls_fail_and_a_reset_brings_it_back(session: Session) -> None:
    serving = session.target_pid
    assert serving is not None
    os.kill(serving, signal.SIGKILL)
    assert _run(session, f"timeout 60 cat {MOUNT_POINT}/README")[0] not in (0, 124)
    session.reset()
    assert _run(session, f"cat {MOUNT_POINT}/README")[0] == 0


def test_region_kernel_recorded_carries_calls_without_a_complaint() -> None:
    """The 9p client writes on a thread of the kernel, beside the task that is recorded."""
    with Session(Settings(transport="region", source="kernel,python")) as session:
        session.kcov(["true"])
        done = session.kcov(_work(MOUNT_POINT))
        pcs = set(done.pcs)
        log = _run(session, "dmesg")[1]
    assert done.exit_status == 0
    assert any(is_kernel_pc(pc) for pc in pcs)
    assert not all(is_kernel_pc(pc) for pc in pcs)
    assert "WARNING" not in log
    assert "Call Trace" not in log


class _Plain:
    name = "plain"
    packages = ()
    endpoints = (Endpoint("plain", 1, 1),)

    def start(self) -> None: ...

    def stop(self) -> None: ...


def test_region_target_that_does_not_offer_it_is_refused() -> None:
    settings = Settings(transport="region", source="python")
    with (
        pytest.raises(UsageError, match="cannot connect to the target plain by the region"),
        Session(settings, target=Services((Service(_Plain),))),
    ):
        pass
