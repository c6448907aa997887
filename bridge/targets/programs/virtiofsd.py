# SPDX-License-Identifier: Apache-2.0
"""virtiofsd, a file server in Rust that shares the guest's memory, behind the driver virtiofs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from bridge.targets import MOUNT_POINT, VhostUserFs
from bridge.targets.programs.build import BuiltTarget, Program
from bridge.targets.programs.crates import Crate
from bridge.targets.programs.files import FILE_WORKLOAD
from bridge.targets.tree import write_tree

__all__ = ["VIRTIOFSD", "Virtiofsd"]

_CRATE: Final = Crate("virtiofsd", "1.14.0")
_TAG: Final = "files"

VIRTIOFSD: Final = Program(
    name="virtiofsd",
    source=_CRATE,
    steps=_CRATE.steps(),
    products=("bin/virtiofsd",),
    tools={
        "gcc": "gcc",
        "/usr/include/cap-ng.h": "libcap-ng-dev",
        "/usr/include/seccomp.h": "libseccomp-dev",
    },
    versions=(("cargo", "--version"), ("rustc", "--version")),
    # The first that reads its Cargo.lock, of version 4.
    oldest={"cargo": "1.78"},
    minutes=4,
    room=1 << 30,
)


class Virtiofsd(BuiltTarget):
    """A directory that virtiofsd serves, mounted at ``/mnt/target``.

    The guest sees a copy of :attr:`directory`, or a small tree, and changes that.
    """

    name = "virtiofsd"
    summary = "virtiofsd (Rust): a file server by vhost-user, mounted at /mnt/target"
    program = VIRTIOFSD
    workload = FILE_WORKLOAD
    ends_with_guest = True
    guest_setup = (
        f"set -e\n[ -d {MOUNT_POINT} ] || mkdir -p {MOUNT_POINT}\n"
        f"mount -t virtiofs {_TAG} {MOUNT_POINT}\n"
    )
    guest_teardown = f"umount {MOUNT_POINT} || umount -l {MOUNT_POINT}\n"

    def command(self) -> Sequence[str | Path]:
        """Serve a tree of files to the machine that connects."""
        tree = self.scratch / "tree"
        write_tree(tree, self.directory)
        # A hostile guest may ask for what lies outside of the tree. root can lock the server in;
        # the other sandbox needs programs for user namespaces.
        sandbox = "chroot" if os.geteuid() == 0 else "none"
        return [
            *(self.built.source / "bin" / "virtiofsd", f"--socket-path={self._socket}"),
            *(f"--shared-dir={tree}", f"--sandbox={sandbox}", "--log-level=warn"),
            # Its filter of system calls knows nothing of the run time's.
            "--seccomp=none",
            # Each operation is to reach the server while its system call lasts.
            "--cache=never",
        ]

    def sockets(self) -> Sequence[int | Path]:
        """Return the socket that QEMU connects to."""
        return (self._socket,)

    def serves(self) -> None:
        """Give the guest the device."""
        self.devices = (VhostUserFs(_TAG, self._socket),)

    @property
    def _socket(self) -> Path:
        return self.scratch / "socket"
