# SPDX-License-Identifier: Apache-2.0
"""Guests that start from a snapshot, and used ones that are taken back to it.

``KCOV_BRIDGE_RESETS`` is the number of resets in a row (10 if it is not given).
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import bridge
from bridge.config import Settings
from bridge.device.abi import AREAS_OFFSET
from bridge.device.region import Region
from bridge.errors import GuestResetError, UsageError
from bridge.session import snapshots
from bridge.session.session import Session
from bridge.sources.pcs import PC_BASE
from bridge.vm.network import LOCALHOST
from bridge.vm.snapshot import Snapshot
from tests.support.guests import complaints, kernel_functions
from tests.support.programs import add_guest_image

pytestmark = pytest.mark.vm

RESETS = int(os.environ.get("KCOV_BRIDGE_RESETS", "10"))
CLOCK_SECONDS = 5.0
"""How far the guest's clock may be off, as seen over SSH on a machine that is busy."""


@pytest.fixture
def no_complaints(session: Session) -> Iterator[None]:
    yield
    assert complaints(session) == ""


used_guest = pytest.mark.usefixtures("no_complaints")
plain_guest = pytest.mark.guest(target="none", source="python", syscall_pcs=True)
served_guest = pytest.mark.guest(target="plan9", source="python")
"""With a target that the guest talks to."""


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with the image and without snapshots."""
    cache = tmp_path / "cache"
    add_guest_image(cache)
    monkeypatch.setenv("KCOV_BRIDGE_CACHE", str(cache))
    return cache


@pytest.fixture(scope="module")
def made_snapshot(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A cache with the image, and beside it the snapshot of the guest with target="none"."""
    cache = tmp_path_factory.mktemp("cache")
    add_guest_image(cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KCOV_BRIDGE_CACHE", str(cache))
        with bridge.boot(target="none", source="python") as session:
            assert isinstance(session.snapshot, Snapshot)
            made = session.snapshot.directory
    return cache, made.rename(tmp_path_factory.mktemp("made") / made.name)


@pytest.fixture
def own_snapshot(made_snapshot: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it in that cache."""
    cache, made = made_snapshot
    monkeypatch.setenv("KCOV_BRIDGE_CACHE", str(cache))
    shutil.rmtree(cache / "snapshots", ignore_errors=True)
    return Path(shutil.copytree(made, cache / "snapshots" / made.name))


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def resident(pid: int | str, what: str = "VmRSS") -> int:
    """Bytes of memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    (kilobytes,) = re.findall(rf"^{what}:\s+(\d+) kB", status, re.M)
    return int(kilobytes) << 10


def used(region: Region) -> list[tuple[int, int]]:
    """Where the region has memory behind the words that belong to no area."""
    found, end = [], AREAS_OFFSET
    while end < region.size:
        try:
            start = os.lseek(region.fd, end, os.SEEK_DATA)
        except OSError:
            break
        end = os.lseek(region.fd, start, os.SEEK_HOLE)
        found.append((start, end))
    return found


def check_clock(session: Session) -> None:
    now = float(session.run("date +%s.%N").text)
    assert abs(now - time.time()) < CLOCK_SECONDS
    hardware = int(session.run("cat /sys/class/rtc/rtc0/since_epoch").text)
    assert abs(hardware - time.time()) < CLOCK_SECONDS + 1


def check_kcov(session: Session) -> None:
    result = session.kcov(["cat", "/etc/hostname"])
    assert result.exit_status == 0
    assert result.pcs
    assert session.device is not None
    assert session.device.enabled == 0


def digest(fd: int) -> str:
    found = hashlib.sha256()
    at, size = 0, os.fstat(fd).st_size
    while at < size:
        found.update(os.pread(fd, 4 << 20, at))
        at += 4 << 20
    return found.hexdigest()


def test_a_guest_starts_from_a_snapshot(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"), bridge.boot(target="none", syscall_pcs=True) as session:
        assert session.snapshot is not None
        assert session.ready is not None
        assert session.ready.boot_seconds < 20
        assert any("(from a snapshot)" in line for line in caplog.messages)
        check_clock(session)
        check_kcov(session)
        # Its time goes on at the host's pace.
        seen = []
        for _ in range(2):
            before = time.monotonic()
            uptime = float(session.run("cut -d' ' -f1 /proc/uptime").text)
            seen.append((before, uptime, time.monotonic()))
            time.sleep(3)
        (begin, first, began), (end, second, ended) = seen
        assert end - began - 0.5 < second - first < ended - begin + 0.5


def test_guests_that_differ_share_one(own_cache: Path) -> None:
    """The sources and the target's port are no part of the guest's state."""
    folder = own_cache / "snapshots"
    with bridge.boot(target="plan9", source="python"):
        pass
    (made,) = folder.iterdir()
    changed = made.stat().st_ctime
    with bridge.boot(target="plan9", source="kernel,python") as session:
        result = session.kcov(["cat", "/mnt/target/README"])
        assert any(pc >= PC_BASE for pc in result.pcs)
        assert any(pc < PC_BASE for pc in result.pcs)
        assert session.snapshot is not None
    assert [path.name for path in folder.iterdir()] == [made.name]
    assert (made / "memory").stat().st_ctime <= changed

    # Another machine has another.
    with bridge.boot(target="none", source="python", memory=320) as session:
        assert "9p" not in session.run("cat /proc/modules").text
        total = int(session.run("grep MemTotal /proc/meminfo").text.split()[1])
        assert total > 256 << 10
        assert session.snapshot is not None
    assert len(list(folder.iterdir())) == 2

    # None where it is not wanted.
    with bridge.boot(target="none", source="python", snapshot=False, memory=384) as session:
        assert session.snapshot is None
        with pytest.raises(UsageError, match="was booted") as caught:
            session.reset()
        assert "snapshot" in caught.value.hint
    assert len(list(folder.iterdir())) == 2

    # And none is kept whose image is gone.
    shutil.rmtree(own_cache / "images")
    snapshots.prune_snapshots()
    assert not list(folder.iterdir())


def test_one_that_does_not_load(own_snapshot: Path, caplog: pytest.LogCaptureFixture) -> None:
    devices = own_snapshot / "devices"
    devices.write_bytes(devices.read_bytes()[:1000] + bytes(devices.stat().st_size - 1000))
    with bridge.boot(target="none", syscall_pcs=True) as session:
        assert session.snapshot is None
        check_kcov(session)
    (line,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "does not start from its snapshot" in line
    assert not own_snapshot.exists(), "the next run makes a good one"


def test_a_guest_that_stays_silent(
    own_snapshot: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Memory that is not the devices' own: what comes of it is not even a panic."""
    memory = own_snapshot / "memory"
    size = memory.stat().st_size
    memory.write_bytes(b"")
    os.truncate(memory, size)
    monkeypatch.setattr("bridge.session.launcher._RESUME_SECONDS", 3.0)
    with bridge.boot(target="none", syscall_pcs=True) as session:
        assert session.snapshot is None
        check_kcov(session)
    assert any("does not start from its snapshot" in line for line in caplog.messages)


def test_two_guests_have_other_random_numbers() -> None:
    script = "head -c 16 /dev/urandom | od -An -tx8; cat /proc/sys/kernel/random/uuid"
    seen: list[str] = []
    for _ in range(2):
        with bridge.boot(target="none", source="python") as session:
            seen += session.run(script).text.split()
            for _ in range(2):
                session.reset()
                seen += session.run(script).text.split()
    assert len(seen) == len(set(seen)) == 18


def key_exchange_cookie(port: int) -> bytes:
    """The random bytes of what sshd says first (RFC 4253, 7.1)."""
    with socket.create_connection((LOCALHOST, port), 30) as sock, sock.makefile("rb") as answer:
        sock.sendall(b"SSH-2.0-test\r\n")
        assert answer.readline().startswith(b"SSH-2.0-OpenSSH")
        head = answer.read(6 + 16)
        assert head[5] == 20, "SSH_MSG_KEXINIT"
        return head[6:]


def test_sshd_of_a_snapshot_has_other_random_numbers_each_time() -> None:
    seen: list[bytes] = []
    for _ in range(2):
        with bridge.boot(target="none", source="python") as session:
            seen += [key_exchange_cookie(session.machine.ssh_port) for _ in range(2)]
            session.reset()
            seen.append(key_exchange_cookie(session.machine.ssh_port))
    assert len(set(seen)) == 6


@plain_guest
@used_guest
def test_all_that_a_guest_has_done_is_gone(session: Session) -> None:
    device, region, machine = session.device, session.region, session.machine
    assert device is not None
    assert region is not None
    look = "cat /proc/modules; ls -R /etc /root /tmp /run"
    before = session.run(look).text
    pid = machine.pid
    uptime = float(session.run("cat /proc/uptime").text.split()[0])
    for _ in range(2):
        script = (
            "echo changed >/etc/hostname; rm -r /root /usr/bin/find; mkdir -p /tmp/a/b; "
            "dd if=/dev/urandom of=/tmp/large bs=1M count=20; modprobe nbd; "
            "date -s 2001-01-01; hostname other; ip link set eth0 mtu 1000 || true; "
            "echo spoilt >/dev/kmsg; "
            "setsid kcov-exec -o /tmp/pcs sleep 1000 >/dev/null 2>&1 & "
            "sleep 2; cat /proc/modules | grep nbd"
        )
        assert "nbd" in session.run(script).text
        assert device.enabled > 0
        assert region.areas_in_use > 0
        # A guest may write where no area is, too.
        os.pwrite(region.fd, b"scribbled", region.size - 4096)
        session.reset()
        assert session.machine.pid == pid
        assert device.instances == device.enabled == region.areas_in_use == 0
        assert used(region) == []
        assert session.run(look).text == before
        assert session.run("dmesg | grep spoilt").exit_status == 1
        assert session.run("hostname; cat /etc/hostname").text.split() == ["kcov-guest"] * 2
        assert session.run("pidof sleep").text == ""
        # The guest's own time goes back as well.
        assert float(session.run("cat /proc/uptime").text.split()[0]) < uptime + 10
        check_clock(session)
        check_kcov(session)
        assert session.run("kcov-doc").exit_status == 0


@served_guest
def test_many_in_a_row(session: Session) -> None:
    snapshot, machine, device = session.snapshot, session.machine, session.device
    assert snapshot is not None
    assert device is not None
    wanted = digest(snapshot.memory)
    resume = machine.resume
    resets = session.resets
    wrong: list[str] = []
    figures: list[tuple[int, ...]] = []

    def look_first() -> None:
        """The last moment before the guest goes on."""
        if len(figures) % max(1, RESETS // 20) == 0 and digest(session.memory_fd) != wanted:
            wrong.append(f"memory after reset {len(figures)}")
        resume()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "resume", look_first)
        for _ in range(RESETS):
            session.run("echo x >/etc/hostname; dd if=/dev/zero of=/tmp/x bs=1M count=4")
            result = session.kcov(["cat", "/mnt/target/README"])
            assert result.exit_status == 0
            assert result.pcs
            session.reset()
            assert session.run("cat /etc/hostname").text == "kcov-guest\n"
            qemu = len(list(Path(f"/proc/{machine.pid}/fd").iterdir()))
            figures.append(
                (descriptors(), qemu, threading.active_count(), resident("self", "RssAnon"),
                 resident(machine.pid, "RssAnon"))
            )  # fmt: skip
    assert not wrong
    assert session.resets == resets + RESETS
    assert device.instances == 0
    # Once warm nothing grows.
    first, last = figures[RESETS // 5], figures[-1]
    print(f"after {RESETS // 5 + 1} resets {first}, after {RESETS} {last}")
    assert abs(last[0] - first[0]) <= 4
    assert abs(last[1] - first[1]) <= 4
    assert abs(last[2] - first[2]) <= 4
    assert last[3] - first[3] < 16 << 20
    assert last[4] - first[4] < 32 << 20
    assert complaints(session) == ""


@plain_guest
@used_guest
def test_a_command_that_runs_fails_with_an_error_of_its_own(session: Session) -> None:
    caught: list[BaseException] = []

    def work(kcov: bool) -> None:
        try:
            if kcov:
                session.kcov(["sleep", "1000"])
            else:
                session.run("sleep 1000")
        except BaseException as error:
            caught.append(error)

    threads = [threading.Thread(target=work, args=(kcov,)) for kcov in (True, False)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    while len(session.run("pidof sleep").text.split()) < 2:
        assert not caught, caught
        assert time.monotonic() < deadline
    session.reset()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert [type(error) for error in caught] == [GuestResetError] * 2
    assert session.run("pidof sleep").text == ""
    check_kcov(session)


@served_guest
def test_the_target_is_there_again(session: Session) -> None:
    script = "cat /mnt/target/README; grep -c /mnt/target /proc/mounts"
    before = session.run(script).text
    for _ in range(3):
        # A file that is open, and a request that is under way.
        session.run("setsid sh -c 'exec 3</mnt/target/README; sleep 100' >/dev/null 2>&1 &")
        session.reset()
        assert session.run(script).text == before
        connections = [line for line in session.machine.connections if "10.0.2.100" in line]
        assert len(connections) == 1
        assert any(pc >= PC_BASE for pc in session.kcov(["cat", "/mnt/target/README"]).pcs)


class TestTheGuestKernelAsASource:
    def test_its_pcs_are_the_same_before_and_after(self) -> None:
        with bridge.boot(target="none", source="kernel", cpus=2) as session:
            kernel = session.kernel
            assert kernel is not None
            modules = dict(kernel.code.modules)

            def trace() -> set[int]:
                # The second time, once all is read and linked.
                session.run("stat /etc/passwd")
                return set(session.kcov(["stat", "/etc/passwd"], follow=False).pcs)

            before = trace()
            for _ in range(2):
                # Code that is other code after the reset, at the same addresses.
                session.run("modprobe nbd; rmmod nbd; modprobe vhci_hcd")
                session.kcov(["cat", "/proc/modules"])
                assert set(kernel.code.modules) > set(modules)
                # One that traces at that very moment.
                session.run("setsid kcov-exec -o /tmp/pcs sh -c 'while :; do :<$0; done' "
                            "/etc/passwd >/dev/null 2>&1 & sleep 1")  # fmt: skip
                assert session.device is not None
                assert session.device.enabled > 0
                session.reset()
                assert session.device.enabled == 0
                assert session.region is not None
                time.sleep(0.5)
                assert used(session.region) == []
                after = trace()
                assert len(before & after) / len(before | after) > 0.9
                texts = kernel.code.symbols.texts(all_modules=True)
                assert all(any(s <= pc < e for s, e, _ in texts) for pc in after)
                names = kernel_functions(session, after)
                assert {"vfs_statx", "__do_sys_newfstatat"} & set(names)
                assert kernel.code.modules == modules
            assert complaints(session) == ""


def test_settings() -> None:
    assert Settings().snapshot is True
    with pytest.raises(UsageError):
        Settings(snapshot=None)  # type: ignore[arg-type]


def test_a_snapshot_that_others_remove_stays_usable(own_snapshot: Path) -> None:
    with bridge.boot(target="none", source="python") as session:
        assert isinstance(session.snapshot, Snapshot)
        assert session.snapshot.directory == own_snapshot
        shutil.rmtree(own_snapshot.parent)
        session.run("touch /tmp/x")
        session.reset()
        assert session.run("ls /tmp").text == ""
