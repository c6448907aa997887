# SPDX-License-Identifier: Apache-2.0
"""A directory for what a target needs while it serves: sockets, files."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

__all__ = ["ScratchDirectory"]


class ScratchDirectory:
    """A temporary directory that a target's forked processes share.

    A target that is forked for each reset (``prepare()``) is killed, so it cannot remove what it
    made. If its ``prepare()`` calls :meth:`make`, each of the processes begins with :meth:`empty`
    on the same directory, and the last one, which is stopped in order, removes it.

    Args:
        name: a part of the directory's name.
    """

    def __init__(self, name: str) -> None:
        self._prefix = f"kcov-bridge-{name}-"
        self._path: Path | None = None

    def make(self) -> Path:
        """Return the directory, which is made if there is none."""
        if self._path is None:
            self._path = Path(tempfile.mkdtemp(prefix=self._prefix))
        return self._path

    def empty(self) -> Path:
        """Return the directory, made or emptied."""
        path = self.make()
        for entry in path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        return path

    def remove(self) -> None:
        """Remove the directory and what is in it. Safe to call twice."""
        path, self._path = self._path, None
        if path is not None:
            shutil.rmtree(path, ignore_errors=True)
