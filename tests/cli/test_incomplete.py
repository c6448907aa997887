# SPDX-License-Identifier: Apache-2.0
"""A run that lost coverage says so, and leaves all that is known."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import cast

import coverage
import pytest

from bridge.cli import runner
from bridge.cli.streams import Streams
from bridge.config import Settings
from bridge.errors import UsageError
from bridge.guest.guest import CAPTURE_LIMIT, CommandResult
from bridge.guest.ssh import SshGuest
from bridge.session.session import KcovResult, Session
from tests.support import COMMAND, run

TARGET = """
    import socketserver, sys, threading
    from bridge import Endpoint
    from bridge.targets import TARGET_ADDRESS

    class Own:
        name = "own"
        packages = ("own_service",)
        guest_modules = ()
        guest_setup = f"echo {TARGET_ADDRESS} target >>/etc/hosts"
        guest_teardown = ""
        endpoints = ()

        def __init__(self, directory):
            pass

        def start(self):
            import own_service

            class Handler(socketserver.StreamRequestHandler):
                def handle(self):
                    own_service.serve(self.rfile.readline().strip())
                    self.wfile.write(b"answer\\n")

            self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
            self.server.daemon_threads = True
            self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
            self.thread.start()
            self.endpoints = (Endpoint("own", self.server.server_address[1], 80),)

        def stop(self):
            self.server.shutdown()
            self.server.server_close()
            self.thread.join()
"""

SERVICE = """
    import gc, os

    def serve(word):
        {"unreadable": unreadable, "forked": forked, "doorbell": end_doorbell}[word.decode()]()

    def unreadable():
        no_name = type("NoName", (str,), {"__hash__": lambda self: 1 // 0})
        exec(compile("a = 1", "", "exec").replace(co_filename=no_name("bad.py")))

    def forked():
        pid = os.fork()
        if pid == 0:
            try:
                unreadable()
            finally:
                os._exit(0)
        os.waitpid(pid, 0)

    def end_doorbell():
        # A defect of the bridge, which cannot be had otherwise.
        from bridge.device.doorbell import Doorbell
        doorbell, = (each for each in gc.get_objects() if isinstance(each, Doorbell))
        def fail(now):
            raise ZeroDivisionError("a defect")
        doorbell._repair = fail
        doorbell._repair_at = 0
        doorbell._thread.join()
"""


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_target.py").write_text(textwrap.dedent(TARGET))
    (tmp_path / "own_service.py").write_text(textwrap.dedent(SERVICE))
    monkeypatch.setenv(
        "PYTHONPATH",
        os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
        if "PYTHONPATH" in os.environ
        else str(tmp_path),
    )
    return "own_target:Own"


@pytest.mark.vm
@pytest.mark.parametrize(
    ("request_", "options", "error"),
    [
        ("unreadable", (), "the tracer failed: ZeroDivisionError"),
        ("forked", ("--isolate",), "the tracer failed: ZeroDivisionError"),
        ("doorbell", (), "the doorbell ended by itself: ZeroDivisionError: a defect"),
    ],
)
def test_run_that_lost_coverage_is_125_and_leaves_what_is_known(
    tmp_path: Path, target: str, request_: str, options: tuple[str, ...], error: str
) -> None:
    out = tmp_path / "out"
    ask = f"exec 3<>/dev/tcp/target/80; echo {request_} >&3; cat <&3"
    done = run(out, "--source", "python", "--target", target, *options, "--", "bash", "-c", ask)
    assert done.returncode == 125, done.stderr
    assert error in done.stderr
    assert done.stdout == "answer\n", done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert summary["exit_status"] == 125
    assert error in summary["error"]
    assert summary["returns"] > 0
    assert (out / "pcs.txt").exists()
    assert (out / ".coverage").exists()
    if request_ != "doorbell":
        assert summary["tracer_faults"] > 0
        assert summary["source_failures"] == 1
        assert (out / "pcs.txt").read_text()


class Printing(Session):
    """A session without a guest, whose example prints as many PCs as its area holds."""

    pcs = range(0xFFFF_FFFF_8100_0000, 0xFFFF_FFFF_8100_0000 + 65535)

    def put(self, *_: object) -> None:
        pass

    def kcov(self, *_: object, **__: object) -> KcovResult:
        return KcovResult(0, [1], b"", b"")

    @property
    def guest(self) -> SshGuest:
        return cast(SshGuest, self)

    def run(self, *_: object, capture: int = CAPTURE_LIMIT, **__: object) -> CommandResult:
        text = "".join(f"{pc:#x}\n" for pc in self.pcs).encode()
        return CommandResult(0, text[:capture], b"", len(text) > capture, 0.0)


def test_work_example_fills_its_area_all_pcs_are_kept() -> None:
    session = Printing(Settings())
    record = runner._Record(session, ("true",))
    assert runner._work(session, (), record, Streams(io.StringIO(), io.StringIO())) == 0
    assert record.pcs[1] == list(session.pcs)


@pytest.fixture
def record(tmp_path: Path) -> runner._Record:
    """What a run has at its end, with coverage data."""
    (tmp_path / "module.py").write_text("a = 1\n")
    data = coverage.CoverageData(str(tmp_path / "out" / ".coverage"))
    (tmp_path / "out").mkdir()
    data.add_lines({str(tmp_path / "module.py"): [1]})
    data.write()
    data.close(force=True)
    made = runner._Record(Session(Settings()), ("true",))
    made.exit_status = 0
    made.pcs.append([1, 2])
    return made


def fail_with(error: BaseException) -> Callable[..., None]:
    def fail(*args: object) -> None:
        raise error

    return fail


def written(record: runner._Record, out: Path) -> tuple[bool, str]:
    err = io.StringIO()
    return record.write(out, Streams(out=io.StringIO(), err=err)), err.getvalue()


@pytest.mark.parametrize("broken", ["make_html", "make_lcov"])
def test_write_with_a_report_that_fails_writes_the_others_and_the_summary(
    record: runner._Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """Whatever it raises: coverage.py and its plugins are not ours."""
    out = tmp_path / "out"
    monkeypatch.setattr(runner, broken, fail_with(RecursionError("too deep")))
    complete, text = written(record, out)
    assert not complete
    assert (out / "html").is_dir() == (broken != "make_html")
    assert (out / "lcov.info").is_file() == (broken != "make_lcov")
    assert (out / "pcs.txt").read_text().splitlines()[1:] == ["0x0000000000000002"]
    assert json.loads((out / "summary.json").read_text())["command"] == ["true"]
    assert "results in" in text


def test_write_that_is_interrupted_writes_the_summary(
    record: runner._Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(runner, "make_html", fail_with(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        written(record, out)
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["exit_status"], summary["error"]) == (130, "interrupted")
    assert (out / "pcs.txt").is_file()
    assert not (out / "html").exists()


def test_write_with_figures_that_cannot_be_had_writes_the_reason(
    record: runner._Record, tmp_path: Path
) -> None:
    class Broken:
        def fill(self, stats: object) -> None:
            raise TimeoutError("the doorbell does not answer")

    record.session._measured.append(Broken())
    assert written(record, tmp_path / "out")[0]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["problem"] == "the doorbell does not answer"


def test_write_to_a_stderr_that_is_full_writes_the_files_and_says_so(
    record: runner._Record, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with contextlib.suppress(OSError), Path("/dev/full").open("w", buffering=1) as full:
        assert not record.write(out, Streams(out=io.StringIO(), err=full))
    assert (out / "summary.json").is_file()
    assert (out / "html").is_dir()


def test_run_into_the_directory_of_another_run_is_refused_until_that_one_has_ended(
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    other = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time, pathlib; from bridge.cli import runner\n"
            "with runner.claimed(pathlib.Path(sys.argv[1])): print(flush=True); time.sleep(300)",
            out,
        ],
        stdout=subprocess.PIPE,
    )
    with other:
        try:
            assert other.stdout is not None
            other.stdout.readline()
            kept = out / "pcs.txt"
            kept.write_text("of the other run\n")
            command = [*COMMAND, "run", "--out", str(out), "--target", "none", "--", "true"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            assert done.returncode == UsageError.exit_status
            assert f"another run (process {other.pid}) is writing to {out}" in done.stderr
            assert "--out DIR" in done.stderr
            assert kept.read_text() == "of the other run\n"
        finally:
            other.kill()
    with runner.claimed(out) as claimed:
        assert claimed == out
        with pytest.raises(UsageError, match=f"process {os.getpid()}"), runner.claimed(out):
            raise AssertionError("it must not begin")
    with runner.claimed(out):
        pass
