# SPDX-License-Identifier: Apache-2.0
"""The figures of a session, defined once for ``status``, ``summary.json`` and the benchmark."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = ["InstanceStats", "Measured", "Stats"]


@dataclass(frozen=True)
class InstanceStats:
    """One open kcov instance."""

    slot: int
    owner: int | None
    """Thread id of the owner in the guest, None while nobody owns the instance."""
    mode: str
    words: int
    """Size of the area."""
    appended: int
    """PCs appended to the area."""
    dropped: int
    """PCs dropped because the area was full."""


@dataclass
class Stats:
    """The figures of a session, from its start to now.

    Counts are of the whole session and of all instances. A default stands for what is not known
    yet, or was never known because the session ended before.
    """

    accel: str = "unknown"
    """The accelerator in use: ``kvm`` or ``tcg``."""
    accel_reason: str = ""
    """Why this accelerator was chosen, in one line."""
    kernel: str | None = None
    """Release of the guest's kernel, as ``uname -r`` prints it."""
    target: str = ""
    """Name of the target."""
    personality: str = ""
    """Whose kcov rules the device follows."""
    sources: list[str] = field(default_factory=list)
    """Names of the coverage sources in use, sorted."""
    boot_seconds: float | None = None
    """From the start of QEMU to the guest's report that it is ready, in seconds."""
    from_snapshot: bool = False
    """Whether the guest was started from a snapshot, not booted."""
    resets: int = 0
    """How often the guest was reset to its ready state."""
    guest_memory_available_kib: int | None = None
    """Memory available in the guest when it was ready, in KiB."""

    returns: int = 0
    """System call returns of owners, reported or not (:class:`bridge.device.kcov.Totals`)."""
    pcs: int = 0
    """PCs appended to areas."""
    pcs_unique: int = 0
    """How many different PCs were recorded, of all sources."""
    lost_pcs: int = 0
    """PCs dropped because the area was full."""
    untraced: int = 0
    """Processes and threads of commands that could not be traced."""
    comparisons: int = 0
    """Comparisons appended to areas."""
    lost_comparisons: int = 0
    """Comparisons dropped."""
    guest_timeouts: int = 0
    """Requests that the guest gave up waiting for."""
    guest_skipped: int = 0
    """Returns that the guest did not report because it took the host for gone."""
    source_failures: int = 0
    """How often a source raised."""
    tracer_faults: int = 0
    """How often the tracer of the target's code failed; each time a line may be missing."""
    target_answered: bool = False
    """Whether the target answered the guest through a relay, or code of its packages ran while the
    guest did; always False with ``syscall_pcs``."""

    blocks_total: int = 0
    """Basic blocks that the target's sources could cover."""
    blocks_covered: int = 0
    """Basic blocks of the target that were covered, by anything that it did."""
    kernel_blocks_covered: int | None = None
    """Basic blocks of the guest kernel that were recorded; None where it is no source."""

    instances: list[InstanceStats] = field(default_factory=list)
    """The kcov instances that are open now."""
    problem: str = ""
    """Why some figures are missing or old; empty if they are complete."""

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON can hold them."""
        return dataclasses.asdict(self)


class Measured(Protocol):
    """A component that has a share in the figures."""

    def fill(self, stats: Stats) -> None:
        """Enter the component's figures, at any time from its construction on, closed or not.

        Where they cannot be had, enter those that are known, and why in ``stats.problem``.
        """
