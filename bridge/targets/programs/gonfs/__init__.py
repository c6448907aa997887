# SPDX-License-Identifier: Apache-2.0
"""go-nfs, a file server in Go, which the guest mounts with its own NFS client."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from bridge.targets import MOUNT_POINT, TARGET_ADDRESS, UnixEndpoint
from bridge.targets.programs.build import BuiltTarget, Program, Step
from bridge.targets.programs.files import FILE_WORKLOAD
from bridge.targets.programs.packaged import PackagedSource
from bridge.targets.tree import write_tree

__all__ = ["GONFS", "Gonfs"]

_PORT: Final = 2049
"""The port registered for NFS; the server takes the calls of the mount protocol there too."""

_COVERED: Final = ("github.com/willscott/...", "github.com/rasky/...", "github.com/go-git/...")
"""The server, its file system in memory, and the libraries of both for XDR and file names."""

GONFS: Final = Program(
    name="gonfs",
    source=PackagedSource("gonfs", "0.0.4", ("go.mod", "go.sum", "main.go")),
    steps=(
        Step(
            "compiling the server and its modules",
            (
                *("go", "build", "-cover", "-covermode=atomic"),
                f"-coverpkg=./...,{','.join(_COVERED)}",
                *("-buildvcs=false", "-mod=readonly", "-o", "gonfs", "."),
            ),
            # Without C the program is the same on each machine.
            environment=(("CGO_ENABLED", "0"), ("GOTOOLCHAIN", "local")),
        ),
    ),
    products=("gonfs",),
    tools={"go": "golang-go"},
    versions=(("go", "version"),),
    # As go.mod says.
    oldest={"go": "1.20"},
)
"""``main.go`` beside this file, on the modules that ``go.mod`` names."""

_OPTIONS: Final = ",".join(
    (
        # No program of the guest's is asked, and no other port: docs/targets.md.
        *("vers=3", "proto=tcp", "nolock", f"addr={TARGET_ADDRESS}", f"port={_PORT}"),
        *("mountproto=tcp", f"mountport={_PORT}"),
        # Each operation is to reach the server while its system call lasts.
        *("noac", "lookupcache=none"),
        # A server that hangs costs a call, not the guest.
        "soft",
    )
)


class Gonfs(BuiltTarget):
    """A directory that go-nfs serves from memory, mounted at ``/mnt/target``.

    The guest sees a copy of :attr:`directory`, or a small tree. What it changes stays in the
    server's memory.
    """

    name = "gonfs"
    summary = "go-nfs (Go): an NFS 3 server, mounted at /mnt/target"
    program = GONFS
    workload = FILE_WORKLOAD
    guest_modules = ("nfsv3",)
    guest_setup = (
        f"set -e\n[ -d {MOUNT_POINT} ] || mkdir -p {MOUNT_POINT}\n"
        # -i: without mount.nfs, which the image need not have.
        f"mount -i -t nfs -o {_OPTIONS} {TARGET_ADDRESS}:/ {MOUNT_POINT}\n"
    )
    guest_teardown = f"umount {MOUNT_POINT} || umount -l {MOUNT_POINT}\n"

    def command(self) -> Sequence[str | Path]:
        """Serve a tree of files on a Unix socket."""
        tree = self.scratch / "tree"
        write_tree(tree, self.directory)
        return [self.built.source / "gonfs", self._socket, tree]

    def serves(self) -> None:
        """Give the guest the port of NFS."""
        self.endpoints = (UnixEndpoint("nfs", self._socket, _PORT),)

    @property
    def _socket(self) -> Path:
        return self.scratch / "socket"
