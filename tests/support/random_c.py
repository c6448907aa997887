# SPDX-License-Identifier: Apache-2.0
"""C programs of many branches, for tests that compare tools of coverage: the same for each seed."""

from __future__ import annotations

import random

__all__ = ["random_program"]

_DEPTH = 4


class _Writer:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.lines: list[str] = []
        self.labels = 0

    def line(self, depth: int, text: str) -> None:
        self.lines.append("    " * depth + text)

    def condition(self) -> str:
        first, second = (
            f"x % {self.random.randint(2, 9)} {self.random.choice(['==', '!=', '<', '>'])} "
            f"{self.random.randint(0, 4)}"
            for _ in range(2)
        )
        return self.random.choice([first, f"{first} && {second}", f"{first} || {second}"])

    def statements(self, depth: int, callees: int) -> None:
        for _ in range(self.random.randint(1, 3)):
            kind = self.random.randrange(8) if depth < _DEPTH else 0
            if kind < 2:
                self.line(depth, f"x = x * {self.random.randint(3, 9)} % 1009 + depth;")
            elif kind < 4:
                self.line(depth, f"if ({self.condition()}) {{")
                self.statements(depth + 1, callees)
                if self.random.random() < 0.5:
                    self.line(depth, "} else {")
                    self.statements(depth + 1, callees)
                self.line(depth, "}")
            elif kind == 4:
                name = f"i{self.labels}"
                self.labels += 1
                bound = f"x % {self.random.randint(2, 4)}"
                self.line(depth, f"for (unsigned {name} = 0; {name} < {bound}; {name}++) {{")
                self.statements(depth + 1, callees)
                self.line(depth, "}")
            elif kind == 5:
                self.line(depth, f"switch (x % {self.random.randint(3, 6)}) {{")
                for case in range(self.random.randint(1, 3)):
                    self.line(depth, f"case {case}:")
                    self.statements(depth + 1, callees)
                    self.line(depth + 1, "break;")
                self.line(depth, "default:")
                self.line(depth + 1, "x += 1;")
                self.line(depth, "}")
            elif kind == 6:
                self.line(depth, f"if ({self.condition()})")
                self.line(depth + 1, "return x;")
                self.line(depth, "x++;")
            elif callees:
                self.line(depth, "if (depth < 3)")
                callee = self.random.randrange(callees)
                self.line(depth + 1, f"x = f{callee}(x, depth + 1);")
                self.line(depth, "x += 2;")


def random_program(seed: int, functions: int) -> str:
    """Return a program that calls a third of its functions with each number among its arguments."""
    writer = _Writer(seed)
    writer.line(0, "#include <stdlib.h>")
    for number in range(functions):
        writer.line(0, f"static unsigned f{number}(unsigned x, unsigned depth) {{")
        writer.statements(1, number)
        writer.line(1, "return x;")
        writer.line(0, "}")
    writer.line(0, "static unsigned (*const all[])(unsigned, unsigned) = {")
    writer.line(1, ", ".join(f"f{number}" for number in range(functions)))
    writer.line(0, "};")
    writer.line(0, "int main(int argc, char **argv) {")
    writer.line(1, "volatile unsigned sum = 0;")
    writer.line(1, "for (int i = 1; i < argc; i++) {")
    writer.line(2, "unsigned x = (unsigned)atoi(argv[i]);")
    writer.line(2, f"for (unsigned f = x % 3; f < {functions}; f += 3) {{")
    writer.line(3, "sum += all[f](x, 0);")
    writer.line(2, "}")
    writer.line(1, "}")
    writer.line(1, "return 0;")
    writer.line(0, "}")
    return "\n".join([*writer.lines, ""])
