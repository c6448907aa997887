# SPDX-License-Identifier: Apache-2.0
"""The snapshots in the cache: each is made once, by booting a guest that is used for nothing else.

A snapshot belongs to an image and to :func:`bridge.vm.snapshot.fingerprint`, which are in its name
below ``snapshots/`` in the cache; so one that does not fit any more is not found, and is thrown
away when others were used since.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from bridge.errors import GuestLostError, ImageError, QemuError
from bridge.guest.guest_image import GuestImage
from bridge.guest.images.store import image_directory
from bridge.session.device_host import DeviceHost
from bridge.session.guest_setup import load_modules
from bridge.targets import MOUNT_POINT
from bridge.util.cache import cache_directory, lock_file, locked
from bridge.vm.config import MachineConfig, MemoryFds
from bridge.vm.machine import Machine
from bridge.vm.snapshot import Snapshot, fingerprint, new_memory, prune

__all__ = ["prune_snapshots", "ready_snapshot", "remove_if_damaged"]

logger = logging.getLogger(__name__)

_WARM_UP = (
    "cat /usr/bin/kcov-exec /usr/lib/kcov-bridge/* /bin/mkdir /bin/rm /bin/mount "
    "/sbin/modprobe /lib/modules/*/modules.*.bin >/dev/null 2>&1; /usr/sbin/sshd -t; "
    "kcov-exec -o /dev/null true; kcov-runner 2>/dev/null; "
    f"mkdir -p {MOUNT_POINT}; mount --version >/dev/null; sync"
)
"""What a session needs at once and would read from the disk, unpack and link each time. The first
owner of an instance has the guest's module put its probes into the kernel, which takes as long as
the rest of a reset."""

_QUIET_SECONDS = 5.0
_SETTLE_SECONDS = 0.2


def ready_snapshot(
    image: GuestImage,
    config: MachineConfig,
    region_bytes: int,
    modules: Sequence[str] = (),
) -> Snapshot:
    """Return the snapshot of ``image`` in this machine, and make it if there is none.

    ``modules`` are kernel modules that are loaded in it. Raises
    :class:`bridge.errors.CacheError` where the cache cannot be written,
    :class:`bridge.errors.ImageError` where the guest cannot be saved, and what keeps it from
    becoming ready.
    """
    name = f"{image.name}-{fingerprint(config, region_bytes, modules, prepared=_WARM_UP)}"
    directory = _folder() / name
    with contextlib.suppress(ImageError):
        return Snapshot(directory)
    with locked(lock_file(f"snapshot-{image.name}"), f"the snapshot {name}", logger.info):
        with contextlib.suppress(ImageError):
            return Snapshot(directory)
        # What a process left that was killed in the middle of it.
        for left in _folder().glob(f".{image.name}-*"):
            shutil.rmtree(left, ignore_errors=True)
        started = time.monotonic()
        logger.info("making a snapshot of the ready guest, which later runs start from")
        try:
            _make(directory, image, config, region_bytes, modules)
        except OSError as error:
            raise ImageError(f"the guest cannot be saved: {error}") from error
        prune_snapshots()
        logger.debug("the snapshot %s took %.1f s", directory, time.monotonic() - started)
        return Snapshot(directory)


def remove_if_damaged(snapshot: Snapshot) -> bool:
    """Remove a snapshot if its files are damaged; a run that lacks something is no reason to.

    Returns:
        Whether it was damaged.
    """
    damaged = snapshot.damaged
    if damaged:
        shutil.rmtree(snapshot.directory, ignore_errors=True)
    return damaged


def prune_snapshots() -> None:
    """Remove the snapshots of images that are gone, and those not used for long."""
    prune(_folder(), lambda name: image_directory(name.rpartition("-")[0]).is_dir())


def _folder() -> Path:
    return cache_directory() / "snapshots"


def _make(
    directory: Path,
    image: GuestImage,
    config: MachineConfig,
    region_bytes: int,
    modules: Sequence[str],
) -> None:
    config = replace(config.identity, boot_timeout=config.boot_timeout)
    with ExitStack() as stack:
        device = stack.enter_context(DeviceHost(region_bytes))
        ram = new_memory(config.memory_mib << 20)
        stack.callback(os.close, ram)
        socket = stack.enter_context(device.connect())
        machine = stack.enter_context(Machine(config, doorbell=socket, memory=MemoryFds(ram)))
        machine.start()
        socket.close()
        guest, _ = image.bring_up(machine, stack, lambda guest, release: None)
        guest.run(_WARM_UP)
        load_modules(guest, modules)
        guest.close()
        # Connections of an agent without a channel, and their sshd.
        deadline = time.monotonic() + _QUIET_SECONDS
        while machine.connections and time.monotonic() < deadline:
            time.sleep(_SETTLE_SECONDS)
        time.sleep(_SETTLE_SECONDS)

        def give_back() -> None:
            # A QEMU that reads through the region, which is empty, fills it with pages of zeroes.
            device.doorbell.call(device.region.clear)

        try:
            Snapshot.save(directory, machine, ram, give_back)
        except (QemuError, GuestLostError) as error:
            raise ImageError(
                f"the guest cannot be saved: {error.message}",
                evidence=error.evidence,
                hint="--no-snapshot spares the attempt",
            ) from error
