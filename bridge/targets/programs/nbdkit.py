# SPDX-License-Identifier: Apache-2.0
"""nbdkit itself, a server of disks in C, behind the guest's driver ``nbd``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from bridge.targets import UnixEndpoint
from bridge.targets.nbd import PORT, NbdDisk
from bridge.targets.programs.build import BuiltTarget, Program, Step
from bridge.targets.programs.debian import DebianSource

__all__ = ["NBDKIT", "Nbdkit"]

_LANGUAGES: Final = ("golang", "lua", "ocaml", "perl", "python", "rust", "tcl")
_LIBRARIES: Final = (
    *("bash-completions", "curl", "ext2", "gnutls", "iconv", "libblkio", "libguestfs", "liblzma"),
    *("libnbd", "libvirt", "manpages", "selinux", "ssh", "zlib", "zlib-ng"),
)
"""Left out, so that a build is the same on each machine, whatever libraries that has."""
_DIRECTORIES: Final = (
    *("common/include", "common/replacements", "common/utils", "common/allocators"),
    *("common/bitmap", "common/gpt", "common/protocol", "common/regions", "include", "server"),
    *("plugins/memory", "filters/cache"),
)
_SERVER, _PLUGIN, _FILTER = (
    "server/nbdkit",
    "plugins/memory/.libs/nbdkit-memory-plugin.so",
    "filters/cache/.libs/nbdkit-cache-filter.so",
)

NBDKIT: Final = Program(
    name="nbdkit",
    source=DebianSource("nbdkit"),
    steps=(
        Step(
            "configuring",
            (
                *("./configure", "CC=clang", "CXX=false"),
                "CFLAGS=-g -O1 -fsanitize-coverage=trace-pc-guard,pc-table "
                "-ffile-prefix-map={source}={place}",
                # Debian's patches are newer than what autoconf has made of the original.
                *(f"{tool}=:" for tool in ("AUTOCONF", "AUTOMAKE", "ACLOCAL", "AUTOHEADER")),
                *(f"--disable-{name}" for name in _LANGUAGES),
                *(f"--without-{name}" for name in _LIBRARIES),
            ),
        ),
        *(
            Step(
                f"compiling {directory}",
                (
                    *("make", "-j{jobs}", "-C", directory),
                    # Several shared objects in one program; docs/native.md.
                    "LDFLAGS=-fno-sanitize-link-runtime {shared}",
                ),
            )
            for directory in _DIRECTORIES
        ),
    ),
    products=(_SERVER, _PLUGIN, _FILTER),
    # Its configure asks for pkg-config, whatever is left out.
    tools={"clang": "clang", "make": "make", "pkg-config": "pkgconf"},
)
"""The server, the plugin ``memory`` and the filter ``cache``."""


class Nbdkit(BuiltTarget):
    """A disk of 64 MiB in nbdkit's memory, behind its cache: ``/dev/target/disk``."""

    name = "nbdkit"
    summary = "nbdkit (C): a disk in its memory, at /dev/nbd0"
    program = NBDKIT
    workload = " && ".join(
        (
            # Lazily, the kernel would write in the background, during whatever call.
            "mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0 /dev/nbd0",
            "mount /dev/nbd0 /mnt",
            "cp /usr/bin/perl /mnt/file",
            "sync /mnt/file",
            "rm /mnt/file",
            "fstrim /mnt",
            "umount /mnt",
            "dd if=/dev/nbd0 of=/dev/null bs=64k count=16 iflag=direct status=none",
            "blkdiscard -f /dev/nbd0",
        )
    )
    size = "64M"
    """The disk's size, as nbdkit reads it."""

    def command(self) -> Sequence[str | Path]:
        """Serve a disk on a Unix socket."""
        source = self.built.source
        return [
            *(source / _SERVER, "--foreground", "--unix", self._socket),
            *(f"--filter={source / _FILTER}", source / _PLUGIN, f"size={self.size}"),
        ]

    def serves(self) -> None:
        """Give the guest the disk, by its own driver."""
        self.endpoints = (UnixEndpoint("nbd", self._socket, PORT),)
        self.devices = (NbdDisk("disk"),)

    @property
    def _socket(self) -> Path:
        return self.scratch / "socket"
