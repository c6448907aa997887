# SPDX-License-Identifier: Apache-2.0
"""The doctor: on this machine, and on machines that lack something."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from pathlib import Path

import pytest

from bridge.cli import doctor
from bridge.cli.doctor import Check, diagnose, render
from bridge.cli.main import main
from bridge.config import Settings
from bridge.device import fastpath
from bridge.sources.python import tracer
from tests.support import without_plugins


def by_name(settings: Settings | None = None) -> dict[str, Check]:
    checks = diagnose(settings or Settings())
    found = {check.name: check for check in checks}
    assert len(found) == len(checks), "two checks have one name"
    return found


def test_on_this_machine_each_check_is_found_or_has_a_remedy() -> None:
    checks = by_name()
    for name in (
        "system",
        "Python",
        "QEMU",
        "accelerator",
        "memory",
        "memfd",
        "guest image",
        "mmdebstrap",
    ):
        assert name in checks
    for check in checks.values():
        assert check.detail
        assert check.found == (check.remedy == ""), check
    assert checks["Python"].found
    assert checks["QEMU"].found
    assert checks["QEMU's ivshmem-doorbell"].found
    assert checks["memfd"].found


def test_python_packages_are_those_of_the_metadata() -> None:
    requires = importlib.metadata.requires("kcov-bridge")
    assert requires is not None
    checks = by_name()
    for name in ("coverage", "paramiko", "qemu.qmp", "pyroute2"):
        assert any(line.startswith(name) for line in requires)
        check = checks[f"Python package {name}"]
        assert check.found
        assert check.detail == importlib.metadata.version(name)
    assert not any("ruff" in name for name in checks)


def test_python_package_missing_or_too_old_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["no-such-package>=1", "coverage>=999", 'ruff>=1; extra == "dev"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    checks = by_name()
    missing = checks["Python package no-such-package"]
    assert not missing.found
    assert missing.required
    assert missing.remedy == "pip install 'no-such-package>=1'"
    old = checks["Python package coverage"]
    assert not old.found
    assert ">=999 is needed" in old.detail
    assert "Python package ruff" not in checks


def test_doctor_no_qemu_is_1_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "MISSING  QEMU" in out
    assert "qemu-system-x86_64 is not found" in out
    assert "sudo apt-get install --no-install-recommends qemu-system-x86" in out
    assert "required, and missing" in out
    assert "`kcov-bridge setup` installs" in out


@pytest.mark.parametrize(
    ("script", "name", "detail"),
    [
        ("exit 1", "QEMU", "--version fails"),
        ('[ "$1" = --version ] && echo version 99', "QEMU's ivshmem-doorbell", "not in"),
    ],
)
def test_qemu_unsuitable_is_reported(tmp_path: Path, script: str, name: str, detail: str) -> None:
    program = tmp_path / "qemu"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    check = by_name(Settings(qemu=str(program)))[name]
    assert not check.found
    assert check.required
    assert detail in check.detail
    assert check.remedy


KERNEL = "guest kernel's coverage"


def test_guest_kernel_can_be_watched() -> None:
    check = by_name(Settings(accel="tcg"))[KERNEL]
    assert check.found, check
    assert not check.required
    assert by_name(Settings(accel="tcg", source="kernel"))[KERNEL].required


def test_guest_kernel_qemu_without_plugins_is_reported(tmp_path: Path) -> None:
    check = by_name(Settings(qemu=str(without_plugins(tmp_path)), source="kernel,python"))[KERNEL]
    assert not check.found
    assert check.required
    assert "plugin interface not enabled" in check.detail
    assert "--qemu" in check.remedy


def test_guest_kernel_no_compiler_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    qemu = shutil.which("qemu-system-x86_64")
    assert qemu is not None
    (programs / "qemu-system-x86_64").symlink_to(qemu)
    monkeypatch.setenv("PATH", str(programs))
    checks = by_name()
    assert checks["QEMU"].found
    assert not checks[KERNEL].found
    assert not checks[KERNEL].required, "a run does without"
    assert "gcc and libc6-dev" in checks[KERNEL].remedy
    assert not checks["gcc"].found
    assert checks["gcc"].remedy.endswith(" gcc")
    assert not checks["gcc"].required


def test_kvm_that_was_asked_for_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    from bridge.vm import accel

    obstacle = ("there is no /dev/kvm", "load the module")
    monkeypatch.setattr(accel, "why_not_kvm", lambda **_: obstacle)
    monkeypatch.setattr(doctor, "why_not_kvm", lambda: obstacle)
    checks = by_name(Settings(accel="kvm"))
    assert not checks["accelerator"].found
    assert checks["accelerator"].required
    assert "there is no /dev/kvm" in checks["accelerator"].detail
    assert not checks["KVM"].required
    checks = by_name(Settings(accel="auto"))
    assert checks["accelerator"].found
    assert checks["accelerator"].detail.startswith("tcg")


def test_too_little_memory() -> None:
    check = by_name(Settings(memory=1 << 20))["memory"]
    assert not check.found
    assert "--memory" in check.remedy


def test_cache_no_room_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KCOV_BRIDGE_CACHE", str(tmp_path / "not" / "yet"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100 << 20))
    checks = by_name()
    assert not checks["guest image"].found
    assert not checks["guest image"].required
    assert checks["mmdebstrap"].required
    assert not checks["disk"].found
    assert "100 MiB free" in checks["disk"].detail
    assert not (tmp_path / "not").exists()


def test_image_own_needs_nothing_to_build(tmp_path: Path) -> None:
    disk, key = tmp_path / "disk.qcow2", tmp_path / "key"
    disk.write_bytes(b"QFI\xfb")
    key.write_text("a key")
    checks = by_name(Settings(image=str(disk), ssh_key=key))
    assert checks["guest image"].found
    assert not checks["mmdebstrap"].required
    assert not checks["disk"].required


@pytest.mark.parametrize(
    ("image", "ssh_key", "detail"),
    [
        ("disk.qcow2", None, "no SSH key is given"),
        ("disk.qcow2", Path("none"), "the SSH key none does not exist"),
        ("none.qcow2", Path("disk.qcow2"), "the disk image none.qcow2 does not exist"),
        ("no-image-of-this-name", None, "there is no image 'no-image-of-this-name'"),
    ],
)
def test_image_missing_is_required(
    image: str,
    ssh_key: Path | None,
    detail: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk.qcow2").write_bytes(b"QFI\xfb")
    check = by_name(Settings(image=image, ssh_key=ssh_key))["guest image"]
    assert not check.found
    assert check.required
    assert check.detail.replace(f"{tmp_path}/", "") == detail


def test_uidmap_is_required_without_root_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KCOV_BRIDGE_CACHE", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert not by_name()["uidmap"].required
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert by_name()["uidmap"].required


def test_engine_missing_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tmp_path / "afl-fuzz"
    engine.write_text("#!/bin/sh\necho afl-fuzz++4.21c\n")
    engine.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    there = by_name()["AFL++"]
    assert there.found
    assert "4.21c" in there.detail
    engine.write_text("#!/bin/sh\necho afl-fuzz++3.15a\n")
    old = by_name()["AFL++"]
    assert (old.found, old.required) == (False, False)
    assert "afl++" in old.remedy


def test_memfd_missing_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: object) -> int:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", denied)
    check = by_name()["memfd"]
    assert not check.found
    assert "Operation not permitted" in check.detail


def test_json_is_one_object_with_the_same_outcome(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["doctor", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert document["format"] == "kcov-bridge-doctor"
    assert document["version"] == 1
    assert document["ok"] == (status == 0)
    assert {"name", "required", "found", "detail", "remedy"} == set(document["checks"][0])
    required = [check for check in document["checks"] if check["required"]]
    assert document["ok"] == all(check["found"] for check in required)


def test_render_has_a_line_for_each_check() -> None:
    checks = (
        Check("there", True, True, "version 1"),
        Check("gone", True, False, "is not there", "get it"),
        Check("luxury", False, False, "is not there", "buy it"),
    )
    lines = render(checks).splitlines()
    assert lines[0] == "     ok  there   version 1"
    assert lines[1] == "MISSING  gone    is not there"
    assert lines[2].endswith("-> get it")
    assert lines[3] == "     no  luxury  is not there"
    assert lines[-1] == "1 required, and missing"
    assert render(checks[:1]).endswith("nothing required is missing")


def test_doctor_names_each_compiled_part_that_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(fastpath.PLAIN_VARIABLE, raising=False)
    monkeypatch.setattr(fastpath, "WHY_PLAIN", "")
    monkeypatch.setattr(tracer, "WHY_PLAIN", "it is older than its source")
    checks = by_name()
    assert checks["compiled fastpath"].found
    missing = checks["compiled tracer"]
    assert not missing.found
    assert not missing.required
    assert "older than its source" in missing.detail
    assert "pip install kcov-bridge once more" in missing.remedy
    monkeypatch.setenv(fastpath.PLAIN_VARIABLE, "1")
    assert by_name()["compiled tracer"].remedy == f"unset {fastpath.PLAIN_VARIABLE}"
