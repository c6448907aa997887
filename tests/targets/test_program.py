# SPDX-License-Identifier: Apache-2.0
"""A program as a target: which end of it is a failure."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bridge.targets.program import ProgramTarget


class Ending(ProgramTarget):
    """A program that ends by itself."""

    name = "ending"
    ready_line = "ready"

    def __init__(self, status: int) -> None:
        super().__init__()
        self.status = status

    def command(self) -> list[str]:
        return ["sh", "-c", f"echo ready; sleep 0.2; exit {self.status}"]


class EndingWithGuest(Ending):
    ends_with_guest = True


@pytest.mark.parametrize(
    ("kind", "status", "fails"),
    [
        (Ending, 0, True),
        (Ending, 3, True),
        (EndingWithGuest, 0, False),
        (EndingWithGuest, 3, True),
    ],
)
def test_program_that_ends_by_itself_has_failed_unless_its_guest_has_ended(
    kind: type[Ending], status: int, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    raised: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: raised.append(str(args.exc_value)))
    target = kind(status)
    target.start()
    (watch,) = (each for each in threading.enumerate() if each.name == "ending")
    watch.join(30)
    target.stop()
    assert len(raised) == fails
    assert all(f"ended by itself, with status {status}" in each for each in raised)


_KILLED = """
import sys, time
from bridge.targets.program import ProgramTarget


class Serving(ProgramTarget):
    name = "serving"
    ready_line = "ready"

    def command(self):
        # Both hold the directory's file, the second one as the child of the first.
        script = "exec 3<$0/output; sleep 1000 & echo ready $! >&2; exec sleep 1000"
        return ["sh", "-c", script, str(self.scratch)]


target = Serving()
target.start()
print(target.pid, target.output.split()[1], target.scratch, flush=True)
if sys.argv[1] == "stop":
    target.stop()
    print("stopped", flush=True)
time.sleep(1000)
"""


def processes_of(directory: Path) -> list[str]:
    """The processes that hold something open below a directory or name it in their arguments."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            held = [str(link.readlink()) for link in (process / "fd").iterdir()]
            held.append((process / "cmdline").read_text())
        except OSError:
            continue
        if any(str(directory) in each for each in held):
            found.append(process.name)
    return found


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("way", ["kill", "stop"])
def test_program_and_its_directory_are_gone_after_the_bridge_was_killed(
    way: str, tmp_path: Path
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _KILLED, way],
        stdout=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        text=True,
    ) as bridge:
        try:
            assert bridge.stdout is not None
            pid, child, directory = bridge.stdout.readline().split()
            assert tmp_path in Path(directory).parents
            if way == "stop":
                # In order: at once, while the bridge goes on.
                assert bridge.stdout.readline() == "stopped\n"
                assert list(tmp_path.iterdir()) == []
                # The kernel may still be ending the child.
                wait_until(lambda: processes_of(tmp_path) == [])
            else:
                # A process that is being executed cannot be looked at.
                wait_until(lambda: {pid, child}.issubset(processes_of(tmp_path)))
        finally:
            bridge.kill()
    wait_until(lambda: processes_of(tmp_path) == [] and list(tmp_path.iterdir()) == [])
