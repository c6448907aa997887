# SPDX-License-Identifier: Apache-2.0
"""The house of the package: imports run downward only, and never in a circle."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "bridge"

LAYERS = (
    ("__main__",),
    ("cli", "pytest_plugin"),
    ("bench",),
    ("fuzz",),
    ("results",),
    ("__init__",),
    ("session",),
    ("guest",),
    ("vm",),
    ("targets",),
    ("trace",),
    ("sources",),
    ("device",),
    ("util",),
    ("config",),
    ("errors",),
)
"""From top to bottom. A room imports from rooms below its own, also where an import is late, or
for types alone. ``__init__`` is the public API."""

FLOORS = {room: floor for floor, rooms in enumerate(LAYERS) for room in rooms}


def modules() -> dict[str, Path]:
    """The modules of the package by their names."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def imports(tree: ast.AST, known: dict[str, Path]) -> Iterator[str]:
    """What a module imports of the package, wherever the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name for name in names if name in known)
            if any(name not in known for name in names):
                yield node.module


def at_the_top(module: ast.Module) -> ast.Module:
    """What is carried out when the module is imported."""

    class Cut(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None: ...

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None: ...

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if ast.unparse(node.test) == "TYPE_CHECKING" else node

    cut = Cut().visit(module)
    assert isinstance(cut, ast.Module)
    return cut


def test_layers_imports_run_downward_only() -> None:
    known = modules()
    upward = [
        f"{name} imports {other}"
        for name, path in known.items()
        for other in imports(ast.parse(path.read_text()), known)
        if room(name) != room(other) and FLOORS[room(name)] >= FLOORS[room(other)]
    ]
    assert upward == []


def test_layers_have_a_place_for_each_room() -> None:
    assert {room(name) for name in modules()} == set(FLOORS)


def test_modules_do_not_import_each_other_in_circles() -> None:
    known = modules()
    graph = {
        name: set(imports(at_the_top(ast.parse(path.read_text())), known)) - {name}
        for name, path in known.items()
    }
    # Raises CycleError, which names the circle.
    assert set(graphlib.TopologicalSorter(graph).static_order()) == set(known)
