# SPDX-License-Identifier: Apache-2.0
"""What an image is made of: the recipe, and the fingerprints of all that goes into it.

A fingerprint has two levels, because the layers change at different speeds. The *base* is a
function of the recipe and the files of ``images/root``; it takes Debian packages and about a
minute to make. The *agent* is a function of the sources in ``guest/``; it is compiled in seconds.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path

from bridge.errors import ImageError, UsageError
from bridge.util.resources import source_root

__all__ = [
    "BASE_FORMAT",
    "DEFAULT_RECIPE",
    "IMAGE_FORMAT",
    "Recipe",
    "Sources",
    "is_recipe",
    "recipes",
]

DEFAULT_RECIPE = "bookworm"
"""The recipe of the image that a run boots if its settings name none; images/README.md says why."""

BASE_FORMAT = 3
"""Version of what the builder makes of a recipe; a new one makes every base be built anew. 2: bases
have ``modules.json``; 3: they have the modules that ``modules.softdep`` names."""

IMAGE_FORMAT = 1
"""Version of an image's files and manifest; a new one makes every image be built anew."""

_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+")
"""A package's name, as Debian Policy 5.6.1 has it."""

_MODULE = re.compile(r"[A-Za-z0-9_-]+")

_AGENT_SOURCES = ("*.c", "*.h", "Makefile", "Kbuild")


@dataclass(frozen=True)
class Recipe:
    """One file of ``images/``.

    ``suite`` is the Debian release; ``kernel`` the package that depends on the kernel to use;
    ``packages`` are installed in the guest and ``build_packages`` in the root where everything is
    compiled and packed; ``boot_modules`` are loaded before there is a root file system, in this
    order, and ``modules`` wait there for modprobe (what they depend on comes with both);
    ``exclude`` has patterns of paths that the guest's root does without, where ``*`` also matches
    slashes.
    """

    name: str
    suite: str
    kernel: str
    packages: tuple[str, ...]
    build_packages: tuple[str, ...]
    boot_modules: tuple[str, ...]
    modules: tuple[str, ...]
    exclude: tuple[str, ...]

    @classmethod
    def load(cls, name: str, directory: Path) -> Recipe:
        """Read the recipe ``name`` from a directory of recipes.

        Raises :class:`bridge.errors.UsageError` if there is none of this name, and
        :class:`bridge.errors.ImageError` if it can't be read.
        """
        known = recipes(directory)
        if name not in known:
            raise UsageError(
                f"there is no image recipe {name!r}",
                hint=f"the recipes are: {', '.join(known) or 'none'}",
            )
        path = directory / f"{name}.toml"
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ImageError(f"the recipe {path} can't be read: {error}") from error
        names = [field.name for field in fields(cls) if field.name != "name"]
        if sorted(data) != sorted(names):
            different = sorted(set(data) ^ set(names))
            raise ImageError(f"the recipe {path} lacks, or has too many of: {', '.join(different)}")
        values: dict[str, str] = {}
        lists: dict[str, tuple[str, ...]] = {}
        for key, value in data.items():
            if isinstance(value, str) and key in ("suite", "kernel"):
                values[key] = value
            elif isinstance(value, list) and all(isinstance(item, str) for item in value):
                lists[key] = tuple(value)
            else:
                raise ImageError(f"the recipe {path} has a wrong kind of value for {key}")
        if set(values) != {"suite", "kernel"}:
            raise ImageError(f"the recipe {path} has a list where suite or kernel should be")
        return cls(name=name, suite=values["suite"], kernel=values["kernel"], **lists)

    def extended(self, packages: Iterable[str] = (), modules: Iterable[str] = ()) -> Recipe:
        """Return this recipe with more packages and kernel modules for the guest.

        Raises:
            UsageError: something cannot be the name of a package or of a module.
        """
        more_packages = sorted(set(packages) - set(self.packages))
        for package in more_packages:
            if not _PACKAGE.fullmatch(package):
                raise UsageError(f"{package!r} is no name of a Debian package")
        more_modules = sorted(set(modules) - set(self.modules))
        for module in more_modules:
            if not _MODULE.fullmatch(module):
                raise UsageError(f"{module!r} is no name of a kernel module")
        return replace(
            self,
            packages=(*self.packages, *more_packages),
            modules=(*self.modules, *more_modules),
        )


def recipes(directory: Path) -> list[str]:
    """Return the names of the recipes in a directory, sorted."""
    return sorted(path.stem for path in directory.glob("*.toml"))


def is_recipe(name: str) -> bool:
    """Return whether the source tree has a recipe of this name.

    Raises:
        InfrastructureError: there is no source tree.
    """
    return name in recipes(Sources.find().recipes)


@dataclass(frozen=True)
class Sources:
    """Where the project's own parts of an image come from: its source tree."""

    root: Path

    @classmethod
    def find(cls) -> Sources:
        """Find the source tree of this package, or the copy that is installed with it.

        Raises :class:`bridge.errors.InfrastructureError` where neither is there.
        """
        return cls(source_root())

    @property
    def recipes(self) -> Path:
        """The directory of the recipes."""
        return self.root / "images"

    @property
    def root_files(self) -> Path:
        """The tree of files that is put over the guest's root."""
        return self.root / "images" / "root"

    def agent_files(self) -> list[tuple[str, Path]]:
        """Return what is compiled for the guest: (path inside the tree, file), sorted by path."""
        found: list[tuple[str, Path]] = []
        for part in ("agent", "module"):
            for pattern in _AGENT_SOURCES:
                for path in (self.root / "guest" / part).glob(pattern):
                    # Kbuild leaves a generated kcov_bridge.mod.c behind where somebody ran it.
                    if path.is_file() and not path.name.endswith(".mod.c"):
                        found.append((f"{part}/{path.name}", path))
        return sorted(found)

    def agent_fingerprint(self) -> str:
        """Return the fingerprint of ``guest/``: 12 hex digits."""
        return _fingerprint(
            [("format", str(IMAGE_FORMAT).encode()), *_contents(self.agent_files())]
        )

    def base_fingerprint(self, recipe: Recipe) -> str:
        """Return the fingerprint of a recipe and of ``images/root``: 12 hex digits."""
        parts = [("format", str(BASE_FORMAT).encode())]
        for field in fields(recipe):
            parts.append((field.name, repr(getattr(recipe, field.name)).encode()))
        files = [
            (str(path.relative_to(self.root_files)), path)
            for path in sorted(self.root_files.rglob("*"))
            if path.is_file()
        ]
        return _fingerprint([*parts, *_contents(files)])

    def fingerprint(self, recipe: Recipe) -> str:
        """Return the fingerprint of a whole image: 12 hex digits."""
        parts = (self.base_fingerprint(recipe), self.agent_fingerprint())
        return _fingerprint([("layers", "+".join(parts).encode())])


def _contents(files: Iterable[tuple[str, Path]]) -> list[tuple[str, bytes]]:
    return [(name, path.read_bytes()) for name, path in files]


def _fingerprint(parts: Iterable[tuple[str, bytes]]) -> str:
    digest = hashlib.sha256()
    for name, content in parts:
        # Lengths first, so that no two lists of parts read the same.
        digest.update(f"{len(name)} {len(content)} {name}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:12]
