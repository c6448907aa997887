# SPDX-License-Identifier: Apache-2.0
"""``summary.json``: the figures of one run, for programs, and the same as text, for people.

The file is one JSON object. ``format`` is ``"kcov-bridge-summary"`` and ``version`` the number
:data:`VERSION`, which goes up when a key is taken away or changes its meaning; new keys may come
at any time, so a reader ignores those it does not know. The other keys are the fields of
:class:`Summary`.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.errors import InfrastructureError
from bridge.session.stats import Stats
from bridge.util.files import write_atomically

__all__ = ["FORMAT", "VERSION", "Summary", "read", "render", "write"]

FORMAT = "kcov-bridge-summary"
"""The value of the key ``format``."""

VERSION = 2
"""The value of the key ``version``."""


@dataclass(frozen=True)
class Summary:
    """The figures of one run; in the file those of ``stats`` stand beside the others.

    A default stands for what is not known because the run ended before it was.
    """

    stats: Stats
    """The figures of the run's session."""
    exit_status: int
    """Exit status of the command, or of the bridge if that failed."""
    command: tuple[str, ...] = ()
    """The workload."""
    run_seconds: float | None = None
    """How long the workload ran, in seconds."""
    error: str = ""
    """What ended the run early, if anything did."""

    def as_dict(self) -> dict[str, Any]:
        """Return the object that :func:`write` puts into the file."""
        stats = self.stats.as_dict()
        del stats["instances"]
        return {
            "format": FORMAT,
            "version": VERSION,
            **stats,
            "exit_status": self.exit_status,
            "command": list(self.command),
            "run_seconds": self.run_seconds,
            "error": self.error,
        }


def write(summary: Summary, path: Path) -> None:
    """Write the file whole or not at all.

    Raises :class:`bridge.errors.InfrastructureError`.
    """
    write_atomically(path, json.dumps(summary.as_dict(), indent=2) + "\n")


def read(path: Path) -> dict[str, Any]:
    """Read a file that :func:`write` made.

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
    """Render the summary for a terminal; no trailing newline."""
    stats, command = summary.stats, summary.command
    per_call = f", {stats.pcs / stats.returns:.1f} a call" if stats.returns else ""
    reason = f" ({stats.accel_reason})" if stats.accel_reason else ""
    rows = [
        ("guest", f"{stats.kernel or 'unknown kernel'}, {stats.accel}{reason}"),
        ("booted in", _seconds(stats.boot_seconds)),
        ("target", stats.target),
        ("command", shlex.join(command) if command[1:] else "".join(command)),
        ("ran for", _seconds(summary.run_seconds)),
        ("system calls", f"{stats.returns:,} traced"),
        ("PCs", f"{stats.pcs:,} appended, {stats.pcs_unique:,} different{per_call}"),
        ("lost PCs", f"{stats.lost_pcs:,}" + (", the area was full" if stats.lost_pcs else "")),
        ("untraced", f"{stats.untraced:,} processes or threads" if stats.untraced else ""),
        ("faults", f"{stats.tracer_faults:,} of the tracer" if stats.tracer_faults else ""),
        ("blocks", _blocks(stats)),
        ("figures", f"some are old or missing: {stats.problem}" if stats.problem else ""),
        ("exit status", str(summary.exit_status)),
        ("ended by", summary.error),
    ]
    return "\n".join(f"{name:>12}  {text}" for name, text in rows if text)


def _blocks(stats: Stats) -> str:
    """Describe what was covered of each source."""
    text = []
    kernel = stats.kernel_blocks_covered
    if kernel is not None:
        text.append(f"{kernel:,} of the guest kernel")
    total = stats.blocks_total
    if total or kernel is None:
        share = f" ({100 * stats.blocks_covered / total:.1f} %)" if total else ""
        text.append(f"{stats.blocks_covered:,} of {total:,} of the target{share}")
    return "; ".join(text)


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} s"
