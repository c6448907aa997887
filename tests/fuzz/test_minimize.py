# SPDX-License-Identifier: Apache-2.0
"""How a case becomes small: by what a real program does with it."""

from __future__ import annotations

import random
import signal
import subprocess
from pathlib import Path

import pytest

from bridge.errors import GuestLostError, UsageError
from bridge.fuzz.findings import Finding
from bridge.fuzz.lane import Execution
from bridge.fuzz.minimize import Minimizer, tries_for
from bridge.fuzz.repro import CaseRunner, wait_seconds
from bridge.fuzz.slot_events import Evidence
from bridge.fuzz.titles import Kind

PROGRAM = r"""
#include <assert.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static int small(long size) { assert(size < 4096); return 0; }
static int plain(char *name) { assert(*name != 'q'); return 0; }
int main(void)
{
	static char input[1 << 16];
	int opened = 0;
	char *line, *rest;

	read(0, input, sizeof(input) - 1);
	for (line = strtok_r(input, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
		if (!strncmp(line, "open ", 5))
			opened = 1;
		if (opened && !strncmp(line, "write ", 6))
			small(atol(line + 6));
		if (!strncmp(line, "mkdir ", 6))
			plain(line + 6);
	}
	return 0;
}
"""
SMALL = "the harness was killed by SIGABRT: Assertion `size < N' failed. in small"
PLAIN = "the harness was killed by SIGABRT: Assertion `*name != 'q'' failed. in plain"


class Programs:
    """Runs a program in place of a slot, which needs no guest to be as new."""

    def __init__(self, program: Path, *, seldom: bool = False) -> None:
        self._program = program
        self._seldom = seldom
        self._runs = 0
        self.resets = 0

    def execute(self, case: bytes, timeout: float) -> Execution:
        self._runs += 1
        if self._seldom and self._runs % 2:
            return Execution(0, (), b"", 0.0)
        done = subprocess.run([self._program], input=case, capture_output=True, timeout=timeout)
        return Execution(-done.returncode, (), done.stderr, 0.0)

    def trouble(self) -> bool:
        return False

    def collect(self, *, timed_out: bool) -> Evidence:
        return Evidence()

    def reset(self, reason: str) -> None:
        self.resets += 1


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("program")
    (directory / "it.c").write_text(PROGRAM)
    subprocess.run(["gcc", "-w", "-o", directory / "it", directory / "it.c"], check=True)
    return directory / "it"


def case_with(*important: str, lines: int = 60) -> bytes:
    rng = random.Random(7)
    others = ["stat", "read", "lseek", "truncate"]
    case = [f"{rng.choice(others)} {rng.randrange(9999)}" for _ in range(lines)]
    places = sorted(rng.sample(range(lines), len(important)))
    for at, line in zip(places, important, strict=True):
        case[at] = line
    return "\n".join(case).encode()


def minimizer(slot: Programs, title: str, **options: int | float) -> Minimizer:
    runner = CaseRunner(slot, timeout=60, settle=0.0)
    return Minimizer(runner, title, **options)  # type: ignore[arg-type]


def test_minimize_leaves_what_leads_to_the_title(program: Path) -> None:
    slot = Programs(program)
    case = case_with("open a 3", "write 70000 77")
    result = minimizer(slot, SMALL).minimize(case)
    assert result.case == b"open \nwrite 7000"
    assert result.complete
    # Each of these is a reset of a guest.
    assert slot.resets < 40
    assert result.runs < 250


def test_minimize_case_of_two_faults_keeps_the_one_that_it_is_for(program: Path) -> None:
    case = case_with("mkdir q", "open a 3", "write 70000 77", "mkdir qq")
    # The first one ends the program, so the case leads to that one alone.
    runner = CaseRunner(Programs(program), timeout=60, settle=0.0)
    assert runner.run(case).title == PLAIN
    assert minimizer(Programs(program), PLAIN).minimize(case).case == b"mkdir q"
    swapped = case_with("open a 3", "write 70000 77", "mkdir q", "mkdir qq")
    assert minimizer(Programs(program), SMALL).minimize(swapped).case == b"open \nwrite 7000"


def test_minimize_without_time_keeps_what_it_has(program: Path) -> None:
    case = case_with("mkdir q")
    result = minimizer(Programs(program), PLAIN, seconds=1e-9).minimize(case)
    assert (result.case, result.complete, result.runs) == (case, False, 0)


def test_minimize_title_that_comes_every_other_time_needs_two_tries(program: Path) -> None:
    slot = Programs(program, seldom=True)
    result = minimizer(slot, PLAIN, tries=2).minimize(case_with("mkdir q", lines=8))
    assert result.case == b"mkdir q"


def test_tries_for_probability() -> None:
    assert [tries_for(same, 10) for same in (10, 9, 5, 1)] == [1, 2, 5, 10]
    with pytest.raises(UsageError, match="did not lead to the finding's title in 10 runs"):
        tries_for(0, 10)


def test_run_guest_that_is_lost_is_no_error_but_a_fault() -> None:
    class Lost(Programs):
        def execute(self, case: bytes, timeout: float) -> Execution:
            raise GuestLostError("the guest was reset from inside")

        def collect(self, *, timed_out: bool) -> Evidence:
            assert not timed_out
            return Evidence(lost="the guest was reset from inside")

    slot = Lost(Path("/bin/true"))
    attempt = CaseRunner(slot, timeout=1, settle=0.0).run(b"x")
    assert (attempt.title, attempt.suspect.status) == ("the guest was reset from inside", None)
    assert slot.resets == 1


def test_run_case_that_does_not_end_is_a_time_out() -> None:
    class Hangs(Programs):
        def execute(self, case: bytes, timeout: float) -> Execution:
            return Execution(None, (), b"", timeout)

    attempt = CaseRunner(Hangs(Path("/bin/true")), timeout=1, settle=0.0).run(b"x")
    assert attempt.faults[0].kind is Kind.TIME_OUT
    assert attempt.suspect.timed_out


def test_wait_seconds_hung_task_is_waited_for() -> None:
    hung = Finding("x", "INFO: task", Kind.KERNEL, timed_out=True)
    assert wait_seconds(hung, 5) > 40
    assert wait_seconds(Finding("x", "WARNING", Kind.KERNEL, status=signal.SIGSEGV), 5) == 5
