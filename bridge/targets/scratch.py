# SPDX-License-Identifier: Apache-2.0
"""A directory for what a target needs while it serves: sockets, files."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bridge.errors import LIMITS_HINT, InfrastructureError

__all__ = ["ScratchDirectory"]

_log = logging.getLogger(__name__)

_GUARDIAN = Path(__file__).with_name("guardian.py")
_END_SECONDS = 5.0


class ScratchDirectory:
    """A temporary directory that a target's forked processes share.

    A target that is forked for each reset (``prepare()``) is killed, so it cannot remove what it
    made. If its ``prepare()`` calls :meth:`make`, each of the processes begins with :meth:`empty`
    on the same directory, and the last one, which is stopped in order, removes it. If all of them
    are killed, a process that outlives them does (:mod:`bridge.targets.guardian`).

    Args:
        name: a part of the directory's name.
    """

    def __init__(self, name: str) -> None:
        self._prefix = f"kcov-bridge-{name}-"
        self._path: Path | None = None
        self._guardian: _Guardian | None = None

    def make(self) -> Path:
        """Return the directory, which is made if there is none.

        Raises:
            InfrastructureError: the process that would clean up cannot be started.
        """
        if self._path is None:
            path = Path(tempfile.mkdtemp(prefix=self._prefix))
            try:
                self._guardian = _Guardian(path)
            except BaseException:
                path.rmdir()
                raise
            self._path = path
        return self._path

    def empty(self) -> Path:
        """Return the directory, made or emptied; raises as :meth:`make`."""
        path = self.make()
        for entry in path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        return path

    def kill_with_us(self, group: int) -> None:
        """Have a process group killed once all processes that share the directory have died.

        Args:
            group: its number; 0 for none, from when the group may have ended.
        """
        if self._guardian is not None:
            self._guardian.kill(group)

    def remove(self) -> None:
        """Remove the directory and what is in it. Safe to call twice."""
        path, self._path = self._path, None
        if path is not None:
            shutil.rmtree(path, ignore_errors=True)
        guardian, self._guardian = self._guardian, None
        if guardian is not None:
            guardian.release()


class _Guardian:
    """The process that removes a directory when those that share it have died.

    Raises:
        InfrastructureError: it cannot be started.
    """

    def __init__(self, directory: Path) -> None:
        self._parent = os.getpid()
        try:
            self._pipe, self._process = self._start(directory)
        except OSError as error:
            raise InfrastructureError(
                f"the process that cleans up after a target cannot be started: {error.strerror}",
                hint=LIMITS_HINT,
            ) from error

    @staticmethod
    def _start(directory: Path) -> tuple[int, subprocess.Popen[bytes]]:
        # Forked processes inherit the pipe, programs do not.
        reading, writing = os.pipe()
        try:
            return writing, subprocess.Popen(
                [sys.executable, "-I", "-S", str(_GUARDIAN), str(directory)],
                stdin=reading,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except BaseException:
            os.close(writing)
            raise
        finally:
            os.close(reading)

    def kill(self, group: int) -> None:
        """Have it kill a process group then; 0 for none."""
        try:
            os.write(self._pipe, b"%d\n" % group)
        except OSError as error:
            _log.warning("nothing cleans up after the target if the bridge is killed: %s", error)

    def release(self) -> None:
        """Let go of it: it ends when no other process holds it."""
        os.close(self._pipe)
        if os.getpid() == self._parent:
            # Processes that were forked may hold it for longer.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_SECONDS)
