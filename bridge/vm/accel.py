# SPDX-License-Identifier: Apache-2.0
"""Which accelerator QEMU is to use, and why.

That /dev/kvm opens and makes a VM does not mean that a stock kernel boots: a KVM without the
processor's help (no ``vmx``, no ``svm`` in /proc/cpuinfo: a nested software KVM) runs the firmware
and then nothing. So the processor's flags count too, and the boot watchdog
(:mod:`bridge.vm.machine`) watches over the rest.
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
"""What a person can ask for."""

_CAREFUL_CPU = "host,-arch-capabilities"
"""QEMU copies the host's IA32_ARCH_CAPABILITIES (MSR 0x10a), which not every KVM lets it set; it
aborts then. ``docs/system/cpu-models-x86.rst.inc`` in QEMU says what the feature is."""

_KVM_API_VERSION = 12
_KVM_GET_API_VERSION = 0xAE00
_KVM_CREATE_VM = 0xAE01
"""``include/uapi/linux/kvm.h``; the API version has been 12 since Linux 2.6.22."""


@dataclass(frozen=True)
class Accelerator:
    """QEMU's ``-accel``, and in one line why it was chosen.

    ``cpu`` is the ``-cpu`` that it needs, None for the usual one.
    """

    name: Literal["kvm", "tcg"]
    reason: str
    cpu: str | None = None

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def choose_accelerator(
    wanted: str = "auto", *, device: Path = Path("/dev/kvm"), cpuinfo: str | None = None
) -> Accelerator:
    """KVM where a stock kernel can really boot under it, TCG elsewhere, or what was asked for.

    ``cpuinfo`` is the text of /proc/cpuinfo if it is not to be read from there. Raises
    :class:`bridge.errors.UsageError` for a word that is not one of :data:`ACCELERATORS`, and
    :class:`bridge.errors.MissingDependencyError` when KVM was asked for and cannot work.
    """
    if wanted not in ACCELERATORS:
        raise UsageError(
            f"no accelerator is called {wanted!r}", hint=f"one of {', '.join(ACCELERATORS)}"
        )
    if wanted == "tcg":
        return Accelerator("tcg", "asked for")
    obstacle = why_not_kvm(device=device, cpuinfo=cpuinfo)
    if obstacle is None:
        return Accelerator("kvm", "hardware virtualisation works here")
    reason, remedy = obstacle
    if wanted == "kvm":
        raise MissingDependencyError(
            f"KVM was asked for and cannot work: {reason}",
            hint=f"{remedy}, or run without KVM: --accel tcg",
        )
    return Accelerator("tcg", f"no KVM: {reason}")


def next_accelerator(
    current: Accelerator, error: BridgeError, *, wanted: str = "auto", cpu: str = ""
) -> Accelerator | None:
    """Return what to try after a guest did not start; None if there is nothing more.

    A QEMU that ends by itself under KVM is tried once more with a processor that lacks what hosts
    and hypervisors below them most often disagree about. Then, and if nothing boots or KVM cannot
    run the guest's code, it is TCG, unless KVM was asked for.

    Args:
        error: how the attempt with ``current`` ended.
        wanted: the setting ``accel``.
        cpu: the setting ``cpu``; it is used as it is or not at all.
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
    """What keeps KVM from working, and the remedy; None when nothing does."""
    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return f"there is no {device}", "load the kernel module kvm_intel or kvm_amd"
    except PermissionError:
        return f"{device} may not be opened", "add the user to the group kvm"
    except OSError as error:
        return f"{device} does not open: {error.strerror}", "look at the kernel's log"
    try:
        return _why_not_kvm_fd(fd, device, cpuinfo)
    finally:
        os.close(fd)


def _why_not_kvm_fd(fd: int, device: Path, cpuinfo: str | None) -> tuple[str, str] | None:
    try:
        version = fcntl.ioctl(fd, _KVM_GET_API_VERSION)
    except OSError as error:
        return f"{device} is not KVM: {error.strerror}", "look at the kernel's log"
    if version != _KVM_API_VERSION:
        return f"{device} speaks API version {version}, not {_KVM_API_VERSION}", "update the kernel"
    text = Path("/proc/cpuinfo").read_text() if cpuinfo is None else cpuinfo
    flags = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    if flags is None or not {"vmx", "svm"} & set(flags.group(1).split()):
        return (
            f"{device} is there, but the processor shows neither vmx nor svm",
            "switch (nested) virtualisation on for this machine",
        )
    try:
        os.close(fcntl.ioctl(fd, _KVM_CREATE_VM, 0))
    except OSError as error:
        return f"{device} makes no VM: {error.strerror}", "look at the kernel's log"
    return None
