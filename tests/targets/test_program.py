# SPDX-License-Identifier: Apache-2.0
"""A program as a target: which end of it is a failure."""

from __future__ import annotations

import threading

import pytest

from bridge.targets.program import ProgramTarget


class Ending(ProgramTarget):
    """A program that ends by itself."""

    name = "ending"
    ready_line = "ready"

    def __init__(self, status: int) -> None:
        super().__init__()
        self.status = status

    def command(self) -> list[str]:
        return ["sh", "-c", f"echo ready; sleep 0.2; exit {self.status}"]


class EndingWithGuest(Ending):
    ends_with_guest = True


@pytest.mark.parametrize(
    ("kind", "status", "fails"),
    [
        (Ending, 0, True),
        (Ending, 3, True),
        (EndingWithGuest, 0, False),
        (EndingWithGuest, 3, True),
    ],
)
def test_program_that_ends_by_itself_has_failed_unless_its_guest_has_ended(
    kind: type[Ending], status: int, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    raised: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: raised.append(str(args.exc_value)))
    target = kind(status)
    target.start()
    (watch,) = (each for each in threading.enumerate() if each.name == "ending")
    watch.join(30)
    target.stop()
    assert len(raised) == fails
    assert all(f"ended by itself, with status {status}" in each for each in raised)
