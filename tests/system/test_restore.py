# SPDX-License-Identifier: Apache-2.0
"""What a reset restores of the guest's memory, and that no code runs that was other code before."""

from __future__ import annotations

import mmap
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

import bridge
from bridge.session.session import Session
from bridge.vm.snapshot import Snapshot
from tests.support.guests import complaints

pytestmark = pytest.mark.vm

PAGE = 4096

WAYS = {
    # By its processors: page tables, stacks, the heap, the page cache.
    "processors": "dd if=/dev/zero bs=1M count=12 2>/dev/null | tr '\\0' x >/dev/shm/filled; "
    "for i in $(seq 20); do sh -c : & done; wait; echo x >/etc/hostname",
    # By devices: reads of the disk, random numbers, packets, the agent's port.
    "disk": "cat /usr/lib/x86_64-linux-gnu/*.so* /usr/bin/* 2>/dev/null | head -c 30M >/dev/null",
    "random numbers": "dd if=/dev/hwrng of=/dev/null bs=4k count=16 2>/dev/null",
    "packets": "ls -lR /mnt/target >/dev/null; cat /mnt/target/README >/dev/null",
    "the agent's port": "head -c 1M /dev/zero",
    # Code: of modules, of the kernel itself.
    "modules": "modprobe nbd; modprobe vhci_hcd; rmmod nbd",
    "probes": "cd /sys/kernel/debug/tracing; echo p:opened do_sys_openat2 >kprobe_events; "
    "echo 1 >events/kprobes/opened/enable; cat /etc/passwd >/dev/null; "
    "grep -q opened trace",
}


@contextmanager
def compared(session: Session) -> Iterator[list[int]]:
    """Compare the memory with the snapshot in each reset, when the guest is about to go on."""
    machine, snapshot = session.machine, session.snapshot
    assert snapshot is not None
    different: list[int] = []
    resume = machine.resume

    def look_first() -> None:
        size = os.fstat(snapshot.memory).st_size
        with (
            mmap.mmap(snapshot.memory, size, prot=mmap.PROT_READ) as wanted,
            mmap.mmap(session.memory_fd, size, prot=mmap.PROT_READ) as found,
        ):
            for at in range(0, size, PAGE):
                if wanted[at : at + PAGE] != found[at : at + PAGE]:
                    different.append(at)
        resume()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "resume", look_first)
        yield different


def check_restores(session: Session) -> None:
    with compared(session) as different:
        for _ in range(2):
            for script in WAYS.values():
                result = session.run(script)
                assert result.exit_status == 0, result
            session.reset()
            assert different == []
            # The kernel's code as it was, where it had been changed and had run.
            assert session.run("cat /etc/hostname /etc/passwd").text
            assert session.run("modprobe nbd; grep -c nbd /proc/modules").text
            assert complaints(session) == ""


@pytest.mark.guest(target="plan9", source="python")
def test_reset_restores_the_memory_whoever_wrote_it(session: Session) -> None:
    check_restores(session)
    restored = session.restored
    if session.accelerator.name == "tcg":
        assert restored is not None
        assert restored.hidden == 0
        assert restored.restored <= restored.candidates


def test_reset_from_outside_restores_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler, under KVM, or in a QEMU without plugins."""
    monkeypatch.setenv("KCOV_BRIDGE_PLAIN", "1")
    with bridge.boot(target="plan9", source="python") as session:
        check_restores(session)
        assert session.restored is None


@pytest.mark.guest(target="none", source="python")
def test_reset_code_that_was_other_code_runs_as_it_was_saved(session: Session) -> None:
    """Pages of code that a processor has run, with other contents each time."""
    for turn in range(4):
        name = f"/dev/shm/program{turn % 2}"
        script = f"cp /bin/{'echo' if turn % 2 else 'true'} {name}; {name} a; {name} b"
        assert session.run(script).text == ("a\nb\n" if turn % 2 else "")
        # Probes put other instructions into the kernel's, and into a page beside it.
        session.run(WAYS["probes"])
        session.reset()
        for _ in range(3):
            assert session.run("cat /etc/hostname").text == "kcov-guest\n"
        assert session.run("cat /sys/kernel/debug/tracing/kprobe_events").text == ""
        assert complaints(session) == ""


def test_resets_of_two_guests_at_once_keep_apart() -> None:
    failures: list[BaseException] = []

    def attempt(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    with (
        bridge.boot(target="none", source="python") as first,
        bridge.boot(target="none", source="python") as second,
    ):
        assert isinstance(first.snapshot, Snapshot)

        def resets(session: Session, seed: int) -> None:
            numbers = random.Random(seed)
            with compared(session) as different:
                for turn in range(5):
                    count = numbers.randrange(1, 9)
                    script = f"dd if=/dev/zero bs=1M count={count} 2>/dev/null | tr '\\0' {seed} "
                    session.run(f"{script} >/dev/shm/{turn}")
                    session.reset()
                    assert different == []
                    assert session.run("ls /dev/shm").text == ""

        threads = [
            threading.Thread(target=attempt, args=(lambda s=s, n=n: resets(s, n),))
            for n, s in enumerate((first, second), 1)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
