# SPDX-License-Identifier: Apache-2.0
"""Traces of ``tests/system/calls.c``: made in a guest, read here."""

from __future__ import annotations

import tempfile
from array import array
from dataclasses import dataclass
from pathlib import Path

from bridge.guest.images import build, compile_for_guest
from bridge.session.session import Session

__all__ = ["Trace", "record"]

SOURCE = Path(__file__).parents[1] / "calls.c"


@dataclass(frozen=True)
class Trace:
    """What one system call left: the name of its kind, its PCs in order."""

    kind: str
    pcs: array[int]


def record(session: Session, device: str, rounds: int) -> list[Trace]:
    """Each kind of call ``rounds`` times, in turn, through this device of the guest."""
    with tempfile.TemporaryDirectory(prefix="kcov-bridge-") as directory:
        program = compile_for_guest(build(), SOURCE, Path(directory) / "calls")
        session.put(program, "/tmp/calls", 0o755)
        result = session.guest.run(
            ["/tmp/calls", device, "/tmp/traces", str(rounds)], timeout=1800, check=True
        )
        names = result.text.split()
        local = Path(directory) / "traces"
        session.get("/tmp/traces", local)
        words = array("Q", local.read_bytes())
    traces = []
    at = 0
    while at < len(words):
        kind, count = words[at : at + 2]
        traces.append(Trace(names[kind], words[at + 2 : at + 2 + count]))
        at += 2 + count
    return traces
