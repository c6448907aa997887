# SPDX-License-Identifier: Apache-2.0
"""The accelerator probe, with processors and devices that this machine may not have."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bridge.errors import (
    BootTimeoutError,
    BridgeError,
    GuestPanicError,
    GuestStoppedError,
    MissingDependencyError,
    QemuError,
    UsageError,
)
from bridge.vm.accel import Accelerator, choose_accelerator, next_accelerator, why_not_kvm

PLAIN = "processor\t: 0\nflags\t\t: fpu vme de pse tsc msr\nbugs\t\t:\n"


def test_tcg_is_taken_when_asked_for() -> None:
    assert choose_accelerator("tcg") == Accelerator("tcg", "requested")


def test_choose_accelerator_unknown_name_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="'hvf'") as caught:
        choose_accelerator("hvf")
    assert "auto, kvm, tcg" in caught.value.hint


def test_choose_accelerator_no_device_is_tcg(tmp_path: Path) -> None:
    chosen = choose_accelerator("auto", device=tmp_path / "kvm")
    assert chosen.name == "tcg"
    assert "there is no" in chosen.reason
    assert "\n" not in str(chosen)


def test_choose_accelerator_device_is_not_kvm_is_an_error() -> None:
    obstacle = why_not_kvm(device=Path("/dev/null"))
    assert obstacle is not None
    assert "/dev/null is not KVM" in obstacle[0]


def test_kvm_that_cannot_work_is_refused_with_reason_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(MissingDependencyError, match="there is no") as caught:
        choose_accelerator("kvm", device=tmp_path / "kvm")
    assert "tcg" in caught.value.hint


@pytest.fixture
def kvm_ioctl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A device that answers as KVM does: a machine has it or not, a test cannot make it."""
    device = tmp_path / "kvm"
    device.touch()

    def ioctl(_fd: int, request: int, _argument: int = 0) -> int:
        if request == 0xAE00:
            return 12
        assert request == 0xAE01
        return os.open(device, os.O_RDONLY)

    monkeypatch.setattr("bridge.vm.accel.fcntl.ioctl", ioctl)
    return device


@pytest.mark.parametrize("flag", ["vmx", "svm"])
def test_kvm_with_the_processors_help_is_taken(kvm_ioctl: Path, flag: str) -> None:
    cpuinfo = PLAIN.replace("msr", f"msr {flag} sse")
    assert choose_accelerator("auto", device=kvm_ioctl, cpuinfo=cpuinfo).name == "kvm"
    assert choose_accelerator("kvm", device=kvm_ioctl, cpuinfo=cpuinfo).name == "kvm"


@pytest.mark.parametrize("cpuinfo", [PLAIN, "", PLAIN.replace("msr", "svm_lock vmxnet")])
def test_kvm_without_the_processors_help_is_not(kvm_ioctl: Path, cpuinfo: str) -> None:
    chosen = choose_accelerator("auto", device=kvm_ioctl, cpuinfo=cpuinfo)
    assert chosen.name == "tcg"
    assert "neither vmx nor svm" in chosen.reason


def test_on_this_machine_the_choice_has_a_reason() -> None:
    chosen = choose_accelerator("auto")
    assert chosen.reason
    assert (chosen.name == "kvm") == (why_not_kvm() is None)


KVM = Accelerator("kvm", "test")
CAREFUL = Accelerator("kvm", "test", "host,-arch-capabilities")
DIED = QemuError("QEMU was killed by SIGABRT")
STOPPED = GuestStoppedError("internal-error")
LATE = BootTimeoutError("not ready")


@pytest.mark.parametrize(
    ("current", "error", "name", "cpu"),
    [
        (KVM, DIED, "kvm", "host,-arch-capabilities"),
        (CAREFUL, DIED, "tcg", None),
        (KVM, LATE, "tcg", None),
        (KVM, STOPPED, "tcg", None),
        (CAREFUL, STOPPED, "tcg", None),
    ],
)
def test_next_accelerator_kvm_fails_says_what_to_try(
    current: Accelerator, error: BridgeError, name: str, cpu: str | None
) -> None:
    following = next_accelerator(current, error)
    assert following is not None
    assert (following.name, following.cpu) == (name, cpu)
    assert following.reason
    assert "\n" not in str(following)


def test_next_accelerator_kvm_asked_for_stays_kvm() -> None:
    assert next_accelerator(KVM, DIED, wanted="kvm") is not None
    for current, error in ((CAREFUL, DIED), (KVM, LATE), (KVM, STOPPED)):
        assert next_accelerator(current, error, wanted="kvm") is None


def test_next_accelerator_cpu_asked_for_is_used_or_nothing() -> None:
    assert next_accelerator(KVM, DIED, cpu="host") is None
    assert next_accelerator(KVM, DIED, cpu="host,-vmx") is None
    following = next_accelerator(KVM, DIED, cpu="qemu64")
    assert following is not None
    assert following.name == "tcg"


@pytest.mark.parametrize(
    "error", [UsageError("x"), MissingDependencyError("x"), GuestPanicError("x")]
)
def test_next_accelerator_other_failure_is_the_answer(error: BridgeError) -> None:
    assert next_accelerator(KVM, error) is None


@pytest.mark.parametrize("error", [DIED, LATE, STOPPED])
def test_next_accelerator_tcg_fails_there_is_no_other(error: BridgeError) -> None:
    assert next_accelerator(Accelerator("tcg", "test"), error) is None


def test_next_accelerator_attempts_come_to_an_end() -> None:
    current: Accelerator | None = KVM
    tried = []
    while current is not None:
        tried.append((current.name, current.cpu))
        current = next_accelerator(current, DIED)
    assert tried == [("kvm", None), ("kvm", "host,-arch-capabilities"), ("tcg", None)]
