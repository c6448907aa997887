# SPDX-License-Identifier: Apache-2.0
"""Lines and functions of a source file that is no Python, and its record in LCOV."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["CodeFile"]


@dataclass(slots=True)
class CodeFile:
    """A source file of the guest's kernel, or of native programs."""

    lines: dict[int, bool] = field(default_factory=dict)
    """Those that count, each with whether it ran."""
    functions: dict[str, tuple[int, bool]] = field(default_factory=dict)
    """Line of each by its name, and whether any of it ran."""
    last_lines: dict[str, int] = field(default_factory=dict)
    """The last known line of each function, where any is known beside the first."""

    def add(self, first: int, last: int, function: str, ran: bool) -> None:
        """Add a block of a function."""
        for line in range(first, last + 1):
            self.lines[line] = self.lines.get(line, False) or ran
        start, before = self.functions.get(function, (first, False))
        self.functions[function] = min(start, first), before or ran
        self.last_lines[function] = max(last, self.last_lines.get(function, 0))

    def lcov(self, name: str) -> str:
        """Return the record of the file. A count is 1 or 0."""
        functions = sorted(
            (line, function, ran) for function, (line, ran) in self.functions.items()
        )
        lines = sorted(self.lines.items())
        return "\n".join(
            [
                "TN:",
                f"SF:{name}",
                *(f"FN:{line},{function}" for line, function, _ in functions),
                *(f"FNDA:{int(ran)},{function}" for _, function, ran in functions),
                f"FNF:{len(functions)}",
                f"FNH:{sum(ran for _, _, ran in functions)}",
                *(f"DA:{line},{int(ran)}" for line, ran in lines),
                f"LF:{len(lines)}",
                f"LH:{sum(ran for _, ran in lines)}",
                "end_of_record\n",
            ]
        )
