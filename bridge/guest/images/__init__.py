# SPDX-License-Identifier: Apache-2.0
"""Guest images: from a Debian release's packages to a bootable kernel, initramfs and root.

image = build()            # or find(), which returns None if it is not built yet
image.kernel, image.initrd, image.root, image.ssh_key, image.host_key
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bridge.guest.images.store import Image, find, list_images, remove

if TYPE_CHECKING:
    from bridge.guest.images.builder import build, compile_for_guest

__all__ = [
    "Image",
    "build",
    "compile_for_guest",
    "find",
    "list_images",
    "remove",
]

_BUILDER = ("build", "compile_for_guest")


def __getattr__(name: str) -> Any:
    """Import the builder on first use, because its imports take long."""
    if name not in _BUILDER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from bridge.guest.images import builder

    return getattr(builder, name)
