# SPDX-License-Identifier: Apache-2.0
"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, Generic, Protocol, Self, TypeVar

from bridge.errors import BridgeError, InfrastructureError, UsageError

__all__ = [
    "FileWriter",
    "atomic_output",
    "cannot_write",
    "check_output",
    "remove",
    "remove_partial",
    "remove_partials",
    "sync",
    "unusable",
    "write_atomically",
    "write_stream",
]

F = TypeVar("F", bound="_Closes")
_PARTIAL: Final = re.compile(r"\.(.+)\.[a-z0-9_]{8}", re.DOTALL)
"""The private directories of :func:`atomic_output`, as :mod:`tempfile` names them."""
_HINT: Final = "check that its directory exists, is writable and has room left"


class _Closes(Protocol):
    def close(self) -> None: ...


class FileWriter(Generic[F]):
    """A file that is written bit by bit; a context manager, which closes it.

    Args:
        path: the file.
        opened: opens it.

    Raises:
        InfrastructureError: it cannot be opened.
    """

    def __init__(self, path: Path, opened: Callable[[], F]) -> None:
        self.path = path
        try:
            self._file = opened()
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Close the file. Safe to call twice.

        Raises:
            InfrastructureError: the system reports that something was not written.
        """
        try:
            self._file.close()
        except OSError as error:
            raise self._failed(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _failed(self, error: OSError) -> InfrastructureError:
        return cannot_write(self.path, error)


def cannot_write(path: Path, error: OSError) -> InfrastructureError:
    """Return the error for a file that cannot be written."""
    return InfrastructureError(f"cannot write {path}: {error.strerror}", hint=_HINT)


@contextlib.contextmanager
def atomic_output(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield the name of a file or directory to create, which replaces ``path`` at the end.

    The name is in a private directory ``.NAME.…`` beside ``path``, which is removed afterwards, or
    by :func:`remove_partial` or :func:`remove_partials` if this process was killed. After an
    exception ``path`` is unchanged.
    A directory replaces an old one in two steps, so for a moment there is none. A file never
    replaces a directory.

    Args:
        durable: write the new content to the disk before it gets its name.

    Raises:
        OSError: the directory of ``path`` cannot be written, or nothing was created.
    """
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        part = Path(scratch, path.name)
        yield part
        if durable:
            sync(part)
        if _is_directory(part) and os.path.lexists(path):
            path.rename(Path(scratch, f"{path.name}.old"))
        part.replace(path)
        if durable:
            _sync_one(path.parent)


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file, whole or not at all. Text is encoded as UTF-8.

    Raises:
        InfrastructureError: the file cannot be written.
    """
    write_stream(path, [data.encode() if isinstance(data, str) else data])


def write_stream(path: Path, pieces: Iterable[bytes | str]) -> None:
    """Write a file of many pieces, whole or not at all. Text is encoded as UTF-8.

    A pipe or a device is written to, and not replaced.

    Raises:
        InfrastructureError: the file cannot be written.
    """
    try:
        with (
            contextlib.nullcontext(path) if _is_stream(path) else atomic_output(path) as part,
            part.open("wb") as file,
        ):
            for piece in pieces:
                file.write(
                    piece.encode(errors="backslashreplace") if isinstance(piece, str) else piece
                )
    except OSError as error:
        raise cannot_write(path, error) from error


def check_output(path: Path) -> None:
    """Raise now what :func:`write_stream` would raise at the end of a long work.

    A file that is there stays as it is; that the disk may become full is not foreseen.

    Raises:
        UsageError: ``path`` is a directory, or in none.
        InfrastructureError: it cannot be written.
    """
    try:
        if path.is_dir():
            raise UsageError(f"cannot write {path}: it is a directory")
        if not path.parent.is_dir():
            raise UsageError(f"there is no directory {path.parent} to write {path.name} into")
        if _is_stream(path):
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        else:
            with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent):
                pass
    except OSError as error:
        raise cannot_write(path, error) from error


def remove(path: Path) -> None:
    """Remove a file, a symbolic link or a directory tree, if it exists.

    Raises:
        OSError: it cannot be removed.
    """
    if _is_directory(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_partial(path: Path) -> None:
    """Remove what killed processes left behind of :func:`atomic_output` for ``path``.

    Raises:
        OSError: it cannot be removed.
    """
    prefix = f".{path.name}."
    if path.parent.is_dir():
        for left in path.parent.iterdir():
            if left.name.startswith(prefix):
                remove(left)


def remove_partials(directory: Path) -> None:
    """Remove what killed processes left behind of :func:`atomic_output` in a directory.

    Nobody may be writing there. Directories below are not looked at, nor is one that is missing.

    Raises:
        OSError: it cannot be removed.
    """
    if directory.is_dir():
        for left in directory.iterdir():
            if _PARTIAL.fullmatch(left.name) and _is_directory(left):
                remove(left)


def sync(path: Path) -> None:
    """Write a file or a directory tree to the disk (fsync).

    Raises:
        OSError: the disk failed, or the path does not exist.
    """
    if _is_directory(path):
        for entry in path.iterdir():
            sync(entry)
    if not path.is_symlink():
        _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _is_stream(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def unusable(directory: Path, error: OSError, *, hint: str) -> BridgeError:
    """Return the error of a directory that nothing can be written to."""
    # A path that may not be looked at counts as no file.
    with contextlib.suppress(OSError):
        for each in (directory, *directory.parents):
            if each.exists() and not each.is_dir():
                return UsageError(f"{directory} cannot be used: {each} is a file", hint=hint)
    return InfrastructureError(f"{directory} cannot be used: {error.strerror}", hint=hint)
