# SPDX-License-Identifier: Apache-2.0
"""Finds the source files of packages without importing them."""

from __future__ import annotations

import importlib.machinery
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bridge.errors import SourceError

__all__ = ["PackageFiles", "find_packages"]

# Importable source files as in coverage.py (coverage/files.py, find_python_files); other names are
# leftovers of editors.
_SOURCE_NAME: Final = re.compile(r"[^.#~!$@%^&*()+=,]+\.pyw?")
_SUFFIXES: Final = (".py", ".pyw")


@dataclass(frozen=True, slots=True)
class PackageFiles:
    """The source files of some packages.

    Attributes:
        names: each file's canonical path and its name, which begins with the top-level package.
        roots: directories and single files of the packages with their names, the innermost first.
            A file that appears below one later belongs to it.
    """

    names: dict[str, str]
    roots: tuple[tuple[str, str], ...]

    def name_of(self, path: str) -> str | None:
        """Return the name of a file that appeared later; None for one outside the packages."""
        for root, prefix in self.roots:
            if path.startswith(root + os.sep):
                return prefix + "/" + path[len(root) + 1 :].replace(os.sep, "/")
        return None


def find_packages(packages: Sequence[str]) -> PackageFiles:
    """Find the source files of ``packages``, dotted names of packages or modules.

    Raises:
        SourceError: a package does not exist, or has no Python source.
    """
    paths: dict[str, str] = {}
    roots = []
    for package in packages:
        for root, prefix in _locations(package):
            canonical = os.path.realpath(root)
            if canonical.endswith(_SUFFIXES):
                paths.setdefault(prefix + Path(canonical).suffix, canonical)
                roots.append((canonical, prefix))
                continue
            roots.append((canonical, prefix))
            for name in _walk(canonical):
                paths.setdefault(f"{prefix}/{name}", os.path.realpath(f"{canonical}/{name}"))
    # The innermost package names a file, whatever the order of the packages.
    roots.sort(key=lambda root: len(root[0]), reverse=True)
    return PackageFiles({path: name for name, path in paths.items()}, tuple(roots))


def _locations(package: str) -> list[tuple[str, str]]:
    """Return directories or source file of a package or module, each with its name in slashes."""
    search: list[str] | None = None
    spec: importlib.machinery.ModuleSpec | None = None
    parts = package.split(".")
    for depth in range(1, len(parts) + 1):
        spec = _find_spec(".".join(parts[:depth]), search)
        if spec is None:
            raise SourceError(
                f"no module named {'.'.join(parts[:depth])}",
                hint="install it into this Python, or set PYTHONPATH",
            )
        search = _search_locations(spec)
        if search is None and depth < len(parts):
            raise SourceError(f"{'.'.join(parts[:depth])} is a module, not a package")
    name = "/".join(parts)
    found = [(root, name) for root in search or () if Path(root).is_dir()]
    origin = spec.origin if spec is not None else None
    if not found and origin is not None and origin.endswith(_SUFFIXES):
        found = [(origin, name)]
    if not found:
        raise SourceError(
            f"{package} has no Python source", hint="only source files can be covered"
        )
    return found


def _search_locations(spec: importlib.machinery.ModuleSpec) -> list[str] | None:
    """Return where the submodules of a package are searched; None for a module."""
    locations = spec.submodule_search_locations
    return list(locations) if locations else None


def _find_spec(name: str, search: Sequence[str] | None) -> importlib.machinery.ModuleSpec | None:
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        try:
            spec: importlib.machinery.ModuleSpec | None = find(name, search) if find else None
        except KeyError:
            # A namespace package below a package that was not imported: after the interpreter's
            # finder has found no module, it looks for the parent in sys.modules.
            spec = _namespace(name, search or ())
        if spec is not None:
            return spec
    return None


def _namespace(name: str, search: Sequence[str]) -> importlib.machinery.ModuleSpec | None:
    """Return a namespace package (PEP 420) with its directories, or None."""
    places = [Path(entry, name.rpartition(".")[2]) for entry in search]
    spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [str(place) for place in places if place.is_dir()]
    return spec if spec.submodule_search_locations else None


def _walk(root: str) -> Iterator[str]:
    """Iterate over the source files of a package directory, relative to it, as coverage.py does.

    Subdirectories without ``__init__.py`` are not part of the package.
    """
    for directory, below, files in os.walk(root):
        if directory != root and "__init__.py" not in files:
            below.clear()
            continue
        for file in files:
            if _SOURCE_NAME.fullmatch(file):
                yield (Path(directory) / file).relative_to(root).as_posix()
