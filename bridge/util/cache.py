# SPDX-License-Identifier: Apache-2.0
"""The cache: its place, writing into it, and its locks.

Everything in the cache can be made again. If it is readable but not writable (mounted read-only, or
another user's), its contents are used. Code that would have to make something gets a
:class:`bridge.errors.CacheError`, and continues without it if possible.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from bridge.errors import CacheError

__all__ = [
    "CACHE_VARIABLE",
    "cache_can_be_written",
    "cache_directory",
    "cache_errors",
    "cache_folder",
    "lock_file",
    "locked",
]

CACHE_VARIABLE = "KCOV_BRIDGE_CACHE"
"""The environment variable that says where the cache is."""


def cache_directory() -> Path:
    """Return where the cache is: ``KCOV_BRIDGE_CACHE``, or ``kcov-bridge`` in the user's cache."""
    wish = os.environ.get(CACHE_VARIABLE)
    if wish:
        return Path(wish).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    # The XDG base directory specification says that a relative path is to be ignored.
    if base and Path(base).is_absolute():
        return Path(base) / "kcov-bridge"
    return Path.home() / ".cache" / "kcov-bridge"


def cache_can_be_written() -> bool:
    """Return whether the cache is writable, or can be made if it is missing."""
    place = cache_directory()
    while not place.exists():
        place = place.parent
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)


def cache_folder(kind: str, *, private: bool = False) -> Path:
    """Return a folder of the cache, and make it if it is missing.

    Args:
        kind: its name in the cache.
        private: make it for this user only.

    Raises:
        CacheError: it is missing and cannot be made.
    """
    folder = cache_directory() / kind
    with cache_errors(f"the folder {kind}"):
        folder.mkdir(mode=0o700 if private else 0o777, parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def cache_errors(what: str) -> Iterator[None]:
    """Turn each OSError inside into a :class:`bridge.errors.CacheError` about ``what``."""
    try:
        yield
    except OSError as error:
        raise CacheError(
            f"cannot write {what} into the cache {cache_directory()}: {error.strerror or error}",
            hint="make the cache writable and check that its disk has room, "
            f"or set {CACHE_VARIABLE} to another directory",
        ) from error


def lock_file(name: str) -> Path:
    """Return the lock file for ``name`` in the cache."""
    return cache_directory() / "locks" / name


@contextlib.contextmanager
def locked(path: Path, what: str, progress: Callable[[str], object]) -> Iterator[int]:
    """Hold an exclusive lock on a file; yield its descriptor.

    The lock ends with the last process that has the descriptor, so no lock can be left behind.

    Args:
        path: the file (see :func:`lock_file`), made if it is missing.
        what: what the lock guards, for the message of a process that waits.
        progress: takes that message.

    Raises:
        CacheError: the file cannot be made or opened.
    """
    with cache_errors(f"the lock of {what}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
            progress(f"waiting for process {holder}, which is making {what}")
            fcntl.flock(fd, fcntl.LOCK_EX)
        # The holder's id is for processes that wait; on a full disk it is left out.
        with contextlib.suppress(OSError):
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield fd
    finally:
        os.close(fd)
