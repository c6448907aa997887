# SPDX-License-Identifier: Apache-2.0
"""Disks as targets."""

from __future__ import annotations

import importlib.util
import subprocess
import tempfile
from pathlib import Path

from bridge.targets.nbdkit import NbdkitTarget
from bridge.targets.scratch import ScratchDirectory
from tests.support.modules import NETWORK_MODULES

SIZE = 8 << 20
MOUNT = "mkdir -p /mnt/disk && mount -o {} /dev/target/disk /mnt/disk\n"
TEXT = "a file on the disk that blkcache reads\n"


class _Ext4(NbdkitTarget):
    """A disk with a file system, made anew for each start."""

    guest_modules: tuple[str, ...] = ("ext4",)
    guest_setup = MOUNT.format("rw")

    def __init__(self, directory: Path | None = None) -> None:
        super().__init__(directory)
        self.place = ScratchDirectory("disk")

    def prepare(self) -> None:
        super().prepare()
        self.place.make()

    def start(self) -> None:
        image = self.place.empty() / "image"
        with tempfile.TemporaryDirectory() as tree:
            (Path(tree) / "file").write_text(TEXT)
            with image.open("wb") as file:
                file.truncate(SIZE)
            subprocess.run(
                ["/sbin/mke2fs", "-q", "-t", "ext4", "-d", tree, image], check=True, timeout=60
            )
        self.arguments = self.arguments_for(image)
        super().start()

    def arguments_for(self, image: Path) -> dict[str, str]:
        raise NotImplementedError

    def stop(self) -> None:
        super().stop()
        self.place.remove()


class CachedDisk(_Ext4):
    """Read through the plugin of the package blkcache, which keeps what it has read."""

    packages = ("blkcache",)
    read_only = True
    guest_setup = MOUNT.format("ro,noload")

    def plugin(self) -> Path:
        return _found("blkcache.backend")

    def arguments_for(self, image: Path) -> dict[str, str]:
        cache = image.with_name("cache")
        with cache.open("wb") as file:
            file.truncate(SIZE)
        return {"device": str(image), "cache": str(cache)}


class RamDisk(_Ext4):
    """A disk that can be written."""

    packages = ("tests.system.ram_disk",)

    def plugin(self) -> Path:
        return _found("tests.system.ram_disk")

    def arguments_for(self, image: Path) -> dict[str, str]:
        return {"image": str(image)}


class NetworkDisk(RamDisk):
    """The same behind the guest's driver for NBD."""

    driver = "nbd"
    guest_modules = NETWORK_MODULES


def _found(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin)
