# SPDX-License-Identifier: Apache-2.0
"""Native programs as targets: what a system call of the guest reached in them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bridge.config import Settings
from bridge.session.session import Session
from bridge.targets import TARGET_ADDRESS
from tests.support.native import DATA, needs_clang

pytestmark = [pytest.mark.vm, needs_clang]

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
