# SPDX-License-Identifier: Apache-2.0
"""Python functions as harnesses: found on this machine without importing anything."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

from bridge.errors import UsageError

__all__ = ["find_function"]

_MOST_BYTES = 32 << 20
"""Of a package that is copied into the guest."""


def find_function(module: str, function: str) -> list[tuple[Path, str]]:
    """Find a function's module in the working directory, or where this Python finds modules.

    Returns:
        The files of its top-level package, each with its path in a directory of modules.

    Raises:
        UsageError: there is no such module or function, or the module is not a source file.
    """
    parts = module.split(".")
    if not all(part.isidentifier() for part in (*parts, *function.split("."))):
        raise UsageError(
            f"{module}:{function} does not name a function", hint="write python:MODULE:FUNCTION"
        )
    source, files = _locate(module, parts)
    _check_function(source, module, function)
    return files


def _locate(module: str, parts: list[str]) -> tuple[Path, list[tuple[Path, str]]]:
    spec = PathFinder.find_spec(parts[0], [str(Path.cwd()), *sys.path])
    missing = UsageError(
        f"there is no Python module {module} here",
        hint="run this where it is, or set PYTHONPATH",
    )
    if spec is None or spec.origin is None:
        raise missing
    origin = Path(spec.origin)
    if origin.suffix != ".py":
        raise UsageError(f"{module} is not a source file: {origin}", hint="name a module in Python")
    if spec.submodule_search_locations is None:
        if len(parts) > 1:
            raise missing
        return origin, [(origin, origin.name)]
    package = origin.parent
    below = package.joinpath(*parts[1:])
    source = below / "__init__.py" if below.is_dir() else below.with_suffix(".py")
    if not source.is_file():
        raise missing
    files = [
        (path, path.relative_to(package.parent).as_posix())
        for path in sorted(package.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    ]
    size = sum(path.stat().st_size for path, _ in files)
    if size > _MOST_BYTES:
        raise UsageError(
            f"the package {parts[0]} has {size >> 20} MiB, and at most {_MOST_BYTES >> 20} are "
            "copied into the guest",
            hint="put the harness into a module of its own, and the package into the image",
        )
    return source, files


def _check_function(source: Path, module: str, function: str) -> None:
    try:
        tree = ast.parse(source.read_bytes(), str(source))
    except (OSError, ValueError) as error:
        raise UsageError(f"{source} cannot be read: {error}") from error
    except SyntaxError as error:
        raise UsageError(
            f"{source} is not Python: line {error.lineno}: {error.msg}",
            hint="correct it, or name another module",
        ) from error
    names = set(_top_names(tree.body))
    if function.split(".")[0] not in names and "*" not in names:
        raise UsageError(
            f"{module} has no function {function}",
            hint=f"define it in {source}: it gets the case as bytes",
        )


def _top_names(body: list[ast.stmt]) -> Iterator[str]:
    """Yield the names that statements bind, those inside of if, try and with too."""
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name
            case ast.Import() | ast.ImportFrom():
                yield from ((alias.asname or alias.name).split(".")[0] for alias in node.names)
            case ast.Assign():
                yield from (
                    name.id
                    for target in node.targets
                    for name in ast.walk(target)
                    if isinstance(name, ast.Name)
                )
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name
            case ast.If() | ast.Try() | ast.With():
                yield from _top_names(
                    [x for x in ast.iter_child_nodes(node) if isinstance(x, ast.stmt)]
                )
                for handler in getattr(node, "handlers", ()):
                    yield from _top_names(handler.body)
            case _:
                pass
