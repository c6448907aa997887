# SPDX-License-Identifier: Apache-2.0
"""Several processes at work: each call gets what the target did for it, and others get nothing.

The setting ``attribution="all"`` shows that the program notices where they do not.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bridge.session.session import Session
from tests.support.guests import complaints
from tests.support.programs import guest_program

pytestmark = pytest.mark.vm

PROGRAM = Path(__file__).parent / "attribution.c"
DIRECTORY = "/mnt/target/many"


def run(session: Session, workers: int) -> dict[str, int]:
    session.put(guest_program(PROGRAM), "/tmp/attribution", 0o755)
    for seconds in (1.5, 6, 24):
        words = ["/tmp/attribution", DIRECTORY, str(workers), str(seconds)]
        result = session.guest.run(words, timeout=120)
        print(result.text)
        assert result.exit_status == 0, result.text + result.stderr.decode()
        found = {name: int(value) for name, value in re.findall(r"(\w+) (\d+)", result.text)}
        # What a call needs is there in any case.
        assert found["incomplete"] == 0
        # Enough of each that a wrong one would show; on a busy machine that takes longer.
        if found["quiet"] > 1000 and found["stats"] > 10 and found["expected"] > 5:
            return found
    raise AssertionError(f"too few calls to tell: {found}")


@pytest.mark.parametrize("workers", [1, 7])
@pytest.mark.parametrize(
    "cpus",
    [
        pytest.param(cpus, marks=pytest.mark.guest(source="python", cpus=cpus), id=f"{cpus}-cpu")
        for cpus in (1, 2)
    ],
)
def test_calls_that_reach_nothing_get_nothing(session: Session, cpus: int, workers: int) -> None:
    found = run(session, workers)
    assert found["foreign"] == 0
    assert complaints(session) == ""


@pytest.mark.guest(source="python", attribution="all")
def test_attribution_all_gives_each_call_what_others_did(session: Session) -> None:
    assert run(session, 7)["foreign"] > 0
