# SPDX-License-Identifier: Apache-2.0
"""The functions of the packages' source files, by name and by line."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

from bridge.errors import SourceError
from bridge.sources.python.blocks import decode_source
from bridge.sources.python.packages import find_packages

__all__ = ["FunctionIndex", "functions_of", "ranges_text"]


class FunctionIndex:
    """The functions of some packages; files are read when they are first asked for.

    Args:
        packages: dotted names.
    """

    def __init__(self, packages: Sequence[str] = ()) -> None:
        self._packages = tuple(packages)

    @functools.cached_property
    def _paths(self) -> dict[str, str]:
        return {name: path for path, name in find_packages(self._packages).names.items()}

    def functions(self, file: str) -> dict[str, range]:
        """Return the functions of a file and the lines of their bodies; none if it is unknown."""
        path = self._paths.get(file)
        return functions_of(Path(path)) if path is not None else {}

    def at(self, file: str, line: int) -> str:
        """Return the innermost function that has a line in its body, "" if none has."""
        found, size = "", 0
        for name, span in self.functions(file).items():
            if line in span and (not found or len(span) <= size):
                found, size = name, len(span)
        return found


@functools.lru_cache(maxsize=256)
def functions_of(path: Path) -> dict[str, range]:
    """Return the functions of a source file and their lines, by name (``Class.method``)."""
    try:
        tree = ast.parse(decode_source(path.read_bytes()))
    except (OSError, SyntaxError, ValueError, SourceError):
        return {}
    return dict(_spans(tree, ""))


def _spans(node: ast.AST, prefix: str) -> Iterable[tuple[str, range]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{prefix}{child.name}"
            if not isinstance(child, ast.ClassDef):
                # The line of "def" runs when the module is imported.
                yield name, range(child.body[0].lineno, (child.end_lineno or child.lineno) + 1)
            yield from _spans(child, f"{name}.")
        else:
            yield from _spans(child, prefix)


def ranges_text(numbers: Iterable[int]) -> str:
    """Return sorted numbers as people write them: ``1-3, 7``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
