# SPDX-License-Identifier: Apache-2.0
"""Native programs as targets: what a system call of the guest reached in them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from bridge.config import Settings
from bridge.device.abi import KCOV_CMP_CONST, KCOV_CMP_SIZE
from bridge.session.session import Session
from bridge.targets import TARGET_ADDRESS
from tests.support.native import DATA, needs_clang
from tests.support.programs import guest_program

pytestmark = [pytest.mark.vm, needs_clang]

REQUESTS = {
    "target": "tests.system.native_targets:RequestServer",
    "source": "python",
    "comparisons": True,
}
LINES = {"target": "tests.system.native_targets:LineServer", "source": "python"}


def ask(line: str) -> list[str]:
    """A command that sends a line to the server, and prints its answer."""
    script = f"exec 3<>/dev/tcp/{TARGET_ADDRESS}/7; echo '{line}' >&3; head -n 1 <&3"
    return ["bash", "-c", script]


def code_of(session: Session, pcs: list[int]) -> dict[str, set[int]]:
    """Lines by function, as PCs are symbolized."""
    found: dict[str, set[int]] = {}
    for pc in pcs:
        match = re.fullmatch(r"(.+):(\d+)\.\d+,\d+\.\d+ (\w+)(, .*)?", str(session.symbolize(pc)))
        assert match is not None, session.symbolize(pc)
        assert match[1] == str(DATA / "service.c")
        for function in (match[3], *re.findall(r"inlined into (\w+)", match[4] or "")):
            found.setdefault(function, set()).add(int(match[2]))
    return found


@pytest.mark.guest(**LINES)
def test_native_server_each_command_has_the_code_of_its_answer(session: Session) -> None:
    first = session.kcov(ask("add 20 22"))
    assert first.stdout.decode().strip() == "42"
    second = session.kcov(ask("upper guest"))
    assert second.stdout.decode().strip() == "GUEST"
    one, other = code_of(session, list(first.pcs)), code_of(session, list(second.pcs))
    assert {"serve", "add", "converse"} <= set(one)
    assert {"serve", "upper", "converse"} <= set(other)
    assert "upper" not in one
    assert "add" not in other
    stats = session.stats()
    assert "native" in stats.sources
    assert len({*first.pcs, *second.pcs}) <= stats.blocks_covered < stats.blocks_total


@pytest.mark.guest(**LINES)
def test_native_server_an_instance_does_not_take_blocks_from_another(session: Session) -> None:
    both = session.kcov(["bash", "-c", f"{ask('add 1 1')[2]} & {ask('add 1 1')[2]}; wait"])
    assert both.stdout.split() == [b"2", b"2"]
    assert "add" in code_of(session, list(both.pcs))


def request(requests: str) -> list[str]:
    """A command that sends requests, each when the one before is answered."""
    script = f"exec 3<>/dev/tcp/{TARGET_ADDRESS}/80"
    for each in requests:
        script += f"; printf {each} >&3; head -c 1 <&3"
    return ["bash", "-c", script]


def functions_of(session: Session, pcs: Iterable[int]) -> set[str]:
    """Functions of native PCs; others are left out."""
    native = session.native
    assert native is not None
    frames = (native.places().innermost(pc) for pc in pcs)
    return {frame.function for frame in frames if frame is not None}


@pytest.mark.guest(**REQUESTS)
def test_native_work_for_a_handle_goes_to_the_instance_that_enabled_it(session: Session) -> None:
    session.put(guest_program(Path(__file__).with_name("remote.c")), "/tmp/remote", 0o755)
    done = session.run(f"/tmp/remote {TARGET_ADDRESS} 80 mumcu", timeout=60)
    assert done.exit_status == 0, done.stderr
    found: dict[str, set[int]] = {"remote": set(), "plain": set()}
    for kind, value in (row.split() for row in done.text.splitlines()):
        if kind in found:
            found[kind].add(int(value, 16))
    assert functions_of(session, found["remote"]) == {"common_work", "usb_work"}
    assert {"serve", "plain_work"} <= functions_of(session, found["plain"])
    assert not {"common_work", "usb_work"} & functions_of(session, found["plain"])


@pytest.mark.guest(**REQUESTS)
def test_native_comparisons_are_those_of_the_request(session: Session) -> None:
    records = session.compare(request("x"))
    wanted = (KCOV_CMP_CONST | KCOV_CMP_SIZE(2), 0x6363, ord("x") * 0x101)
    found = {record[:3]: record[3] for record in records}
    assert wanted in found, [tuple(map(hex, record)) for record in records]
    assert functions_of(session, [found[wanted]]) == {"plain_work"}


@pytest.mark.guest(**REQUESTS)
def test_native_trace_has_functions_lines_and_thread_of_the_call(session: Session) -> None:
    calls = session.kcov(request("c"), trace=True, timeout=60).calls
    host = [code for call in calls for code in call.host]
    assert {"serve", "plain_work"} <= {code.function for code in host}
    assert {code.file for code in host} == {str(DATA / "requests.c")}
    assert {code.thread.name for code in host if code.thread is not None} == {"requests"}


def test_native_run_leaves_what_symbolize_needs(tmp_path: Path) -> None:
    from bridge.results.run_directory import load_native

    settings = Settings(target=LINES["target"], source="python")
    with Session(settings, tmp_path) as session:
        result = session.kcov(ask("add -5 2"))
        told = {pc: session.symbolize(pc) for pc in result.pcs}
        total = session.stats().blocks_total
    assert result.stdout.decode().strip() == "minus 3"
    places = load_native(tmp_path)
    assert places is not None
    assert len(places.table) == total
    # The program is gone with the session, so its blocks have places, and no lines.
    for pc in told:
        assert re.fullmatch(r"service\+0x[0-9a-f]+", places.text(pc) or ""), places.text(pc)
