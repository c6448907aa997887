# SPDX-License-Identifier: Apache-2.0
"""What happens in a slot, for those that keep cases, findings and figures.

A *slot* is one VM with its session, target and lane. It calls its listeners on its own thread, and
the engine waits meanwhile, so a listener must be quick.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bridge.session.session import Session

__all__ = ["Evidence", "GuestFile", "Monitor", "NewCase", "SlotHarness", "SlotListener", "Suspect"]


@dataclass(frozen=True, slots=True)
class NewCase:
    """A case that covered something that none before it in this slot did.

    Attributes:
        pcs: for each trace area that was in use, its PCs in order.
        executions: executions of the slot so far.
        seconds: time since the slot began.
        again: its PCs when it was executed once more at once; None if that did not end well.
    """

    case: bytes
    pcs: tuple[tuple[int, ...], ...]
    executions: int
    seconds: float
    again: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True, slots=True)
class Evidence:
    """The state of guest and target after a suspect case, collected before the reset.

    Attributes:
        console: the console's text since the last reset.
        dmesg: the kernel's log since the last reset; empty if the guest does not answer.
        lost: why the guest is lost; empty if it runs.
        problems: what the target reported: tracebacks, dead threads, its death.
        stacks: what guest and target were doing, if the case did not end in time.
        later: the target's part of that once more, a moment later.
    """

    console: str = ""
    dmesg: str = ""
    lost: str = ""
    problems: tuple[str, ...] = ()
    stacks: str = ""
    later: str = ""


@dataclass(frozen=True, slots=True)
class Suspect:
    """A case after which something is wrong.

    Attributes:
        status: wait status of the harness: 0, or of a signal or an exit; None if it did not end.
        output: what the harness wrote to stderr, its end.
        timed_out: whether the case did not end in time.
        evidence: of guest and target.
        pcs: as for :class:`NewCase`, as far as they are known.
    """

    case: bytes
    status: int | None
    output: bytes = b""
    timed_out: bool = False
    evidence: Evidence = field(default_factory=Evidence)
    pcs: tuple[tuple[int, ...], ...] = ()


class SlotListener(Protocol):
    """Learns about a slot. What it raises ends the slot."""

    def new_case(self, event: NewCase, /) -> None:
        """Keep a case with new coverage."""

    def suspect(self, event: Suspect, /) -> bool:
        """Judge a case after which something is wrong.

        Returns:
            Whether it did no more than what is known to leave guest and target as they were. The
            slot resets them after it, unless all listeners say so.
        """

    def was_reset(self, reason: str, seconds: float, /) -> None:
        """Note that guest and target went back to the ready state, in this time."""

    def lost(self, error: Exception, /) -> None:
        """Note that the slot ends because of this error."""


class Monitor(Protocol):
    """Notices what goes wrong in guest and target. Called on the slot's own thread."""

    def began(self, session: Session, /) -> None:
        """Note that guest and target are as new: after each start and each reset."""

    def trouble(self) -> bool:
        """Return whether something is wrong now; called a few times a second, so it is quick."""

    def collect(self, *, timed_out: bool) -> Evidence:
        """Return what is known, before the reset. The guest may be dead: no wait is without end."""


class GuestFile(Protocol):
    """A file that a harness needs in the guest."""

    @property
    def source(self) -> Path:
        """The file here."""

    @property
    def guest_path(self) -> str:
        """Its path in the guest."""

    @property
    def mode(self) -> int:
        """Its permissions."""


class SlotHarness(Protocol):
    """A harness, as a slot starts it in the guest."""

    @property
    def runner(self) -> str:
        """The runner's program in the guest."""

    @property
    def arguments(self) -> Sequence[str]:
        """Its arguments after the lane's number: the harness's name, and its own arguments."""

    @property
    def files(self) -> Sequence[GuestFile]:
        """What is put into the guest after each start and each reset."""
