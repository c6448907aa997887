# SPDX-License-Identifier: Apache-2.0
"""The benchmark's service in the workers of a pool (:mod:`bridge.session.pool`)."""

from __future__ import annotations

import json
import os
from pathlib import Path

from bridge.bench.signals import stay_awake
from bridge.errors import InfrastructureError
from bridge.session.session import Session

__all__ = ["SERVICE", "MeasuredSession", "proportional_mib"]

SERVICE = "bridge.bench.worker:MeasuredSession"
"""For :class:`bridge.session.pool.Pool`."""


def proportional_mib(pid: int) -> float:
    """Return a process's memory in MiB, with its part of shared memory ("Pss" of proc(5)).

    Raises:
        OSError: the process has ended.
    """
    text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    (kib,) = [line.split()[1] for line in text.splitlines() if line.startswith("Pss:")]
    return int(kib) / 1024


class MeasuredSession:
    """The measurements in a worker."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def memory(self) -> tuple[float, float]:
        """Return the MiB of QEMU and of the bridge."""
        return proportional_mib(self._session.machine.pid), proportional_mib(os.getpid())

    def stream(self, seconds: float, adaptive: bool) -> float:
        """Return signals a second, with the doorbell as it is or always asleep in between."""
        stay_awake(self._session, self._session.settings.awake if adaptive else 0)
        words = ["kcov-bench", "stream", str(seconds)]
        figures = json.loads(self._session.guest.run(words, check=True).text)
        if not figures["pcs"]:
            raise InfrastructureError("calls under kcov left no PC")
        return float(figures["calls"] / figures["seconds"])
