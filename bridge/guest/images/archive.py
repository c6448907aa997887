# SPDX-License-Identifier: Apache-2.0
"""Reproducible archives: sorted, with one fixed time, owned by root.

``newc`` is the cpio format of ``Documentation/driver-api/early-userspace/buffer-format.rst``: the
kernel unpacks any number of such archives, one after the other, into its initramfs. So layers of
an initramfs can be appended to each other.
"""

from __future__ import annotations

import fnmatch
import io
import re
import stat
import tarfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

__all__ = ["EPOCH", "Entry", "normalise_tar", "read_tree", "with_parents", "write_newc"]

EPOCH = 1_672_531_200
"""The time of each file in an image, in seconds: 2023-01-01, because some programs dislike 0."""


@dataclass(frozen=True)
class Entry:
    """A directory, regular file or symbolic link to archive.

    ``path`` is relative and has no leading dot; ``mode`` has the file's type; ``data`` is the
    file's content or the link's target.
    """

    path: str
    mode: int
    data: bytes = b""

    @classmethod
    def directory(cls, path: str, mode: int = 0o755) -> Entry:
        """Make a directory with these permissions."""
        return cls(path, stat.S_IFDIR | mode)

    @classmethod
    def file(cls, path: str, data: bytes, mode: int = 0o644) -> Entry:
        """Make a regular file with these permissions."""
        return cls(path, stat.S_IFREG | mode, data)

    @classmethod
    def link(cls, path: str, target: str) -> Entry:
        """Make a symbolic link."""
        return cls(path, stat.S_IFLNK | 0o777, target.encode())


def read_tree(root: Path, prefix: str = "") -> list[Entry]:
    """Return everything below a directory, as entries below ``prefix``.

    Only the execute bit of a file's permissions is kept, so that the umask does not matter.
    """
    entries = []
    for path in sorted(root.rglob("*")):
        name = prefix + str(path.relative_to(root))
        if path.is_symlink():
            entries.append(Entry.link(name, str(path.readlink())))
        elif path.is_dir():
            entries.append(Entry.directory(name))
        else:
            executable = path.stat().st_mode & stat.S_IXUSR
            entries.append(Entry.file(name, path.read_bytes(), 0o755 if executable else 0o644))
    return entries


def with_parents(entries: Iterable[Entry]) -> list[Entry]:
    """Return the entries sorted by path, with the missing directories above them."""
    all_entries = {entry.path: entry for entry in entries}
    for path in list(all_entries):
        for parent in Path(path).parents:
            if str(parent) != ".":
                all_entries.setdefault(str(parent), Entry.directory(str(parent)))
    return [all_entries[path] for path in sorted(all_entries)]


def write_newc(out: IO[bytes], entries: Iterable[Entry]) -> None:
    """Write an archive, padded so that another may follow."""
    for number, entry in enumerate(with_parents(entries), start=1):
        _write_newc_member(out, number, entry)
    _write_newc_member(out, 0, Entry("TRAILER!!!", 0))


def _write_newc_member(out: IO[bytes], number: int, entry: Entry) -> None:
    name = entry.path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    # ino, mode, uid, gid, nlink, mtime, filesize, dev and rdev (major, minor), namesize, check
    mtime = EPOCH if entry.mode else 0
    values = (number, entry.mode, 0, 0, links, mtime, len(entry.data), 0, 0, 0, 0, len(name), 0)
    header = b"070701" + b"".join(b"%08x" % value for value in values)
    for part in (header + name, entry.data):
        out.write(part + b"\0" * (-len(part) % 4))


def normalise_tar(
    source: IO[bytes],
    out: IO[bytes],
    *,
    exclude: Iterable[str],
    replace: Iterable[Entry],
    edit: Mapping[str, Callable[[bytes], bytes]],
) -> None:
    """Rewrite a tar archive with sorted members and fixed times.

    Args:
        source: must be seekable.
        exclude: patterns of paths to leave out; ``*`` also matches slashes.
        replace: entries that replace members, or are added.
        edit: functions that change the contents of files, by path.

    Raises:
        tarfile.TarError: the archive is broken.
    """
    excluded = re.compile("|".join(fnmatch.translate(pattern) for pattern in exclude) or r"\Z\A")
    with (
        tarfile.open(fileobj=source, mode="r:") as old,
        tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as new,
    ):
        members: dict[str, tarfile.TarInfo] = {}
        for member in old:
            path = member.name.removeprefix("./").rstrip("/")
            if path in ("", ".") or excluded.match(path):
                continue
            members[path] = member
        entries = {entry.path: entry for entry in with_parents(replace)}
        # A directory that is a link in the archive (merged /usr) remains a link.
        for path, entry in list(entries.items()):
            if stat.S_ISDIR(entry.mode) and path in members:
                del entries[path]
        first_names: dict[str, str] = {}
        for path in sorted({*members, *entries}):
            if path in entries:
                _add_entry(new, entries[path])
            else:
                _add_member(old, new, path, members[path], first_names, edit.get(path))


def _add_entry(new: tarfile.TarFile, entry: Entry) -> None:
    info = tarfile.TarInfo(entry.path)
    info.mtime = EPOCH
    info.mode = stat.S_IMODE(entry.mode)
    if stat.S_ISDIR(entry.mode):
        info.type = tarfile.DIRTYPE
        new.addfile(info)
    elif stat.S_ISLNK(entry.mode):
        info.type = tarfile.SYMTYPE
        info.linkname = entry.data.decode()
        new.addfile(info)
    else:
        info.size = len(entry.data)
        new.addfile(info, io.BytesIO(entry.data))


def _add_member(
    old: tarfile.TarFile,
    new: tarfile.TarFile,
    path: str,
    member: tarfile.TarInfo,
    first_names: dict[str, str],
    edit: Callable[[bytes], bytes] | None,
) -> None:
    content = member
    while content.islnk():
        content = old.getmember(content.linkname)
    info = tarfile.TarInfo(path)
    info.type = content.type
    info.mode, info.uid, info.gid = content.mode, content.uid, content.gid
    info.mtime = EPOCH
    info.linkname = content.linkname
    info.devmajor, info.devminor = content.devmajor, content.devminor
    if not content.isreg():
        new.addfile(info)
        return
    # The first name of a file in order has the content; its other names are hard links.
    first = first_names.setdefault(content.name, path)
    if first != path:
        info.type = tarfile.LNKTYPE
        info.linkname = first
        new.addfile(info)
        return
    data = old.extractfile(content)
    assert data is not None  # a regular file has data
    if edit is not None:
        data = io.BytesIO(edit(data.read()))
        info.size = len(data.getvalue())
    else:
        info.size = content.size
    new.addfile(info, data)
