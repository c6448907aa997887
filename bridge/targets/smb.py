# SPDX-License-Identifier: Apache-2.0
"""A share of an SMB server on the host, mounted by the guest's own client ``cifs``."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from bridge.targets import MOUNT_POINT, TARGET_ADDRESS

__all__ = ["MODULES", "PORT", "SmbShare"]

PORT = 445
"""The TCP port registered for SMB."""

MODULES = ("cifs",)
"""The guest's modules for it."""


@dataclass(frozen=True)
class SmbShare:
    """A share, as the guest mounts it.

    The guest keeps nothing of it: each operation reaches the server. It needs no program of its
    own, because the kernel's client is given the address.

    Attributes:
        name: the share's.
        user, password: as whom the guest logs in; no password to log in as a guest.
        dialect: the version of the protocol, as the option ``vers``. For 3.0 and later the guest's
            image needs the module ``cmac``.
        guest_port: where the guest reaches the server, by an endpoint of the target.
        mount_point: a directory of the guest, which is made.
        options: further options of the mount.
    """

    name: str
    user: str = "guest"
    password: str = ""
    dialect: str = "2.1"
    guest_port: int = PORT
    mount_point: str = MOUNT_POINT
    options: str = "cache=none,actimeo=0"

    @property
    def guest_setup(self) -> str:
        """The shell script that mounts the share, for a target's ``guest_setup``."""
        options = (
            f"ip={TARGET_ADDRESS},port={self.guest_port},vers={self.dialect},"
            f"username={self.user},password={self.password},{self.options}"
        )
        place = shlex.quote(self.mount_point)
        share = shlex.quote(f"//{TARGET_ADDRESS}/{self.name}")
        return (
            f"set -e\nmkdir -p {place}\n"
            f"mount -t cifs -o {shlex.quote(options)} {share} {place} || {{\n"
            # mount(8) says little: the reason is in the kernel's log.
            "    dmesg | grep CIFS | tail -n 5 >&2\n"
            "    exit 1\n"
            "}\n"
        )

    @property
    def guest_teardown(self) -> str:
        """The shell script that unmounts it."""
        place = shlex.quote(self.mount_point)
        return f"umount {place} || umount -l {place}\n"
