# SPDX-License-Identifier: Apache-2.0
"""Recipes of images, and the fingerprints of everything that an image is made of.

A fingerprint has two levels, because the layers change at different speeds. The *base* depends on
the recipe and the files of ``images/root``; making it needs Debian packages and about a minute. The
*agent* depends on the sources in ``guest/``; compiling it takes seconds.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields, replace
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
"""The recipe for runs whose settings name no image; images/README.md has the reasons."""

BASE_FORMAT = 3
"""Version of bases; every base is built again after a change. 2: bases have ``modules.json``; 3:
they have the modules that ``modules.softdep`` names."""

IMAGE_FORMAT = 1
"""Version of an image's files and manifest; every image is built again after a change."""

_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+")
"""A package's name, by Debian Policy 5.6.1."""

_MODULE = re.compile(r"[A-Za-z0-9_-]+")

_SOURCE = re.compile(r"([a-z0-9_-]+/)+[A-Za-z0-9_-]+\.c")
"""A file of the kernel's source."""

_SUFFIX = ".toml"
"""A recipe whose name ends with this is a file of the user's."""

_FILE = re.compile(r"[a-z0-9][a-z0-9_-]*")
"""The name of such a file without the suffix; the names of its images begin with it."""

_AGENT_SOURCES = ("*.c", "*.h", "Makefile", "Kbuild")


@dataclass(frozen=True)
class Recipe:
    """One file of ``images/``.

    Attributes:
        suite: the Debian release.
        kernel: the package that depends on the kernel to use.
        packages: packages of the guest.
        build_packages: packages of the root in which everything is compiled and packed.
        boot_modules: modules to load before the root file system is mounted, in this order.
            Their dependencies are added.
        modules: modules in the root file system for modprobe. Their dependencies are added.
        exclude: patterns of paths to leave out of the guest's root; ``*`` also matches slashes.
        source_modules: modules that the release does not build, as files of its kernel's source;
            optional. Each is one file, and is built for the guest's kernel.
    """

    name: str
    suite: str
    kernel: str
    packages: tuple[str, ...]
    build_packages: tuple[str, ...]
    boot_modules: tuple[str, ...]
    modules: tuple[str, ...]
    exclude: tuple[str, ...]
    source_modules: tuple[str, ...] = ()

    @classmethod
    def load(cls, name: str, directory: Path) -> Recipe:
        """Read the recipe ``name`` from a directory of recipes, or ``PATH.toml`` from there.

        Raises:
            UsageError: there is no such recipe, or the name of its file is not allowed.
            ImageError: it cannot be read.
        """
        path = Path(name) if name.endswith(_SUFFIX) else directory / f"{name}{_SUFFIX}"
        if not path.is_file():
            known = ", ".join(recipes(directory)) or "none"
            raise UsageError(
                f"there is no image recipe {name!r}",
                hint=f"the recipes are: {known}; --image and --recipe also take a PATH{_SUFFIX}",
            )
        name = path.stem
        if not _FILE.fullmatch(name):
            raise UsageError(
                f"the recipe {path} needs another name",
                hint="the file's name may have small letters, digits, - and _",
            )
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ImageError(f"the recipe {path} cannot be read: {error}") from error
        names = {field.name: field.default for field in fields(cls) if field.name != "name"}
        needed = {key for key, default in names.items() if default is MISSING}
        different = sorted((needed - set(data)) | (set(data) - set(names)))
        if different:
            raise ImageError(
                f"the recipe {path} lacks keys, or has unknown ones: {', '.join(different)}"
            )
        values: dict[str, str] = {}
        lists: dict[str, tuple[str, ...]] = {}
        for key, value in data.items():
            if isinstance(value, str) and key in ("suite", "kernel"):
                values[key] = value
            elif isinstance(value, list) and all(isinstance(item, str) for item in value):
                lists[key] = tuple(value)
            else:
                raise ImageError(f"the recipe {path} has a value of the wrong type for {key}")
        if set(values) != {"suite", "kernel"}:
            raise ImageError(f"the recipe {path} has a list for suite or kernel instead of text")
        for source in lists.get("source_modules", ()):
            if not _SOURCE.fullmatch(source):
                raise ImageError(f"the recipe {path} names {source!r}, which is no file in C")
        return cls(name=name, suite=values["suite"], kernel=values["kernel"], **lists)

    def extended(self, packages: Iterable[str] = (), modules: Iterable[str] = ()) -> Recipe:
        """Return this recipe with more packages and kernel modules for the guest.

        Raises:
            UsageError: a name is not valid for a package or module.
        """
        more_packages = sorted(set(packages) - set(self.packages))
        for package in more_packages:
            if not _PACKAGE.fullmatch(package):
                raise UsageError(f"{package!r} is not a valid name of a Debian package")
        more_modules = sorted(set(modules) - set(self.modules))
        for module in more_modules:
            if not _MODULE.fullmatch(module):
                raise UsageError(f"{module!r} is not a valid name of a kernel module")
        return replace(
            self,
            packages=(*self.packages, *more_packages),
            modules=(*self.modules, *more_modules),
        )


def recipes(directory: Path) -> list[str]:
    """Return the names of the recipes in a directory, sorted."""
    return sorted(path.stem for path in directory.glob(f"*{_SUFFIX}"))


def is_recipe(name: str) -> bool:
    """Return whether this names a recipe of the source tree, or a file that is to be one.

    Raises:
        InfrastructureError: there is no source tree.
    """
    return name.endswith(_SUFFIX) or name in recipes(Sources.find().recipes)


@dataclass(frozen=True)
class Sources:
    """The source tree, with the project's own parts of an image."""

    root: Path

    @classmethod
    def find(cls) -> Sources:
        """Find the source tree of this package, or the copy that is installed with it.

        Raises:
            InfrastructureError: there is neither.
        """
        return cls(source_root())

    @property
    def recipes(self) -> Path:
        """The directory of the recipes."""
        return self.root / "images"

    @property
    def root_files(self) -> Path:
        """The tree of files that are added to the guest's root, or replace files there."""
        return self.root / "images" / "root"

    def agent_files(self) -> list[tuple[str, Path]]:
        """Return the sources for the guest: (path inside the tree, file), sorted by path."""
        found: list[tuple[str, Path]] = []
        for part in ("agent", "module"):
            for pattern in _AGENT_SOURCES:
                for path in (self.root / "guest" / part).glob(pattern):
                    # A build in the tree leaves Kbuild's generated kcov_bridge.mod.c behind.
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
            value = getattr(recipe, field.name)
            # A key that a recipe does not use leaves its fingerprint alone.
            if value != field.default:
                parts.append((field.name, repr(value).encode()))
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
        # Lengths first, so that different lists of parts give different bytes.
        digest.update(f"{len(name)} {len(content)} {name}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:12]
