# SPDX-License-Identifier: Apache-2.0
"""A machine that is lost when a test says so."""

from __future__ import annotations

from collections.abc import Callable

from bridge.errors import BridgeError, GuestPanicError, GuestStoppedError

__all__ = ["WatchedMachine"]


class WatchedMachine:
    """What a guest is watched by: :class:`bridge.guest.guest.Watched`, and what channels need."""

    def __init__(self) -> None:
        self.loss: BridgeError | None = None
        self.listeners: list[Callable[[BridgeError], None]] = []

    def check(self) -> None:
        if self.loss is not None:
            raise self.loss

    def add_loss_listener(self, listener: Callable[[BridgeError], None]) -> Callable[[], None]:
        self.listeners.append(listener)
        return lambda: self.listeners.remove(listener)

    def lose_silent(self, seconds: float) -> None:
        self.lose(GuestStoppedError(f"silent for {seconds:g} s"))

    def lose_channel(self, why: str) -> None:
        self.lose(GuestStoppedError(f"broken: {why}"))

    def lose(self, loss: BridgeError | None = None) -> None:
        """Be lost, and tell those who listen."""
        self.loss = loss or GuestPanicError("the guest kernel panicked: test")
        for listener in list(self.listeners):
            listener(self.loss)
