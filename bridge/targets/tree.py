# SPDX-License-Identifier: Apache-2.0
"""Trees of files for file servers: a copy of a directory, or a small built-in one."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from bridge.errors import UsageError

__all__ = ["MAX_BYTES", "MAX_ENTRIES", "Entry", "built_in", "read_directory", "write_tree"]

_log = logging.getLogger(__name__)

MAX_BYTES = 256 << 20
"""How much a copied directory may hold, in bytes: the copy is kept in memory."""

MAX_ENTRIES = 60_000
"""How many files and directories a tree may have: 9P2000 servers number them, some with 16 bits."""


@dataclass(frozen=True)
class Entry:
    """A directory (``content is None``) or a file, by its path from the root with ``/`` in it."""

    path: str
    content: bytes | None


def _pattern(size: int) -> bytes:
    """Return ``size`` bytes that are the same each time and differ from place to place."""
    lines = (f"{number:07d}\n".encode() for number in range(size // 8 + 1))
    return b"".join(lines)[:size]


def built_in() -> tuple[Entry, ...]:
    """Return a small tree: directories in depth and breadth, files from 0 to 100,000 bytes.

    Sizes lie around limits of readers and servers: a line, a page, 8 KiB. The files in ``scratch``
    are meant to be written to.
    """
    sizes = (0, 1, 64, 4095, 4096, 4097, 8192, 8193, 100_000)
    entries = [Entry("README", b"Files to read, and in scratch/ files to write.\n")]
    entries.append(Entry("sizes", None))
    entries += [Entry(f"sizes/{size}", _pattern(size)) for size in sizes]
    path = "deep"
    for level in range(6):
        entries.append(Entry(path, None))
        entries.append(Entry(f"{path}/level", f"{level}\n".encode()))
        path += f"/{level}"
    entries.append(Entry("many", None))
    entries += [Entry(f"many/file-{number:02d}", _pattern(number)) for number in range(40)]
    entries.append(Entry("empty", None))
    entries.append(Entry("scratch", None))
    entries += [Entry(f"scratch/{name}", _pattern(256)) for name in ("a", "b", "c", "d")]
    return tuple(entries)


def read_directory(directory: Path) -> tuple[Entry, ...]:
    """Return a copy of what is in a directory, parents before children, in sorted order.

    Symbolic links, devices and names that are not ASCII are left out with a warning.

    Raises:
        UsageError: it is not a directory, cannot be read, or is too big.
    """
    if not directory.is_dir():
        raise UsageError(
            f"the target directory {directory} is not a directory",
            hint="--target-dir DIR names the directory whose copy the guest sees",
        )
    entries: list[Entry] = []
    left_out: list[str] = []
    total = 0

    def failed(error: OSError) -> None:
        raise UsageError(f"{error.filename}: {error.strerror}") from error

    for parent, folders, files in os.walk(directory, onerror=failed):
        folders.sort()
        for name in list(folders):
            path = Path(parent, name)
            if path.is_symlink() or not name.isascii():
                folders.remove(name)
                left_out.append(str(path))
            else:
                entries.append(Entry(path.relative_to(directory).as_posix(), None))
        for name in sorted(files):
            path = Path(parent, name)
            if path.is_symlink() or not path.is_file() or not name.isascii():
                left_out.append(str(path))
                continue
            try:
                total += path.stat().st_size
                if total > MAX_BYTES:
                    raise UsageError(
                        f"{directory} holds more than {MAX_BYTES >> 20} MiB",
                        hint="the target keeps a copy of it in memory; give a smaller one",
                    )
                content = path.read_bytes()
            except OSError as error:
                failed(error)
            entries.append(Entry(path.relative_to(directory).as_posix(), content))
        if len(entries) > MAX_ENTRIES:
            raise UsageError(f"{directory} holds more than {MAX_ENTRIES} files and directories")
    if left_out:
        _log.warning(
            "%d entries of %s are not served (links, devices, names that are not ASCII): %s",
            len(left_out),
            directory,
            ", ".join(left_out[:3]) + (", …" if len(left_out) > 3 else ""),
        )
    return tuple(entries)


def write_tree(place: Path, directory: Path | None) -> None:
    """Write a copy of a directory, or the built-in tree for None, to a place that is not there yet.

    Raises:
        UsageError: as :func:`read_directory`.
    """
    place.mkdir()
    for entry in built_in() if directory is None else read_directory(directory):
        if entry.content is None:
            (place / entry.path).mkdir()
        else:
            (place / entry.path).write_bytes(entry.content)
