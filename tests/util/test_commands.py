# SPDX-License-Identifier: Apache-2.0
"""Programs of a build: their log, their failures, and their end."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bridge.errors import ImageError, MissingDependencyError
from bridge.util.commands import Commands, Phases
from tests.support import ROOT


def test_a_failing_command_shows_the_end_of_its_output(tmp_path: Path) -> None:
    commands = Commands(tmp_path / "log", Phases(lambda line: None))
    commands.run(["echo", "earlier"], what="talking")
    with pytest.raises(ImageError) as caught:
        commands.run(["sh", "-c", "seq 100; echo bad >&2; exit 3"], what="counting")
    assert "counting failed" in caught.value.message
    assert "status 3" in caught.value.message
    assert caught.value.evidence.endswith("100\nbad")
    assert len(caught.value.evidence.splitlines()) == 15
    with pytest.raises(MissingDependencyError):
        commands.run(["no-such-program"], what="nothing")


def test_commands_run_in_no_directory_says_so(tmp_path: Path) -> None:
    commands = Commands(tmp_path / "log", Phases(lambda line: None))
    with pytest.raises(ImageError, match=f"in {tmp_path}/no, which is no directory"):
        commands.run(["true"], what="working", cwd=tmp_path / "no")


def test_commands_run_what_cannot_be_executed_says_why(tmp_path: Path) -> None:
    (tmp_path / "script").write_text("#!/no/such/interpreter\n")
    (tmp_path / "script").chmod(0o755)
    commands = Commands(tmp_path / "log", Phases(lambda line: None))
    with pytest.raises(ImageError, match="status 127") as caught:
        commands.run(["./script"], what="working", cwd=tmp_path)
    assert os.strerror(errno.ENOENT) in caught.value.evidence


def test_commands_run_what_writes_into_a_closed_pipe_ends_silently(tmp_path: Path) -> None:
    commands = Commands(tmp_path / "log", Phases(lambda line: None))
    commands.run(["sh", "-c", "yes | head -n 1"], what="writing")
    assert commands.log.read_text().splitlines()[1:] == ["y"]


def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    commands = Commands(tmp_path / "log", Phases(lambda line: None))
    with pytest.raises(ImageError, match="no room"):
        commands.run(["sh", "-c", "cat /proc/version > /dev/full"], what="writing")


def test_commands_run_unreachable_mirror_hint_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "sources").write_text("deb http://127.0.0.1:1/ bookworm main\n")
    for directory in ("state/lists/partial", "cache/archives/partial"):
        (tmp_path / directory).mkdir(parents=True)
    places = {"Etc::SourceList": "sources", "State": "state", "Cache": "cache"}
    options = [f"-oDir::{key}={tmp_path / name}" for key, name in places.items()]
    options += ["-oDir::Etc::SourceParts=-", f"-oDir::State::status={os.devnull}"]
    options += ["-oAcquire::Retries=0"]
    commands = Commands(tmp_path / "log", Phases(lambda line: None))
    with pytest.raises(ImageError) as caught:
        commands.run(["apt-get", "update", "--error-on=any", *options], what="updating")
    assert "KCOV_BRIDGE_MIRROR" in caught.value.hint


def test_commands_run_hint_names_no_mirror_of_debian_for_other_servers(tmp_path: Path) -> None:
    commands = Commands(tmp_path / "log", Phases(lambda line: None))
    with pytest.raises(ImageError) as caught:
        # What cargo prints.
        commands.run(["sh", "-c", "echo 'Could not resolve host: x'; exit 1"], what="fetching")
    assert not caught.value.hint


def test_a_command_that_does_not_read_its_input_is_an_error(tmp_path: Path) -> None:
    commands = Commands(tmp_path / "log", Phases(lambda line: None))
    with pytest.raises(ImageError, match="failed"):
        commands.run(["false"], what="feeding", feed=lambda out: out.writelines([bytes(1 << 20)]))


def test_a_command_has_bounded_time_and_dies_with_its_children(tmp_path: Path) -> None:
    commands = Commands(tmp_path / "log", Phases(lambda line: None))
    start = time.monotonic()
    with pytest.raises(ImageError, match="signal 9"):
        commands.run(["sh", "-c", "sleep 60 & wait"], what="sleeping", seconds=0.5)
    assert time.monotonic() - start < 10


def test_ctrl_c_ends_what_runs(tmp_path: Path) -> None:
    marker = tmp_path / "pid"
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from bridge.util.commands import *\n"
        "commands = Commands(Path(sys.argv[1]), Phases(print))\n"
        "commands.run(['sh', '-c', 'echo $$ > ' + sys.argv[2] + '; exec sleep 60'], what='x')\n"
    )
    words = [sys.executable, "-c", script, str(tmp_path / "log"), str(marker)]
    builder = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE)
    while not marker.exists() or not marker.read_text().strip():
        time.sleep(0.01)
    builder.send_signal(signal.SIGINT)
    _, error = builder.communicate(timeout=20)
    assert b"KeyboardInterrupt" in error
    with pytest.raises(ProcessLookupError):
        os.kill(int(marker.read_text()), 0)


def test_a_killed_bridge_leaves_no_process_of_a_make(tmp_path: Path) -> None:
    jobs = [tmp_path / f"job-{number}" for number in range(3)]
    makefile = tmp_path / "Makefile"
    # One of them has to be killed.
    makefile.write_text(
        f"all: {' '.join(map(str, jobs))}\n"
        f"{jobs[0]}: ; trap '' TERM; echo $$$$ >$@; while :; do sleep 1; done\n"
        f"{jobs[1]}: ; (sleep 600 & wait) & echo $$$$ >$@; wait\n"
        # As those of ninja, in a group of its own.
        f"{jobs[2]}: ; bash -c 'set -m; sleep 600 & echo $$$$ >$@; wait' & wait\n"
    )
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from bridge.util.commands import *\n"
        "commands = Commands(Path(sys.argv[1]), Phases(print))\n"
        "commands.run(['make', '-j3', '-f', sys.argv[2]], what='x')\n"
    )
    words = [sys.executable, "-c", script, str(tmp_path / "log"), str(makefile)]
    builder = subprocess.Popen(words, cwd=ROOT)
    while not all(job.exists() and job.read_text().strip() for job in jobs):
        assert builder.poll() is None
        time.sleep(0.01)
    session = os.getsid(int(jobs[0].read_text()))
    # The supervisor, make, three shells, and what they start, perhaps a moment later.
    while len(_of_session(session)) < 8:
        assert builder.poll() is None
        time.sleep(0.01)
    builder.kill()
    builder.wait()
    deadline = time.monotonic() + 60
    while left := _of_session(session):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def _of_session(session: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if os.getsid(int(entry.name)) == session:
                found.append(int(entry.name))
    return found
