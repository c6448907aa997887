# SPDX-License-Identifier: Apache-2.0
"""What depends on QEMU's version, with the QEMU of a newer Debian: both sources, snapshot, reset.

``KCOV_BRIDGE_TEST_QEMUS`` names the Debian releases whose QEMU is tried (default: ``trixie``).
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import bridge
from bridge.config import Settings
from bridge.session.session import Session
from bridge.sources.guest_kernel.plugin import build_plugin, why_not_loaded
from bridge.sources.pcs import PC_BASE
from tests.support.debian_qemu import debian_qemu
from tests.support.guests import complaints
from tests.system import conformance
from tests.system.conformance import KNOWN_FAILURES, PROGRAMS

pytestmark = pytest.mark.vm

RELEASES = os.environ.get("KCOV_BRIDGE_TEST_QEMUS", "trixie").split()
ROUNDS = 10
READ = ["cat", "/mnt/target/README"]


@pytest.fixture(scope="module", params=RELEASES)
def qemu(request: pytest.FixtureRequest) -> str:
    return str(debian_qemu(request.param))


@pytest.fixture(scope="module")
def session(qemu: str) -> Iterator[Session]:
    with bridge.boot(target="plan9", source="kernel,python", qemu=qemu) as session:
        yield session
        assert complaints(session) == ""


def test_the_qemu_is_another_one(qemu: str) -> None:
    def version(program: str) -> str:
        done = subprocess.run([program, "--version"], check=True, capture_output=True, text=True)
        (found,) = re.findall(r"version ([\d.]+)", done.stdout)
        return str(found)

    assert version(qemu) != version(Settings().qemu)


def test_build_plugin_makes_one_that_it_loads(qemu: str) -> None:
    assert why_not_loaded(qemu, build_plugin(qemu)) is None


def test_a_guest_starts_from_a_snapshot_without_a_warning(session: Session) -> None:
    assert session.snapshot is not None
    assert session.run("uname -s").text.strip() == "Linux"
    assert session.machine.stderr == ""


def test_a_call_has_the_pcs_of_both_sources(session: Session) -> None:
    session.run(READ)
    pcs = session.kcov(READ, follow=False).pcs
    assert session.kernel is not None
    names = {
        symbol.name
        for pc in pcs
        if pc < PC_BASE and (symbol := session.kernel.code.symbols.lookup(pc)) is not None
    }
    assert {"vfs_read", "do_sys_openat2"} <= names
    assert sum(pc >= PC_BASE for pc in pcs) > 20


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


def test_each_rule_is_kept(qemu: str, tmp_path: Path) -> None:
    binaries = conformance.compile_programs()
    with bridge.boot(target="none", source="python", syscall_pcs=True, qemu=qemu) as session:
        conformance.upload(session, binaries)
        results = [
            conformance.run_program(session, program, "linux", rounds=ROUNDS)
            for program in PROGRAMS
        ]
        known = {(p, rule): why for (who, p, rule), why in KNOWN_FAILURES.items() if who == "linux"}
        assert conformance.differences(results, known)[1] == []
        assert complaints(session) == ""
