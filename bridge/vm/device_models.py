# SPDX-License-Identifier: Apache-2.0
"""A QEMU whose own device models are covered: see "QEMU's own devices" in docs/native.md.

    python -m bridge.vm.device_models

builds it, from Debian's source package, and prints where it is; ``make qemu-devices`` does so.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from bridge.errors import BridgeError, MissingDependencyError
from bridge.targets.programs.build import Program, Step
from bridge.targets.programs.debian import DebianSource

__all__ = ["EXTRA_ARGS", "QEMU", "find_qemu"]

_PRODUCT: Final = "qemu-system-x86_64"
_COVERED: Final = ("src:*/hw/*", "src:*/net/*", "src:*/block/*", "src:*/scsi/*", "fun:*")
"""Devices, and what they hand the guest's requests to."""
_NOT_COVERED: Final = (
    # The bridge's own device, which rings at many returns.
    "src:*/hw/misc/ivshmem.c",
    # Interrupts and the clock, as kcov leaves out interrupts.
    *("src:*/hw/intc/*", "src:*/hw/timer/*", "src:*/hw/core/irq.c", "src:*/hw/i386/kvmvapic.c"),
    *("fun:acpi_pm_tmr_*", "fun:msi_prepare_message", "fun:msix_prepare_message"),
    "fun:pci_msi_trigger",
    *("fun:msi_send_message", "fun:msix_get_message", "fun:msix_is_masked", "fun:msix_notify"),
    "fun:msix_vector_masked",
    # Processors: QEMU calls these as it runs the guest's code.
    *("src:*/hw/core/cpu*", "src:*/hw/i386/x86.c"),
    # Each turn of the main loop.
    *("fun:net_slirp_add_poll", "fun:net_slirp_get_revents", "fun:net_slirp_poll_notify"),
    "fun:net_slirp_clock_get_ns",
)
_COMPILED: Final = (
    "-fsanitize-coverage=trace-pc-guard,pc-table "
    "-fsanitize-coverage-allowlist={source}/covered.txt "
    "-fsanitize-coverage-ignorelist={source}/not-covered.txt "
    # Where the source is afterwards, without the build tree.
    "-fdebug-prefix-map={source}/build={place} -fdebug-prefix-map=../= "
    "-fdebug-prefix-map={source}/include={place}/include"
)
_QUIET: Final = """\
/* Whether a device takes input is asked at each turn of the main loop: for nobody. */
#include <stdint.h>
typedef int (*taker)(uint64_t pc);
extern taker kcov_bridge_take_blocks(taker take);
/* Weak, because configure links its own programs with this too. */
extern int __attribute__((weak)) __real_qemu_chr_be_can_write(void *chardev);
static int nobody(uint64_t pc) { (void)pc; return 0; }
int __wrap_qemu_chr_be_can_write(void *chardev)
{
    taker before = kcov_bridge_take_blocks(nobody);
    int room = __real_qemu_chr_be_can_write(chardev);

    kcov_bridge_take_blocks(before);
    return room;
}
"""
_LINKED: Final = (
    "{source}/quiet.o -Wl,--wrap=qemu_chr_be_can_write -fno-sanitize-link-runtime {shared}"
)
_FEATURES: Final = (
    *("attr", "cap-ng", "coroutine-pool", "fdt", "kvm", "linux-aio", "plugins", "seccomp", "slirp"),
    *("tcg", "tpm", "vhost-kernel", "vhost-net", "vhost-user", "virtfs"),
)
_FIRMWARE: Final = "/usr/share/qemu:/usr/share/seabios:/usr/lib/ipxe/qemu"
"""That of Debian's QEMU."""

QEMU: Final = Program(
    name="qemu-devices",
    source=DebianSource("qemu", "bookworm"),
    steps=(
        Step(
            "choosing what is covered",
            ("sh", "-c", 'printf "%s\\n" "$@" >covered.txt', "sh", *_COVERED),
        ),
        Step(
            "choosing what is not",
            ("sh", "-c", 'printf "%s\\n" "$@" >not-covered.txt', "sh", *_NOT_COVERED),
        ),
        Step(
            "writing what runs for nobody", ("sh", "-c", 'printf "%s" "$1" >quiet.c', "sh", _QUIET)
        ),
        Step("compiling it", ("clang", "-O2", "-Wall", "-Werror", "-c", "quiet.c")),
        Step("making room", ("mkdir", "build")),
        Step(
            "configuring QEMU",
            (
                *("../configure", "--cc=clang", "--host-cc=clang", "--cxx=/bin/false"),
                *("--target-list=x86_64-softmmu", "--without-default-features"),
                *("--disable-docs", "--disable-tools", "--disable-guest-agent", "--disable-user"),
                *(f"--firmwarepath={_FIRMWARE}", "--enable-trace-backends=nop"),
                *(f"--enable-{feature}" for feature in _FEATURES),
                *("--disable-werror", f"--extra-cflags={_COMPILED}", f"--extra-ldflags={_LINKED}"),
            ),
            "build",
        ),
        Step(
            "compiling QEMU (many minutes)",
            ("ninja", "-C", "build", "-j{jobs}", _PRODUCT),
        ),
        # In its build tree it would look for its firmware there.
        Step("keeping the program", ("mv", f"build/{_PRODUCT}", ".")),
        Step("removing the rest", ("rm", "-r", "build")),
    ),
    products=(_PRODUCT,),
    tools={
        "clang": "clang",
        "meson": "meson",
        "ninja": "ninja-build",
        "pkg-config": "pkg-config",
        "python3": "python3",
        "/usr/include/attr/libattr.h": "libattr1-dev",
        "/usr/include/cap-ng.h": "libcap-ng-dev",
        "/usr/include/glib-2.0/glib.h": "libglib2.0-dev",
        "/usr/include/libaio.h": "libaio-dev",
        "/usr/include/libfdt.h": "libfdt-dev",
        "/usr/include/pixman-1/pixman.h": "libpixman-1-dev",
        "/usr/include/seccomp.h": "libseccomp-dev",
        "/usr/include/slirp/libslirp.h": "libslirp-dev",
        "/usr/include/zlib.h": "zlib1g-dev",
    },
    minutes=30,
    room=4 << 30,
)
"""How it is built."""

EXTRA_ARGS: Final = ("-global", "virtio-pci.ioeventfd=off")
"""Have virtio devices serve the guest on the vCPU's thread, where it is known for which task."""


def find_qemu() -> Path:
    """Return the program.

    Raises:
        MissingDependencyError: it is not built.
    """
    built = QEMU.find()
    if built is None:
        raise MissingDependencyError(
            "the QEMU whose own device models are covered is not built yet",
            hint="build it: make qemu-devices (about half an hour), or name one: --qemu PROGRAM",
        )
    return built.source / _PRODUCT


def main() -> int:
    """Build the program and print where it is; return the exit status."""
    try:
        print(QEMU.build().source / _PRODUCT)
    except BridgeError as error:
        print(error.report(), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
