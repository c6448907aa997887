# SPDX-License-Identifier: Apache-2.0
"""``summary.json``: the figures of one run, for programs, and the same as text, for people.

The file is one JSON object. ``format`` is ``"kcov-bridge-summary"`` and ``version`` the number
:data:`VERSION`, which goes up when a key is taken away or changes its meaning; new keys may come
at any time, so a reader ignores those it does not know. The other keys are the fields of
:class:`Summary`.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bridge.errors import InfrastructureError
from bridge.util.files import write_atomically

__all__ = ["FORMAT", "VERSION", "Summary", "read", "render", "write"]

FORMAT = "kcov-bridge-summary"
"""The value of the key ``format``."""

VERSION = 1
"""The value of the key ``version``."""


@dataclass(frozen=True)
class Summary:
    """The figures of one run; counts are of the whole run and of all instances.

    ``None`` stands for what is not known because the run ended before it was.
    """

    accel: str
    """The accelerator in use: ``kvm`` or ``tcg``."""
    kernel: str | None
    """Release of the guest's kernel, as ``uname -r`` prints it."""
    target: str
    """Name of the target."""
    boot_seconds: float | None
    """From the start of QEMU to the guest's report that it is ready, in seconds."""
    syscalls: int
    """System call returns of owners, told or not (:class:`bridge.device.kcov.Totals`)."""
    pcs: int
    """PCs appended to areas."""
    pcs_unique: int
    """How many different PCs are among them."""
    blocks_total: int
    """Basic blocks that the sources could cover."""
    blocks_covered: int
    """Basic blocks that were covered, by anything that the target did."""
    lost_pcs: int
    """PCs that were dropped because the area was full."""
    exit_status: int
    """Exit status of the command, or of the bridge if that failed."""
    accel_reason: str = ""
    """Why this accelerator was chosen, in one line."""
    command: tuple[str, ...] = ()
    """The workload."""
    run_seconds: float | None = None
    """How long the workload ran, in seconds."""
    error: str = ""
    """What ended the run early, if anything did."""
    more: dict[str, Any] = field(default_factory=dict)
    """Further figures by name; in the file they stand beside the others."""

    def as_dict(self) -> dict[str, Any]:
        """The object that :func:`write` puts into the file."""
        values = dataclasses.asdict(self)
        more = values.pop("more")
        values["command"] = list(self.command)
        return {"format": FORMAT, "version": VERSION, **values, **more}


def write(summary: Summary, path: Path) -> None:
    """Write the file whole or not at all.

    Raises :class:`bridge.errors.InfrastructureError`.
    """
    write_atomically(path, json.dumps(summary.as_dict(), indent=2) + "\n")


def read(path: Path) -> dict[str, Any]:
    """The object in a file that :func:`write` made.

    Raises :class:`bridge.errors.InfrastructureError` for anything else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InfrastructureError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InfrastructureError(f"{path} is not JSON", evidence=str(error)) from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise InfrastructureError(f"{path} is no summary of a run")
    if values.get("version") != VERSION:
        raise InfrastructureError(
            f"{path} has version {values.get('version')}, this program reads version {VERSION}"
        )
    return values


def render(summary: Summary) -> str:
    """The summary as a person reads it in a terminal; no trailing newline."""
    per_call = f", {summary.pcs / summary.syscalls:.1f} a call" if summary.syscalls else ""
    reason = f" ({summary.accel_reason})" if summary.accel_reason else ""
    rows = [
        ("guest", f"{summary.kernel or 'unknown kernel'}, {summary.accel}{reason}"),
        ("booted in", _seconds(summary.boot_seconds)),
        ("target", summary.target),
        (
            "command",
            shlex.join(summary.command) if summary.command[1:] else "".join(summary.command),
        ),
        ("ran for", _seconds(summary.run_seconds)),
        ("system calls", f"{summary.syscalls:,} traced"),
        ("PCs", f"{summary.pcs:,} appended, {summary.pcs_unique:,} different{per_call}"),
        ("lost PCs", f"{summary.lost_pcs:,}" + (", the area was full" if summary.lost_pcs else "")),
        ("blocks", _blocks(summary)),
        ("exit status", str(summary.exit_status)),
        ("ended by", summary.error),
    ]
    return "\n".join(f"{name:>12}  {text}" for name, text in rows if text)


def _blocks(summary: Summary) -> str:
    """What was covered of each source that there was."""
    text = []
    kernel = summary.more.get("kernel_blocks_covered")
    if kernel is not None:
        text.append(f"{kernel:,} of the guest kernel")
    total = summary.blocks_total
    if total or kernel is None:
        share = f" ({100 * summary.blocks_covered / total:.1f} %)" if total else ""
        text.append(f"{summary.blocks_covered:,} of {total:,} covered{share}")
    return "; ".join(text)


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} s"
