# SPDX-License-Identifier: Apache-2.0
"""What tests in a guest cost: pytest with the plugin, beside other ways to test in a guest.

Each turn runs pytest as a process, on a file of small tests. ``suite`` is the time of the whole
process: guests that are reset before each test, with one guest and with two workers; the same
tests over SSH on one guest that is never reset, as labgrid and NixOS's test driver have it; and a
boot for each test with virtme-ng, of which one is measured. A test's cost over its own commands is
its time from set-up to teardown, without its commands. The first command after a reset runs code
that QEMU has to translate again, which is counted apart: as the time that it takes longer than the
same command once more.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from bridge.bench.commands import seconds_to_answer
from bridge.bench.measurement import Bench, Measurement, take_turns
from bridge.bench.ready import environment_of, virtme_of
from bridge.bench.stats import Aim, Comparison, Of, Series
from bridge.config import Settings
from bridge.errors import InfrastructureError
from bridge.session.session import Session

__all__ = [
    "MEASUREMENT",
    "RESET_SUITE",
    "SHARED_SUITE",
    "SuiteRun",
    "run_suite",
    "write_suites",
]

TESTS = 20
RESET_SUITE, SHARED_SUITE = "test_reset.py", "test_shared.py"
_NEEDED = 3
_SECONDS = 600.0
_OVER_AIM = Aim(200.0, of=Of.VALUE)
_OVER_RESET_AIM = Aim(1.1)
_RESET_AIM = Aim(30.0, of=Of.VALUE)
_COLD_AIM = Aim(3.0, of=Of.VALUE)
_WARM_AIM = Aim(1.2, of=Of.VALUE)
_DONE = b"all-tests-have-passed"

_CONFTEST = '''
import json, os, time
import pytest

reports = {{}}

def pytest_runtest_logreport(report):
    entry = reports.setdefault(report.nodeid, {{"seconds": 0.0, "passed": True}})
    entry["seconds"] += report.duration
    entry["passed"] &= report.passed
    entry.update(report.user_properties)
    entry["ended"] = time.time()

def pytest_sessionfinish(session):
    if not hasattr(session.config, "workerinput"):
        with open(os.environ["BENCH_OUT"], "w") as file:
            json.dump(list(reports.values()), file)

def pytest_unconfigure(config):
    if not hasattr(config, "workerinput") and all(each["passed"] for each in reports.values()):
        os.write(1, b"{done}\\n")

@pytest.fixture(scope="session")
def shared():
    """A guest that all tests use as it is, over SSH."""
    import bridge
    from bridge.guest.ssh import SshGuest
    with bridge.boot(target="none", source="python") as session:
        image, machine = session.image.image, session.machine
        key = image.host_key.read_text()
        with SshGuest(machine.ssh_port, image.ssh_key, key, watched=machine) as ssh:
            ssh.connect()
            yield ssh
'''

_TESTS = """
import time
import pytest

@pytest.mark.parametrize("number", range({count}))
def test_small(number, guest, record_property):
    began = time.perf_counter()
    guest.succeed("true")
    first = time.perf_counter()
    guest.succeed("true")
    record_property("first", first - began)
    record_property("again", time.perf_counter() - first)
"""

_SHARED_TESTS = """
import pytest

@pytest.mark.parametrize("number", range({count}))
def test_small(number, shared):
    assert shared.run("true").exit_status == 0
    assert shared.run("true").exit_status == 0
"""


@dataclass(frozen=True)
class SuiteRun:
    """What a run of pytest took.

    Attributes:
        suite: seconds of the whole process.
        first_test: seconds until its first test had ended.
        over: milliseconds of a test over its own commands; 0 for tests that do not time them.
        translation: milliseconds that a test's first command took longer than the same once more.
    """

    suite: float
    first_test: float
    over: float
    translation: float


def _measure(bench: Bench) -> None:
    settings = bench.settings(target="none")
    with ExitStack() as stack:
        out = Path(stack.enter_context(TemporaryDirectory(prefix="kcov-bridge-bench-")))
        run = functools.partial(run_suite, settings.replace(snapshot=True), out)
        write_suites(out, TESTS)
        bench.progress("starting a guest, for the snapshot to be there")
        with Session(settings.replace(snapshot=True), None) as session:
            if session.snapshot is None:
                bench.note("this image cannot be started from a snapshot, nor reset to one")
                return
            resets = [_reset(session) for _ in range(_NEEDED + 8)][2:]
        ways: dict[str, Callable[[], SuiteRun]] = {
            "one guest": functools.partial(run, RESET_SUITE),
            "over SSH": functools.partial(run, SHARED_SUITE),
        }
        if find_spec("xdist") is not None:
            ways["two workers"] = functools.partial(run, RESET_SUITE, "-n", "2")
        else:
            bench.note("pytest-xdist is not installed: no suite with two workers")
        boot = virtme_of(bench, settings, stack)
        bench.progress(f"suites of {TESTS} tests in turn: {', '.join(ways)}")
        taken = take_turns(ways, _NEEDED, warm_up=0 if bench.quick else 1)
        bench.progress("a first test without a snapshot")
        booted_first = settings.replace(snapshot=False)
        cold = [
            run_suite(booted_first, out, f"{RESET_SUITE}::test_small[0]") for _ in range(_NEEDED)
        ]
        boots = [boot() for _ in range(_NEEDED)] if boot is not None else []
    ours, theirs = taken["one guest"], taken["over SSH"]
    reset = Series("reset", tuple(resets))
    bench.add(Comparison("reset", "ms", reset, None, _NEEDED, Of.VALUE, (_RESET_AIM,)))
    over = Series("test", tuple(each.over for each in ours))
    alone = Series("reset", (statistics.median(resets),) * len(ours))
    aims = (_OVER_AIM, _OVER_RESET_AIM)
    bench.add(Comparison("over its commands", "ms", over, alone, _NEEDED, Of.TIMES, aims))
    again = Series("translation", tuple(each.translation for each in ours))
    bench.add(Comparison("translated again", "ms", again, None, _NEEDED, Of.VALUE))
    for case, runs, aim in (
        ("first test, cold", cold, _COLD_AIM),
        ("first, warm", ours, _WARM_AIM),
    ):
        first = Series(case, tuple(each.first_test for each in runs))
        bench.add(Comparison(case, "s", first, None, _NEEDED, Of.VALUE, (aim,)))
    shared = Series("over SSH", tuple(each.suite for each in theirs))
    for name in ("one guest", "two workers"):
        if name in taken:
            suite = Series(name, tuple(each.suite for each in taken[name]))
            bench.add(Comparison(f"{TESTS} tests, {name}", "s", suite, shared, _NEEDED, Of.TIMES))
            if boots:
                booted = Series("virtme-ng", tuple(TESTS * each for each in boots))
                case = f"{TESTS} tests, {name}, to boots"
                bench.add(Comparison(case, "s", suite, booted, _NEEDED, Of.FASTER))


def _reset(session: Session) -> float:
    """Return the milliseconds of a reset after a command."""
    session.guest.run("true", check=True)
    begun = time.perf_counter()
    session.reset()
    return (time.perf_counter() - begun) * 1e3


def write_suites(out: Path, count: int) -> None:
    """Write suites of ``count`` tests each into a directory."""
    (out / "conftest.py").write_text(_CONFTEST.format(done=_DONE.decode()))
    (out / RESET_SUITE).write_text(_TESTS.format(count=count))
    (out / SHARED_SUITE).write_text(_SHARED_TESTS.format(count=count))


def run_suite(settings: Settings, out: Path, tests_in: str, *options: str) -> SuiteRun:
    """Run pytest on tests of a file in ``out``."""
    result = out / "result.json"
    result.unlink(missing_ok=True)
    environment: Mapping[str, str] = {
        **os.environ,
        **environment_of(settings),
        "KCOV_BRIDGE_REQUIRE": "1",
        "BENCH_OUT": str(result),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-s", "--rootdir", str(out)]
    command += ["-p", "no:cacheprovider", "-o", "addopts=", str(out / tests_in)]
    began = time.time()
    seconds = seconds_to_answer([*command, *options], _DONE, timeout=_SECONDS, env=environment)
    tests = json.loads(result.read_text(encoding="utf-8"))
    if not tests:
        raise InfrastructureError("no test has run")
    # The first one starts the guest.
    timed = [each for each in tests[1:] if "first" in each] or [{}]
    first, again, whole = (
        [each.get(name, 0.0) for each in timed] for name in ("first", "again", "seconds")
    )
    over = [of - once - twice for of, once, twice in zip(whole, first, again, strict=True)]
    longer = [once - twice for once, twice in zip(first, again, strict=True)]
    return SuiteRun(
        suite=seconds,
        first_test=min(each["ended"] for each in tests) - began,
        over=statistics.median(over) * 1e3,
        translation=statistics.median(longer) * 1e3,
    )


MEASUREMENT = Measurement("tests", "tests in a guest, with the pytest plugin", _measure)
