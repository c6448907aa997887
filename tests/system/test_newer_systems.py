# SPDX-License-Identifier: Apache-2.0
"""What depends on QEMU's version or the guest's kernel, with those of newer Debian releases.

``KCOV_BRIDGE_TEST_RELEASES`` names the releases that are tried (default: ``trixie``): the QEMU of
each with its own image in full, and each of the two with the usual other in one run.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterator

import pytest

import bridge
from bridge.config import Settings
from bridge.guest.images import build
from bridge.session.session import Session
from bridge.sources.guest_kernel.plugin import build_plugin, why_not_loaded
from bridge.sources.pcs import PC_BASE
from tests.support.debian_qemu import debian_qemu
from tests.support.guests import complaints, kernel_functions, never_traced
from tests.support.programs import guest_image
from tests.system import conformance
from tests.system.conformance import KNOWN_FAILURES, PROGRAMS

pytestmark = [pytest.mark.vm, pytest.mark.first]

RELEASES = os.environ.get("KCOV_BRIDGE_TEST_RELEASES", "trixie").split()
ROUNDS = 10
READ = ["cat", "/mnt/target/README"]


@pytest.fixture(scope="module", params=RELEASES)
def release(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def qemu(release: str) -> str:
    return str(debian_qemu(release))


@pytest.fixture(scope="module")
def session(release: str, qemu: str) -> Iterator[Session]:
    with bridge.boot(target="plan9", source="kernel,python", qemu=qemu, image=release) as session:
        yield session
        assert complaints(session) == ""


def has_the_pcs_of_both_sources(session: Session) -> None:
    session.run(READ)
    pcs = session.kcov(READ, follow=False, unique=False).pcs
    names = kernel_functions(session, pcs)
    assert "vfs_read" in names
    assert names.index("do_sys_openat2") < names.index("v9fs_fid_lookup")
    assert sum(pc >= PC_BASE for pc in pcs) > 20
    assert not never_traced(names)


def test_the_qemu_is_another_one(release: str, qemu: str) -> None:
    if platform.freedesktop_os_release().get("VERSION_CODENAME") == release:
        pytest.skip("this machine runs the release itself, so its QEMU is the same")

    def version(program: str) -> str:
        done = subprocess.run([program, "--version"], check=True, capture_output=True, text=True)
        (found,) = re.findall(r"version ([\d.]+)", done.stdout)
        return str(found)

    assert version(qemu) != version(Settings().qemu)


def test_build_plugin_makes_one_that_it_loads(qemu: str) -> None:
    assert why_not_loaded(qemu, build_plugin(qemu)) is None


@pytest.mark.parametrize("newer", ["kernel", "qemu"])
def test_a_call_has_the_pcs_of_both_sources_where_one_part_is_newer(
    release: str, qemu: str, newer: str
) -> None:
    part, image = {
        "qemu": ({"qemu": qemu}, guest_image()),
        "kernel": ({"image": release}, build(release)),
    }[newer]
    # Booted: each snapshot would be one more to make, and to throw another away for.
    with bridge.boot(target="plan9", source="kernel,python", snapshot=False, **part) as session:
        assert session.run("uname -r").text.strip() == image.kernel_release
        assert session.machine.stderr == ""
        has_the_pcs_of_both_sources(session)
        assert complaints(session) == ""


def test_the_kernel_is_another_one_and_starts_from_a_snapshot_without_a_warning(
    session: Session, release: str
) -> None:
    found = session.run("uname -r").text.strip()
    assert found == build(release).kernel_release != guest_image().kernel_release
    assert session.snapshot is not None
    assert session.machine.stderr == ""


def test_a_call_has_the_pcs_of_both_sources(session: Session) -> None:
    has_the_pcs_of_both_sources(session)


def test_children_and_their_programs_are_traced(session: Session) -> None:
    alone = session.kcov(["sh", "-c", "exec true"])
    result = session.kcov(["sh", "-c", "(cat /mnt/target/README) | wc -c; true"])
    assert result.exit_status == 0, result.stderr.decode()
    assert result.untraced == 0
    assert "v9fs_fid_lookup" not in kernel_functions(session, alone.pcs)
    assert "v9fs_fid_lookup" in kernel_functions(session, result.pcs)


def test_replace_network_gives_a_guest_that_is_reset_its_target_again(session: Session) -> None:
    session.machine.replace_network()
    session.reset()
    assert session.run(READ).exit_status == 0


def test_reset_takes_the_guest_back_again_and_again(session: Session) -> None:
    session.run(READ)
    before = set(session.kcov(READ, follow=False).pcs)
    for _ in range(3):
        session.run("touch /tmp/used; modprobe nbd")
        session.reset()
        assert session.run("ls /tmp").text == ""
        session.run(READ)
        after = set(session.kcov(READ, follow=False).pcs)
        assert len(before & after) / len(before | after) > 0.8


def test_each_rule_is_kept(session: Session, release: str, qemu: str) -> None:
    # Of the usual image: what an older release's libraries are enough for runs on a newer one.
    binaries = conformance.compile_programs()
    # Nothing asks the target; with it, the guest starts from the same snapshot as the session's.
    with bridge.boot(
        target="plan9", source="python", syscall_pcs=True, qemu=qemu, image=release
    ) as plain:
        assert plain.snapshot is not None
        assert session.snapshot is not None
        assert plain.snapshot.directory == session.snapshot.directory
        conformance.upload(plain, binaries)
        results = [
            conformance.run_program(plain, program, "linux", rounds=ROUNDS) for program in PROGRAMS
        ]
        known = {(p, rule): why for (who, p, rule), why in KNOWN_FAILURES.items() if who == "linux"}
        assert conformance.differences(results, known)[1] == []
        assert complaints(plain) == ""
