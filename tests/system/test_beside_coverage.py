# SPDX-License-Identifier: Apache-2.0
"""A suite that pytest-cov measures boots a guest whose target is in the package under test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.support.coverage_data import executed

pytestmark = pytest.mark.vm

ROOT = Path(__file__).resolve().parents[2]

SUITE = """
    import json, os, pathlib, socket

    import bridge
    from aiosmtpd.controller import Controller
    from aiosmtpd.handlers import Debugging, Mailbox, Sink
    from bridge import Endpoint
    from bridge.targets import TARGET_ADDRESS

    COMMANDS = [
        *("EHLO guest", "MAIL FROM:<a@example.com>", "RCPT TO:<b@example.com>", "DATA"),
        *("Subject: x", "", "hello", ".", "QUIT"),
    ]
    TALK = 'exec 3<>/dev/tcp/$0/25; printf "%s\\r\\n" "$@" >&3; cat <&3'

    class Mail:
        name = "mail"
        packages = ("aiosmtpd",)
        guest_modules = ()
        guest_setup = guest_teardown = ""
        endpoints = ()

        def __init__(self, directory):
            self.seen = open(os.devnull, "w")
            self.controller = Controller(
                Debugging(self.seen), hostname="127.0.0.1", port=0, server_hostname="target"
            )
            # The port of the kernel's choice, which aiosmtpd does not look up itself.
            self.controller._trigger_server = self.trigger

        def port(self):
            return self.controller.server.sockets[0].getsockname()[1]

        def trigger(self):
            with socket.create_connection(("127.0.0.1", self.port()), 60) as connection:
                connection.recv(1000)

        def start(self):
            self.controller.start()
            self.endpoints = (Endpoint("smtp", self.port(), 25),)

        def stop(self):
            self.controller.stop()

    def test_before(tmp_path):
        Sink.from_cli(None)

    def test_in_a_guest(tmp_path):
        if os.environ["WITH_GUEST"] == "0":
            Mailbox(str(tmp_path / "mail")).reset()
            return
        out = pathlib.Path(os.environ["OUT"])
        with bridge.boot(target="test_suite:Mail", source="python", out=out) as session:
            result = session.kcov(["bash", "-c", TALK, TARGET_ADDRESS, *COMMANDS], timeout=120)
            assert b"250 OK" in result.stdout, result
            # What the target does not call, on a thread that the session does not measure.
            Mailbox(str(tmp_path / "mail")).reset()
            names = {session.symbolize(pc).file for pc in result.pcs}
        (out / "seen.json").write_text(json.dumps(sorted(names)))

    def test_after(tmp_path):
        assert Debugging.from_cli(lambda message: None, "stderr")
"""


def run(directory: Path, *, guest: bool) -> dict[str, set[int]]:
    """The lines of aiosmtpd that pytest-cov has, by path."""
    directory.mkdir()
    (directory / "test_suite.py").write_text(textwrap.dedent(SUITE))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "--cov=aiosmtpd", "--cov-report="),
            *("-q", "-p", "no:cacheprovider", "test_suite.py"),
        ],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(directory)]),
            "COVERAGE_FILE": str(directory / "data"),
            "WITH_GUEST": "1" if guest else "0",
            "OUT": str(directory / "out"),
        },
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "CoverageWarning" not in done.stdout + done.stderr
    return {path: set(lines) for path, lines in executed(directory / "data").items()}


def test_pytest_cov_and_a_session_that_measure_one_package_are_both_complete(
    tmp_path: Path,
) -> None:
    without = run(tmp_path / "without", guest=False)
    within = run(tmp_path / "within", guest=True)
    out = tmp_path / "within" / "out"
    of_guest = {path: set(lines) for path, lines in executed(out / ".coverage").items()}
    names = json.loads((out / "seen.json").read_text())
    assert {"aiosmtpd/handlers.py", "aiosmtpd/smtp.py"} <= set(names)
    # The suite has what it had, and what the guest reached.
    (handlers,) = (path for path in within if path.endswith("aiosmtpd/handlers.py"))
    assert within[handlers] == without[handlers] | of_guest[handlers]
    assert of_guest[handlers] - without[handlers]
    for path, lines in of_guest.items():
        assert lines <= within.get(path, set()), path
    # The session has what the guest reached, and nothing of what the suite called meanwhile.
    assert without[handlers] - of_guest[handlers]
    text = Path(handlers).read_text().splitlines()
    of_mailbox = {number for number, line in enumerate(text, 1) if "self.mailbox.clear()" in line}
    assert of_mailbox
    assert of_mailbox <= within[handlers]
    assert not of_mailbox & of_guest[handlers]
