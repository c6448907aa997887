# SPDX-License-Identifier: Apache-2.0
"""Choose QEMU's accelerator, and say why.

A KVM that opens and makes a VM may still boot no stock kernel: without hardware support (a nested
software KVM, neither ``vmx`` nor ``svm`` in /proc/cpuinfo) it runs the firmware and then hangs. So
the processor's flags are checked as well, and the boot timeout (:mod:`bridge.vm.machine`) detects
what remains.
"""

from __future__ import annotations

import fcntl
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bridge.errors import (
    BootTimeoutError,
    BridgeError,
    GuestStoppedError,
    MissingDependencyError,
    QemuError,
    UsageError,
)

__all__ = ["ACCELERATORS", "Accelerator", "choose_accelerator", "next_accelerator", "why_not_kvm"]

ACCELERATORS = ("auto", "kvm", "tcg")
"""The values of the setting ``accel``."""

_CAREFUL_CPU = "host,-arch-capabilities"
"""QEMU copies the host's IA32_ARCH_CAPABILITIES (MSR 0x10a) and aborts where KVM refuses to set it.
``docs/system/cpu-models-x86.rst.inc`` in QEMU describes the feature."""

_KVM_API_VERSION = 12
_KVM_GET_API_VERSION = 0xAE00
_KVM_CREATE_VM = 0xAE01
"""``include/uapi/linux/kvm.h``; the API version has been 12 since Linux 2.6.22."""


@dataclass(frozen=True)
class Accelerator:
    """QEMU's ``-accel``, and in one line why it was chosen.

    Attributes:
        cpu: the ``-cpu`` that it needs; None for the usual one.
    """

    name: Literal["kvm", "tcg"]
    reason: str
    cpu: str | None = None

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def choose_accelerator(
    wanted: str = "auto", *, device: Path = Path("/dev/kvm"), cpuinfo: str | None = None
) -> Accelerator:
    """Choose KVM if a stock kernel can boot under it, otherwise TCG; or the one that is wanted.

    Args:
        wanted: one of :data:`ACCELERATORS`.
        cpuinfo: the text of /proc/cpuinfo; None to read that file.

    Raises:
        UsageError: ``wanted`` is something else.
        MissingDependencyError: KVM is wanted and cannot work.
    """
    if wanted not in ACCELERATORS:
        raise UsageError(
            f"there is no accelerator {wanted!r}",
            hint=f"--accel takes one of {', '.join(ACCELERATORS)}",
        )
    if wanted == "tcg":
        return Accelerator("tcg", "requested")
    obstacle = why_not_kvm(device=device, cpuinfo=cpuinfo)
    if obstacle is None:
        return Accelerator("kvm", "hardware virtualisation works here")
    reason, remedy = obstacle
    if wanted == "kvm":
        raise MissingDependencyError(
            f"KVM was requested, but cannot work: {reason}",
            hint=f"{remedy}, or run without KVM: --accel tcg",
        )
    return Accelerator("tcg", f"no KVM: {reason}")


def next_accelerator(
    current: Accelerator, error: BridgeError, *, wanted: str = "auto", cpu: str = ""
) -> Accelerator | None:
    """Return what to try after a guest did not start; None if there is nothing more.

    If QEMU ends by itself under KVM, it is started once more without the processor feature that
    KVM most often refuses. After that, or if nothing boots or KVM cannot run the guest's code, the
    answer is TCG, unless KVM was requested.

    Args:
        error: how the attempt with ``current`` ended.
        wanted: the setting ``accel``.
        cpu: the setting ``cpu``, which is never changed.
    """
    if current.name != "kvm" or not isinstance(
        error, (BootTimeoutError, GuestStoppedError, QemuError)
    ):
        return None
    if isinstance(error, QemuError) and current.cpu is None and not cpu:
        return Accelerator("kvm", "without arch-capabilities", _CAREFUL_CPU)
    if wanted == "kvm" or cpu.split(",")[0] == "host":
        return None
    if isinstance(error, BootTimeoutError):
        reason = "nothing booted under KVM"
    elif isinstance(error, GuestStoppedError):
        reason = "KVM cannot run the guest's code"
    else:
        reason = "QEMU does not start under KVM"
    return Accelerator("tcg", reason)


def why_not_kvm(
    *, device: Path = Path("/dev/kvm"), cpuinfo: str | None = None
) -> tuple[str, str] | None:
    """Return what keeps KVM from working and the remedy; None if nothing does."""
    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return f"there is no {device}", "load the kernel module kvm_intel or kvm_amd"
    except PermissionError:
        return f"this user may not open {device}", "add the user to the group kvm"
    except OSError as error:
        return f"{device} cannot be opened: {error.strerror}", "read the kernel's log (dmesg)"
    try:
        return _why_not_kvm_fd(fd, device, cpuinfo)
    finally:
        os.close(fd)


def _why_not_kvm_fd(fd: int, device: Path, cpuinfo: str | None) -> tuple[str, str] | None:
    try:
        version = fcntl.ioctl(fd, _KVM_GET_API_VERSION)
    except OSError as error:
        return f"{device} is not KVM: {error.strerror}", "read the kernel's log (dmesg)"
    if version != _KVM_API_VERSION:
        return f"{device} speaks API version {version}, not {_KVM_API_VERSION}", "update the kernel"
    text = Path("/proc/cpuinfo").read_text() if cpuinfo is None else cpuinfo
    flags = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    if flags is None or not {"vmx", "svm"} & set(flags.group(1).split()):
        return (
            f"{device} exists, but the processor has neither vmx nor svm",
            "enable (nested) virtualisation for this machine",
        )
    try:
        os.close(fcntl.ioctl(fd, _KVM_CREATE_VM, 0))
    except OSError as error:
        return f"{device} cannot create a VM: {error.strerror}", "read the kernel's log (dmesg)"
    return None
