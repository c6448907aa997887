# SPDX-License-Identifier: Apache-2.0
"""Which job of a campaign runs on which worker."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

__all__ = ["Placement"]

_QUICK_FAILURES: Final = 5
"""How many runs in a row may fail soon after their start before a job is given up."""

_SOON: Final = 60.0
"""Seconds within which a failure counts as soon after the start."""

_LONGEST_PAUSE: Final = 30.0
"""Seconds before a job that failed is started again, at most."""


@dataclass(slots=True)
class _Place:
    worker: str = ""
    """Where the job runs; empty if it does not."""
    began: float = 0.0
    failures: int = 0
    """Runs in a row that failed soon."""
    due: float = 0.0
    """When it may start."""


class Placement:
    """The places of all jobs. It knows workers by their names, and how many jobs each has room for.

    The caller carries out what it decides.
    """

    def __init__(self, jobs: int, clock: Callable[[], float]) -> None:
        self._places = [_Place() for _ in range(jobs)]
        self._clock = clock
        self._stopping = False

    def worker(self, job: int) -> str:
        """Return where a job runs; empty if it does not."""
        return self._places[job].worker

    def lost(self, room: Mapping[str, int]) -> list[int]:
        """Return the jobs whose worker is not there any more."""
        return [
            number
            for number, place in enumerate(self._places)
            if place.worker and place.worker not in room
        ]

    def take_back(self, job: int) -> None:
        """Note that a job does not run; it may start again at once."""
        self._places[job].worker = ""

    def ended(self, job: int) -> None:
        """Note that a job ended by itself; it starts again after a pause, or is given up."""
        place = self._places[job]
        place.worker = ""
        soon = self._clock() - place.began < _SOON
        place.failures = place.failures + 1 if soon else 0
        if place.failures >= _QUICK_FAILURES:
            place.due = math.inf
        else:
            place.due = self._clock() + min(_LONGEST_PAUSE, 2.0**place.failures - 1)

    def stop(self) -> None:
        """Start nothing any more."""
        self._stopping = True

    @property
    def hopeless(self) -> bool:
        """Whether all jobs were given up."""
        return not self._stopping and all(
            place.failures >= _QUICK_FAILURES for place in self._places
        )

    def place(self, room: Mapping[str, int]) -> list[tuple[int, str]]:
        """Decide where jobs start: on the workers with most room.

        Args:
            room: for each worker, how many jobs it can run in all.

        Returns:
            jobs with their workers; they count as running there.
        """
        if self._stopping:
            return []
        now = self._clock()
        waiting = [
            number
            for number, place in enumerate(self._places)
            if not place.worker and place.due <= now
        ]
        if not waiting:
            return []
        free = dict(room)
        for place in self._places:
            if place.worker in free:
                free[place.worker] -= 1
        heap = [(-count, worker) for worker, count in free.items() if count > 0]
        heapq.heapify(heap)
        placed = []
        for number in waiting:
            if not heap:
                break
            count, worker = heap[0]
            if count < -1:
                heapq.heapreplace(heap, (count + 1, worker))
            else:
                heapq.heappop(heap)
            self._places[number].worker, self._places[number].began = worker, now
            placed.append((number, worker))
        return placed
