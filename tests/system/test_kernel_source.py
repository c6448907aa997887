# SPDX-License-Identifier: Apache-2.0
"""The unmodified guest kernel as a source, on the stock image."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import bridge
from bridge.cli.main import main
from bridge.config import Settings
from bridge.errors import (
    GuestLostError,
    GuestPoweredOffError,
    QemuError,
    UnwatchableError,
    UsageError,
)
from bridge.guest.images import compile_for_guest
from bridge.guest.ssh import SshGuest
from bridge.session.session import Session
from bridge.sources.guest_kernel import source
from bridge.sources.guest_kernel.plan import PlanWord
from bridge.sources.pcs import PC_BASE
from tests.support import run, without_plugins
from tests.support.guests import complaints, kernel_functions, never_traced, stalled_host
from tests.support.programs import guest_image

pytestmark = pytest.mark.vm

DEVICE = "/sys/kernel/debug/kcov"
AREA_WORDS = 1 << 19
"""Of a thread that is traced for the host."""
LOOP = "for i in $(seq 10); do {}; done >/dev/null"


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with bridge.boot(target="plan9", source="python,kernel", cpus=2) as session:
        yield session
        assert complaints(session) == ""
        assert session.device is not None
        assert session.device.enabled == 0


def test_one_trace_across_the_machines_boundary(session: Session) -> None:
    result = session.kcov(["cat", "/mnt/target/README"], follow=False, unique=False)
    assert result.exit_status == 0, result.stderr.decode()
    names = kernel_functions(session, result.pcs)
    assert names.index("do_sys_openat2") < names.index("v9fs_fid_lookup")
    # The server's code, after the kernel's of the call that waited for it.
    first_served = next(at for at, pc in enumerate(result.pcs) if pc >= PC_BASE)
    before = kernel_functions(session, result.pcs[:first_served])
    assert "v9fs_fid_lookup" in before
    assert "p9_client_rpc" in before or "p9_client_walk" in before
    after = kernel_functions(session, result.pcs[first_served:])
    assert "__x64_sys_read" in after
    files = {str(session.symbolize(pc)).partition(":")[0] for pc in result.pcs if pc >= PC_BASE}
    assert "pyroute2/plan9/server.py" in files
    assert not never_traced(names)


def has_no_work_of_the_modules(session: Session, program: Path) -> None:
    session.guest.put(program, "/tmp/exit_work", 0o755)
    text = session.guest.run(["/tmp/exit_work", DEVICE], timeout=120, check=True).text
    traces = {int(pcs): int(n) for pcs, n in (line.split() for line in text.splitlines())}
    assert sum(traces.values()) == 300
    # The guest's other tasks interrupt some; the module had its work in half of all.
    assert max(traces.values()) >= 285, traces


@pytest.fixture(scope="module")
def exit_work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = Path(__file__).with_name("exit_work.c")
    return compile_for_guest(guest_image(), source, tmp_path_factory.mktemp("work") / "exit_work")


def test_work_that_waiting_for_the_host_causes_is_in_no_trace(exit_work: Path) -> None:
    """No return is reported; only RESET_TRACE waits."""
    with bridge.boot(target="none", source="kernel") as session:
        has_no_work_of_the_modules(session, exit_work)


def test_work_that_a_reported_return_causes_is_in_no_trace(
    session: Session, exit_work: Path
) -> None:
    has_no_work_of_the_modules(session, exit_work)


def test_work_that_the_call_itself_leaves_for_its_end_is_in_the_trace(session: Session) -> None:
    result = session.kcov(["cat", "/mnt/target/README"], follow=False, unique=False)
    names = kernel_functions(session, result.pcs)
    # The last reference to a file is put by a task work.
    assert {"task_work_run", "__fput", "v9fs_dir_release"} <= set(names)


def test_repeats_and_order_are_kept(session: Session) -> None:
    result = session.kcov(["true"], follow=False, unique=False)
    assert len(result.pcs) > 2 * len(set(result.pcs))
    once = session.kcov(["true"], follow=False)
    assert len(once.pcs) == len(set(once.pcs))


def test_trace_longer_than_the_area_is_whole(session: Session) -> None:
    lost = session.status()["lost_pcs"]
    times = 150
    script = f"i=0; while [ $i -lt {times} ]; do read line </etc/passwd; i=$((i+1)); done"
    result = session.kcov(["sh", "-c", script], unique=False)
    assert result.exit_status == 0, result.stderr.decode()
    assert len(result.pcs) > AREA_WORDS
    assert session.status()["lost_pcs"] == lost
    # Whole from the first file that was opened to the last.
    first = next(pc for pc in result.pcs if kernel_functions(session, [pc]) == ["do_filp_open"])
    assert result.pcs.count(first) >= times


def test_owners_on_two_processors_have_their_own(session: Session) -> None:
    def trace(command: str) -> set[str]:
        result = session.kcov(["sh", "-c", LOOP.format(command)])
        assert result.exit_status == 0, result.stderr.decode()
        return set(kernel_functions(session, result.pcs))

    with ThreadPoolExecutor(2) as both:
        statfs, affinity = both.map(trace, ["stat -f /", "nproc"])
    assert "__do_sys_statfs" in statfs or "user_statfs" in statfs
    assert "sched_getaffinity" not in statfs
    assert not {"__do_sys_statfs", "user_statfs"} & affinity


def test_the_same_program_again(session: Session) -> None:
    """More of this, with figures: tests/bench/bench_kernel.py."""
    runs = [set(session.kcov(["stat", "/etc/passwd"], follow=False).pcs) for _ in range(5)]
    for one in runs[2:]:
        assert len(one & runs[1]) / len(one | runs[1]) > 0.9


def test_root_makes_the_module_describe_the_kernel_again_keeps_the_trace(
    session: Session,
) -> None:
    script = "echo 1 >/sys/kernel/debug/kcov_bridge_host; kill -0 $$"
    result = session.kcov(["sh", "-c", script], follow=False)
    assert result.exit_status == 0, result.stderr.decode()
    names = kernel_functions(session, result.pcs)
    assert "vfs_write" in names
    assert "__x64_sys_kill" in names, "what the shell did afterwards"


def test_an_area_too_small_for_one_call(session: Session) -> None:
    device = session.device
    assert device is not None
    dropped = device.totals.dropped
    result = session.run(["kcov-exec", "-n", "512", "-o", "/tmp/small", "true"])
    assert b"the area is full" in result.stderr
    assert len(session.run("cat /tmp/small").text.split()) == 511
    assert device.totals.dropped > dropped + 1000
    assert session.status()["lost_pcs"] == device.totals.dropped


def test_modules_come_and_go_while_tasks_are_traced(session: Session) -> None:
    kernel = session.kernel
    assert kernel is not None
    before = set(kernel.code.modules)
    script = "for i in 1 2 3; do modprobe nbd && rmmod nbd; done"
    result = session.kcov(["sh", "-c", script])
    assert result.exit_status == 0, result.stderr.decode()
    assert set(kernel.code.modules) == before
    # Gone before anybody could ask for its symbols, but where it was is known, and only that.
    texts = kernel.code.symbols.texts(all_modules=True)
    (place,) = [(start, end) for start, end, module in texts if module == "nbd"]
    assert any(place[0] <= pc < place[1] for pc in result.pcs)
    for pc in result.pcs:
        assert pc >= PC_BASE or any(start <= pc < end for start, end, _ in texts), hex(pc)
    session.run("modprobe nbd")
    session.kcov(["true"])
    assert "nbd" in kernel.code.modules
    assert kernel.code.symbols.lookup(kernel.code.modules["nbd"].canonical + 64) is not None


def test_modules_loaded_while_the_host_stalls_keep_their_names(session: Session) -> None:
    """The host reads a request that the guest has given up, with the name that belongs to it."""
    kernel = session.kernel
    assert kernel is not None
    session.run("rmmod nbd; rmmod virtio_balloon")
    with stalled_host(session, timeout_ms=100):
        session.guest.run("modprobe nbd && modprobe virtio_balloon", check=True, timeout=60)
    session.kcov(["true"])
    loaded = session.run("cat /proc/modules").text.splitlines()
    bases = {line.split()[0]: int(line.split()[5], 16) for line in loaded}
    for name in ("nbd", "virtio_balloon"):
        assert kernel.code.modules[name].base == bases[name], name
    assert session.stats().guest_skipped > 0, "what could not be told is counted"
    session.run("rmmod nbd; rmmod virtio_balloon")


def test_reset_what_is_translated_stays_watched(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also code of modules that were unloaded, with other modules in their place."""
    # However slow this machine is.
    monkeypatch.setattr(source, "_QUIET_SECONDS", 600.0)
    kernel = session.kernel
    assert kernel is not None
    session.reset()
    modules = dict(kernel.code.modules)

    def trace() -> set[int]:
        session.run(["cat", "/mnt/target/README"])
        result = session.kcov(["cat", "/mnt/target/README"], follow=False)
        return {pc for pc in result.pcs if pc < PC_BASE}

    before = trace()
    assert {"p9_client_walk", "v9fs_fid_lookup"} <= set(kernel_functions(session, before))
    for _ in range(2):
        session.run("umount /mnt/target; rmmod 9p 9pnet_fd 9pnet; modprobe vhci_hcd; modprobe nbd")
        assert set(kernel.code.modules) ^ set(modules) >= {"9p", "9pnet", "nbd"}
        session.kcov("cat /sys/block/nbd0/size /sys/devices/platform/vhci_hcd.0/nports")
        translations = kernel.plan.words[PlanWord.RESETS]
        session.reset()
        assert kernel.code.modules == modules
        after = trace()
        assert kernel.plan.words[PlanWord.RESETS] == translations
        assert len(before & after) / len(before | after) > 0.9
        assert {"p9_client_walk", "v9fs_fid_lookup"} <= set(kernel_functions(session, after))


def test_nothing_is_watched_once_nobody_traces(session: Session) -> None:
    plan = session.kernel
    assert plan is not None
    session.kcov(["true"])
    session.run("sleep 4")
    assert plan.plan.words[8] == 0, "the bridge does not want it any more"
    assert plan.plan.words[16] == 0, "and the plugin has stopped"
    assert session.kcov(["true"]).pcs, "until somebody does again"


def test_another_kernel_in_the_place_of_this_one(tmp_path: Path) -> None:
    """kexec out of a task that traces, then a reboot out of one."""
    image = guest_image()
    program = compile_for_guest(image, Path(__file__).with_name("kexec.c"), tmp_path / "kexec")
    command = ["stat", "/etc/passwd"]
    # The only guest with that much memory: a snapshot of it takes longer than a boot.
    with bridge.boot(target="none", source="kernel", memory=512, snapshot=False) as session:
        kernel, device, doorbell = session.kernel, session.device, session.doorbell
        assert kernel is not None
        assert device is not None
        assert doorbell is not None
        before = session.kcov(command, follow=False)
        assert "vfs_statx" in kernel_functions(session, before.pcs)
        for local, name in (
            (program, "kexec"),
            (image.vmlinuz, "kernel"),
            (image.initrd, "initrd"),
        ):
            session.put(local, f"/tmp/{name}", 0o755)
        # It never ends: there is nobody left to say so.
        session.run("setsid /tmp/kexec /tmp/kernel /tmp/initrd </dev/null >/dev/ttyS0 2>&1 &")
        offsets: list[int | None] = [kernel.offset]
        end = time.monotonic() + 300
        while len(offsets) < 3 and time.monotonic() < end:
            offset = doorbell.call(lambda: kernel.offset)
            if (offset is None) != (offsets[-1] is None):
                offsets.append(offset)
                assert kernel.plan.words[PlanWord.WANT] == 0
            time.sleep(0.02)
        assert [offset is None for offset in offsets] == [False, True, False], offsets
        (left,) = [kcov for _, kcov in doorbell.call(doorbell.instances)]
        doorbell.call(lambda: device.count_watched(left))
        assert left.appended > 1000

        guest = SshGuest(session.machine.ssh_port, image.ssh_key, image.host_key.read_text())
        with guest:
            guest.connect(timeout=120)
            # The session's own connection was to the kernel of before.
            session._running.running.guest = session._running.executor._guest = guest  # type: ignore[attr-defined]
            session.run("mkdir -p /run/kcov-bridge")
            appended = device.totals.appended
            after = session.kcov(command, follow=False)
            assert after.exit_status == 0, after.stderr.decode()
            assert device.totals.appended - appended >= len(after.pcs)
            assert device.enabled == 0, "of the old kernel nothing is left"
            kernel_functions(session, after.pcs)
            both = set(before.pcs) & set(after.pcs)
            assert len(both) > 0.85 * len({*before.pcs, *after.pcs})
            with pytest.raises(GuestLostError):
                session.kcov(["reboot", "-f"])
        # The connection may be gone before QEMU has said why.
        end = time.monotonic() + 30
        while session.machine.loss is None and time.monotonic() < end:
            time.sleep(0.02)
        assert isinstance(session.machine.loss, GuestPoweredOffError)
        assert "was reset" in session.machine.loss.message
        assert "__do_sys_reboot" in kernel_functions(session, session.partial_pcs)


def test_a_filter() -> None:
    with bridge.boot(source="kernel", kernel_include="v9fs_* module:9pnet") as session:
        result = session.kcov(["cat", "/mnt/target/README"])
        names = kernel_functions(session, result.pcs)
        assert names
        kernel = session.kernel
        assert kernel is not None
        for pc in result.pcs:
            symbol = kernel.code.symbols.lookup(pc)
            assert symbol is not None
            assert symbol.name.startswith("v9fs_") or symbol.module == "9pnet"
        assert {"v9fs_fid_lookup", "p9_client_rpc"} <= set(names)


def test_a_run_and_its_exports(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    command = ["cat", "/mnt/target/README"]
    # In a process of its own: coverage.py measures this one for the other tests.
    program = [sys.executable, "-m", "bridge", "run", "--source", "kernel,python", "--out", out]
    subprocess.run([*program, "--", *command], check=True, timeout=300)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["kernel_blocks_covered"] > 1000
    assert summary["pcs"] >= summary["pcs_unique"] > summary["kernel_blocks_covered"] - 1
    for form in ("rawcover", "drcov"):
        assert main(["export", "--run", out, "--format", form, "-o", f"{out}/{form}"]) == 0
        assert (tmp_path / "run" / form).stat().st_size > 10_000


def test_a_plugin_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.so"
    broken.write_text("no object file")
    monkeypatch.setattr("bridge.sources.guest_kernel.plugin.build_plugin", lambda qemu: broken)
    with (
        pytest.raises(UnwatchableError, match="cannot load the plugin") as caught,
        bridge.boot(target="none", source="kernel"),
    ):
        pass
    assert "--source python" in caught.value.report()
    assert "broken.so" in caught.value.report()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the session has warned of."""
    return [
        record.getMessage()
        for record in caplog.records
        if (record.name, record.levelname) == ("bridge.session.launcher", "WARNING")
    ]


def test_a_qemu_without_plugins(tmp_path: Path) -> None:
    """Asked for it is an error; by default the run goes on without the kernel, and says so."""
    qemu = str(without_plugins(tmp_path))
    with (
        pytest.raises(UnwatchableError, match="cannot load the plugin") as caught,
        bridge.boot(target="none", source="kernel", qemu=qemu, snapshot=False),
    ):
        pass
    assert "plugin interface not enabled" in caught.value.evidence
    out = tmp_path / "out"
    words = ["--accel", "tcg", "--qemu", qemu, "--no-snapshot"]
    result = run(out, *words, "--", "cat", "/mnt/target/README")
    assert result.returncode == 0, result.stderr
    (said,) = [line for line in result.stderr.splitlines() if "is not recorded" in line]
    assert "the guest kernel is not recorded: this QEMU cannot load the plugin" in said
    assert "plugin interface not enabled" in said
    assert "install a QEMU with TCG plugins" in said
    assert "imported before" not in result.stderr, "the target is started once"
    assert json.loads((out / "summary.json").read_text())["sources"] == ["python"]
    pcs = [int(line, 16) for line in (out / "pcs.txt").read_text().split()]
    assert pcs
    assert min(pcs) >= PC_BASE
    assert not list(out.glob("kernel-*"))


def test_by_default_it_goes_without_the_kernel_where_it_must(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As far as to a QEMU that does not start."""
    guest_image()
    qemu = tmp_path / "broken-qemu"
    qemu.write_text("#!/bin/sh\necho a library is missing >&2\nexit 127\n")
    qemu.chmod(0o755)
    everything: dict[str, Any] = {"target": "none", "accel": "tcg", "qemu": str(qemu)}
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        pytest.raises(UnwatchableError, match="has no C compiler"),
        bridge.boot(source="kernel", **everything),
    ):
        pass
    caplog.clear()
    with pytest.raises(QemuError, match="status 127"), bridge.boot(**everything):
        pass
    (said,) = warnings(caplog)
    assert "has no C compiler" in said
    assert "install gcc and libc6-dev" in said


def test_not_under_kvm() -> None:
    settings = Settings(source="kernel")
    with pytest.raises(UsageError, match="KVM"):
        settings.sources("kvm")
    assert settings.sources("tcg") == {"kernel"}
    assert Settings(source="kernel,python").sources("tcg") == {"kernel", "python"}
