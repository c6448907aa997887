# SPDX-License-Identifier: Apache-2.0
"""Results of a run that cannot be written: the run says so, and does not succeed."""

from __future__ import annotations

import pytest

pytest_plugins = ["pytester"]


@pytest.mark.parametrize(
    ("obstacle", "workers"),
    [("report.html", ()), ("tests.gw0.jsonl", ("-n1",))],
)
def test_report_that_cannot_be_written_makes_the_run_fail(
    pytester: pytest.Pytester, obstacle: str, workers: tuple[str, ...]
) -> None:
    obstructed = pytester.path / "out" / obstacle
    pytester.makepyfile(
        f"""
        import pathlib

        def test_it():
            pathlib.Path({str(obstructed)!r}, "in the way").mkdir(parents=True)
        """
    )
    result = pytester.runpytest_subprocess("--guest-report=out", *workers)
    outcomes = result.parseoutcomes()
    assert (outcomes["passed"], outcomes["warnings"] > 0) == (1, True)
    assert str(obstructed) in result.stdout.str()
    assert result.ret == pytest.ExitCode.TESTS_FAILED


def test_report_that_is_written_lets_the_run_succeed(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_it(): pass")
    result = pytester.runpytest_subprocess("--guest-report=out", "-n1")
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["report of guest tests: *out/report.html"])
