# SPDX-License-Identifier: Apache-2.0
"""The directory of a campaign of syzkaller's manager: what it holds, and how it is made.

=================  ===========================================================================
``manager.cfg``    the manager's configuration
``qemu``           what the manager starts in QEMU's place: :mod:`bridge.cli.syzkaller_machine`
``campaign.json``  settings, for the stand-in, and the image that they mean
``id_ed25519``     the key with which the manager logs in; each guest is given its public half
``image``          empty: syzkaller wants a file, and takes an empty one for none
``kcov_bridge.*``  what the target offers: :mod:`bridge.cli.syzkaller_descriptions`
``workdir/``       the manager's own: corpus, crashes
``coverage/``      what all guests covered together, as the directory of a run
``kernel_obj/``    what the manager shows coverage with: :mod:`bridge.cli.syzkaller_trial`
``manager.json``   which manager runs here
=================  ===========================================================================
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from bridge.cli.syzkaller_claim import manager_of
from bridge.cli.syzkaller_descriptions import (
    CONST_FILE,
    DESCRIPTION_FILE,
    Offer,
    calls_in,
    constants,
    description,
)
from bridge.config import Settings
from bridge.errors import ImageError, UsageError
from bridge.guest.guest_image import ProjectImage, find_guest_image
from bridge.guest.images import Image
from bridge.guest.images.recipe import Sources
from bridge.guest.images.store import image_directory
from bridge.sources.guest_kernel import BLOCKS_FILE as KERNEL_BLOCKS_FILE
from bridge.targets.registry import check_name
from bridge.util.files import cannot_write, unusable, write_atomically
from bridge.vm.accel import choose_accelerator

__all__ = [
    "COVERAGE",
    "Campaign",
    "PinnedImage",
    "Trial",
    "locked",
    "prepare",
    "public_key",
]

logger = logging.getLogger(__name__)

COVERAGE = "coverage"
_CAMPAIGN = "campaign.json"
_KEY = "id_ed25519"
_VERSION = 2
_OTHER = "give another DIR, as in kcov-bridge syzkaller ~/fuzz --syzkaller …"
"""Of ``campaign.json``. 2: it pins the image."""
_PLACES = ("vmlinux", "modules.json")
"""The files of an image on which the PCs of its kernel depend."""
_OWN_MEMORY_MIB = 300
"""What QEMU and the bridge need beside the guest's memory, about."""
_IMAGE_CALLS = ("syz_mount_image", "syz_read_part_table")
"""They mount a disk image that the manager sends: seconds under TCG. The manager generates none of
them (``no_generate`` in its ``sys/linux/filesystem.txt``), but has hundreds of seeds with them."""
_USB_CALLS = ("syz_usb_*",)
"""They wait for a device of theirs to be probed, under TCG up to 30 seconds (``timeout`` in
``sys/linux/vusb.txt``), and tasks of the kernel, which are not recorded, probe it."""
_PROGRAMS = ("bin/syz-manager", "bin/linux_amd64/syz-executor", "bin/linux_amd64/syz-execprog")


@dataclass(frozen=True)
class PinnedImage:
    """The image that all guests of a campaign boot, so that their coverage is of one kernel.

    Attributes:
        name: of the image in the cache.
        release: of its kernel.
        kernel: SHA-256 over kernel and places of its modules, on which the PCs depend.
    """

    name: str = ""
    release: str = ""
    kernel: str = ""

    @classmethod
    def of(cls, image: Image) -> PinnedImage:
        """Pin an image."""
        parts = [image.files[name].sha256 for name in _PLACES if name in image.files]
        kernel = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        return cls(image.name, image.kernel_release, kernel)

    def find(self) -> None:
        """Check that it is still what a guest would boot.

        Raises:
            UsageError: there is no such image any more, or another version of kcov-bridge made it.
            ImageError: it was built again, with another kernel.
        """
        again = "run kcov-bridge syzkaller again for this directory: it takes the image of today"
        try:
            image = Image.load(image_directory(self.name))
        except ImageError as error:
            raise UsageError(
                f"the image {self.name} of this campaign is gone: {error.message}", hint=again
            ) from error
        if image.agent_fingerprint != Sources.find().agent_fingerprint():
            raise UsageError(
                f"the image {self.name} of this campaign is of another version of kcov-bridge",
                hint=again,
            )
        found = PinnedImage.of(image)
        if found != self:
            raise ImageError(
                f"the image {self.name} was built again since this campaign was prepared, and has "
                f"another kernel: {found.release} in place of {self.release}",
                hint=again,
            )


@dataclass(frozen=True)
class Campaign:
    """What ``campaign.json`` holds."""

    settings: Settings
    image: PinnedImage = PinnedImage()
    count: int = 1
    procs: int = 4
    loglevel: int = 7
    panic_on_oops: bool = True
    panic_on_warn: bool = False
    http: str = "127.0.0.1:56741"
    only_target: bool = False
    """Whether the manager keeps to the calls of the target's description."""
    images: bool = False
    """Whether programs mount disk images; see :data:`_IMAGE_CALLS`."""
    usb: bool = False
    """Whether programs emulate USB devices; see :data:`_USB_CALLS`."""

    def save(self, directory: Path) -> None:
        """Write it."""
        values = {"version": _VERSION, **asdict(self), "settings": self.settings.changed()}
        write_atomically(directory / _CAMPAIGN, json.dumps(values, indent=1) + "\n")

    @classmethod
    def load(cls, directory: Path) -> Campaign:
        """Read it.

        Raises:
            UsageError: it is no such directory, or of another version.
        """
        path = directory / _CAMPAIGN
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.pop("version") != _VERSION:
                raise ValueError("another version wrote it")
            image = PinnedImage(**values.pop("image"))
            return cls(Settings.of(values.pop("settings")), image, **values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{path} cannot be used: {error}", hint="make it again: kcov-bridge syzkaller"
            ) from error

    def machine_settings(self) -> Settings:
        """Return the settings of each guest, in which every call leaves a PC and a comparison.

        The manager's first look at a guest fails if a call leaves no PC, and only the kernel always
        leaves some. It switches comparisons off for good if a call leaves none.
        """
        sources = self.settings.sources(choose_accelerator(self.settings.accel).name)
        return self.settings.replace(
            image=self.image.name,
            syscall_pcs="kernel" not in sources,
            syscall_comparisons=True,
        )


@dataclass(frozen=True)
class Trial:
    """What was found in a guest that is like those of a campaign."""

    kernel_object: Path | None
    """``kernel_obj`` in the campaign's directory; None if there is nothing to show."""
    offer: Offer | None
    """What the target offers; None without a target."""


def prepare(
    directory: Path,
    checkout: Path,
    campaign: Campaign,
    try_guest: Callable[[Path, Campaign], Trial],
    *,
    start: bool = False,
) -> list[str]:
    """Make the directory, or bring it up to date; return the command that starts the manager.

    Args:
        try_guest: boots a guest and looks at it.
        start: whether the manager is started at once; then it must know the calls of the target.

    Raises:
        UsageError: the checkout is too old or not built, or does not know the calls that reach
            the target while nothing else is to be called; flags exclude each other; the machine
            has too little memory; the directory is a file; or a manager runs in it.
        BridgeError: no guest can be started.
    """
    checkout = checkout.expanduser().absolute()
    _check_checkout(checkout)
    _check_memory(campaign)
    check_name(campaign.settings.target)
    if campaign.only_target and campaign.settings.target == "none":
        raise UsageError("--only-target is given without a target", hint="--target NAME names one")
    if campaign.only_target and (campaign.images or campaign.usb):
        raise UsageError(
            "--only-target leaves out disk images and USB",
            hint="leave out --only-target, or --images and --usb",
        )
    accelerator = choose_accelerator(campaign.settings.accel)
    campaign.settings.sources(accelerator.name)
    directory = directory.expanduser().absolute()
    if " " in str(directory):
        raise UsageError(
            f"the path {directory} has a space, which the manager does not take",
            hint=_OTHER,
        )
    if manager := manager_of(directory):
        raise UsageError(
            f"a manager (process {manager}) runs in {directory}",
            hint="end it before its directory is changed, or give another DIR",
        )
    try:
        for each in (directory, directory / "workdir", directory / COVERAGE):
            each.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unusable(directory, error, hint=_OTHER) from error
    # Built here if it is missing, because the manager waits minutes at most.
    image = find_guest_image(campaign.settings)
    if not isinstance(image, ProjectImage):
        raise UsageError("a disk image of your own cannot be used here", hint="name a recipe")
    campaign = replace(campaign, image=PinnedImage.of(image.image))
    _check_kernel(directory, campaign.image)
    try:
        (directory / "image").write_bytes(b"")
        _make_key(directory)
        stand_in = directory / "qemu"
        stand_in.write_text(_stand_in(directory), encoding="utf-8")
        stand_in.chmod(0o755)
        campaign.save(directory)
        trial = try_guest(directory, campaign)
        text = _describe_target(directory, campaign, trial.offer)
        config = _manager_config(directory, checkout, campaign, accelerator.name)
        if campaign.only_target:
            config["enable_syscalls"] = [*calls_in(text), "close"]
        if trial.kernel_object is not None:
            config["kernel_obj"] = str(trial.kernel_object)
        write_atomically(directory / "manager.cfg", json.dumps(config, indent=1) + "\n")
        if text and not _knows(checkout, directory):
            _tell(checkout, directory, refuse=start and campaign.only_target)
    except OSError as error:
        raise cannot_write(Path(error.filename or directory), error) from error
    return [str(checkout / _PROGRAMS[0]), f"-config={directory / 'manager.cfg'}"]


def _describe_target(directory: Path, campaign: Campaign, offer: Offer | None) -> str:
    """Write a description of what guests reach of the target; return it, or "" without a target."""
    if offer is None:
        return ""
    files = {DESCRIPTION_FILE: description(offer), CONST_FILE: constants()}
    for name, text in files.items():
        write_atomically(directory / name, text)
    if not offer:
        logger.warning("the target %s offers nothing to programs", campaign.settings.target)
        return ""
    return files[DESCRIPTION_FILE]


def _knows(checkout: Path, directory: Path) -> bool:
    """Return whether the checkout was built with the description in the directory."""
    built = (checkout / _PROGRAMS[0]).stat().st_mtime
    for name in (DESCRIPTION_FILE, CONST_FILE):
        copy = checkout / "sys" / "linux" / name
        if _text_of(copy) != _text_of(directory / name) or copy.stat().st_mtime > built:
            return False
    return True


def _tell(checkout: Path, directory: Path, *, refuse: bool) -> None:
    """Say how syzkaller gets to know the target; an error if it must know it now."""
    problem = "syzkaller does not know the target yet"
    way = "cp {}/kcov_bridge.txt* {} && make -C {} manager executor execprog".format(
        *(shlex.quote(str(path)) for path in (directory, checkout / "sys" / "linux", checkout))
    )
    if refuse:
        raise UsageError(
            f"{problem}, and is to call nothing else", hint=f"to tell it, and start again: {way}"
        )
    logger.warning("%s; to tell it: %s", problem, way)


def _text_of(path: Path) -> str | None:
    """Return what is in a file, or None if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def _check_checkout(checkout: Path) -> None:
    if not (checkout / "syz-manager").is_dir():
        raise UsageError(
            f"{checkout} is no checkout of syzkaller", hint="--syzkaller names its directory"
        )
    if (checkout / "syz-fuzzer").is_dir():
        raise UsageError(
            f"the syzkaller in {checkout} is too old: it still has syz-fuzzer",
            hint="take one of 2025 or later",
        )
    missing = [name for name in _PROGRAMS if not os.access(checkout / name, os.X_OK)]
    if missing:
        raise UsageError(
            f"the syzkaller in {checkout} is not built: {', '.join(missing)} is missing",
            hint="make manager executor execprog, in that directory",
        )


def _check_memory(campaign: Campaign) -> None:
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    wanted = campaign.count * (campaign.settings.memory + _OWN_MEMORY_MIB)
    if wanted > there:
        raise UsageError(
            f"{campaign.count} guests of {campaign.settings.memory} MiB need {wanted} MiB, "
            f"and this machine has {there}",
            hint="lower --count or --memory",
        )


def _check_kernel(directory: Path, image: PinnedImage) -> None:
    """Raise UsageError if what is covered in the directory is of another kernel."""
    results = directory / COVERAGE
    if not (results / KERNEL_BLOCKS_FILE).exists():
        return
    try:
        before = Campaign.load(directory).image
    except UsageError:
        # An older version, whose campaign.json does not name the image, left these results.
        return
    if before.kernel != image.kernel:
        raise UsageError(
            f"{results} is of another kernel: {before.release} of the image {before.name}, and "
            f"not {image.release} of {image.name}",
            hint="take another DIR, or --image with that name; or move that directory away",
        )


def _stand_in(directory: Path) -> str:
    """Return the script that has all it needs to know of this installation."""
    lines = ["#!/bin/sh", "# Started by syz-manager in QEMU's place."]
    if (cache := os.environ.get("KCOV_BRIDGE_CACHE")) is not None:
        lines.append(f"export KCOV_BRIDGE_CACHE={shlex.quote(str(Path(cache).absolute()))}")
    command = [sys.executable, "-m", "bridge.cli.syzkaller_machine", str(directory)]
    return "\n".join([*lines, f'exec {shlex.join(command)} "$@"', ""])


def _manager_config(
    directory: Path, checkout: Path, campaign: Campaign, accelerator: str
) -> dict[str, Any]:
    left_out: list[str] = []
    if not campaign.only_target:
        left_out += () if campaign.images else _IMAGE_CALLS
        left_out += () if campaign.usb else _USB_CALLS
    return {
        "name": "kcov-bridge",
        "target": "linux/amd64",
        "http": campaign.http,
        "workdir": str(directory / "workdir"),
        "syzkaller": str(checkout),
        "image": str(directory / "image"),
        "sshkey": str(directory / _KEY),
        "ssh_user": "root",
        "procs": campaign.procs,
        "sandbox": "none",
        "cover": True,
        "disable_syscalls": left_out,
        # Coverage of what other tasks do for a program: only a target has it. After a program with
        # calls of USB the executor waits for it, under TCG for five seconds.
        "experimental": {"remote_cover": campaign.settings.target != "none"},
        "type": "qemu",
        "vm": {
            "count": campaign.count,
            "qemu": str(directory / "qemu"),
            # The manager reads its time-outs off this.
            "qemu_args": f"-accel {accelerator}",
            "cpu": campaign.settings.cpus,
            "mem": campaign.settings.memory,
        },
    }


def _make_key(directory: Path) -> None:
    """Make the manager's own key, which stays when images are built again."""
    path = directory / _KEY
    if path.is_file():
        return
    text = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    new = directory / f".{_KEY}.{os.getpid()}"
    new.touch(mode=0o600)
    new.write_bytes(text)
    new.replace(path)


def public_key(directory: Path) -> str:
    """Return the line for ``authorized_keys`` that lets the manager in.

    Raises:
        UsageError: the key cannot be read.
    """
    path = directory / _KEY
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UsageError(
            f"the key {path} cannot be used: {error}",
            hint="remove it, and run kcov-bridge syzkaller again for this directory",
        ) from error
    line = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return line.decode()


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep the other guests of a campaign from its results while inside."""
    with (directory / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
