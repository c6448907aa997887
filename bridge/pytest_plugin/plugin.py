# SPDX-License-Identifier: Apache-2.0
"""What pytest calls: options, markers, fixtures, and the checks around each test.

This module imports only pytest and the standard library; see the package.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from bridge.pytest_plugin.guest import Guest
    from bridge.pytest_plugin.kcov import Kcov
    from bridge.pytest_plugin.machines import Lease, Machines
    from bridge.pytest_plugin.recorder import Recorder

__all__ = ["LINES", "REPORT"]

_FIXTURE = "guest"
_TARGET = "target"
_SCOPES = ("session", "module", "function")
_REQUIRE = "KCOV_BRIDGE_REQUIRE"
"""An environment variable: 1 makes a missing program a failure of the test instead of a skip."""

_SCOPE_HINT = (
    "the guest is lent to one test at a time, so a fixture that takes it has the scope function. "
    'To prepare a guest once for a file, mark the tests with guest(reset="module"), and let the '
    "fixture look whether the guest is prepared already."
)

LINES = "guest_lines"
"""Lines by context: the attribute of a report, and the key of a worker's input and output."""
INCOMPLETE = "guest_incomplete"
"""The key of a worker's output that says that it could not write all results."""
REPORT = "guest_report"
"""The key of a worker's input for the directory of the report."""

_MACHINES: pytest.StashKey[Machines] = pytest.StashKey()
_LEASE: pytest.StashKey[Lease] = pytest.StashKey()
_RECORDER: pytest.StashKey[Recorder] = pytest.StashKey()
_CONTEXT: pytest.StashKey[str] = pytest.StashKey()
"""The phase of a test that runs now, as coverage data names it."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("guest", "guests (kcov-bridge)")
    group.addoption(
        "--guest-image",
        metavar="IMAGE",
        help="guest image: a recipe such as trixie, or a name from `kcov-bridge image list`",
    )
    group.addoption(
        "--guest-accel",
        choices=("auto", "kvm", "tcg"),
        help="accelerator: auto takes KVM where it can boot a stock kernel, else TCG",
    )
    group.addoption(
        "--guest-scope",
        choices=_SCOPES,
        default="session",
        help="how long a guest lives: for all tests that ask for the same one (session, the "
        "default), for those of a module, or for one test (function)",
    )
    # Each form is an option of its own: an optional argument would take the path after it.
    group.addoption(
        "--guest-keep",
        "--guest-keep=always",
        action="store_const",
        const="always",
        dest="guest_keep",
        help="keep the guest at the end, print how to get in, and wait for Ctrl-C",
    )
    group.addoption(
        "--guest-keep=failed",
        action="store_const",
        const="failed",
        dest="guest_keep",
        help="the same with the guest of the first test that fails",
    )
    group.addoption(
        "--guest-shell",
        action="store_true",
        help="open a shell in the guest of each test that fails",
    )
    group.addoption(
        "--guest-cov",
        action="store_true",
        help="write the lines of targets that tests reached, with the tests as contexts, into "
        "coverage.py's data file; not needed with pytest-cov or `coverage run`, whose data they "
        "join",
    )
    group.addoption(
        "--guest-report",
        metavar="DIR",
        help="write a report of the tests, and what they reached, into this directory",
    )
    parser.addini(
        "guest_ignore",
        type="linelist",
        help="regular expressions: lines of the guest's kernel log, or texts of errors of the "
        "target, that do not make a test fail",
    )


def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    distributed = getattr(option, "dist", "no") != "no"
    if distributed and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Controller(config), "guest_controller")
    if distributed and (option.guest_keep or option.guest_shell):
        raise pytest.UsageError(
            "--guest-keep and --guest-shell need the terminal, which the workers of pytest-xdist "
            "do not have: leave out -n"
        )
    config.addinivalue_line(
        "markers",
        "guest(reset='test', ignore=(), **settings): the test's guest has these settings of "
        "kcov-bridge (memory, cpus, image, target, source, personality, ...); reset says how often "
        "it becomes as new: before each test, before each module, or never; ignore takes regular "
        "expressions as guest_ignore does",
    )
    config.addinivalue_line(
        "markers",
        "target(*targets, reset='keep', **arguments): what the test's guest reaches: names "
        '("module:Class"), classes, which are called with the arguments, or instances; several '
        "are there at once; reset says what becomes of them when the guest becomes as new: keep, "
        "restart, or fork",
    )


@pytest.hookimpl(tryfirst=True)  # before workers are started
def pytest_sessionstart(session: pytest.Session) -> None:
    option = session.config.option
    if option.guest_report and not option.collectonly:
        from bridge.pytest_plugin.recorder import prepare

        prepare(session.config)


def pytest_unconfigure(config: pytest.Config) -> None:
    machines = config.stash.get(_MACHINES, None)
    if machines is not None:
        machines.close()


def _machines(config: pytest.Config) -> Machines:
    """Return the guests of this process, which are made when the first test asks for one."""
    machines = config.stash.get(_MACHINES, None)
    if machines is None:
        from bridge.pytest_plugin.machines import Machines, options_of

        machines = config.stash[_MACHINES] = Machines(options_of(config))
        _recorder(config).watch(machines)
        _end_in_order(config)
    return machines


def _recorder(config: pytest.Config) -> Recorder:
    """Return the recorder of this process, which is made when there is something to record."""
    recorder = config.stash.get(_RECORDER, None)
    if recorder is None:
        from bridge.pytest_plugin.recorder import Recorder

        recorder = config.stash[_RECORDER] = Recorder(config, config.stash.get(_CONTEXT, ""))
    return recorder


def _end_in_order(config: pytest.Config) -> None:
    """Have SIGTERM and SIGHUP end the run as Ctrl-C does, so that nothing of a guest is left."""
    if threading.current_thread() is not threading.main_thread():
        return

    def received(number: int, frame: FrameType | None) -> None:
        for each in handled:
            signal.signal(each, signal.SIG_IGN)
        pytest.exit(f"{signal.Signals(number).name} was received", returncode=128 + number)

    handled = [
        each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) == signal.SIG_DFL
    ]

    def restore() -> None:
        for each in handled:
            signal.signal(each, signal.SIG_DFL)

    for each in handled:
        signal.signal(each, received)
    config.add_cleanup(restore)


# ---- collection: wrong arguments are found before anything runs, tests of one guest are together


def pytest_itemcollected(item: pytest.Item) -> None:
    # So that -m guest and -m "not guest" choose by the fixture, with the marker or without.
    if _wants_guest(item) and item.get_closest_marker(_FIXTURE) is None:
        item.add_marker(_FIXTURE)


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Let the parameter ``target`` choose the target of a test that does not take the fixture."""
    names = metafunc.fixturenames
    if _FIXTURE not in names or _TARGET in names:
        return
    for marker in metafunc.definition.iter_markers("parametrize"):
        wanted = marker.args[0] if marker.args else marker.kwargs.get("argnames", ())
        if isinstance(wanted, str):
            wanted = [each.strip() for each in wanted.split(",")]
        indirect = marker.kwargs.get("indirect", marker.args[2] if len(marker.args) > 2 else False)
        if _TARGET in wanted and (indirect is True or (indirect and _TARGET in indirect)):
            names.append(_TARGET)
            return


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not any(_wants_guest(item) for item in items):
        return
    from bridge.pytest_plugin.request import group, request_of

    requests = {}
    for item in items:
        if _wants_guest(item):
            try:
                requests[item] = request_of(item)
            except pytest.UsageError:
                if not hasattr(item.config, "workerinput"):
                    raise
                # A worker of pytest-xdist that ends here breaks the whole run: the test fails.
    items[:] = group(items, requests)


def pytest_collection_finish(session: pytest.Session) -> None:
    items = [item for item in session.items if _wants_guest(item)]
    if items and not session.config.option.collectonly:
        _machines(session.config).expect(items)


def _wants_guest(item: pytest.Item) -> bool:
    """Return whether a test takes this plugin's fixture, not one of its own with that name."""
    if _FIXTURE not in getattr(item, "fixturenames", ()):
        return False
    definitions = getattr(item, "_fixtureinfo").name2fixturedefs.get(_FIXTURE, ())  # noqa: B009
    for definition in reversed(definitions):
        if definition.func.__module__ == __name__:
            return True
        if _FIXTURE not in definition.argnames:
            return False
    return False


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> bool | None:
    """Keep what is known before pytest-timeout ends the process; its signals do not."""
    if settings.method != "thread" or not _wants_guest(item):
        return None
    from bridge.pytest_plugin.evidence import set_timer

    set_timer(item, settings, lambda item: item.stash.get(_LEASE, None))
    return True


# ---- fixtures


@pytest.fixture
def guest(request: pytest.FixtureRequest) -> Guest:
    """The guest that the marker ``guest`` asks for, as new."""
    from bridge.errors import MissingDependencyError
    from bridge.pytest_plugin.guest import Guest
    from bridge.pytest_plugin.machines import GivenTarget, StartsFailed
    from bridge.pytest_plugin.target import user_fixture

    machines = _machines(request.config)
    given = None
    if user_fixture(request.node):
        value = request.getfixturevalue(_TARGET)
        lasting = request._get_active_fixturedef(_TARGET).scope != "function"
        given = GivenTarget(value, lasting)
    capture = request.config.pluginmanager.getplugin("capturemanager")
    # An image may be built, which takes minutes and reports its progress.
    shown = capture.global_and_fixture_disabled() if capture else contextlib.nullcontext()
    wrong = ""
    try:
        with shown:
            lease = machines.lease(request.node, given)
    except MissingDependencyError as error:
        if os.environ.get(_REQUIRE) == "1":
            raise
        pytest.skip(error.report())
    except pytest.UsageError as error:
        wrong = str(error)
    except StartsFailed as error:
        request.session.shouldstop = str(error)
        raise
    if wrong:
        pytest.fail(wrong, pytrace=False)
    request.node.stash[_LEASE] = lease
    request.node.user_properties += lease.properties
    return Guest(lease, request.config)


@pytest.fixture
def target(guest: Guest) -> Any:
    """The target that serves the test's guest: an object of the class that the test names.

    With several of them, a tuple. ``@pytest.mark.parametrize("target", [...], indirect=True)``
    chooses it.
    """
    from bridge.pytest_plugin.guest import Guest

    if not isinstance(guest, Guest):
        pytest.fail("the fixture target needs the guest of kcov-bridge", pytrace=False)
    return guest.target


@pytest.fixture
def kcov(guest: Guest) -> Kcov:
    """What commands in the test's guest cover on the host, and in the guest's kernel."""
    from bridge.pytest_plugin.kcov import Kcov

    return Kcov(guest)


# ---- around a test


def _enter(item: pytest.Item, phase: str) -> None:
    """Have lines that run from now on belong to a phase of a test."""
    item.config.stash[_CONTEXT] = context = f"{item.nodeid}|{phase}"
    if (recorder := item.config.stash.get(_RECORDER, None)) is not None:
        recorder.enter(context)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    _enter(item, "setup")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a test whose machine is sick, even if its commands passed."""
    _enter(item, "run")
    if (lease := item.stash.get(_LEASE, None)) is not None:
        lease.watch()
    try:
        yield
    finally:
        # The test may have asked for its guest by itself.
        if (lease := item.stash.get(_LEASE, None)) is not None and lease.traces:
            pcs = sum(len(trace.pcs) for trace in lease.traces)
            item.user_properties.append(("guest_pcs", pcs))
    if lease is not None:
        lease.check()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Iterator[pytest.TestReport]:
    report: pytest.TestReport = yield  # type: ignore[assignment,misc]
    if report.failed and "ScopeMismatch" in report.longreprtext and _wants_guest(item):
        report.sections.append(("guest", _SCOPE_HINT))
    # Nothing of the package is imported for tests without a guest.
    if _MACHINES in item.config.stash or item.config.option.guest_report:
        from bridge.pytest_plugin.reports import complete

        lease = item.stash.get(_LEASE, None)
        kind = complete(report, call, lease)
        _recorder(item.config).note(report, call.start, kind, lease)
    return report  # type: ignore[return-value]


def pytest_exception_interact(
    node: pytest.Item | pytest.Collector, report: pytest.CollectReport | pytest.TestReport
) -> None:
    lease = node.stash.get(_LEASE, None)
    if lease is None or not isinstance(node, pytest.Item):
        return
    if node.config.option.guest_shell:
        from bridge.pytest_plugin.interact import open_shell

        greeting = f"a shell in the guest of {node.nodeid}, which failed; `exit` goes on"
        open_shell(node.config, lease.session, greeting)
    if node.config.option.guest_keep == "failed":
        lease.keep()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """Fail the teardown of a test in which the machine became sick."""
    _enter(item, "teardown")
    if (lease := item.stash.get(_LEASE, None)) is not None:
        lease.settle()
    yield
    if (lease := item.stash.get(_LEASE, None)) is not None:
        lease.check()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Take the guest back when all reports of a test are written."""
    try:
        return (yield)
    finally:
        lease = item.stash.get(_LEASE, None)
        if lease is not None:
            del item.stash[_LEASE]
            lease.release(nextitem)


# ---- around all tests


@pytest.hookimpl(wrapper=True, trylast=True)  # inside the one in which pytest-cov writes its data
def pytest_runtestloop(session: pytest.Session) -> Iterator[None]:
    try:
        return (yield)
    finally:
        _finish(session.config)


def _finish(config: pytest.Config) -> None:
    """End the guests, and record what is left to record."""
    machines = config.stash.get(_MACHINES, None)
    if machines is not None and not config.option.guest_keep:
        machines.close()
    if _RECORDER in config.stash or (config.option.guest_report and not config.option.collectonly):
        _recorder(config).finish()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    try:
        _end_guests(session)
    finally:
        if (recorder := session.config.stash.get(_RECORDER, None)) is not None:
            recorder.write_page()
            if recorder.incomplete and session.exitstatus == pytest.ExitCode.OK:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _end_guests(session: pytest.Session) -> None:
    machines = session.config.stash.get(_MACHINES, None)
    if machines is None:
        return
    if session.config.option.guest_keep and machines.kept:
        from bridge.pytest_plugin.interact import wait_for_user

        wait_for_user(session.config, machines.kept)
    machines.close()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    recorder = config.stash.get(_RECORDER, None)
    if recorder is not None and recorder.coverage_file is not None:
        terminalreporter.write_line(f"coverage data of guest tests: {recorder.coverage_file}")
    elif config.option.guest_cov and (recorder is None or not recorder.joined):
        terminalreporter.write_line(
            "no coverage data of guest tests: they reached no line of a target's packages"
        )
    if recorder is not None and recorder.page is not None:
        terminalreporter.write_line(f"report of guest tests: {recorder.page}")


# ---- the controller of pytest-xdist


class _Controller:
    """What the process that gives tests to workers is told."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        option = self._config.option
        wanted = option.guest_cov or option.guest_report or "coverage" in sys.modules
        node.workerinput[LINES] = bool(wanted)
        if option.guest_report:
            directory = Path(self._config.invocation_params.dir, option.guest_report)
            node.workerinput[REPORT] = str(directory.absolute())

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # Not left to other plugins, which write reports to files or keep them to the end.
        if (lines := vars(report).pop(LINES, None)) is not None:
            _recorder(self._config).receive(lines)
        if str(report.when) == "???" and self._config.option.guest_report:
            _recorder(self._config).note_crash(report)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        output = getattr(node, "workeroutput", {})
        if lines := output.get(LINES):
            _recorder(self._config).receive(lines)
        if output.get(INCOMPLETE):
            _recorder(self._config).incomplete = True
