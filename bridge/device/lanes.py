# SPDX-License-Identifier: Apache-2.0
"""Lanes: areas that the host makes before the guest asks for them, and keeps over resets.

A *lane* has a control area, index 0, which the guest only maps, and trace areas, which it uses like
any kcov area. An instance of the guest takes one of them with KCOV_BRIDGE_LANE instead of
KCOV_INIT_TRACE. So the host knows every place from the start and believes nothing that the guest
says. What the control area means is no business of the device: see :mod:`bridge.fuzz.lane`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Protocol

from bridge.device.region import Area

__all__ = ["LaneAreas"]


class AreaSource(Protocol):
    """The provider of areas: :class:`bridge.device.region.Region`."""

    def allocate(self, size: int) -> Area | None:
        """Return a zeroed area of ``size`` words, or None."""

    def free(self, area: Area) -> None:
        """Free an area."""


class LaneAreas:
    """The areas of one lane; on the doorbell's thread, except for what is constant.

    Attributes:
        number: the lane's name for the guest; never 0.
        areas: the control area, then the trace areas. Constant until :meth:`close`.
    """

    def __init__(self, areas: Sequence[Area], source: AreaSource) -> None:
        self.number = int.from_bytes(os.urandom(4), "little") | 1
        self.areas = tuple(areas)
        self._source = source
        self._takers: dict[int, object] = {}
        self._closed = False

    @classmethod
    def allocate(cls, sizes: Sequence[int], source: AreaSource) -> LaneAreas | None:
        """Return a lane with areas of these sizes in words; None if there is no room for all."""
        areas: list[Area] = []
        for size in sizes:
            area = source.allocate(size)
            if area is None:
                for made in areas:
                    source.free(made)
                return None
            area.kept = True
            areas.append(area)
        return cls(areas, source)

    def take(self, index: int, taker: object) -> tuple[int, Area | None]:
        """Give the area to an instance that has none; return an errno and the area."""
        if not 0 <= index < len(self.areas):
            return errno.EINVAL, None
        if index in self._takers:
            return errno.EBUSY, None
        if self.areas[index].abandoned:
            return errno.EIO, None
        self._takers[index] = taker
        return 0, self.areas[index]

    def give_back(self, index: int) -> None:
        """Take the area back from its instance, which has ended."""
        del self._takers[index]
        if self._closed:
            self._free(self.areas[index])

    def close(self) -> None:
        """Free the areas. Those that the guest may still have mapped live as long as that."""
        if self._closed:
            return
        self._closed = True
        for index, area in enumerate(self.areas):
            if index not in self._takers:
                self._free(area)

    def _free(self, area: Area) -> None:
        area.kept = False
        self._source.free(area)
