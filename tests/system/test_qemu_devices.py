# SPDX-License-Identifier: Apache-2.0
"""QEMU's own device models as a source, between the guest kernel's PCs.

Needs the QEMU that ``make qemu-devices`` builds; skipped without it.
"""

from __future__ import annotations

import os
import re
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from bridge.config import Settings
from bridge.errors import GuestLostError, MissingDependencyError
from bridge.results.run_directory import load_native
from bridge.session.session import Session
from bridge.sources.native.modules import NATIVE_BASE, NATIVE_END
from bridge.sources.pcs import SLOT_BYTES
from bridge.vm.config import DEFAULT_QEMU
from bridge.vm.device_models import QEMU, find_qemu

pytestmark = pytest.mark.vm

SETTINGS = Settings(qemu_devices=True, source="kernel", target="none")
# The task itself starts its request, not a worker of the kernel's.
DIRECT = "echo none >/sys/block/vda/queue/scheduler"
READ = ["dd", "if=/dev/vda", "of=/dev/null", "bs=4096", "count=1", "iflag=direct", "status=none"]
BUSY = (
    "(while :; do dd if=/dev/vda of=/dev/null bs=4096 count=64 iflag=direct status=none; done) "
    "</dev/null >/dev/null 2>&1 & echo $!"
)
NOT_COVERED = ("hw/misc/ivshmem.c", "hw/intc/", "hw/timer/", "hw/core/cpu", "hw/i386/x86.c")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def session(directory: Path) -> Iterator[Session]:
    try:
        find_qemu()
    except MissingDependencyError as error:
        pytest.skip(error.report())
    with Session(SETTINGS, directory) as session:
        session.run(DIRECT)
        yield session


def places(session: Session, pcs: Sequence[int]) -> list[tuple[str, str]]:
    """File and function of PCs: the innermost; for the guest's kernel without a file."""
    known: dict[int, tuple[str, str]] = {}
    for pc in {*pcs}:
        text = str(session.symbolize(pc))
        native = re.match(r"\S+/source/(\S+):\d+\.\d+,\d+\.\d+ (\w+)", text)
        if native is not None:
            known[pc] = native[1], native[2]
        elif NATIVE_BASE <= pc < NATIVE_END:
            # A line 0: the compiler's own code.
            known[pc] = "?", text.split()[0]
        else:
            known[pc] = "", text.partition("+")[0]
    return [known[pc] for pc in pcs]


def of_devices(pcs: Sequence[int]) -> list[int]:
    return [pc for pc in pcs if NATIVE_BASE <= pc < NATIVE_END]


def alike(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether one read covered what the other did; one of them may also have loaded dd."""
    fewer, more = sorted(({*one}, {*other}), key=len)
    return len(fewer & more) > 0.8 * len(fewer) > 0


def test_qemu_devices_lie_between_the_code_of_the_driver(session: Session) -> None:
    result = session.kcov(READ, follow=False, unique=False)
    assert result.exit_status == 0
    trace = places(session, result.pcs)
    # virtio's driver rings, the device takes the request, the driver goes on.
    rings = trace.index(("", "vp_notify"))
    takes = trace.index(("hw/block/virtio-blk.c", "virtio_blk_handle_output"))
    assert rings < takes
    assert ("hw/virtio/virtio-pci.c", "virtio_pci_notify_write") in trace[rings:takes]
    after = next(at for at, (file, _) in enumerate(trace) if at > takes and not file)
    assert all(file for file, _ in trace[takes:after])
    assert trace[after][1] in ("iowrite16", "vp_notify", "virtqueue_notify", "virtio_queue_rq")
    # Another thread of QEMU ends the request.
    assert ("hw/block/virtio-blk.c", "virtio_blk_rw_complete") in trace
    files = Counter(file for file, _ in trace if file)
    assert not [file for file in files if file.startswith(NOT_COVERED)], files
    stats = session.stats()
    assert stats.sources == ["kernel", "qemu"]
    assert 0 < stats.blocks_covered < stats.blocks_total


def test_qemu_devices_are_in_no_trace_of_what_uses_none(session: Session) -> None:
    """The bridge's own device rings, QEMU's main loop turns, clocks tick: of that, nothing."""
    result = session.kcov(["sh", "-c", "for i in 1 2 3 4 5; do : </dev/null; done"])
    again = session.kcov(["sh", "-c", "for i in 1 2 3 4 5; do : </dev/null; done"])
    # Its output, if any, has another thread of QEMU work on the agent's port.
    for pcs in (result.pcs, again.pcs):
        files = Counter(file for file, _ in places(session, pcs) if file)
        assert sum(files.values()) < 10, files


def test_qemu_devices_of_another_task_are_not_the_owners(session: Session) -> None:
    busy = session.run(BUSY).text.strip()
    try:
        result = session.kcov(["sh", "-c", "for i in 1 2 3 4 5; do : </dev/null; done"])
    finally:
        session.run(f"kill {busy}")
    mine = {function for file, function in places(session, result.pcs) if file}
    # What the vCPU's thread runs for another task; the request's end is on another thread.
    assert not mine & {"virtio_blk_handle_output", "virtio_pci_notify_write"}, mine


def test_qemu_devices_have_the_same_pcs_after_a_reset_and_in_another_process(
    session: Session, tmp_path: Path
) -> None:
    here = of_devices(session.kcov(READ).pcs)
    pid = session.machine.pid
    session.reset()
    assert session.machine.pid == pid
    session.run(DIRECT)
    again = of_devices(session.kcov(READ).pcs)
    with Session(SETTINGS, tmp_path) as other:
        other.run(DIRECT)
        there = of_devices(other.kcov(READ).pcs)
        told = {pc: other.symbolize(pc) for pc in there}
        covered = other.stats().blocks_covered
    assert alike(here, again)
    assert alike(here, there)
    kept = load_native(tmp_path)
    assert kept is not None
    assert {pc: kept.text(pc) for pc in there} == told
    (module,) = kept.table
    # Some more was covered after the look.
    assert covered <= sum(module.covered)


def test_qemu_devices_are_kept_when_qemu_is_killed(session: Session, tmp_path: Path) -> None:
    here = of_devices(session.kcov(READ).pcs)
    with Session(SETTINGS, tmp_path) as killed:
        killed.run(DIRECT)
        there = of_devices(killed.kcov(READ).pcs)
        os.kill(killed.machine.pid, signal.SIGKILL)
        with pytest.raises(GuestLostError):
            killed.kcov(READ)
    assert alike(here, there)
    kept = load_native(tmp_path)
    assert kept is not None
    (module,) = kept.table
    assert all(module.covered[(pc - module.first_pc) // SLOT_BYTES] for pc in there)


def test_qemu_devices_without_the_kernel(session: Session, tmp_path: Path) -> None:
    """No plugin tells tasks apart: a call gets what was covered during it, on all threads."""
    with Session(SETTINGS.replace(source="python"), tmp_path) as alone:
        alone.run(DIRECT)
        result = alone.kcov(READ, follow=False)
        functions = {function for _, function in places(alone, result.pcs)}
        assert alone.stats().sources == ["qemu"]
    assert {"virtio_blk_handle_output", "virtio_blk_rw_complete"} <= functions


def test_qemu_devices_of_a_qemu_without_coverage() -> None:
    # Booted: the check comes before the guest runs.
    settings = SETTINGS.replace(qemu=f"/usr/bin/{DEFAULT_QEMU}", snapshot=False)
    with (
        pytest.raises(MissingDependencyError, match=r"are not covered: it was not built"),
        Session(settings),
    ):
        pass


def test_the_qemu_is_named_by_its_make_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(QEMU), "find", lambda _: None)
    with pytest.raises(MissingDependencyError, match="is not built yet") as caught:
        find_qemu()
    assert "make qemu-devices" in caught.value.hint
