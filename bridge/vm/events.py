# SPDX-License-Identifier: Apache-2.0
"""Decide from QEMU's events and status whether the guest is lost, and why.

Pure functions. The events and their members are those of ``qapi/run-state.json`` in QEMU, the
statuses those of ``query-status``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from bridge.errors import BridgeError, GuestPanicError, GuestPoweredOffError, GuestStoppedError
from bridge.vm.console import ConsoleLog

__all__ = [
    "FATEFUL",
    "NEEDS_RESET",
    "loss_by_channel",
    "loss_by_event",
    "loss_by_silence",
    "loss_by_status",
]

FATEFUL = frozenset(
    {
        "GUEST_CRASHLOADED",
        "GUEST_PANICKED",
        "GUEST_PVSHUTDOWN",
        "MEMORY_FAILURE",
        "SHUTDOWN",
        "SUSPEND",
        "SUSPEND_DISK",
        "WATCHDOG",
    }
)
"""The events that may mean that the guest is lost. After STOP the status tells."""

NEEDS_RESET = frozenset(
    {"guest-panicked", "internal-error", "io-error", "shutdown", "suspended", "watchdog"}
)
"""The statuses in which QEMU continues a guest only after a reset."""

_EVIDENCE_LINES = 25
_PANIC_LINES = 60  # an oops and the panic that follows, with their traces

_RESCUE = "a session that started from a snapshot continues after reset()"

_STOPPED = {
    "guest-panicked": "the guest kernel panicked",
    "internal-error": "the processor of the guest stopped: the accelerator cannot run the guest's "
    "code any further",
    "io-error": "QEMU stopped the guest: the host failed to read or write one of its disks",
    "paused": "the processor of the guest stopped without a request of the bridge",
    "shutdown": "the guest was shut down",
    "suspended": "the guest suspended itself",
    "watchdog": "the guest's watchdog expired, and QEMU stopped the guest",
}
_STOPPED_HINTS = {
    "internal-error": "if it happens again, try another --cpu, or --accel tcg",
    "io-error": "check that the host's disks, also that of TMPDIR, have room and work",
}

_MEMORY_FATAL = {"fatal": "QEMU cannot continue", "reset": "the guest was reset"}
_WATCHDOG_HARMLESS = frozenset({"debug", "inject-nmi", "none"})


def loss_by_event(name: str, data: Mapping[str, object], console: ConsoleLog) -> BridgeError | None:
    """Return why the guest is lost after one of the :data:`FATEFUL` events, None if it is not.

    Args:
        console: the guest's output up to the event.
    """
    reason, action = data.get("reason"), str(data.get("action"))
    panicked = name == "GUEST_PANICKED" or (
        name == "SHUTDOWN" and (reason == "guest-panic" or console.panic is not None)
    )
    if panicked or name == "GUEST_CRASHLOADED":
        cause = console.panic or "the console does not say why"
        after = "" if panicked else "; its crash kernel runs next"
        return GuestPanicError(
            f"the guest kernel panicked: {cause}{after}", evidence=console.tail(_PANIC_LINES)
        )
    if name == "SUSPEND":
        what = "suspended itself to memory (ACPI S3)"
    elif name == "SUSPEND_DISK":
        what = "suspended itself to disk (ACPI S4)"
    elif name == "WATCHDOG" and action not in _WATCHDOG_HARMLESS:
        what = f"did not answer to its watchdog in time (action: {action})"
    elif name == "MEMORY_FAILURE" and action in _MEMORY_FATAL:
        what = f"met a fault in the host's memory: {_MEMORY_FATAL[action]}"
    elif name == "GUEST_PVSHUTDOWN" or (name == "SHUTDOWN" and data.get("guest") is True):
        what = "was reset" if reason == "guest-reset" else "was switched off"
        return GuestPoweredOffError(
            f"the guest {what} from inside", evidence=console.tail(_EVIDENCE_LINES)
        )
    else:
        return None  # the guest continues, or QEMU ends and its exit status says why
    return GuestStoppedError(
        f"the guest {what}", evidence=console.tail(_EVIDENCE_LINES), hint=_RESCUE
    )


def loss_by_status(
    status: str, *, asked: bool, stderr: str, disk_errors: Iterable[Mapping[str, object]]
) -> GuestStoppedError | None:
    """Return why the guest is lost after QEMU's event STOP; None if it is not.

    Args:
        status: the answer to ``query-status``, after the event.
        asked: whether the bridge had paused the guest when the event came.
        stderr: QEMU's stderr so far.
        disk_errors: the data of the ``BLOCK_IO_ERROR`` events.
    """
    if status not in _STOPPED or (status == "paused" and asked):
        return None
    if status == "io-error":
        evidence = "\n".join(
            f"{each.get('operation')} on {each.get('node-name') or each.get('device')}: "
            f"{each.get('reason')}"
            for each in disk_errors
        )
    else:
        evidence = stderr
    return GuestStoppedError(
        f"{_STOPPED[status]} (status of QEMU: {status})",
        evidence=evidence,
        hint="; ".join(filter(None, [_STOPPED_HINTS.get(status), _RESCUE])),
    )


def loss_by_silence(seconds: float, console: ConsoleLog) -> GuestStoppedError:
    """Return why a guest is lost that has not answered for ``seconds``, and no event says why."""
    return GuestStoppedError(
        f"the guest has not answered for {seconds:g} s, and QEMU does not say why",
        evidence=console.tail(_EVIDENCE_LINES),
        hint="it suspended itself to idle, its kernel is stuck, or its sshd is stopped; " + _RESCUE,
    )


def loss_by_channel(why: str, console: ConsoleLog) -> GuestStoppedError:
    """Return why a guest is lost whose agent cannot be understood."""
    return GuestStoppedError(
        f"the channel to the guest's agent broke: {why}",
        evidence=console.tail(_EVIDENCE_LINES),
        hint=_RESCUE,
    )
