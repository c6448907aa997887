# SPDX-License-Identifier: Apache-2.0
"""The kcov device in a real guest, through programs that know nothing of the bridge."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from bridge.session.session import Session
from tests.support.guests import complaints
from tests.system.conformance import compile_programs, run_program, table, upload

pytestmark = [
    pytest.mark.vm,
    pytest.mark.guest(target="none", source="python", syscall_pcs=True),
]


@pytest.fixture(scope="module")
def binaries() -> dict[str, Path]:
    programs = ["calls_append", "mmap_shared", "owner_ends"]
    return compile_programs(programs)


def test_the_module_goes_and_comes_back(session: Session, binaries: dict[str, Path]) -> None:
    upload(session, binaries)
    held = session.run("exec 3</dev/kcov; rmmod kcov_bridge")
    assert held.exit_status != 0, "an open descriptor holds the module"
    assert "in use" in held.stderr.decode()
    # As the agent does it; the module lies where the image's first archive put it.
    session.run("find / -xdev -name kcov_bridge.ko | head -n 1 >/tmp/where")
    for _ in range(3):
        assert session.run("rmmod kcov_bridge").exit_status == 0
        assert session.run("test -e /dev/kcov").exit_status != 0
        assert session.run('insmod "$(cat /tmp/where)"').exit_status == 0
        results = [run_program(session, name, "linux") for name in binaries]
        assert all(result.ok for result in results), table(results)
    assert complaints(session) == ""


def test_the_documentations_example(session: Session) -> None:
    result = session.run("kcov-doc")
    assert result.exit_status == 0
    found = [int(word, 16) for word in result.text.split()]
    # read(2) is number 0.
    assert [str(session.symbolize(pc)) for pc in found] == ["syscall/x86_64:0.1,0.1"]


def test_the_guest_reads_what_was_lost(session: Session) -> None:
    stats = "/sys/kernel/debug/kcov_bridge_stats"
    # What traces has a row of its own; an area of 512 words has room for 511 PCs.
    script = f"for i in $(seq 300); do : </etc/passwd; done; echo $$; cat {stats}; :"
    text = session.run(f"kcov-exec -n 512 -o /dev/null -- sh -c {shlex.quote(script)}").text
    pid, host, header, *rows = text.splitlines()
    assert host == "host here, timeouts 0, skipped 0, unreleased 0"
    assert header == "slot owner appended dropped timeouts skipped"
    (row,) = [row.split() for row in rows if row.split()[1] != "0"]
    assert row[1] == pid
    assert row[2] == "511"
    assert int(row[3]) > 300, "three calls a round"
    assert row[4:] == ["0", "0"]
    assert session.run(f"cat {stats}").text.splitlines() == [host, header]


def test_the_region_is_mapped_cached(session: Session) -> None:
    """Also where the guest's memory types count: KVM on AMD honours them."""
    # kcov-exec has its area mapped while the command runs.
    types = session.run("kcov-exec -- cat /sys/kernel/debug/x86/pat_memtype_list").text
    device = session.run(
        "cd /sys/bus/pci/devices; cd $(dirname $(grep -l 0x1110 */device)); sed -n 3p resource"
    ).text
    start, end, _ = (int(word, 16) for word in device.split())
    assert end - start + 1 == session.settings.region << 20
    assert start >= 1 << 32, "above 4 GiB, where no MTRR forbids caching"
    entries = re.findall(r"\[mem 0x(\w+)-0x(\w+)\] (\S+)", types)
    inside = [kind for low, _, kind in entries if start <= int(low, 16) <= end]
    assert len(inside) == 2, "the control part and the mapped area"
    assert set(inside) == {"write-back"}
