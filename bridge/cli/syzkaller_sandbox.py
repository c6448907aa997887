# SPDX-License-Identifier: Apache-2.0
"""What programs in the sandbox of syzkaller's executor reach of a target.

``do_sandbox_none`` in syzkaller's ``executor/common_linux.h`` moves into an empty root and a
network namespace of its own. Three ways lead out of it, and they need no help of ours while a
program runs:

* ``/syz-inputs`` of the guest is there with all that is mounted below it. So the target's mounts
  are bound there before the executor starts.
* ``/dev`` is that of the guest, and ``/dev/target`` with it.
* ``syz_init_net_socket`` opens a socket in the guest's own network namespace. What it connects to
  is in the description file.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from bridge.cli.syzkaller_descriptions import Device, Offer
from bridge.errors import GuestSetupError
from bridge.guest.guest import Guest
from bridge.targets.description import Description

__all__ = ["INPUTS", "look", "lost_mount", "mount_points", "mounts_of", "show_script"]

INPUTS = "/syz-inputs"
"""The directory of the guest that the executor binds into its sandboxes."""

_MOUNTS = "/mnt/"
"""Where targets mount what they serve."""

_LIST_BYTES = 1 << 20
"""As much of a mount's list of files is looked at."""
_LIST_SECONDS = 60

_STAT_SECONDS = 30
"""A target that answers later is slow, and its mount is not lost."""

_OCTAL = re.compile(r"\\([0-7]{3})")

_DEVICES = """\
for node in /dev/target/*; do
    [ -e "$node" ] || continue
    stat -L -c '%F' "$node"
    readlink -f "$node"
    echo "$node"
done
"""


def mounts_of(guest: Guest) -> list[str]:
    """Return where something is mounted below /mnt in a guest, sorted."""
    done = guest.run(["cat", "/proc/self/mountinfo"], timeout=60, check=True)
    return mount_points(done.stdout.decode("utf-8", "surrogateescape"))


def lost_mount(guest: Guest, mounts: Sequence[str]) -> str:
    """Return which of these mounts no longer works, and why; "" if all do.

    A program may unmount one in the guest, or with MNT_FORCE in a sandbox, after which all calls
    on it fail everywhere; and a target may cut a mount's connection.

    Raises:
        BridgeError: the guest does not say.
    """
    there = mounts_of(guest) if mounts else []
    for mount in mounts:
        if mount not in there:
            return f"{mount} was unmounted"
        done = guest.run(["stat", mount], timeout=_STAT_SECONDS)
        # Others are of a guest without the memory or the processes to run it.
        if done.exit_status == 1 and (said := done.stderr.decode(errors="replace").strip()):
            return said.removeprefix("stat: ")
    return ""


def mount_points(mountinfo: str) -> list[str]:
    """Return the paths below /mnt in ``/proc/PID/mountinfo``, sorted."""
    # proc(5): the fifth field, in which blanks and backslashes are octal numbers.
    found = (line.split(" ")[4] for line in mountinfo.split("\n") if line)
    paths = {_OCTAL.sub(lambda octal: chr(int(octal[1], 8)), path) for path in found}
    return sorted(path for path in paths if path.startswith(_MOUNTS))


def _inside(path: str) -> str:
    """Return where a path below /mnt is in the sandbox."""
    return f"{INPUTS}/{path.removeprefix(_MOUNTS)}"


def show_script(mounts: list[str]) -> str:
    """Return the script for the guest that shows mounts in all later sandboxes."""
    if not mounts:
        return ""
    lines = [
        f"mkdir -p {INPUTS}",
        f"mount -t tmpfs -o mode=0755,size=1m kcov-bridge {INPUTS}",
    ]
    for path in mounts:
        there = shlex.quote(_inside(path))
        lines.append(f"mkdir -p {there} && mount --bind {shlex.quote(path)} {there}")
    # Programs of all sandboxes share it.
    lines.append(f"mount -o remount,ro {INPUTS}")
    return "".join(f"{line}\n" for line in lines)


def look(guest: Guest, target: Description) -> Offer:
    """Return what the target offers in this guest, in which it is set up.

    Raises:
        GuestSetupError: a mount of the target cannot be looked at.
        GuestLostError: the guest is gone.
    """
    offer = Offer(endpoints=target.endpoints)
    for mount in mounts_of(guest):
        command = f"find {shlex.quote(mount)} -xdev -printf '%y%P\\0' | head -c {_LIST_BYTES}"
        done = guest.run(command, timeout=_LIST_SECONDS)
        if not done.stdout or done.exit_status:
            raise GuestSetupError(
                f"the target's mount {mount} cannot be looked at in the guest",
                evidence=done.stderr.decode(errors="replace"),
                hint="does `kcov-bridge run -- find /mnt` with the same target show it?",
            )
        # The last one may be cut off.
        for entry in done.stdout.decode("utf-8", "surrogateescape").split("\0")[:-1]:
            kind, path = entry[0], entry[1:]
            found = _inside(f"{mount}/{path}" if path else mount)
            (offer.directories if kind == "d" else offer.files).append(found)
    nodes = guest.run(_DEVICES, timeout=60, check=True).text.splitlines()
    for what, node, name in zip(nodes[::3], nodes[1::3], nodes[2::3], strict=True):
        tty = node.startswith("/dev/tty")
        kind = "fd_block" if what.startswith("block") else "fd_tty" if tty else "fd"
        offer.devices.append(Device(name, kind))
    return offer
