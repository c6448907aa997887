# SPDX-License-Identifier: Apache-2.0
"""Which run a command is about when ``--run`` does not say."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import sys
from pathlib import Path

from bridge.errors import BridgeError, UsageError
from bridge.sources.guest_kernel import SYMBOLS_FILE
from bridge.sources.symbolize import BLOCKS_FILE
from bridge.util.cache import cache_directory
from bridge.util.files import write_atomically

__all__ = ["DEFAULT_RUN", "find_run", "remember"]

_log = logging.getLogger("bridge.cli")

DEFAULT_RUN = Path("build/run")
"""Where ``run`` leaves its results by default."""

_MARKS = (BLOCKS_FILE, SYMBOLS_FILE)
"""A directory with one of these can be symbolized."""


def remember(out: Path) -> None:
    """Note in the cache that ``out`` has the results of the last run, if it has any.

    A cache that cannot be written is no error: ``--run`` names the run then.
    """
    if _is_run(out):
        with contextlib.suppress(BridgeError, OSError):
            write_atomically(_note(), f"{out.absolute()}\n")


def find_run(given: Path | None, *, stdin: bool = False, flag: str = "--run DIR") -> Path:
    """Return the directory of the run that is meant; the log says which unless it was given.

    Args:
        given: what ``--run`` says.
        stdin: PCs come from stdin, so the run that wrote that file is meant, if it is one of a run.
        flag: the argument that names another, for the log.

    Raises:
        UsageError: ``given`` is no directory.
    """
    if given is not None:
        hint = f"{flag} names that of a finished run"
        try:
            there = given.is_dir()
        except OSError as error:
            raise UsageError(f"{given} cannot be read: {error.strerror}", hint=hint) from error
        if not there:
            raise UsageError(f"there is no directory {given}", hint=hint)
        return given
    beside = _beside_stdin() if stdin else None
    last = _last()
    if beside is not None:
        run, why = beside, "its pcs.txt is read"
    elif last is not None:
        run, why = last, "the last run"
    else:
        run, why = DEFAULT_RUN, "the default"
    _log.info("run directory: %s (%s; %s names another)", run, why, flag)
    return run


def _note() -> Path:
    return cache_directory() / "last-run"


def _last() -> Path | None:
    try:
        run = Path(_note().read_text(encoding="utf-8").removesuffix("\n"))
    except (OSError, UnicodeDecodeError):
        return None
    return run if _is_run(run) else None


def _beside_stdin() -> Path | None:
    """Return the directory of stdin's file if it is a run; None for a pipe or a terminal."""
    try:
        descriptor = sys.stdin.fileno()
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        run = Path(f"/proc/self/fd/{descriptor}").readlink().parent
    except (OSError, ValueError, AttributeError):
        # stdin may be closed, or be no file at all.
        return None
    return run if _is_run(run) else None


def _is_run(directory: Path) -> bool:
    try:
        return any((directory / name).is_file() for name in _MARKS)
    except (OSError, ValueError):
        return False
