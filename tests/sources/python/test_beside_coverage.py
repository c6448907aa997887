# SPDX-License-Identifier: Apache-2.0
"""A source beside a coverage.py that measures the tests: neither takes lines from the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.support.coverage_data import executed

ROOT = Path(__file__).resolve().parents[3]

SUITE = """
    import json, os, pathlib, smtplib, socket, threading
    from concurrent.futures import ThreadPoolExecutor

    import pytest
    from aiosmtpd.controller import Controller
    from aiosmtpd.handlers import Debugging, Mailbox, Sink

    WITH = os.environ["WITH_SOURCE"] == "1"

    def send(port):
        with smtplib.SMTP("127.0.0.1", port, timeout=60) as client:
            client.sendmail("a@example.com", ["b@example.com"], "Subject: x\\r\\n\\r\\nhello\\r\\n")

    def serve(tmp_path, handler, inside=lambda: None):
        controller = Controller(handler, hostname="127.0.0.1", port=0)
        def port():
            return controller.server.sockets[0].getsockname()[1]
        def trigger():
            with socket.create_connection(("127.0.0.1", port()), 60) as connection:
                connection.recv(1000)
        # The port of the kernel's choice, which aiosmtpd does not look up itself.
        controller._trigger_server = trigger
        controller.start()
        try:
            send(port())
            inside()
        finally:
            controller.stop()

    def test_before(tmp_path):
        serve(tmp_path, Sink())

    def test_with_a_target(tmp_path):
        executor = ThreadPoolExecutor(1)
        if not WITH:
            executor.submit(serve, tmp_path, Debugging()).result()
            return
        from bridge.sources.python.source import PythonSource

        source = PythonSource(["aiosmtpd"], data_file=tmp_path / "cov")
        executor.submit(source.start).result()
        seen = []
        look = lambda: seen.extend(source.consume())
        executor.submit(serve, tmp_path, Debugging(), look).result()
        # While it runs, the test's own thread calls what the target does not.
        Mailbox(str(tmp_path / "mail")).reset()
        # A thread that outlives the source, and goes on for the other.
        go_on, thread = threading.Event(), None
        def later():
            go_on.wait(60)
            Sink.from_cli(None)
        def start():
            nonlocal thread
            thread = threading.Thread(target=later)
            thread.start()
        executor.submit(start).result()
        executor.submit(source.stop).result()
        go_on.set()
        thread.join()
        names = {source.table.lookup(pc).file for pc in seen}
        pathlib.Path(os.environ["SEEN"]).write_text(json.dumps(sorted(names)))

    def test_after(tmp_path):
        if not WITH:
            Mailbox(str(tmp_path / "mail")).reset()
            Sink.from_cli(None)
        handler = Mailbox(str(tmp_path / "mail"))
        serve(tmp_path, handler)
        with pytest.raises(Exception):
            Debugging.from_cli(lambda message: (_ for _ in ()).throw(ValueError(message)), "bad")
"""

CORES = ["ctrace", "pytrace"] + (["sysmon"] if sys.version_info >= (3, 12) else [])


def run(directory: Path, *, source: bool, core: str, cov: bool) -> dict[str, list[int]]:
    """The lines of aiosmtpd that the suite's own coverage.py has, by file."""
    directory.mkdir()
    (directory / "test_suite.py").write_text(textwrap.dedent(SUITE))
    data = directory / "data"
    command = [sys.executable, "-m"]
    if cov:
        command += ["pytest", "--cov=aiosmtpd", "--cov-report="]
    else:
        command += ["coverage", "run", "--source=aiosmtpd", "-m", "pytest"]
    done = subprocess.run(
        [*command, "-q", "-p", "no:cacheprovider", "test_suite.py"],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "WITH_SOURCE": "1" if source else "0",
            "COVERAGE_CORE": core,
            "COVERAGE_FILE": str(data),
            "SEEN": str(directory / "seen.json"),
        },
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "CoverageWarning" not in done.stdout + done.stderr
    return {Path(file).name: lines for file, lines in executed(data).items()}


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("cov", [True, False], ids=["pytest-cov", "coverage-run"])
def test_the_suites_data_has_all_lines_with_and_without_the_source(
    tmp_path: Path, core: str, cov: bool
) -> None:
    without = run(tmp_path / "without", source=False, core=core, cov=cov)
    within = run(tmp_path / "within", source=True, core=core, cov=cov)
    assert len(without["handlers.py"]) > 60
    # Of the server's own lines some depend on which end of a connection is faster.
    assert within["handlers.py"] == without["handlers.py"]
    assert set(within) == set(without)
    seen = json.loads((tmp_path / "within" / "seen.json").read_text())
    assert "aiosmtpd/handlers.py" in seen
    assert "aiosmtpd/smtp.py" in seen
