# SPDX-License-Identifier: Apache-2.0
"""The conformance programs in a guest of each personality, and the reader of their reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

import bridge
from bridge.session.session import Session
from tests.support.guests import complaints
from tests.system import conformance
from tests.system.conformance import KNOWN_FAILURES, PERSONALITIES, PROGRAMS, Result, parse

ROUNDS = 200
"""Of the programs that repeat; ``make conformance`` does more."""

CPUS = {"linux": 2, "gvisor": 1}


@dataclass
class Subject:
    """A guest of one personality, and what the programs said there so far."""

    session: Session
    personality: str
    results: dict[str, Result]

    def result(self, program: str) -> Result:
        if program not in self.results:
            self.results[program] = conformance.run_program(
                self.session, program, self.personality, rounds=ROUNDS
            )
        return self.results[program]


@pytest.fixture(scope="module")
def binaries() -> dict[str, Path]:
    return conformance.compile_programs()


@contextmanager
def booted(personality: str, binaries: dict[str, Path]) -> Iterator[Subject]:
    with bridge.boot(
        target="none",
        source="python",
        syscall_pcs=True,
        personality=personality,
        cpus=CPUS[personality],
    ) as session:
        conformance.upload(session, binaries)
        yield Subject(session, personality, {})
        assert complaints(session) == ""
        assert session.device is not None
        assert session.device.enabled == 0
        assert session.device.instances == 0


@pytest.fixture(scope="module")
def subjects(binaries: dict[str, Path]) -> Iterator[Callable[[str], Subject]]:
    """The guest of a personality: one at a time, each booted when it is first asked for."""
    with ExitStack() as stack:
        current: list[Subject] = []

        def subject(personality: str) -> Subject:
            if not current or current[0].personality != personality:
                current.clear()
                stack.pop_all().close()
                current.append(stack.enter_context(booted(personality, binaries)))
            return current[0]

        yield subject


def known(personality: str, program: str) -> list[str]:
    return [rule for who, name, rule in KNOWN_FAILURES if (who, name) == (personality, program)]


def cases() -> Iterator[ParameterSet]:
    """Personality by personality, so that each guest is booted once."""
    for personality in PERSONALITIES:
        for program in PROGRAMS:
            yield pytest.param(personality, program, None, id=f"{personality}-{program}")
        for (who, program, rule), reason in KNOWN_FAILURES.items():
            if who == personality:
                yield pytest.param(
                    *(who, program, rule),
                    id=f"{who}-{program}-{rule}",
                    marks=pytest.mark.xfail(reason=reason, strict=True),
                )


@pytest.mark.vm
@pytest.mark.parametrize(("personality", "program", "rule"), list(cases()))
def test_each_rule_is_kept(
    subjects: Callable[[str], Subject], personality: str, program: str, rule: str | None
) -> None:
    """``rule`` is one that is known to fail; None for all others of the program."""
    subject = subjects(personality)
    result = subject.result(program)
    if rule is not None:
        assert rule not in result.failed
        return
    expected = known(subject.personality, program)
    assert result.problem is None, conformance.table([result])
    assert not set(result.failed) - set(expected), conformance.table([result])


class TestReports:
    GOOD = "ok 1 - one\nnot ok 2 - two\n# got 3, wanted 4\nok 3 - three # SKIP no such\n1..3\n"

    def test_lines(self) -> None:
        result = parse("p", self.GOOD, 1)
        assert result.problem is None
        assert [line.rule for line in result.lines] == ["one", "two", "three"]
        assert result.failed == ["two"]
        assert not result.ok
        assert result.lines[1].detail == "got 3, wanted 4"
        assert result.lines[2].skip == "no such"
        shown = conformance.table([result])
        assert "not ok two  [got 3, wanted 4]" in shown
        assert "skip   three  [no such]" in shown

    @pytest.mark.parametrize(
        ("text", "status", "problem"),
        [
            ("ok 1 - one\n", 0, "no plan"),
            ("ok 1 - one\n1..2\n", 0, "1 lines instead of 2"),
            ("ok 1 - one\n1..1\n", 139, "exit status 139"),
            ("not ok 1 - one\n1..1\n", 0, "exit status 0"),
            ("ok 2 - one\n1..1\n", 0, "out of order"),
            ("Bail out! no device\n", 1, "Bail out! no device"),
            ("1..0\n", 0, "exit status 0"),
            ("", -9, "no plan"),
        ],
    )
    def test_what_is_no_good_report(self, text: str, status: int, problem: str) -> None:
        result = parse("p", text, status)
        assert not result.ok
        assert problem in str(result.problem)
