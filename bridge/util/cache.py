# SPDX-License-Identifier: Apache-2.0
"""The cache: where it is, how to write into it, and its locks.

Everything in it can be made again. Where it can be read but not written (mounted read-only,
another user's), what it holds is used; whoever would have to make something gets a
:class:`bridge.errors.CacheError` and goes on without it if that is possible.
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
    """Return whether new things can be put into the cache; made if it is missing."""
    place = cache_directory()
    while not place.exists():
        place = place.parent
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)


def cache_folder(kind: str, *, private: bool = False) -> Path:
    """Return a folder of the cache, made if it is missing.

    Args:
        kind: its name in the cache.
        private: make it for this user alone.

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
            hint=f"make the cache writable and see that its disk has room, or set {CACHE_VARIABLE} "
            "to another directory",
        ) from error


def lock_file(name: str) -> Path:
    """Return the file whose lock guards what is called ``name`` in the cache."""
    return cache_directory() / "locks" / name


@contextlib.contextmanager
def locked(path: Path, what: str, progress: Callable[[str], object]) -> Iterator[int]:
    """Hold an exclusive lock on a file while inside; give its descriptor.

    The lock goes with the last process that has the descriptor, so it cannot be left behind.

    Args:
        path: the file, made if it is missing: see :func:`lock_file`.
        what: what the lock guards, for the line that says who is waited for.
        progress: takes that line.

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
        # Who holds it, for those that wait; a full disk is no reason to stop.
        with contextlib.suppress(OSError):
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield fd
    finally:
        os.close(fd)
