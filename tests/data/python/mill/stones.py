# SPDX-License-Identifier: Apache-2.0
"""Calls, recursion and exceptions."""

from __future__ import annotations


class Grit(Exception):
    """What gets between the stones."""


def grind(number: int) -> int:
    """Go through all branches, some by exceptions."""
    total = 0
    for kind in range(4):
        try:
            total += crush(number, kind)
        except Grit:
            total += 1
        except ZeroDivisionError:
            total += 2
        else:
            total += 3
        finally:
            total += 4
    return total + deep(number % 30)


def crush(number: int, kind: int) -> int:
    """Return or raise, by kind."""
    if kind == 0:
        raise Grit(number)
    if kind == 1:
        return number // 0
    match kind:
        case 2:
            return sum(n for n in range(3))
        case _:
            return len([n for n in range(5) if n % 2])


def deep(depth: int) -> int:
    """Recursion: many frames of one file."""
    if depth <= 0:
        return 0
    return 1 + deep(depth - 1)


def never(self: object) -> None:
    """Not called."""
    if self:
        raise Grit
