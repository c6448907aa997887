# SPDX-License-Identifier: Apache-2.0
"""Which manager a campaign's directory belongs to, while it runs.

The manager itself locks nothing: two in one directory would write over each other's corpus. But
each asks what it takes for QEMU for its version before anything else, and that is ours.
"""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Final

from bridge.errors import UsageError
from bridge.util.files import write_atomically

__all__ = ["MANAGER_FILE", "claim", "manager_of"]

MANAGER_FILE: Final = "manager.json"
"""In the campaign's directory: process and its start, in clock ticks since the boot."""

_MANAGER: Final = "syz-manager"
"""Its name as a process. Others that start guests of the campaign, syz-repro, have a workdir of
their own or change nothing in it."""


def manager_of(directory: Path) -> int:
    """Return the process of the manager that runs in a directory, 0 if there is none."""
    try:
        values = json.loads((directory / MANAGER_FILE).read_text(encoding="utf-8"))
        pid, started = int(values["pid"]), int(values["started"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    return pid if started and _started(pid) == started else 0


def claim(directory: Path, process: int) -> None:
    """Note that a process starts guests here; only a manager counts.

    Raises:
        UsageError: another manager runs here.
        InfrastructureError: the directory cannot be written.
    """
    try:
        name = Path(f"/proc/{process}/comm").read_text(encoding="utf-8").strip()
    except OSError:
        return
    if name != _MANAGER:
        return
    with (directory / ".manager.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        other = manager_of(directory)
        if other == process:
            return
        if other:
            raise UsageError(
                f"another manager (process {other}) runs in {directory}",
                hint="end it, or make a directory for each: kcov-bridge syzkaller DIR",
            )
        values = {"pid": process, "started": _started(process)}
        write_atomically(directory / MANAGER_FILE, json.dumps(values) + "\n")


def _started(pid: int) -> int:
    """Return when a process was started, 0 if it has ended; see proc_pid_stat(5)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    # After the name, which is in parentheses and may have any character: field 3 and later.
    fields = stat[stat.rindex(")") + 2 :].split()
    return 0 if fields[0] in "ZX" else int(fields[22 - 3])
