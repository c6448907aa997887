# SPDX-License-Identifier: Apache-2.0
"""What depends on the guest's kernel, with the kernels of newer Debian releases.

``KCOV_BRIDGE_TEST_IMAGES`` names the recipes whose images are tried (default: ``trixie``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

import bridge
from bridge.guest.images import build
from bridge.session.session import Session
from bridge.sources.pcs import PC_BASE
from tests.support.guests import complaints
from tests.support.programs import guest_image
from tests.system import conformance
from tests.system.conformance import KNOWN_FAILURES, PROGRAMS

pytestmark = pytest.mark.vm

RECIPES = os.environ.get("KCOV_BRIDGE_TEST_IMAGES", "trixie").split()
ROUNDS = 10
READ = ["cat", "/mnt/target/README"]


@pytest.fixture(scope="module", params=RECIPES)
def image(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def session(image: str) -> Iterator[Session]:
    with bridge.boot(target="plan9", source="kernel,python", image=image) as session:
        yield session
        assert complaints(session) == ""


def test_the_kernel_is_another_one_and_starts_from_a_snapshot(session: Session, image: str) -> None:
    release = session.run("uname -r").text.strip()
    assert release == build(image).kernel_release != guest_image().kernel_release
    assert session.snapshot is not None


def test_a_call_has_the_pcs_of_both_sources(session: Session) -> None:
    session.run(READ)
    pcs = session.kcov(READ, follow=False, unique=False).pcs
    assert session.kernel is not None
    names = []
    for pc in pcs:
        if pc < PC_BASE:
            symbol = session.kernel.code.symbols.lookup(pc)
            assert symbol is not None, hex(pc)
            names.append(symbol.name)
    assert names.index("do_sys_openat2") < names.index("v9fs_fid_lookup")
    assert sum(pc >= PC_BASE for pc in pcs) > 20
    # What Linux' kcov leaves out, and what is ours.
    assert not {"__schedule", "entry_SYSCALL_64", "asm_exc_page_fault"} & set(names)
    assert not [name for name in names if name.startswith("kb_")]


def test_children_and_their_programs_are_traced(session: Session) -> None:
    alone = session.kcov(["sh", "-c", "exec true"])
    result = session.kcov(["sh", "-c", "(cat /mnt/target/README) | wc -c; true"])
    assert result.exit_status == 0, result.stderr.decode()
    assert result.untraced == 0
    assert session.kernel is not None
    names = [
        {symbol.name for pc in pcs if (symbol := session.kernel.code.symbols.lookup(pc))}
        for pcs in (alone.pcs, result.pcs)
    ]
    assert "v9fs_fid_lookup" not in names[0]
    assert "v9fs_fid_lookup" in names[1]


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


def test_each_rule_is_kept(image: str) -> None:
    # Of the usual image: what an older release's libraries are enough for runs on a newer one.
    binaries = conformance.compile_programs()
    with bridge.boot(target="none", source="python", syscall_pcs=True, image=image) as session:
        conformance.upload(session, binaries)
        results = [
            conformance.run_program(session, program, "linux", rounds=ROUNDS)
            for program in PROGRAMS
        ]
        known = {(p, rule): why for (who, p, rule), why in KNOWN_FAILURES.items() if who == "linux"}
        assert conformance.differences(results, known)[1] == []
        assert complaints(session) == ""
