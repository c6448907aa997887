# SPDX-License-Identifier: Apache-2.0
"""``kcov-bridge setup``, on machines where apt-get and sudo are made up."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from bridge.cli.main import main
from bridge.util.packages import debian_packages


class _Machine:
    """A PATH with a shell and little else."""

    def __init__(self, programs: Path) -> None:
        self.programs = programs
        self.log = programs.parent / "log"
        programs.mkdir()
        for name in ("sh", "dirname", "grep", "env"):
            found = shutil.which(name)
            assert found is not None
            (programs / name).symlink_to(found)

    def add(self, name: str, script: str) -> None:
        path = self.programs / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Machine:
    machine = _Machine(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(machine.programs))
    return machine


def test_setup_as_root_installs_what_is_missing(
    machine: _Machine, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    machine.add("id", "echo 0")
    machine.add("apt-get", f'echo "$@" >>{machine.log}')
    assert main(["setup"]) == 0
    (call,) = machine.log.read_text().splitlines()
    words = call.split()
    for package in debian_packages("run"):
        if not package.probe.startswith("/"):
            assert package.name in words
    assert "uidmap" not in words
    assert "e2fsprogs" not in words
    assert "busybox-static" not in words
    out, err = capfd.readouterr()
    assert out == ""
    assert "missing: qemu-system-x86 (runs the guest)" in err


def test_setup_without_root_prints_one_line_and_is_1(
    machine: _Machine, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    machine.add("id", "echo 1000")
    machine.add("apt-get", "exit 9")
    machine.add("sudo", "exit 1")
    assert main(["setup", "--tests", "--bench"]) == 1
    (line,) = capfd.readouterr().out.splitlines()
    assert line.startswith("sudo apt-get update && sudo apt-get install -y")
    words = line.split()
    assert {"qemu-system-x86", "busybox-static"} <= set(words)


def test_setup_print_installs_nothing(machine: _Machine, capfd: pytest.CaptureFixture[str]) -> None:
    machine.add("id", "echo 0")
    machine.add("apt-get", f'echo "$@" >>{machine.log}')
    assert main(["setup", "--print"]) == 1
    assert "sudo apt-get install -y" in capfd.readouterr().out
    assert not machine.log.exists()


def test_setup_where_apt_get_fails_is_125(
    machine: _Machine, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    machine.add("id", "echo 0")
    machine.add("apt-get", "exit 100")
    assert main(["setup"]) == 125
    assert "apt-get failed with status 100" in capfd.readouterr().err


def test_setup_where_nothing_is_missing_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    # `make test` has installed them.
    assert main(["setup"]) == 0
    out, err = capfd.readouterr()
    assert out == ""
    assert "are installed" in err
