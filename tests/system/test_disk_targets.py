# SPDX-License-Identifier: Apache-2.0
"""Disks that Python on the host serves, behind the real drivers of a guest."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from pathlib import Path

import pytest

import bridge
from bridge import config
from bridge.session.session import Session
from bridge.session.target_host import TargetState
from tests.support.named_calls import make_calls
from tests.system.disk_targets import TEXT, RamDisk

pytestmark = pytest.mark.vm

CACHED = {"target": "tests.system.disk_targets:CachedDisk", "source": "python"}


@pytest.mark.guest(**CACHED)
def test_nbdkit_disk_with_ext4_each_call_reaches_the_plugin(session: Session) -> None:
    opened, read, again = make_calls(session, "open /mnt/disk/file r", "pread 64 0", "pread 64 0")
    assert not opened.error
    assert read.data == TEXT.encode()
    assert "blkcache/backend.py:pread" in read.functions
    assert "blkcache/backend.py:pread" not in again.functions, "the guest's page cache has it"


@pytest.mark.guest(**CACHED)
def test_nbdkit_disk_is_there_after_a_reset(session: Session) -> None:
    session.reset()
    assert session.run("cat /mnt/disk/file").text == TEXT


WRITTEN = {"target": "tests.system.disk_targets:RamDisk", "source": "python"}
DISK = "tests/system/ram_disk.py"


NETWORK = {"target": "tests.system.disk_targets:NetworkDisk", "source": "python"}


@pytest.mark.guest(**NETWORK)
def test_nbd_in_the_guest_each_call_reaches_the_plugin(session: Session) -> None:
    opened, read, written, synced = make_calls(
        session, "open /mnt/disk/file w", "pread 64 0", "write text", "fsync"
    )
    assert not opened.error
    assert read.data == TEXT.encode()
    assert f"{DISK}:pread" in read.functions
    assert written.result == 4
    assert synced.functions >= {f"{DISK}:pwrite", f"{DISK}:flush"}
    assert f"{DISK}:pread" not in synced.functions


@pytest.mark.guest(**NETWORK)
def test_nbd_in_the_guest_is_connected_again_after_a_reset(session: Session) -> None:
    session.guest.run("echo text >/mnt/disk/kept && sync", check=True)
    session.reset()
    assert session.run("cat /mnt/disk/kept; readlink /dev/target/disk").text == "text\n/dev/nbd0\n"


@pytest.mark.guest(**WRITTEN)
def test_nbdkit_disk_is_written_when_a_file_is_synced(session: Session) -> None:
    opened, written, synced = make_calls(session, "open /mnt/disk/new wct", "write text", "fsync")
    assert not opened.error
    assert written.result == 4
    assert f"{DISK}:pwrite" not in written.functions
    assert synced.functions >= {f"{DISK}:pwrite", f"{DISK}:flush"}


@pytest.mark.guest(**WRITTEN)
def test_nbdkit_disk_that_was_written_is_there_after_a_reset(session: Session) -> None:
    session.guest.run("echo text >/mnt/disk/kept && sync", check=True)
    session.reset()
    assert session.run("cat /mnt/disk/kept").text == "text\n"


@pytest.mark.parametrize("state", [TargetState.RESTART, TargetState.FORK])
def test_nbdkit_disk_of_a_target_that_is_renewed_has_its_first_contents_after_a_reset(
    state: TargetState, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A path of its own, and short: sockets lie there.
    with tempfile.TemporaryDirectory(prefix="kb-") as scratch:
        monkeypatch.setenv("TMPDIR", scratch)
        monkeypatch.setattr(tempfile, "tempdir", None)
        with Session(config.load(WRITTEN), target_state=state) as session:
            session.guest.run("echo text >/mnt/disk/new && sync", check=True)
            session.reset()
            assert session.run("ls /mnt/disk").text == "file\nlost+found\n"
        left = [path.name for path in Path(scratch).iterdir() if "kcov-bridge-" in path.name]
        assert left == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nbdkit_that_dies_is_an_error_of_the_guests_disk() -> None:
    with bridge.boot(**WRITTEN) as session:
        (target,) = session.target_objects
        assert isinstance(target, RamDisk)
        os.kill(target.pid, signal.SIGKILL)
        read = session.run("dd if=/dev/target/disk of=/dev/null iflag=direct count=1 skip=9999")
        assert b"Input/output error" in read.stderr
        assert session.run("echo the guest goes on").text
        problems: list[str] = []
        deadline = time.monotonic() + 10
        while not problems and time.monotonic() < deadline:
            problems = session.target_problems()
        assert any("nbdkit" in problem for problem in problems)
