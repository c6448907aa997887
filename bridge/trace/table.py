# SPDX-License-Identifier: Apache-2.0
"""A trace in short: a row for each system call, with how much of the target it reached."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from bridge.trace.call import Call
from bridge.trace.text import FUNCTIONS, duration, some

__all__ = ["CallRow", "rows", "table"]

_HEADER = ("system call", "calls", "failed", "time", "blocks", "its own", "kernel")


@dataclass
class CallRow:
    """All calls of one name.

    Attributes:
        calls, failed: how many there were, and how many of them ended with an error.
        seconds: what those that returned took together.
        blocks: the target's blocks that they reached: PCs, or file and line in a trace that an
            earlier version wrote.
        own: those of them that no other system call of the trace reached.
        functions: the target's functions that they reached, those with a block that the fewest
            system calls reached first.
        kernel: how many functions of the guest's kernel they reached.
    """

    name: str
    calls: int = 0
    failed: int = 0
    seconds: float = 0.0
    blocks: int = 0
    own: int = 0
    functions: tuple[str, ...] = ()
    kernel: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return the row as JSON can hold it."""
        return {**vars(self), "seconds": round(self.seconds, 9), "functions": list(self.functions)}


@dataclass
class _Reached:
    """What the calls of one name reached: function by block; functions of the kernel."""

    row: CallRow
    blocks: dict[object, str] = field(default_factory=dict)
    kernel: set[str] = field(default_factory=set)

    def add(self, call: Call) -> None:
        self.row.calls += 1
        self.row.failed += call.error is not None
        self.row.seconds += call.seconds or 0.0
        self.kernel.update(call.kernel)
        for code in call.host:
            name = code.function or code.file
            for block in code.pcs or ((code.file, line) for line in code.lines):
                self.blocks.setdefault(block, name)


def rows(calls: Iterable[Call]) -> list[CallRow]:
    """Return a row for each system call, the one that reached most of the target first."""
    reached: dict[str, _Reached] = {}
    for call in calls:
        reached.setdefault(call.name, _Reached(CallRow(call.name))).add(call)
    count: dict[object, int] = {}
    for each in reached.values():
        for block in each.blocks:
            count[block] = count.get(block, 0) + 1
    for each in reached.values():
        rarest = sorted(each.blocks, key=count.__getitem__)
        each.row.blocks = len(rarest)
        each.row.own = sum(count[block] == 1 for block in rarest)
        each.row.functions = tuple(dict.fromkeys(each.blocks[block] for block in rarest))
        each.row.kernel = len(each.kernel)
    found = [each.row for each in reached.values()]
    return sorted(found, key=lambda row: (-row.blocks, -row.own, -row.kernel, row.name))


def table(found: Sequence[CallRow], functions: int | None = FUNCTIONS) -> Iterator[str]:
    """Yield the lines of a table, without their ends.

    Args:
        functions: how many functions of the target a line names; None: all.
    """
    cells = [
        _HEADER,
        *(
            (
                *(row.name, str(row.calls), str(row.failed), duration(row.seconds)),
                *(str(row.blocks), str(row.own), str(row.kernel)),
            )
            for row in found
        ),
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    names = ["functions of the target", *(some(row.functions, functions) for row in found)]
    for words, last in zip(cells, names, strict=True):
        first, *others = (
            f"{word:{'<' if at == 0 else '>'}{width}}"
            for at, (word, width) in enumerate(zip(words, widths, strict=True))
        )
        yield "  ".join((first, *others, last)).rstrip()
