# SPDX-License-Identifier: Apache-2.0
"""The device goes away under the module, and the module under the device's users."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import bridge
from bridge.session.session import Session
from tests.support.guests import SEVERAL_CPUS, TIMEOUT_MS, complaints, stalled_host
from tests.support.programs import guest_program
from tests.system import conformance

pytestmark = pytest.mark.vm

HERE = Path(__file__).parent
ROUNDS = int(os.environ.get("KCOV_BRIDGE_REMOVALS", "4"))
"""Removals under load, and loads of the module."""

DRIVER = "/sys/bus/pci/drivers/kcov_bridge"
MODULE = "/usr/lib/modules/$(uname -r)/extra/kcov_bridge.ko"
STATS = "/sys/kernel/debug/kcov_bridge_stats"
KCOV_INIT_TRACE = 0x80086301


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("removal")
    for path in (HERE / "removal.c", conformance.SOURCES / "kcov_test.h"):
        shutil.copyfile(path, directory / path.name)
    return guest_program(directory / "removal.c")


@pytest.fixture(
    scope="module",
    params=[("python", "linux", SEVERAL_CPUS), ("kernel", "gvisor", 1)],
    ids=["python", "kernel"],
)
def session(request: pytest.FixtureRequest, program: Path) -> Iterator[Session]:
    source, personality, cpus = request.param
    with bridge.boot(
        target="none", source=source, personality=personality, cpus=cpus, syscall_pcs=True
    ) as session:
        session.put(program, "/tmp/removal", 0o755)
        yield session


@pytest.fixture
def guest(session: Session) -> Iterator[Session]:
    """The shared guest, whose kernel has nothing to complain about, before and after the test."""
    assert complaints(session) == ""
    yield session
    assert complaints(session) == ""
    assert session.device is not None
    assert session.device.enabled == 0


def address(session: Session) -> str:
    return session.guest.run(f"basename {DRIVER}/0000:*", check=True).text.strip()


@pytest.mark.parametrize("way", ["remove", "unbind"])
def test_removal_in_use_gives_errors_and_a_rescan_a_new_device(guest: Session, way: str) -> None:
    device = address(guest)
    words = {
        "remove": [f"/sys/bus/pci/devices/{device}/remove", "1", "/sys/bus/pci/rescan", "1"],
        "unbind": [f"{DRIVER}/unbind", device, f"{DRIVER}/bind", device],
    }[way]
    done = guest.guest.run(
        ["/tmp/removal", conformance.DEVICE, guest.settings.personality, *words],
        timeout=600,
        env={"KCOV_ROUNDS": str(ROUNDS)},
    )
    text = (done.stdout + done.stderr).decode(errors="replace")
    result = conformance.parse("removal", text, done.exit_status)
    assert result.ok, conformance.table([result])
    assert guest.device is not None
    assert guest.device.instances == 0


def test_removal_under_kcov_exec_ends_the_command_as_usual(guest: Session) -> None:
    remove = f"/sys/bus/pci/devices/{address(guest)}/remove"
    done = guest.run(
        f"kcov-exec -o /dev/null -- sh -c 'echo 1 >{remove}; grep State /proc/self/status'",
        timeout=60,
    )
    assert "State:" in done.text
    said = guest.run("dmesg | grep -F 'removed: the 1 open instances trace nothing more'")
    assert said.exit_status == 0
    guest.guest.run("echo 1 >/sys/bus/pci/rescan", check=True)
    assert guest.run("kcov-doc").exit_status == 0


def test_removal_while_children_are_followed_leaves_them_untraced(guest: Session) -> None:
    remove = f"/sys/bus/pci/devices/{address(guest)}/remove"
    forks = "i=0; while [ $i -lt 100 ]; do (:); i=$((i+1)); done"
    script = f"({forks}) & ({forks}) & {forks}; echo 1 >{remove}; {forks}; wait; echo done"
    result = guest.kcov(["sh", "-c", script], timeout=600)
    assert (result.exit_status, result.stdout, result.stderr) == (0, b"done\n", b"")
    guest.guest.run("echo 1 >/sys/bus/pci/rescan", check=True)
    assert guest.kcov(["true"]).exit_status == 0
    assert guest.device is not None
    assert guest.device.instances == 0


def test_removal_waits_for_a_last_close_that_waits_for_the_host(guest: Session) -> None:
    initialise = f"open(F, '+<&=3') and ioctl(F, {KCOV_INIT_TRACE}, 512) or die"
    script = f"""
        rm -f /tmp/opened /tmp/close
        (exec 3<>{conformance.DEVICE}; perl -e "{initialise}" && echo >/tmp/opened
         until [ -e /tmp/close ]; do sleep 0.05; done; exec 3>&-) & closing=$!
        until [ -e /tmp/close ]; do sleep 0.05; done; sleep 0.5
        echo 1 >/sys/bus/pci/devices/{address(guest)}/remove & removing=$!
        sleep 1; kill -0 $closing && kill -0 $removing && echo both wait
        echo >/tmp/waiting; wait; echo removed
    """
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(guest.guest.run, script, timeout=120)
        guest.guest.run("until [ -e /tmp/opened ]; do sleep 0.05; done", check=True, timeout=60)
        with stalled_host(guest, timeout_ms=60000):
            wait = "echo >/tmp/close; until [ -e /tmp/waiting ]; do sleep 0.05; done"
            guest.guest.run(wait, check=True, timeout=60)
        done = run.result(120)
    assert done.text == "both wait\nremoved\n", done.stderr
    guest.guest.run("rm /tmp/waiting; echo 1 >/sys/bus/pci/rescan", check=True)
    assert guest.run("kcov-doc").exit_status == 0
    assert guest.device is not None
    assert guest.device.instances == 0


def test_unload_while_open_is_refused(guest: Session) -> None:
    refused = guest.run(f"exec 3<{conformance.DEVICE}; rmmod kcov_bridge")
    assert refused.exit_status != 0
    assert "in use" in refused.stderr.decode()
    assert guest.run("kcov-doc").exit_status == 0


def test_module_loads_again_and_again(guest: Session) -> None:
    """Users come and go meanwhile: they find no device, or a whole one."""
    script = f"""
        (while [ ! -e /tmp/enough ]; do kcov-doc >/dev/null 2>&1; done) & busy=$!
        i=0
        while [ $i -lt {ROUNDS} ]; do
            until rmmod kcov_bridge 2>/dev/null; do sleep 0.01; done
            insmod {MODULE} || exit 1
            i=$((i + 1))
        done
        touch /tmp/enough; wait $busy; rm /tmp/enough
        kcov-doc
    """
    done = guest.run(script, timeout=600)
    assert done.exit_status == 0, done.stderr.decode()
    assert "timeouts 0" in guest.run(f"cat {STATS}").text


def test_timeout_of_zero_is_refused(guest: Session) -> None:
    before = guest.guest.run(f"cat {TIMEOUT_MS}", check=True).text
    assert guest.run(f"echo 0 >{TIMEOUT_MS}").exit_status != 0
    assert guest.run(f"cat {TIMEOUT_MS}").text == before
    loaded = guest.run(f"rmmod kcov_bridge && insmod {MODULE} timeout_ms=0")
    assert "Invalid parameters" in loaded.stderr.decode()
    assert "at least 1" in guest.run("dmesg | tail -n 4").text
    guest.guest.run(f"insmod {MODULE} timeout_ms={before.strip()}", check=True)
    assert guest.run("kcov-doc").exit_status == 0
