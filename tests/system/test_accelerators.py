# SPDX-License-Identifier: Apache-2.0
"""A KVM that is there and does not work: what is tried, in which order, and that it is said."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

import bridge
from bridge.errors import QemuError
from bridge.vm.accel import Accelerator

pytestmark = pytest.mark.vm

_ABORT = (
    'echo "qemu-system-x86_64: error: failed to set MSR 0x10a to 0x69" >&2; kill -ABRT $$; sleep 9'
)


@pytest.fixture(autouse=True)
def hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that seems to help KVM, as this machine's may not."""
    monkeypatch.setattr(
        "bridge.session.launcher.choose_accelerator", lambda wanted: Accelerator("kvm", "test")
    )


def qemu(directory: Path, aborts: str) -> str:
    """QEMU with TCG in KVM's place, which aborts on arguments that match a pattern of sh.

    A real KVM that does this cannot be made; the words are those of one that was seen.
    """
    real = shutil.which("qemu-system-x86_64")
    program = directory / "qemu"
    program.write_text(
        f"""#!/bin/sh
case " $* " in {aborts}) {_ABORT};; esac
for word; do
  shift
  case $word in kvm) word=tcg;; host*) word=max,la57=off;; esac
  set -- "$@" "$word"
done
exec {real} "$@"
"""
    )
    program.chmod(0o755)
    return str(program)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.message for each in caplog.records if "once more with" in each.message]


def marks() -> set[str]:
    from bridge.util.cache import lock_file

    return {path.name for path in lock_file("").glob("no-snapshot-*")}


def test_kvm_aborts_the_careful_processor_is_tried(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    program = qemu(tmp_path, '*" kvm -cpu host "*')
    caplog.set_level(logging.INFO, "bridge")
    before = marks()
    with bridge.boot(
        target="none", source="python", snapshot=False, qemu=program, boot_timeout=300
    ) as session:
        assert session.accelerator == Accelerator(
            "kvm", "without arch-capabilities", "host,-arch-capabilities"
        )
        assert session.run(["true"]).exit_status == 0
    (line,) = lines(caplog)
    assert "failed to set MSR 0x10a" in line
    assert "kvm (without arch-capabilities)" in line
    assert marks() == before


def test_kvm_always_aborts_tcg_runs_the_guest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    program = qemu(tmp_path, '*" -accel kvm "*')
    caplog.set_level(logging.INFO, "bridge")
    before = marks()
    with bridge.boot(target="none", source="python", qemu=program) as session:
        assert session.accelerator == Accelerator("tcg", "QEMU does not start under KVM")
        assert session.snapshot is not None
    assert [line.partition("once more with ")[2] for line in lines(caplog)] == [
        "kvm (without arch-capabilities)",
        "tcg (QEMU does not start under KVM)",
    ]
    assert marks() == before


def test_kvm_aborts_with_the_cpu_that_was_asked_for_is_the_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    program = qemu(tmp_path, '*" -accel kvm "*')
    with (
        pytest.raises(QemuError, match="SIGABRT") as caught,
        bridge.boot(target="none", source="python", qemu=program, cpu="host"),
    ):
        pass
    assert "MSR 0x10a" in caught.value.evidence
    assert lines(caplog) == []


def test_cpu_setting_is_the_guests_processor() -> None:
    with bridge.boot(
        target="none",
        source="python",
        accel="tcg",
        cpu="qemu64,model-id=Of the test",
        snapshot=False,
    ) as session:
        assert "model name\t: Of the test\n" in session.run(["cat", "/proc/cpuinfo"]).text
