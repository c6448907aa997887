# SPDX-License-Identifier: Apache-2.0
"""A scheduler of Dask with its workers, as processes of their own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["Scheduler"]

ROOT = Path(__file__).resolve().parents[2]


class Scheduler:
    """The processes; a context manager that ends all of them."""

    def __init__(
        self, workers: int, vms: int, host: str = "127.0.0.1", prefix: tuple[str, ...] = ()
    ) -> None:
        """Start them.

        Args:
            workers: how many.
            vms: the resource of each.
            host: the address on which the scheduler listens.
            prefix: runs the scheduler's command.
        """
        self._stack = contextlib.ExitStack()
        self._place = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self.processes: list[subprocess.Popen[bytes]] = []
        file = self._place / "scheduler.json"
        words = ["--no-dashboard", "--scheduler-file", str(file), "--port", "0", "--host", host]
        with self._stack:
            self._scheduler = self._start("scheduler", *words, prefix=prefix)
            deadline = time.monotonic() + 60
            while not file.exists() or not file.read_text().rstrip().endswith("}"):
                assert self._scheduler.poll() is None, "the scheduler ended"
                assert time.monotonic() < deadline
                time.sleep(0.05)
            self.address: str = json.loads(file.read_text())["address"]
            for _ in range(workers):
                self.processes.append(self.start_worker(vms))
            self._stack = self._stack.pop_all()

    def start_worker(self, vms: int, *prefix: str, name: str = "") -> subprocess.Popen[bytes]:
        """Start a worker; ``prefix`` runs its command."""
        words = ["--nthreads", str(vms), "--resources", f"vm={vms}", "--no-dashboard"]
        words += ["--no-nanny", "--death-timeout", "10", "--local-directory", str(self._place)]
        words += ["--name", name] if name else []
        return self._start("worker", self.address, *words, prefix=prefix)

    def kill(self) -> None:
        """Kill the scheduler, not its workers."""
        self._scheduler.kill()
        self._scheduler.wait()

    def _start(
        self, kind: str, *words: str, prefix: tuple[str, ...] = ()
    ) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "dask", kind, *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # A scheduler that is killed leaves its scratch space.
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "DASK_TEMPORARY_DIRECTORY": str(self._place),
            },
            cwd=ROOT,
        )
        self._stack.callback(_end, process)
        return process

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
