# SPDX-License-Identifier: Apache-2.0
"""What a run with guests leaves behind: coverage data, the record of its tests, reports.

The suite below has a package of the user's own, ``shop``, that its tests call in their own process
and that a guest uses as a target. ``WITHOUT`` in the environment has a client in the same process
take the guest's place, and so says what coverage.py finds where there is no bridge.
"""

from __future__ import annotations

import contextlib
import html
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path

import coverage
import pytest

from bridge.results.test_record import FailureKind, Outcome, read_records
from bridge.trace import read_traces
from bridge.util.cache import cache_directory
from tests.support.coverage_data import executed

pytestmark = pytest.mark.vm

FILES = {
    "shop/__init__.py": "",
    "shop/prices.py": """
        def price(name):
            if name == "apple":
                return 3
            if name == "pear":
                return 5
            raise KeyError(name)


        def discount(total):
            if total > 10:
                return total - 1
            return total


        def stock(name):
            for each in ("apple", "pear"):
                if each == name:
                    return 1
            return 0


        def close():
            return "closed"
        """,
    "shop/server.py": """
        import socketserver

        from shop.prices import discount, price


        class Handler(socketserver.StreamRequestHandler):
            def handle(self):
                try:
                    total = sum(price(word) for word in self.rfile.readline().decode().split())
                    answer = str(discount(total))
                except KeyError as error:
                    answer = f"no {error}"
                self.wfile.write(f"{answer}\\n".encode())
        """,
    "shop_target.py": """
        import socketserver
        import threading

        from bridge import Endpoint
        from bridge.targets import TARGET_ADDRESS


        class Shop:
            name = "shop"
            packages = ("shop",)
            guest_modules = ()
            guest_setup = f"echo {TARGET_ADDRESS} target >>/etc/hosts\\n"
            guest_teardown = ""
            endpoints = ()

            def __init__(self, directory):
                self.server = None

            def start(self):
                from shop.server import Handler

                self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
                self.server.daemon_threads = False  # so that stop() waits for what they run
                self.thread = threading.Thread(target=self.server.serve_forever)
                self.thread.start()
                self.endpoints = (Endpoint("shop", self.server.server_address[1], 7000),)

            def stop(self):
                if self.server is not None:
                    self.server.shutdown()
                    self.thread.join()
                    self.server.server_close()
                    self.server = None

                    from shop.prices import close

                    close()
        """,
    "conftest.py": """
        import os
        import socket

        import pytest

        ASK = 'exec 3<>/dev/tcp/target/7000; echo "$0" >&3; head -n 1 <&3'

        if os.environ.get("WITHOUT"):

            @pytest.fixture(scope="session")
            def server():
                from shop_target import Shop

                shop = Shop(None)
                shop.start()
                yield shop
                shop.stop()

            @pytest.fixture
            def ask(server):
                def ask(words):
                    with socket.create_connection(server.server.server_address) as connection:
                        connection.sendall(words.encode() + b"\\n")
                        return connection.makefile().readline().strip()

                return ask

        else:

            @pytest.fixture
            def ask(guest, kcov):
                def ask(words):
                    with kcov.trace():
                        return guest.succeed(["bash", "-c", ASK, words]).strip()

                return ask
        """,
    "test_shop.py": """
        import threading

        import pytest

        pytestmark = pytest.mark.guest(target="shop_target:Shop", source="python")


        def test_apple(ask):
            assert ask("apple") == "3"


        def test_pear(ask):
            assert ask("pear pear pear") == "14"


        def test_unknown(ask):
            # The test's own thread, and another one, while the target is measured.
            from shop.prices import stock

            thread = threading.Thread(target=stock, args=["apple"])
            thread.start()
            thread.join()
            assert ask("plum") == "no 'plum'"


        def test_unit():
            from shop.prices import stock

            assert stock("plum") == 0
        """,
}
CORES = ["ctrace"] + (["sysmon"] if sys.version_info >= (3, 12) else [])


class Suite:
    """The suite in a directory of its own, where pytest runs in processes of its own."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self.directory = directory
        self.environment = environment
        for name in FILES:
            self.write(name, FILES[name])

    def write(self, name: str, text: str) -> None:
        path = self.directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text).lstrip("\n"))

    def __call__(self, *command: str, status: int = 0, **environment: str) -> str:
        """Run a module of Python, and return what it prints."""
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=self.directory,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == status, done.stdout
        return done.stdout

    def data(self, name: str = ".coverage") -> dict[str, list[int]]:
        """Return the lines of the package in a file of coverage data, by the name of their file."""
        found = executed(self.directory / name)
        return {Path(file).name: lines for file, lines in found.items() if "shop/" in file}

    def contexts(self, file: str, name: str = ".coverage") -> dict[int, set[str]]:
        """Return the contexts of each line of a file of the package."""
        data = coverage.CoverageData(basename=str(self.directory / name))
        data.read()
        try:
            (path,) = [path for path in data.measured_files() if path.endswith(f"shop/{file}")]
            return {line: set(found) for line, found in data.contexts_by_lineno(path).items()}
        finally:
            data.close(force=True)


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Suite:
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("COV", "PYTEST", "KCOV_BRIDGE"))
    }
    environment |= {"KCOV_BRIDGE_REQUIRE": "1", "KCOV_BRIDGE_CACHE": str(cache_directory())}
    return Suite(tmp_path, environment)


PYTEST = ("pytest", "-q", "-p", "no:cacheprovider")
APPLE, PEAR, UNKNOWN = (f"test_shop.py::test_{name}|run" for name in ("apple", "pear", "unknown"))
LINES = {"apple": 3, "pear": 5, "unknown": 6, "discount": 11, "close": 23}
"""Lines of ``shop/prices.py``, each reached for one reason."""


def assert_joined(suite: Suite, *, others: bool) -> None:
    """Assert that each line of the package names the tests that reached it.

    Args:
        suite: after its run.
        others: whether coverage.py itself measured the lines too, without contexts.
    """
    contexts = suite.contexts("prices.py")
    mine = {""} if others else set()
    assert contexts[LINES["apple"]] == {APPLE} | mine
    assert contexts[LINES["pear"]] == {PEAR} | mine
    assert contexts[LINES["unknown"]] == {UNKNOWN} | mine
    assert contexts[LINES["discount"]] == {PEAR} | mine
    assert any(context.endswith("|teardown") for context in contexts[LINES["close"]])


@pytest.mark.parametrize("core", CORES)
def test_join_pytest_cov_has_its_lines_and_the_guests_and_all_reports_say_which(
    suite: Suite, core: str
) -> None:
    cov = ("--cov=shop", "--cov-report=")
    suite(*PYTEST, *cov, WITHOUT="1", COVERAGE_CORE=core)
    without = suite.data()
    assert without["prices.py"] == [*range(1, 7), *range(9, 13), *range(15, 20), 22, 23]
    reports = ("--junitxml=junit.xml", "--html=page/index.html", "--guest-report=out/report")
    output = suite(*PYTEST, *cov, *reports, COVERAGE_CORE=core)
    assert "CoverageWarning" not in output
    assert f"report of guest tests: {suite.directory}/out/report/report.html" in output
    assert suite.data() == without
    assert_joined(suite, others=True)
    assert suite.contexts("prices.py")[LINES["apple"]] == {"", APPLE}
    assert_record(suite.directory / "out/report", suite)
    assert_junit(suite.directory / "junit.xml")
    assert_page(suite.directory / "page/index.html")
    # As people read it.
    suite("coverage", "html", "-q", "--show-contexts")
    (page,) = (suite.directory / "htmlcov").glob("*prices_py.html")
    assert APPLE in page.read_text()


def assert_record(directory: Path, suite: Suite) -> None:
    records = read_records(directory)
    assert records.problems == ()
    apple, pear, unknown, unit = records.tests
    assert {test.outcome for test in records.tests} == {Outcome.PASSED}
    assert apple.kernel
    assert apple.image
    assert apple.accelerator in ("kvm", "tcg")
    assert unit.kernel == ""
    assert unit.lines == {}
    assert apple.reset_seconds == 0 < pear.reset_seconds
    assert apple.began < pear.began < unknown.began
    prices = str(suite.directory / "shop/prices.py")
    assert LINES["apple"] in apple.lines[prices]
    assert LINES["pear"] in pear.new_lines[prices]
    assert 2 in pear.lines[prices]
    assert 2 not in pear.new_lines[prices]
    data = suite.contexts("prices.py", f"{directory}/.coverage")
    assert data[LINES["apple"]] == {APPLE}
    (trace,) = read_traces(directory)
    assert (trace.header.kernel, trace.header.source) == (apple.kernel, "python")
    calls = [call for call in trace if call.test == apple.test]
    assert len(calls) == apple.calls
    assert any(code.file.endswith("shop/prices.py") for call in calls for code in call.host)
    assert (apple.lost, unit.pcs, unit.calls) == (0, None, None)
    assert apple.pcs is not None
    assert apple.pcs > 0
    page = (directory / "report.html").read_text()
    assert "test_pear" in page
    assert "html/index.html" in page
    (source,) = (directory / "html").glob("*prices_py.html")
    assert APPLE in source.read_text()


def assert_page(file: Path) -> None:
    text = html.unescape(file.read_text())
    for wanted in ("../out/report/report.html", "all guest tests", ">lines<"):
        assert wanted in text
    shown = [path.read_text() for path in (file.parent / "assets").glob("*.txt")]
    assert any("guest_kernel: " in each for each in shown)
    assert any("shop/prices.py: 2-3, 10, 12\n" in each for each in shown)
    assert any("execve(" in each for each in shown)


def assert_junit(file: Path, *, workers: bool = False) -> None:
    cases = {
        case.get("name"): {each.get("name"): each.get("value") for each in case.iter("property")}
        for case in xml.etree.ElementTree.parse(file).iter("testcase")
    }
    apple, pear = cases["test_apple"], cases["test_pear"]
    assert set(apple) == {
        "guest_image",
        "guest_kernel",
        "guest_accel",
        "guest_reset_seconds",
        "guest_pcs",
    }
    assert apple["guest_reset_seconds"] == "0.0"
    # Another worker may have started its own guest for it.
    assert float(pear["guest_reset_seconds"] or 0) > 0 or workers
    assert int(pear["guest_pcs"] or 0) > 0
    assert cases["test_unit"] == {}


def test_join_coverage_run_names_files_and_contexts_as_its_configuration_says(
    suite: Suite,
) -> None:
    suite.write(
        ".coveragerc",
        """
        [run]
        source = shop
        omit = */server.py
        relative_files = true
        context = nightly
        """,
    )
    run = ("coverage", "run", "-m", *PYTEST)
    suite(*run, WITHOUT="1")
    without = executed(suite.directory / ".coverage")
    suite(*run)
    assert executed(suite.directory / ".coverage") == without
    assert set(without) == {"shop/__init__.py", "shop/prices.py"}
    contexts = suite.contexts("prices.py")
    assert contexts[LINES["apple"]] == {"nightly", f"nightly|{APPLE}"}


def test_join_coverage_run_measures_workers_too(suite: Suite) -> None:
    suite.write(".coveragerc", "[run]\nsource = shop\npatch = subprocess\n")
    run = ("coverage", "run", "-m", *PYTEST, "-n2")
    suite(*run, WITHOUT="1")
    suite("coverage", "combine", "-q")
    without = suite.data()
    assert LINES["apple"] in without["prices.py"]
    suite(*run)
    suite("coverage", "combine", "-q")
    assert suite.data() == without
    assert_joined(suite, others=True)


def test_join_workers_branches_and_a_target_in_another_process(suite: Suite) -> None:
    """coverage.py alone knows nothing of that process."""
    cov = ("--cov=shop", "--cov-branch", "--cov-report=")
    suite(*PYTEST, *cov, WITHOUT="1")
    without = suite.data()
    arcs = branches(suite)
    suite.write(
        "test_shop.py",
        FILES["test_shop.py"].replace('source="python"', 'source="python", isolate=True'),
    )
    suite(*PYTEST, *cov, "-n2", "--junitxml=junit.xml")
    assert suite.data() == without
    assert_junit(suite.directory / "junit.xml", workers=True)
    assert_joined(suite, others=False)
    # What the guest reached says nothing of branches, and takes nothing from those that are known.
    assert branches(suite) < arcs
    assert (16, 17) in branches(suite)


def branches(suite: Suite) -> set[tuple[int, int]]:
    """Return the arcs of ``prices.py`` from one line to another."""
    data = coverage.CoverageData(basename=str(suite.directory / ".coverage"))
    data.read()
    try:
        (path,) = [path for path in data.measured_files() if path.endswith("shop/prices.py")]
        return {(first, second) for first, second in data.arcs(path) or () if first != second}
    finally:
        data.close(force=True)


WORKERS = """
    import os
    import signal
    import time

    import pytest

    pytestmark = pytest.mark.guest(target="shop_target:Shop", source="python")


    @pytest.fixture(autouse=True)
    def note(guest, worker_id):
        with open("guests", "a") as file:
            print(worker_id, guest.session.machine.pid, file=file)
        assert guest.session.settings.boot_timeout == 4 * 60


    def check(ask, guest, worker_id):
        guest.fail("test -e /run/left")
        guest.succeed(["sh", "-c", 'echo "$0" >/run/left', worker_id])
        assert ask("apple") == "3"
        assert guest.succeed("cat /run/left").strip() == worker_id


    @pytest.mark.parametrize("number", range(8))
    def test_before(ask, guest, worker_id, number):
        check(ask, guest, worker_id)


    def test_dies(guest):
        os.kill(os.getpid(), signal.SIGKILL)


    def test_sick(guest, kcov):
        with kcov.trace():
            guest.succeed("echo 'BUG: on purpose' >/dev/kmsg")


    @pytest.mark.parametrize("number", range(2))
    def test_after(ask, guest, worker_id, number):
        check(ask, guest, worker_id)
    """


def test_workers_four_on_a_cold_start_have_a_guest_each_and_one_that_dies_is_replaced(
    suite: Suite, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # Without a snapshot: the first to come boots and makes one, the others wait for it. Outside of
    # the suite's directory, because a cache may hold a kernel's sources, with tests of their own.
    cold = tmp_path_factory.mktemp("cold")
    for entry in cache_directory().iterdir():
        if entry.name not in ("snapshots", "locks"):
            (cold / entry.name).symlink_to(entry)
    suite.write("test_shop.py", WORKERS)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    output = suite(
        *PYTEST,
        *("-n4", "--guest-cov", "--guest-report=report", "-rf"),
        status=1,
        KCOV_BRIDGE_CACHE=str(cold),
        TMPDIR=str(temporary),
    )
    assert "2 failed, 10 passed" in output, output
    assert "crashed while running 'test_shop.py::test_dies'" in output
    guests = {tuple(line.split()) for line in (tmp_path / "guests").read_text().splitlines()}
    assert len({worker for worker, _ in guests}) >= 4
    assert len({pid for _, pid in guests}) == len(guests), "no worker shares a guest or has two"
    assert not any(Path("/proc", pid).exists() for _, pid in guests)
    assert left_in(temporary) == []
    # What the worker that died had finished is there, and nothing twice.
    names = {f"test_shop.py::test_before[{number}]|run" for number in range(8)}
    names |= {f"test_shop.py::test_after[{number}]|run" for number in range(2)}
    for data in (".coverage", "report/.coverage"):
        assert suite.contexts("prices.py", data)[LINES["apple"]] == names
    records = read_records(tmp_path / "report")
    assert len(records.tests) == 12
    failed = {test.test: test for test in records.tests if test.outcome is not Outcome.PASSED}
    dead, sick = failed["test_shop.py::test_dies"], failed["test_shop.py::test_sick"]
    assert "crashed" in dead.message
    assert sick.kind_of_failure is FailureKind.MACHINE
    assert "BUG: on purpose" in sick.message
    assert "last traced system calls" in output
    assert len(list(read_traces(tmp_path / "report"))) >= 4
    assert "test_sick" in (tmp_path / "report/report.html").read_text()
    # Together with what unit tests cover.
    (tmp_path / ".coverage").rename(tmp_path / ".coverage.guests")
    suite.write(
        "test_unit.py", "from shop.prices import stock\n\ndef test_it():\n    stock('plum')\n"
    )
    suite("coverage", "run", "-p", "-m", *PYTEST, "test_unit.py")
    suite("coverage", "combine", "-q")
    contexts = suite.contexts("prices.py")
    assert contexts[LINES["apple"]] == names
    assert contexts[16] == {""}


@pytest.mark.parametrize(
    ("everyone", "number", "status"),
    [(True, signal.SIGINT, pytest.ExitCode.INTERRUPTED), (False, signal.SIGTERM, -signal.SIGTERM)],
    ids=["Ctrl-C", "controller ends"],
)
def test_workers_run_ends_in_the_middle_of_a_command_and_leaves_nothing(
    suite: Suite, tmp_path: Path, everyone: bool, number: int, status: int
) -> None:
    """A terminal sends SIGINT to the workers too; the controller may also just be gone."""
    suite.write(
        "test_shop.py",
        """
        import os, pytest

        @pytest.mark.parametrize("number", range(2))
        def test_it(guest, worker_id, number):
            with open(worker_id, "w") as file:
                print(guest.session.machine.pid, file=file)
            os.rename(worker_id, f"running.{worker_id}")
            guest.run("sleep 1000", timeout=None)
        """,
    )
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    output = tmp_path / "output"
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", _INTERRUPTIBLE, "-n2"],
            cwd=tmp_path,
            env={**suite.environment, "TMPDIR": str(temporary)},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait(lambda: process.poll() is not None or len(list(tmp_path.glob("running.*"))) == 2)
        pids = [path.read_text().strip() for path in tmp_path.glob("running.*")]
        workers = children(process.pid)
        assert len(workers) == 2, output.read_text()
        os.kill(-process.pid if everyone else process.pid, number)
        assert process.wait(120) == status, output.read_text()
        wait(lambda: not any(Path("/proc", pid).exists() for pid in [*pids, *workers]))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert left_in(temporary) == []


_INTERRUPTIBLE = """
import signal, sys
import pytest

# A shell's background job ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(pytest.main(["-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def left_in(temporary: Path) -> list[str]:
    """Return the names in a temporary directory that are not pytest's own."""
    names = (path.name for path in temporary.iterdir())
    return [name for name in names if not name.startswith("pytest-of-")]


def children(pid: int) -> list[str]:
    """Return the child processes of a process."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if path.read_text().rpartition(")")[2].split()[1] == str(pid):
                found.append(path.parent.name)
    return found


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_options_scope_accelerator_and_image_hold_for_all_tests(suite: Suite) -> None:
    suite.write(
        "test_shop.py",
        """
        import pytest

        seen = []

        @pytest.mark.parametrize("number", range(2))
        @pytest.mark.guest(accel="kvm")
        def test_it(guest, number):
            assert guest.session.accelerator.name == "tcg"
            assert guest.session.machine.pid not in seen
            assert guest.session.resets == 0
            seen.append(guest.session.machine.pid)
        """,
    )
    suite(*PYTEST, "--guest-accel=tcg", "--guest-scope=function")
    output = suite(*PYTEST, "--guest-accel=tcg", "--guest-image=no-such-image", status=1)
    assert "what the test asks for cannot be had: there is no image 'no-such-image'" in output
    assert "the recipes are: bookworm" in output
    assert "the machine" not in output


def test_plugin_loaded_by_pytest_imports_pytest_and_the_standard_library_alone() -> None:
    script = """
import importlib.metadata, json, sys
import pytest
(plugin,) = importlib.metadata.entry_points(group="pytest11", name="kcov-bridge")
before = set(sys.modules)
plugin.load()
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    new = json.loads(done.stdout)
    foreign = [name for name in new if name.partition(".")[0] not in sys.stdlib_module_names]
    assert foreign == ["bridge", "bridge.pytest_plugin", "bridge.pytest_plugin.plugin"]
