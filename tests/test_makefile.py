# SPDX-License-Identifier: Apache-2.0
"""The developer's frame: Makefile, package and environment scripts."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bridge.util.packages import debian_packages

ROOT = Path(__file__).resolve().parents[1]


def sh(
    *command: str, path: str | None = None, cwd: Path = ROOT, **variables: str
) -> subprocess.CompletedProcess[str]:
    # A make around this one hands its flags and variables down otherwise.
    outer = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "PYTHON", "VENV", "OUT", "ARGS"}
    outer |= {"CMD", "TARGET", "SOURCE", "TESTS"}
    environment = {key: text for key, text in os.environ.items() if key not in outer}
    environment |= variables
    if path is not None:
        environment["PATH"] = path
    program = shutil.which(command[0]) or command[0]
    return subprocess.run(
        [program, *command[1:]],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def targets() -> list[str]:
    return re.findall(r"^([a-z-]+):.* ## ", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_plain_make_prints_help_on_each_target() -> None:
    done = sh("make")
    assert done.returncode == 0, done.stderr
    assert {"run", "test", "lint", "image", "clean", "venv"} <= set(targets())
    for target in targets():
        assert re.search(rf"^make {target} +\S", done.stdout, re.MULTILINE), target


@pytest.mark.parametrize("target", targets())
def test_makefile_each_target_has_commands_that_parse(target: str) -> None:
    done = sh("make", "--dry-run", "--warn-undefined-variables", target)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    assert done.stdout


def test_run_hands_its_variables_on(tmp_path: Path) -> None:
    done = sh("make", "-n", "run", f"OUT={tmp_path}", "ARGS=--memory 512 -- ls")
    assert f"kcov-bridge run --out {tmp_path} --memory 512 -- ls" in done.stdout


def test_run_command_target_and_source_reach_the_guest_as_they_are(tmp_path: Path) -> None:
    """With a program in the place of ``kcov-bridge`` that shows its words."""
    (tmp_path / "bin").mkdir()
    script(tmp_path / "bin", "kcov-bridge", "printf '<%s>' \"$@\"; exit 3")
    (tmp_path / "installed").touch()
    command = "echo \"$HOME\" 'a b' | wc -l; ls /mnt/*"
    words = (f"VENV={tmp_path}", "OUT=out", "TARGET=a b:C", "SOURCE=python", "ARGS=--memory 512")
    done = sh("make", "-s", "run", *words, f"CMD={command.replace('$', '$$')}")
    shown = "<--target><a b:C><--source><python><--memory><512><--><sh><-c>"
    assert f"<run><--out><out>{shown}<{command}>" in done.stdout
    assert done.returncode == 2  # make's own for each failure
    assert "Error 3" in done.stderr
    done = sh("make", "-s", "run", words[0], CMD=command, TARGET="none")
    assert f"<-c><{command}>" in done.stdout


def test_commands_may_keep_compiled_modules() -> None:
    show = ("make", "-s", "--eval=shown: ; @env", "shown")
    assert "PYTHONDONTWRITEBYTECODE" not in sh(*show, PYTHONDONTWRITEBYTECODE="1").stdout


def test_up_to_date_stamps_mean_no_pip(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    venv.mkdir()
    (venv / "installed").touch()
    assert "make-venv" not in sh("make", "-n", "run", f"VENV={venv}").stdout
    assert "make-venv" in sh("make", "-n", "test", f"VENV={venv}").stdout


def tools(directory: Path, *names: str) -> str:
    """A PATH on which only these programs are found."""
    directory.mkdir(exist_ok=True)
    for name in names:
        found = shutil.which(name)
        assert found is not None, name
        (directory / name).symlink_to(found)
    return str(directory)


def script(directory: Path, name: str, text: str) -> None:
    directory.mkdir(exist_ok=True)
    path = directory / name
    path.unlink(missing_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


SYSTEM = "/usr/sbin:/sbin"
INSTALL = str(ROOT / ".ci" / "install-packages")


def test_package_list_is_read_by_script_and_package() -> None:
    packages = debian_packages()
    assert {"qemu-system-x86", "mmdebstrap", "make", "gcc"} <= {each.name for each in packages}
    assert {each.purpose for each in packages} == {"run", "user", "bench", "test", "make"}
    assert next(iter(debian_packages("run"))).name == "qemu-system-x86"
    # The plugin that watches the guest's kernel is compiled where it runs.
    assert {"gcc", "libc6-dev"} <= {each.name for each in debian_packages("run")}
    for each in packages:
        assert each.what_for


def test_install_packages_no_root_prints_the_line_and_exits_with_2(tmp_path: Path) -> None:
    path = tools(tmp_path / "bin", "sh", "dirname", "grep")
    script(tmp_path / "bin", "id", "echo 1000")
    script(tmp_path / "bin", "apt-get", "echo must not be called; exit 9")
    done = sh(INSTALL, "run", path=path)
    assert done.returncode == 2
    lines = [line for line in done.stdout.splitlines() if line.startswith("sudo apt-get")]
    assert len(lines) == 1
    for package in debian_packages("run"):
        probe = package.probe
        if not (Path(probe).exists() if probe[0] == "/" else shutil.which(probe, path=SYSTEM)):
            assert f" {package.name}" in lines[0]
    assert "missing: qemu-system-x86 (runs the guest)" in done.stderr


def test_sudo_that_asks_for_a_password_is_not_used(tmp_path: Path) -> None:
    path = tools(tmp_path / "bin", "sh", "dirname", "grep")
    script(tmp_path / "bin", "id", "echo 1000")
    script(tmp_path / "bin", "apt-get", "exit 9")
    script(tmp_path / "bin", "sudo", "exit 1")
    assert sh(INSTALL, "run", path=path).returncode == 2


def test_install_packages_no_debian_names_the_programs(tmp_path: Path) -> None:
    path = tools(tmp_path / "bin", "sh", "dirname", "grep", "id")
    done = sh(INSTALL, "run", path=path)
    assert done.returncode == 2
    assert "this is not Debian" in done.stderr
    assert "qemu-system-x86_64" in done.stderr


def test_install_packages_failure_is_retried_with_new_lists(tmp_path: Path) -> None:
    log = tmp_path / "log"
    path = tools(tmp_path / "bin", "sh", "dirname", "grep", "env", "touch")
    script(tmp_path / "bin", "id", "echo 0")
    script(
        tmp_path / "bin",
        "apt-get",
        f'echo "$@" >>{log}\n[ "$1" = update ] && {{ touch {log}.updated; exit; }}\n'
        f"[ -e {log}.updated ]",
    )
    done = sh(INSTALL, "run", path=path)
    assert done.returncode == 0, done.stderr
    calls = log.read_text().splitlines()
    assert len(calls) == 3
    assert calls[1].startswith("update")
    assert "qemu-system-x86" in calls[2]


def test_install_packages_nothing_missing_is_silent() -> None:
    done = sh(INSTALL)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


MAKE_VENV = str(ROOT / ".ci" / "make-venv")


def test_make_venv_no_python_is_a_clear_message(tmp_path: Path) -> None:
    path = tools(tmp_path / "bin", "sh", "dirname")
    script(tmp_path / "bin", "python3", "exit 1")
    done = sh(MAKE_VENV, str(tmp_path / "venv"), path=path)
    assert done.returncode == 2
    assert "Python 3.11 or newer is needed" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_make_venv_named_python_must_work(tmp_path: Path) -> None:
    done = sh(MAKE_VENV, str(tmp_path / "venv"), PYTHON="/bin/false")
    assert done.returncode == 2
    assert "/bin/false is no Python 3.11 or newer" in done.stderr


def test_make_venv_python_without_venv_names_its_package(tmp_path: Path) -> None:
    """python3.12 passes the version check but has no ensurepip; the package is python3.12-venv."""
    path = tools(tmp_path / "bin", "sh", "dirname", "grep", "rm")
    script(tmp_path / "bin", "id", "echo 1000")
    script(tmp_path / "bin", "apt-get", "exit 9")
    script(
        tmp_path / "bin",
        "python3.12",
        f'case "$2" in *version_info*) exec {sys.executable} "$@" ;; esac\nexit 1',
    )
    done = sh(MAKE_VENV, str(tmp_path / "venv"), path=path)
    assert done.returncode == 2
    assert "sudo apt-get install -y" in done.stdout.replace("update && sudo apt-get ", "")
    assert done.stdout.rstrip().endswith(" python3.12-venv")


def test_ci_ends_with_pytests_line_and_status(tmp_path: Path) -> None:
    """The real script in a project whose `make test` fails as pytest does."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    script(tmp_path / ".ci", "install-packages", "[ $# -eq 1 ] && [ $1 = make ]")
    (tmp_path / "Makefile").write_text(
        "test:\n\t@echo '=== 1 failed, 2 passed in 0.1s ==='; echo 5 >build/test.status; exit 5\n"
    )
    done = sh(str(tmp_path / ".ci" / "run"), cwd=tmp_path)
    assert done.returncode == 5
    assert done.stdout.splitlines()[-1] == "=== 1 failed, 2 passed in 0.1s ==="
    (tmp_path / "Makefile").write_text("test:\n\t@echo no pip today; exit 1\n")
    done = sh(str(tmp_path / ".ci" / "run"), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout.splitlines()[-1] == "make test ended before pytest did (exit status 2)"


TEST_ON = str(ROOT / ".ci" / "test-on")


@pytest.mark.parametrize(
    ("arguments", "steps", "said"),
    [
        ((), "run", "which release? One of: bookworm trixie forky sid"),
        (("",), "run", "which release?"),
        (("trixie", "sid"), "run", "which release?"),
        (("woody",), "run", "woody is no release that is tried"),
        (("--inside",), "run", "--inside is no release that is tried"),
        (("trixie",), "run tests", "tests is no step; STEPS is made of: run test"),
    ],
)
def test_test_on_wrong_arguments_change_nothing(
    tmp_path: Path, arguments: tuple[str, ...], steps: str, said: str
) -> None:
    cache = tmp_path / "cache"
    done = sh(TEST_ON, *arguments, STEPS=steps, KCOV_BRIDGE_CACHE=str(cache))
    assert done.returncode == 2
    assert said in done.stderr
    assert not cache.exists()


def test_test_on_without_root_says_what_to_run(tmp_path: Path) -> None:
    path = tools(tmp_path / "bin", "bash", "dirname", "env")
    script(tmp_path / "bin", "id", "echo 1000")
    done = sh(TEST_ON, "trixie", path=path, KCOV_BRIDGE_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 2
    assert done.stderr.endswith("sudo make test-on RELEASE=trixie\n")
    assert not (tmp_path / "cache").exists()


def test_test_on_hands_the_release_on() -> None:
    assert sh("make", "-n", "test-on", "RELEASE=sid").stdout == ".ci/test-on sid\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, as test-on does")
def test_test_on_interrupted_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C while the root is made: its processes and files go."""
    cache, begun = tmp_path / "cache", tmp_path / "begun"
    sleep = f"300.{os.getpid()}"
    # In mmdebstrap's place: what is made has a file, and a child waits longer than the test.
    script(
        tmp_path / "bin",
        "mmdebstrap",
        f'for last in "$@"; do :; done\nmkdir "$last"\nsleep {sleep} &\ntouch {begun}\nwait',
    )
    environment = {key: text for key, text in os.environ.items() if key != "KCOV_BRIDGE_MIRROR"}
    environment |= {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "KCOV_BRIDGE_CACHE": str(cache),
        "STEPS": "run",
    }
    with subprocess.Popen(
        [TEST_ON, "trixie"],
        env=environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            deadline = time.monotonic() + 60
            while not begun.exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            assert running(sleep)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
        finally:
            process.kill()
    assert not running(sleep)
    assert [path.name for path in (cache / "tests" / "roots").iterdir()] == ["trixie.lock"]


def running(argument: str) -> bool:
    """Whether some process has this argument."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if argument.encode() in path.read_bytes().split(b"\0"):
                return True
    return False
