# SPDX-License-Identifier: Apache-2.0
"""The directory of a campaign of syzkaller's manager: what it holds, and how it is made.

=================  ===========================================================================
``manager.cfg``    the manager's configuration
``qemu``           what the manager starts in QEMU's place: :mod:`bridge.cli.syzkaller_machine`
``campaign.json``  settings, for the stand-in
``id_ed25519``     a copy of the image's key, brought up to date at each start of a guest
``image``          empty: syzkaller wants a file, and takes an empty one for none
``workdir/``       the manager's own: corpus, crashes
``coverage/``      what all guests covered together, as the directory of a run
=================  ===========================================================================
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bridge.config import Settings
from bridge.errors import InfrastructureError, UsageError
from bridge.guest.guest_image import GuestImage, find_guest_image
from bridge.targets.registry import check_name
from bridge.util.files import write_atomically
from bridge.vm.accel import choose_accelerator

__all__ = ["COVERAGE", "Campaign", "copy_key", "locked", "prepare"]

logger = logging.getLogger(__name__)

COVERAGE = "coverage"
_CAMPAIGN = "campaign.json"
_KEY = "id_ed25519"
_VERSION = 1
_OWN_MEMORY_MIB = 300
"""What QEMU and the bridge need beside the guest's memory, about."""
_PROGRAMS = ("bin/syz-manager", "bin/linux_amd64/syz-executor", "bin/linux_amd64/syz-execprog")


@dataclass(frozen=True)
class Campaign:
    """What ``campaign.json`` holds."""

    settings: Settings
    count: int = 1
    procs: int = 2
    loglevel: int = 7
    panic_on_oops: bool = True
    panic_on_warn: bool = False
    http: str = "127.0.0.1:56741"

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
            return cls(Settings.of(values.pop("settings")), **values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{path} cannot be used: {error}", hint="make it again: kcov-bridge syzkaller"
            ) from error

    def machine_settings(self) -> Settings:
        """Return the settings of each guest, in which every call leaves a PC.

        The manager's first look fails if a call leaves none, and only the kernel always leaves
        some.
        """
        sources = self.settings.sources(choose_accelerator(self.settings.accel).name)
        return self.settings.replace(syscall_pcs="kernel" not in sources)


def prepare(directory: Path, checkout: Path, campaign: Campaign) -> list[str]:
    """Make the directory, or bring it up to date; return the command that starts the manager.

    Raises:
        UsageError: the checkout is too old or not built, or the machine has too little memory.
    """
    checkout = checkout.expanduser().absolute()
    _check_checkout(checkout)
    _check_memory(campaign)
    check_name(campaign.settings.target)
    accelerator = choose_accelerator(campaign.settings.accel)
    campaign.settings.sources(accelerator.name)
    directory = directory.expanduser().absolute()
    if " " in str(directory):
        raise UsageError(
            f"the path {directory} has a space, which the manager does not take",
            hint="give another DIR, as in kcov-bridge syzkaller ~/fuzz --syzkaller …",
        )
    # Built here if it is missing, because the manager waits minutes at most.
    image = find_guest_image(campaign.settings)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name in ("workdir", COVERAGE):
            (directory / name).mkdir(exist_ok=True)
        (directory / "image").write_bytes(b"")
        copy_key(image, directory)
        stand_in = directory / "qemu"
        stand_in.write_text(_stand_in(directory), encoding="utf-8")
        stand_in.chmod(0o755)
        campaign.save(directory)
        config = _manager_config(directory, checkout, campaign, accelerator.name)
        write_atomically(directory / "manager.cfg", json.dumps(config, indent=1) + "\n")
    except OSError as error:
        raise InfrastructureError(f"{directory} cannot be used: {error}") from error
    return [str(checkout / _PROGRAMS[0]), f"-config={directory / 'manager.cfg'}"]


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


def copy_key(image: GuestImage, directory: Path) -> None:
    """Have the manager's key be that of the image, which may have been built again."""
    image.check_key()
    key, copy = image.ssh_key.read_bytes(), directory / _KEY
    if copy.is_file() and copy.read_bytes() == key:
        return
    new = directory / f".{_KEY}.{os.getpid()}"
    new.touch(mode=0o600)
    new.write_bytes(key)
    new.replace(copy)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep the other guests of a campaign from its results while inside."""
    with (directory / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
