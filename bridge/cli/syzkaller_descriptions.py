# SPDX-License-Identifier: Apache-2.0
"""What a target offers to programs in the executor's sandbox, as a description for syzkaller.

The format is that of syzkaller's ``docs/syscall_descriptions_syntax.md``. Nothing that a target
chooses becomes a word of it: names of files are strings, in hexadecimal digits unless they are
plain; all else gets a number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from bridge.targets import TARGET_ADDRESS, AnyEndpoint, UdpEndpoint

__all__ = [
    "CONST_FILE",
    "DESCRIPTION_FILE",
    "PATHS_SHOWN",
    "Device",
    "DeviceKind",
    "Offer",
    "calls_in",
    "constants",
    "description",
]

DESCRIPTION_FILE = "kcov_bridge.txt"
CONST_FILE = f"{DESCRIPTION_FILE}.const"

PATHS_SHOWN = 200
"""Files and directories of a target's mounts that a description names, those near the root
first."""

_NEW_NAMES = ("syz0", "syz1")
_NEW_DIRECTORIES = 8
"""Directories in which programs make files with these names."""

DeviceKind = str
"""The resource of syzkaller that is an open device of this kind."""


@dataclass(frozen=True)
class Device:
    """A device node in the guest.

    ``kind`` is ``fd_tty``, ``fd_block`` or ``fd``.
    """

    path: str
    kind: DeviceKind


@dataclass
class Offer:
    """What programs can reach of a target.

    Attributes:
        directories, files: paths in the sandbox; names that are no UTF-8 have surrogate escapes.
    """

    directories: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    devices: list[Device] = field(default_factory=list)
    endpoints: tuple[AnyEndpoint, ...] = ()

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return bool(self.directories or self.files or self.devices or self.endpoints)


# x86-64 Linux: include/uapi/asm-generic/fcntl.h, include/uapi/linux/fcntl.h, linux/socket.h,
# linux/net.h, arch/x86/entry/syscalls/syscall_64.tbl.
_CONSTANTS: Final = {
    "AF_INET": 2,
    "AT_FDCWD": (1 << 64) - 100,
    "SOCK_DGRAM": 2,
    "SOCK_STREAM": 1,
    **{
        f"__NR_{name}": number
        for name, number in (
            *(("read", 0), ("write", 1), ("lseek", 8), ("ioctl", 16), ("pread64", 17)),
            *(("pwrite64", 18), ("connect", 42), ("flock", 73), ("fsync", 74)),
            *(("truncate", 76), ("ftruncate", 77), ("getdents64", 217), ("openat", 257)),
            *(("rename", 82), ("mkdir", 83), ("rmdir", 84), ("link", 86), ("unlink", 87)),
            *(("symlink", 88), ("readlink", 89), ("chmod", 90), ("fchmod", 91), ("chown", 92)),
            *(("lstat", 6), ("stat", 4), ("fstat", 5), ("statfs", 137), ("getxattr", 191)),
            *(("setxattr", 188), ("listxattr", 194), ("mknod", 133), ("fallocate", 285)),
        )
    },
}

_HEAD = """\
# What the target of a campaign offers to programs. Written by kcov-bridge syzkaller.

meta arches["amd64"]

include <linux/net.h>
include <linux/socket.h>
include <uapi/linux/fcntl.h>
"""

_FILE_CALLS = """
# Files and directories of the target's mounts.

resource fd_kcov_bridge[fd]

openat$kcov_bridge(fd const[AT_FDCWD], file ptr[in, string[kcov_bridge_path]], \
flags flags[open_flags], mode flags[open_mode]) fd_kcov_bridge
openat$kcov_bridge_new(fd const[AT_FDCWD], file ptr[in, string[kcov_bridge_any]], \
flags flags[open_flags], mode flags[open_mode]) fd_kcov_bridge
openat$kcov_bridge_dir(fd const[AT_FDCWD], file ptr[in, string[kcov_bridge_dir]], flags const[0], \
mode const[0]) fd_kcov_bridge
read$kcov_bridge(fd fd_kcov_bridge, buf buffer[out], count len[buf])
write$kcov_bridge(fd fd_kcov_bridge, buf buffer[in], count len[buf])
pread64$kcov_bridge(fd fd_kcov_bridge, buf buffer[out], count len[buf], pos fileoff)
pwrite64$kcov_bridge(fd fd_kcov_bridge, buf buffer[in], count len[buf], pos fileoff)
lseek$kcov_bridge(fd fd_kcov_bridge, offset fileoff, whence flags[seek_whence])
getdents64$kcov_bridge(fd fd_kcov_bridge, ent buffer[out], count len[ent])
fstat$kcov_bridge(fd fd_kcov_bridge, statbuf ptr[out, stat])
ftruncate$kcov_bridge(fd fd_kcov_bridge, len fileoff)
fallocate$kcov_bridge(fd fd_kcov_bridge, mode flags[fallocate_mode], off fileoff, len fileoff)
fchmod$kcov_bridge(fd fd_kcov_bridge, mode flags[open_mode])
flock$kcov_bridge(fd fd_kcov_bridge, op flags[flock_op])
fsync$kcov_bridge(fd fd_kcov_bridge)
stat$kcov_bridge(file ptr[in, string[kcov_bridge_any]], statbuf ptr[out, stat])
lstat$kcov_bridge(file ptr[in, string[kcov_bridge_any]], statbuf ptr[out, stat])
statfs$kcov_bridge(path ptr[in, string[kcov_bridge_path]], buf buffer[out])
chmod$kcov_bridge(file ptr[in, string[kcov_bridge_any]], mode flags[open_mode])
chown$kcov_bridge(file ptr[in, string[kcov_bridge_any]], uid uid, gid gid)
truncate$kcov_bridge(file ptr[in, string[kcov_bridge_any]], len fileoff)
mkdir$kcov_bridge(path ptr[in, string[kcov_bridge_new]], mode flags[open_mode])
mknod$kcov_bridge(file ptr[in, string[kcov_bridge_new]], mode flags[mknod_mode], dev int32)
rmdir$kcov_bridge(path ptr[in, string[kcov_bridge_new]])
unlink$kcov_bridge(path ptr[in, string[kcov_bridge_new]])
rename$kcov_bridge(old ptr[in, string[kcov_bridge_any]], new ptr[in, string[kcov_bridge_any]])
link$kcov_bridge(old ptr[in, string[kcov_bridge_any]], new ptr[in, string[kcov_bridge_new]])
symlink$kcov_bridge(old ptr[in, string[kcov_bridge_any]], new ptr[in, string[kcov_bridge_new]])
readlink$kcov_bridge(path ptr[in, string[kcov_bridge_any]], buf buffer[out], siz len[buf])
getxattr$kcov_bridge(path ptr[in, string[kcov_bridge_path]], name ptr[in, xattr_name], \
val buffer[out], size len[val])
setxattr$kcov_bridge(path ptr[in, string[kcov_bridge_path]], name ptr[in, xattr_name], \
val ptr[in, string], size len[val], flags flags[setxattr_flags])
listxattr$kcov_bridge(path ptr[in, string[kcov_bridge_path]], list buffer[out], size len[list])
"""

_SOCKET_CALLS = """
# Endpoints. The network of the sandbox does not lead there, that of the guest does.

resource sock_kcov_bridge_{kind}[sock_{kind}]

syz_init_net_socket$kcov_bridge_{kind}(domain const[AF_INET], type const[{type}], proto const[0]) \
sock_kcov_bridge_{kind}
read$kcov_bridge_{kind}(fd sock_kcov_bridge_{kind}, buf buffer[out], count len[buf])
write$kcov_bridge_{kind}(fd sock_kcov_bridge_{kind}, buf buffer[in], count len[buf])
"""

_PLAIN = re.compile(r"[A-Za-z0-9_./+=,@-]+")


def description(offer: Offer) -> str:
    """Return the text of :data:`DESCRIPTION_FILE`."""
    parts = [_HEAD]
    known = sorted({*offer.directories, *offer.files}, key=lambda path: (path.count("/"), path))
    if known:
        shown = known[:PATHS_SHOWN]
        directories = [path for path in shown if path in set(offer.directories)]
        if not directories:
            # There is always one, the root of a mount.
            directories = [shown[0].rpartition("/")[0] or "/"]
        new = [f"{path}/{name}" for path in directories[:_NEW_DIRECTORIES] for name in _NEW_NAMES]
        parts.append(_FILE_CALLS)
        if len(known) > len(shown):
            parts.append(f"\n# {len(known) - len(shown)} more paths are left out.")
        parts += [
            f"\n{name} = {_strings(paths)}"
            for name, paths in (
                ("kcov_bridge_path", shown),
                ("kcov_bridge_dir", directories),
                ("kcov_bridge_new", new),
                ("kcov_bridge_any", (*shown, *new)),
            )
        ]
        parts.append("\n")
    for number, device in enumerate(offer.devices):
        parts.append(_device_calls(number, device))
    parts += _endpoint_calls(offer.endpoints)
    return "".join(parts)


def calls_in(text: str) -> list[str]:
    """Return the names of the calls in a description."""
    return re.findall(r"^(\w+\$\w+)\(", text, re.MULTILINE)


def constants() -> str:
    """Return the text of :data:`CONST_FILE`."""
    lines = [f"{name} = {value}" for name, value in sorted(_CONSTANTS.items())]
    return "\n".join(["arches = amd64", *lines, ""])


def _device_calls(number: int, device: Device) -> str:
    name = f"kcov_bridge_dev{number}"
    lines = [
        "",
        f"resource fd_{name}[{device.kind}]",
        "",
        f"openat${name}(fd const[AT_FDCWD], file ptr[in, string[{_string(device.path)}]], "
        f"flags flags[open_flags], mode const[0]) fd_{name}",
        f"read${name}(fd fd_{name}, buf buffer[out], count len[buf])",
        f"write${name}(fd fd_{name}, buf buffer[in], count len[buf])",
        f"lseek${name}(fd fd_{name}, offset fileoff, whence flags[seek_whence])",
        f"ioctl${name}(fd fd_{name}, cmd int32, arg buffer[in])",
    ]
    return "\n".join([*lines, ""])


def _endpoint_calls(endpoints: Sequence[AnyEndpoint]) -> list[str]:
    parts = []
    address = int.from_bytes(bytes(map(int, TARGET_ADDRESS.split("."))), "big")
    numbered = list(enumerate(endpoints))
    for kind, type_ in (("tcp", "SOCK_STREAM"), ("udp", "SOCK_DGRAM")):
        those = [each for each in numbered if isinstance(each[1], UdpEndpoint) is (kind == "udp")]
        if not those:
            continue
        parts.append(_SOCKET_CALLS.format(kind=kind, type=type_))
        for number, endpoint in those:
            where = f"sockaddr_kcov_bridge{number}"
            parts.append(
                f"connect$kcov_bridge{number}(fd sock_kcov_bridge_{kind}, "
                f"addr ptr[in, {where}], addrlen len[addr])\n\n"
                f"{where} {{\n"
                "\tfamily\tconst[AF_INET, int16]\n"
                f"\tport\tconst[{endpoint.guest_port}, int16be]\n"
                f"\taddr\tconst[{address:#x}, int32be]\n"
                "} [size[16]]\n"
            )
    return parts


def _strings(paths: Iterable[str]) -> str:
    return ", ".join(_string(path) for path in paths)


def _string(path: str) -> str:
    """Return a path as a string of the descriptions, whatever its characters are."""
    if _PLAIN.fullmatch(path):
        return f'"{path}"'
    return f"`{path.encode('utf-8', 'surrogateescape').hex()}`"
