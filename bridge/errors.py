# SPDX-License-Identifier: Apache-2.0
"""Every error that kcov-bridge raises on purpose, under one root.

Three branches, three meanings, each with an exit status of the command:

* the user's mistake (:class:`UsageError`, 2),
* the bridge or the machine it runs on failed (:class:`InfrastructureError`, 125),
* the guest failed (:class:`GuestLostError`, 123),

and beside them :class:`RunTimeoutError` (124). An error says what happened, carries its evidence
and, where there is one, a hint that says what to do next.
"""

from __future__ import annotations

__all__ = [
    "LIMITS_HINT",
    "BootTimeoutError",
    "BridgeError",
    "CacheError",
    "DoorbellError",
    "GuestLostError",
    "GuestPanicError",
    "GuestPoweredOffError",
    "GuestResetError",
    "GuestSetupError",
    "GuestStoppedError",
    "ImageError",
    "IncompleteError",
    "InfrastructureError",
    "KernelUnknownError",
    "MissingDependencyError",
    "QemuError",
    "RegionError",
    "RunTimeoutError",
    "SourceError",
    "TargetError",
    "UnwatchableError",
    "UsageError",
]

LIMITS_HINT = "end some programs, or raise the limits of processes and files (ulimit)"
"""What to do when a process cannot be started."""


class BridgeError(Exception):
    """Root of all errors of kcov-bridge.

    ``evidence`` is raw material (the last console lines, a command's output), shown indented below
    the message; ``hint`` is one sentence that says what to do next.
    """

    exit_status = 125

    def __init__(self, message: str, *, evidence: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.evidence = evidence
        self.hint = hint

    def report(self) -> str:
        """Render the error for people: message, evidence, hint; no trailing newline."""
        parts = [self.message]
        if self.evidence.strip():
            parts.append("\n".join("  | " + line for line in self.evidence.strip().splitlines()))
        if self.hint:
            parts.append(f"hint: {self.hint}")
        return "\n".join(parts)


class UsageError(BridgeError):
    """What was asked for makes no sense: an unknown option, a file that is not there."""

    exit_status = 2


class InfrastructureError(BridgeError):
    """The host side failed: QEMU, the region, the target, the disk."""


class IncompleteError(InfrastructureError):
    """Not all that a command covered could be kept, or it was not run."""


class MissingDependencyError(InfrastructureError):
    """A program or package that this machine lacks; the hint says how to get it."""


class UnwatchableError(MissingDependencyError):
    """The guest's kernel cannot be watched here; other sources can."""


class RegionError(InfrastructureError):
    """The shared region could not be made or mapped."""


class DoorbellError(InfrastructureError):
    """The ivshmem connection to QEMU failed."""


class SourceError(InfrastructureError):
    """A coverage source could not start or be read."""


class KernelUnknownError(SourceError):
    """The guest's kernel can't be watched, as it is not known where its code is."""


class TargetError(InfrastructureError):
    """The target raised, is not what it should be, or could not be built."""


class CacheError(InfrastructureError):
    """Something that the cache lacks could not be written into it."""


class ImageError(InfrastructureError):
    """A guest image could not be built, or is broken."""


class QemuError(InfrastructureError):
    """QEMU did not start, or ended by itself with an error."""


class GuestSetupError(InfrastructureError):
    """The guest booted but could not be made ready: no module, no device, no mount."""


class GuestLostError(BridgeError):
    """The guest went away while it was needed."""

    exit_status = 123


class GuestPanicError(GuestLostError):
    """The guest kernel panicked."""


class GuestPoweredOffError(GuestLostError):
    """The guest was switched off or reset from inside."""


class GuestStoppedError(GuestLostError):
    """The guest stopped running: it sleeps, or QEMU stopped it. QEMU itself lives, so a session
    that started from a snapshot can reset the guest."""


class GuestResetError(GuestLostError):
    """The guest was reset to its ready state while a command ran in it."""


class BootTimeoutError(GuestLostError):
    """The guest did not become ready in time; the evidence is the console's end."""


class RunTimeoutError(BridgeError):
    """The workload did not end in the time it was given."""

    exit_status = 124
