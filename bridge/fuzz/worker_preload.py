# SPDX-License-Identifier: Apache-2.0
"""What a worker of a local cluster does first."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from typing import Final

__all__ = ["LOG_KEY", "dask_setup"]

LOG_KEY: Final = "kcov-bridge.log"
"""The key in Dask's settings of the file that gets what the worker and its target print."""

_LOG_BYTES: Final = 4 << 20
"""The file begins anew when it is larger."""
_LOOK_SECONDS: Final = 1.0


def dask_setup(worker: object) -> None:
    """Leave the terminal: Ctrl-C is for the campaign, which then ends its jobs."""
    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    import dask

    if path := dask.config.get(LOG_KEY, ""):
        _print_to(path)


def _print_to(path: str) -> None:
    """Have a file take standard output and standard error, also of processes started later."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    try:
        log = os.open(path, flags, 0o644)
    except OSError:
        log = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    threading.Thread(target=_keep_small, args=(log,), name="log", daemon=True).start()


def _keep_small(log: int) -> None:
    """Keep a file from filling the disk: a target may print for each request."""
    while True:
        time.sleep(_LOOK_SECONDS)
        with contextlib.suppress(OSError):
            if os.fstat(log).st_size > _LOG_BYTES:
                os.ftruncate(log, 0)
