# SPDX-License-Identifier: Apache-2.0
"""What a job has found and the hub has not confirmed, in files.

The file of a report is there as soon as :meth:`Outbox.put` returns and until :meth:`Outbox.done`. A
run of a job has a directory of its own, which it locks. What a killed run left behind is sent by
the next run on the same machine, or taken by the campaign when it is resumed there.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from bridge.errors import InfrastructureError
from bridge.util.files import remove

__all__ = ["Outbox", "leftover_reports"]

_LOCK: Final = "lock"
_SUFFIX: Final = ".report"


class Outbox:
    """Reports of one run that are not confirmed; a context manager."""

    def __init__(self, directory: Path) -> None:
        """Make a new one in a directory of outboxes.

        Raises:
            InfrastructureError: it cannot be written.
        """
        self.run: Final = uuid.uuid4().hex
        """Name of the run; differs from all others."""
        self._place = directory / self.run
        self._next = 0
        self._size = 0
        try:
            self._place.mkdir(parents=True)
            self._lock = os.open(self._place / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise self._failed(error) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise self._failed(error) from error

    def put(self, report: bytes) -> Path:
        """Keep a report; return its file.

        Raises:
            InfrastructureError: it cannot be written.
        """
        path = self._place / f"{self._next:08}{_SUFFIX}"
        part = path.with_suffix(".part")
        try:
            part.write_bytes(report)
            part.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise self._failed(error) from error
        self._next += 1
        return path

    def done(self, path: Path) -> None:
        """Remove a report that is confirmed."""
        # One that stays is sent again, which does no harm.
        with contextlib.suppress(OSError):
            path.unlink()

    def close(self) -> None:
        """Unlock it; remove it if it is empty. Safe to call twice."""
        if self._lock < 0:
            return
        if not any(self._place.glob(f"*{_SUFFIX}")):
            with contextlib.suppress(OSError):
                remove(self._place)
        os.close(self._lock)
        self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _failed(self, error: OSError) -> InfrastructureError:
        return InfrastructureError(
            f"cannot write {self._place}: {error.strerror}",
            hint="make room on the disk, then go on with --resume",
        )


@contextlib.contextmanager
def leftover_reports(directory: Path) -> Iterator[list[bytes]]:
    """Yield the reports that killed runs left in a directory of outboxes; then remove them.

    They stay if an exception ends the block. Outboxes in use are left alone.

    Raises:
        InfrastructureError: they cannot be read.
    """
    with contextlib.ExitStack() as stack:
        reports: list[bytes] = []
        places: list[Path] = []
        try:
            for place in sorted(directory.iterdir()) if directory.is_dir() else ():
                try:
                    lock = os.open(place / _LOCK, os.O_RDWR | os.O_CLOEXEC)
                except (FileNotFoundError, NotADirectoryError):
                    # Its owner is about to make the lock, or was killed before it put anything.
                    continue
                stack.callback(os.close, lock)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                places.append(place)
                reports += [path.read_bytes() for path in sorted(place.glob(f"*{_SUFFIX}"))]
        except OSError as error:
            raise InfrastructureError(f"cannot read {directory}: {error.strerror}") from error
        yield reports
        for place in places:
            with contextlib.suppress(OSError):
                remove(place)
