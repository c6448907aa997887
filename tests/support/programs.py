# SPDX-License-Identifier: Apache-2.0
"""The image that tests boot, and C programs for it, each compiled once and kept in the cache."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from bridge.guest.images import Image, build, compile_for_guest
from bridge.guest.images.recipe import DEFAULT_RECIPE
from bridge.util.cache import cache_directory

__all__ = ["add_guest_image", "guest_image", "guest_program"]

_FLAGS = ("-O2", "-Wall", "-Wextra", "-Werror")


def guest_image() -> Image:
    """Return the image that a test boots: the recipe that ``KCOV_BRIDGE_IMAGE`` names, or the
    default; built if it is not there."""
    return build(os.environ.get("KCOV_BRIDGE_IMAGE") or DEFAULT_RECIPE)


def add_guest_image(cache: Path) -> None:
    """Put the image of the guests into another cache."""
    image = guest_image()
    shutil.copytree(image.directory, cache / "images" / image.name, copy_function=_link_or_copy)


def _link_or_copy(source: str, destination: str) -> None:
    try:
        os.link(source, destination)
    except OSError:  # another file system
        shutil.copy2(source, destination)


def guest_program(
    source: Path, *, image: Image | None = None, flags: Sequence[str] = _FLAGS
) -> Path:
    """Return ``source`` compiled for an image, :func:`guest_image` by default; headers beside it
    are found.

    Raises:
        ImageError: it does not compile; with the compiler's messages.
    """
    image = image or guest_image()
    made_of = hashlib.sha256(repr((image.base_fingerprint, tuple(flags))).encode())
    for path in (source, *sorted(source.parent.glob("*.h"))):
        made_of.update(path.name.encode() + b"\0" + path.read_bytes())
    folder = cache_directory() / "tests" / "programs"
    program = folder / f"{source.stem}-{made_of.hexdigest()[:16]}"
    if not program.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        made = folder / f".{program.name}.{os.getpid()}"
        try:
            compile_for_guest(image, source, made, flags=flags)
            made.rename(program)
        finally:
            made.unlink(missing_ok=True)
    return program
