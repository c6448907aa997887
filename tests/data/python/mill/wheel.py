# SPDX-License-Identifier: Apache-2.0
"""Frames that stop and go on: generators and asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator


def turn() -> Generator[int, int, None]:
    """A generator that lives as long as its thread."""
    angle = 0
    try:
        while True:
            step = yield angle
            angle += step
            if angle > 100:
                angle -= 100
    finally:
        angle = 0


def flow(number: int) -> int:
    """An event loop of its own, with tasks that take turns."""
    return asyncio.run(river(number))


async def river(number: int) -> int:
    """Tasks, an asynchronous generator, and one task that is cancelled."""
    tasks = [asyncio.create_task(brook(number + n)) for n in range(3)]
    still = asyncio.create_task(asyncio.Event().wait())
    total = sum(await asyncio.gather(*tasks))
    still.cancel()
    try:
        await still
    except asyncio.CancelledError:
        total += 1
    async for drop in drops(3):
        total += drop
    return total


async def brook(number: int) -> int:
    """Give way to the others a few times."""
    for _ in range(3):
        await asyncio.sleep(0)
        number += 1
    return number


async def drops(count: int) -> AsyncIterator[int]:
    """An asynchronous generator."""
    for drop in range(count):
        yield drop
        await asyncio.sleep(0)
