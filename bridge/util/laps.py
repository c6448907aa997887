# SPDX-License-Identifier: Apache-2.0
"""What the parts of something take, one after the other."""

from __future__ import annotations

import time

__all__ = ["Laps"]


class Laps:
    """Times the parts of something from now on; call it after each part with its name.

    Attributes:
        seconds: by part, in their order. A part that comes twice counts together.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def __call__(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now
