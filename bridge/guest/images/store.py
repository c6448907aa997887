# SPDX-License-Identifier: Apache-2.0
"""The cache of images: their place and contents, and how to find and remove them.

Layout of :func:`bridge.util.cache.cache_directory`::

    images/NAME-FINGERPRINT/   one image; its name depends on everything that it is made of
    bases/NAME-FINGERPRINT/    the slow part of images, and the root in which the rest is compiled
    locks/NAME                 held while an image of this recipe is built

An image directory appears by a rename when it is complete and is never changed afterwards.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bridge.errors import ImageError, UsageError
from bridge.guest.images.recipe import DEFAULT_RECIPE, IMAGE_FORMAT, Recipe, Sources
from bridge.guest.images.recipe import recipes as recipe_names
from bridge.util.cache import cache_directory

__all__ = [
    "FILES",
    "MANIFEST",
    "OPTIONAL_FILES",
    "FileRecord",
    "Image",
    "base_directories",
    "base_directory",
    "broken_images",
    "disk_usage",
    "find",
    "image_directory",
    "list_images",
    "refuse_mounts",
    "remove",
    "remove_tree",
    "resolve",
    "sha256_of",
]

MANIFEST = "image.json"
"""The file that describes an image, JSON: what :meth:`Image.manifest` returns."""

FILES = (
    "vmlinux",
    "vmlinuz",
    "initrd.img",
    "root.squashfs",
    "System.map",
    "id_ed25519",
    "id_ed25519.pub",
    "ssh_host_ed25519_key.pub",
    "kcov_bridge.ko",
)
"""The files of an image, except its manifest."""

OPTIONAL_FILES = ("modules.json",)
"""Further files; images that an earlier version built lack them."""

_CMDLINE = "quiet mitigations=off norandmaps cryptomgr.notests"
"""``mitigations=off``: the guest needs no defence against its own programs, and its system calls
get cheaper. ``norandmaps``: without it TCG translates each library again for each process, because
it finds translated code only at the same address. ``cryptomgr.notests`` saves a quarter of a second
of boot under TCG. Other options that were tried had no measurable effect."""


@dataclass(frozen=True)
class FileRecord:
    """A file in the manifest: size in bytes, SHA-256 in hex."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Image:
    """A complete guest image on disk.

    Attributes:
        base_fingerprint, agent_fingerprint: the two levels of :mod:`bridge.guest.images.recipe`.
        packages: the packages of the guest with their versions.
    """

    directory: Path
    recipe: str
    suite: str
    fingerprint: str
    base_fingerprint: str
    agent_fingerprint: str
    kernel_release: str
    kernel_version: str
    include: tuple[str, ...]
    """Packages beyond the recipe's."""
    modules: tuple[str, ...]
    """Kernel modules beyond the recipe's."""
    packages: Mapping[str, str]
    files: Mapping[str, FileRecord] = field(repr=False)

    @classmethod
    def load(cls, directory: Path) -> Image:
        """Read an image's manifest; :meth:`check` looks at the files.

        Raises:
            ImageError: it cannot be read, or has another format.
        """
        path = directory / MANIFEST
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["format"] != IMAGE_FORMAT:
                raise ImageError(
                    f"the image {directory} has format {data['format']}, not {IMAGE_FORMAT}",
                    hint="remove it and build it again",
                )
            return cls(
                directory=directory,
                recipe=str(data["recipe"]),
                suite=str(data["suite"]),
                fingerprint=str(data["fingerprint"]),
                base_fingerprint=str(data["base_fingerprint"]),
                agent_fingerprint=str(data["agent_fingerprint"]),
                kernel_release=str(data["kernel_release"]),
                kernel_version=str(data["kernel_version"]),
                include=tuple(map(str, data["include"])),
                # Missing in manifests of an earlier version.
                modules=tuple(map(str, data.get("modules", ()))),
                packages=MappingProxyType({str(k): str(v) for k, v in data["packages"].items()}),
                files=MappingProxyType(
                    {
                        str(name): FileRecord(int(record["size"]), str(record["sha256"]))
                        for name, record in data["files"].items()
                    }
                ),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ImageError(
                f"the image {directory} has no readable manifest",
                evidence=f"{MANIFEST}: {type(error).__name__}: {error}",
                hint="remove it and build it again",
            ) from error

    def manifest(self) -> dict[str, Any]:
        """Return the manifest as it is written to ``image.json``."""
        return {
            "format": IMAGE_FORMAT,
            "recipe": self.recipe,
            "suite": self.suite,
            "fingerprint": self.fingerprint,
            "base_fingerprint": self.base_fingerprint,
            "agent_fingerprint": self.agent_fingerprint,
            "kernel_release": self.kernel_release,
            "kernel_version": self.kernel_version,
            "include": list(self.include),
            "modules": list(self.modules),
            "packages": dict(sorted(self.packages.items())),
            "files": {
                name: {"size": record.size, "sha256": record.sha256}
                for name, record in sorted(self.files.items())
            },
        }

    def check(self, *, contents: bool = False) -> None:
        """Check that all files exist and have the right size.

        Args:
            contents: also read all files and check their contents.

        Raises:
            ImageError: the image is broken.
        """
        wrong = []
        for name in (*FILES, *OPTIONAL_FILES):
            record = self.files.get(name)
            path = self.directory / name
            if record is None and name in OPTIONAL_FILES:
                continue
            if record is None:
                wrong.append(f"{name}: not in the manifest")
                continue
            try:
                size = path.stat().st_size
                if size != record.size:
                    wrong.append(f"{name}: {size} bytes instead of {record.size}")
                elif contents and sha256_of(path) != record.sha256:
                    wrong.append(f"{name}: the content has changed")
            except OSError as error:
                wrong.append(f"{name}: {error.strerror}")
        if wrong:
            raise ImageError(
                f"the image {self.directory} is broken",
                evidence="\n".join(wrong),
                hint=f"build it again: kcov-bridge image rm {self.name} && kcov-bridge image build",
            )

    @property
    def name(self) -> str:
        """The image's name in commands: ``RECIPE-FINGERPRINT``."""
        return self.directory.name

    @property
    def size(self) -> int:
        """Bytes on disk, without holes."""
        return disk_usage(self.directory)

    @property
    def kernel(self) -> Path:
        """The kernel to boot: ``vmlinux``, which QEMU starts through its PVH entry.

        It is the unpacked ``vmlinuz``, because under TCG the kernel takes three seconds to unpack
        itself. A kernel that is entered this way does not randomise its address.
        """
        return self.directory / "vmlinux"

    @property
    def vmlinuz(self) -> Path:
        """The distribution's own kernel file, for loaders that cannot boot :attr:`kernel`."""
        return self.directory / "vmlinuz"

    @property
    def initrd(self) -> Path:
        """The initramfs: boot modules, agent and keys, three archives one after the other."""
        return self.directory / "initrd.img"

    @property
    def root(self) -> Path:
        """The root file system: a squashfs, for a read-only virtio disk."""
        return self.directory / "root.squashfs"

    @property
    def system_map(self) -> Path:
        """The kernel's symbols at their addresses without randomisation."""
        return self.directory / "System.map"

    @property
    def modules_list(self) -> Path | None:
        """The sizes of the kernel's modules; None if the image lacks them.

        :class:`bridge.sources.guest_kernel.placement.ModulePlacement` reads them.
        """
        return self.directory / "modules.json" if "modules.json" in self.files else None

    @property
    def ssh_key(self) -> Path:
        """The private key that root of the guest accepts."""
        return self.directory / "id_ed25519"

    @property
    def host_key(self) -> Path:
        """The guest's public host key, one line in OpenSSH's form."""
        return self.directory / "ssh_host_ed25519_key.pub"

    @property
    def module(self) -> Path:
        """The kernel module of the kcov device, as in the guest."""
        return self.directory / "kcov_bridge.ko"

    @property
    def cmdline(self) -> str:
        """The kernel's command line for this image, without the console and panic policy."""
        return _CMDLINE


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def disk_usage(directory: Path) -> int:
    """Return the bytes on disk of a directory's files, without holes and repeated hard links."""
    seen: set[int] = set()
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            status = os.lstat(os.path.join(folder, name))  # noqa: PTH118 (many thousand files)
            if status.st_ino not in seen:
                seen.add(status.st_ino)
                total += status.st_blocks * 512  # POSIX: st_blocks counts 512 bytes
    return total


def image_directory(name: str) -> Path:
    """Return the directory of the image with this full name, existing or not."""
    return cache_directory() / "images" / name


def base_directory(recipe: str, fingerprint: str) -> Path:
    """Return the directory of the base with this recipe and fingerprint, existing or not."""
    return cache_directory() / "bases" / f"{recipe}-{fingerprint}"


def find(
    recipe: str = DEFAULT_RECIPE, *, include: Iterable[str] = (), modules: Iterable[str] = ()
) -> Image | None:
    """Return the image of a recipe's current sources; None if it is not built yet.

    Raises:
        ImageError: it is broken.
        UsageError: the recipe is unknown.
    """
    sources = Sources.find()
    wanted = Recipe.load(recipe, sources.recipes).extended(include, modules)
    directory = image_directory(f"{wanted.name}-{sources.fingerprint(wanted)}")
    if not directory.is_dir():
        return None
    image = Image.load(directory)
    image.check()
    return image


def list_images() -> list[Image]:
    """Return all images of the cache with a readable manifest, the newest first."""
    found: list[tuple[float, Image]] = []
    for directory in _directories("images"):
        try:
            found.append(((directory / MANIFEST).stat().st_mtime, Image.load(directory)))
        except (ImageError, OSError):
            continue
    return [image for _, image in sorted(found, key=lambda pair: pair[0], reverse=True)]


def broken_images() -> list[Path]:
    """Return the directories among the images without a readable manifest."""
    good = {image.directory for image in list_images()}
    return [directory for directory in _directories("images") if directory not in good]


def base_directories() -> list[Path]:
    """Return the directories of the cached bases."""
    return _directories("bases")


def resolve(name: str, *, recipes: bool = False) -> Path:
    """Return the directory of the image with this name, or of the only one whose name begins so.

    Args:
        recipes: the name of a recipe was allowed too; the hint lists them.

    Raises:
        UsageError: there is no such image, or more than one.
    """
    directories = _directories("images")
    exact = [directory for directory in directories if directory.name == name]
    matching = exact or [d for d in directories if name and d.name.startswith(name)]
    if len(matching) == 1:
        return matching[0]
    names = ", ".join(directory.name for directory in (matching or directories))
    if matching:
        raise UsageError(f"{name!r} could be any of: {names}")
    hints = [f"the images are: {names}"] if names else []
    if recipes:
        hints.insert(0, f"the recipes are: {', '.join(recipe_names(Sources.find().recipes))}")
    raise UsageError(f"there is no image {name!r}", hint="; ".join(hints))


def remove(name: str) -> Path:
    """Remove an image, named in full or by the beginning of its name.

    A guest that runs from it continues, because QEMU has the files open.

    Returns:
        The directory that it had.

    Raises:
        UsageError: there is no such image.
    """
    directory = resolve(name)
    remove_tree(directory)
    return directory


def remove_tree(directory: Path) -> None:
    """Remove a directory of the cache; refuse if something is mounted below it.

    A rename comes first, so that no process finds half of the directory.

    Raises:
        ImageError: it cannot be removed.
    """
    refuse_mounts(directory)
    doomed = directory.with_name(f".rm-{directory.name}-{os.getpid()}")
    try:
        directory.rename(doomed)
        shutil.rmtree(doomed)
    except FileNotFoundError:
        return  # another process removed it at the same time
    except OSError as error:
        raise ImageError(f"{directory} cannot be removed: {error}") from error


def refuse_mounts(directory: Path) -> None:
    """Raise :class:`bridge.errors.ImageError` if something is mounted below ``directory``.

    Removing the directory would remove the contents of the mount.
    """
    mounts = _mounts_below(directory)
    if mounts:
        raise ImageError(
            f"{directory} cannot be removed: something is mounted in it",
            evidence="\n".join(mounts),
            hint="unmount it and try again",
        )


def _directories(kind: str) -> list[Path]:
    folder = cache_directory() / kind
    try:
        return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    except FileNotFoundError:
        return []


def _mounts_below(directory: Path) -> list[str]:
    prefix = str(directory.resolve()) + "/"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as lines:  # noqa: PTH123
        points = [line.split()[4] for line in lines]
    return [point for point in points if point.startswith(prefix)]
