# SPDX-License-Identifier: Apache-2.0
"""Guest images: from a Debian release's packages to a bootable kernel, initramfs and root.

image = build()            # or find(): None if it is not built yet
image.kernel, image.initrd, image.root, image.ssh_key, image.host_key
"""

from __future__ import annotations

from bridge.image.builder import build, compile_for_guest
from bridge.image.store import Image, cache_directory, find, list_images, remove

__all__ = [
    "Image",
    "build",
    "cache_directory",
    "compile_for_guest",
    "find",
    "list_images",
    "remove",
]
