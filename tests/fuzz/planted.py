# SPDX-License-Identifier: Apache-2.0
"""A service with planted defects: it does what a line tells it, and answers ``ok``."""

from __future__ import annotations

import os
import signal
import socketserver
import threading
import time
from pathlib import Path

__all__ = ["Lines"]

STEP = 8 << 20
SLOW = 3.0


class Lines(socketserver.StreamRequestHandler):
    """One connection."""

    def handle(self) -> None:
        while line := self.rfile.readline():
            answer(line.strip().decode(errors="replace"))
            self.wfile.write(b"ok\n")


def answer(line: str) -> None:
    """Do what a line says."""
    if line == "raise":
        check_header(len(line))
    elif line == "die":
        signal.pthread_kill(threading.get_ident(), signal.SIGSEGV)
    elif line == "exit":
        os._exit(3)
    elif line == "hang":
        loop_forever()
    elif line == "eat":
        take_memory()
    elif line.startswith("slow "):
        be_slow_once(Path(line[5:]))


def check_header(length: int) -> None:
    """Fail an assertion."""
    assert length > 100, length


def loop_forever() -> None:
    """Be busy for ever."""
    while True:
        time.sleep(0.001)


def be_slow_once(mark: Path) -> None:
    """Be slow if there is no such file yet, which stays when this process is forked anew."""
    if not mark.exists():
        mark.touch()
        time.sleep(SLOW)


def take_memory() -> None:
    """Take memory without end."""
    taken = []
    while True:
        taken.append(b"x" * STEP)
