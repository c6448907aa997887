# SPDX-License-Identifier: Apache-2.0
"""``kcov-bridge run`` with targets that do anything, and with standard streams of any kind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from bridge.guest.images import Image
from tests.support import COMMAND, nothing_left, run, start
from tests.support.programs import guest_image

pytestmark = pytest.mark.vm

TARGET = """\
import os, sys, time
from bridge import Endpoint

class Target:
    name = "mine"
    packages = ("colorsys",)
    guest_modules = ()
    guest_setup = guest_teardown = ""
    endpoints = ()
    def __init__(self, directory):
        {made}
    def start(self):
        import colorsys
        colorsys.rgb_to_hsv(1, 2, 3)
        {start}
    def stop(self):
        {stop}
"""


@pytest.fixture(scope="module")
def image() -> Image:
    return guest_image()


def target(directory: Path, made: str = "pass", start: str = "pass", stop: str = "pass") -> str:
    """The name of a target that does so; ``directory`` is where it is found."""
    directory.mkdir(exist_ok=True)
    text = TARGET.format(made=made, start=start, stop=stop)
    (directory / "mine_target.py").write_text(text)
    return "mine_target:Target"


def mine(
    out: Path, name: str, *options: str, cwd: Path, command: tuple[str, ...] = ("echo", "ran")
) -> subprocess.CompletedProcess[str]:
    arguments = ("--target", name, "--source", "python", *options, "--", *command)
    return run(out, *arguments, cwd=cwd)


RAISES = ["sys.exit(0)", "sys.exit('text')", "sys.exit(3)", "raise KeyboardInterrupt"]


@pytest.mark.parametrize("isolate", [(), ("--isolate",)], ids=["in-process", "isolated"])
@pytest.mark.parametrize("what", [*RAISES, "raise GeneratorExit('done')"])
def test_run_target_that_raises_anything_on_start_is_a_failure(
    tmp_path: Path, what: str, isolate: tuple[str, ...]
) -> None:
    name = target(tmp_path, start=what)
    result = mine(tmp_path / "out", name, *isolate, cwd=tmp_path)
    assert result.returncode == 125, result.stderr
    assert "the target mine raised " in result.stderr
    assert "on start" in result.stderr
    assert f"| {what}" in " ".join(result.stderr.split()), "its traceback"
    assert "internal error" not in result.stderr
    assert result.stdout == ""
    assert json.loads((tmp_path / "out/summary.json").read_text())["exit_status"] == 125


@pytest.mark.parametrize("isolate", [(), ("--isolate",)], ids=["in-process", "isolated"])
def test_run_target_that_exits_when_it_is_made_is_a_failure(
    tmp_path: Path, isolate: tuple[str, ...]
) -> None:
    name = target(tmp_path, made="sys.exit(0)")
    result = mine(tmp_path / "out", name, *isolate, cwd=tmp_path)
    assert result.returncode == 125, result.stderr
    assert "raised SystemExit while it was made: 0" in result.stderr


@pytest.mark.parametrize("isolate", [(), ("--isolate",)], ids=["in-process", "isolated"])
def test_run_packages_are_found_without_being_run(
    image: Image, tmp_path: Path, isolate: tuple[str, ...]
) -> None:
    name = target(tmp_path)
    source = tmp_path / "mine_target.py"
    source.write_text(source.read_text().replace('("colorsys",)', '("outer.inner",)'))
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer/__init__.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "outer/inner.py").write_text("x = 1\n")
    result = mine(tmp_path / "out", name, *isolate, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "ran\n"
    values = json.loads((tmp_path / "out/summary.json").read_text())
    assert (values["blocks_total"], values["blocks_covered"]) == (1, 0)


@pytest.mark.parametrize("isolate", [(), ("--isolate",)], ids=["in-process", "isolated"])
def test_run_target_that_exits_on_stop_is_a_failure_with_its_results(
    image: Image, tmp_path: Path, isolate: tuple[str, ...]
) -> None:
    name = target(tmp_path, stop="sys.exit(0)")
    result = mine(tmp_path / "out", name, *isolate, cwd=tmp_path)
    assert result.returncode == 125, result.stderr
    assert result.stdout == "ran\n"
    assert "the target mine raised SystemExit on stop: 0" in result.stderr
    values = json.loads((tmp_path / "out/summary.json").read_text())
    assert values["exit_status"] == 125
    assert values["blocks_covered"] > 0
    assert (tmp_path / "out/.coverage").is_file()


def test_run_failure_of_the_command_is_not_hidden_by_the_targets(
    image: Image, tmp_path: Path
) -> None:
    name = target(tmp_path, stop="sys.exit(0)")
    result = mine(
        *(tmp_path / "out", name, "--timeout", "2"), cwd=tmp_path, command=("sleep", "60")
    )
    assert result.returncode == 124, result.stderr
    assert "SystemExit on stop" in result.stderr


@pytest.mark.parametrize("where", ["made", "start"])
def test_run_interrupt_of_the_user_ends_a_target_that_hangs(tmp_path: Path, where: str) -> None:
    name = target(tmp_path, **{where: "print('hangs', flush=True); time.sleep(1000)"})
    out = tmp_path / "out"
    options = ("--target", name, "--source", "python", "--", "true")
    with nothing_left(out), start(out, *options, cwd=tmp_path) as process:
        assert process.line() == "hangs\n"
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=120)
        assert time.monotonic() - begun < 60
    assert process.returncode == 130, stderr
    assert json.loads((out / "summary.json").read_text())["error"] == "interrupted"


def test_run_target_that_changes_directory_and_streams(image: Image, tmp_path: Path) -> None:
    """The results are where the command was started, its output where it was to go."""
    here, there = tmp_path / "here", tmp_path / "there"
    there.mkdir()
    name = target(
        here,
        start=f"os.chdir({str(there)!r}); import io; sys.stdout = io.StringIO(); "
        "sys.stderr = open('log', 'w')",
        stop="print('last words', file=sys.stderr); sys.stderr.close()",
    )
    for file in ("kernel", "initrd"):
        (here / file).symlink_to(getattr(image, file))
    (here / "files").mkdir()
    result = subprocess.run(
        [
            *(*COMMAND, "run", "--target", name, "--source", "python", "--out", "out"),
            *("--target-dir", "files", "--kernel", "kernel", "--initrd", "initrd"),
            *("--", "sh", "-c", "echo to stdout; echo to stderr >&2"),
        ],
        capture_output=True,
        text=True,
        cwd=here,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "to stdout\n"
    assert "to stderr\n" in result.stderr
    assert f"results in  {here / 'out'}\n" in result.stderr
    assert json.loads((here / "out/summary.json").read_text())["blocks_covered"] > 0
    assert (here / "out/lcov.info").is_file()
    assert (there / "log").read_text() == "last words\n"
    assert [path.name for path in there.iterdir()] == ["log"]


def shell(line: str, out: Path) -> subprocess.CompletedProcess[bytes]:
    """A line of bash in which ``$run`` is a run without a target."""
    command = f"{' '.join(COMMAND)} run --source python --target none --out {out} --"
    return subprocess.run(
        ["bash", "-c", line.replace("$run", command)], capture_output=True, timeout=600
    )


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_run_with_closed_streams(image: Image, tmp_path: Path, closed: str) -> None:
    result = shell(f"$run sh -c 'echo to stdout; echo to stderr >&2' {closed}", tmp_path)
    assert result.returncode == 0, result.stderr
    words = closed.split()
    assert result.stdout == (b"" if ">&-" in words else b"to stdout\n")
    if "2>&-" in words:
        assert result.stderr == b""
    else:
        assert b"to stderr\n" in result.stderr
        assert b"results in" in result.stderr
    assert json.loads((tmp_path / "summary.json").read_text())["exit_status"] == 0


def test_run_output_that_cannot_be_written_is_said(image: Image, tmp_path: Path) -> None:
    result = shell("$run echo much >/dev/full", tmp_path)
    assert result.returncode == 125
    assert b"stdout cannot be written: No space left on device" in result.stderr


def test_run_arguments_arrive_byte_for_byte(image: Image, tmp_path: Path) -> None:
    result = shell("$run printf '%s|' $'a\\xffb' $'\\n' '' \"it's\" $'\\u20ac'", tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == b"a\xffb|\n||it's|\xe2\x82\xac|"
    values = json.loads((tmp_path / "summary.json").read_text())
    assert os.fsencode(values["command"][2]) == b"a\xffb"
