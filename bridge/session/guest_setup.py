# SPDX-License-Identifier: Apache-2.0
"""What a target needs in the guest: kernel modules, packages, files, devices, its own set-up."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bridge.errors import BridgeError, GuestSetupError
from bridge.targets.description import Description

if TYPE_CHECKING:
    # Imported while the guest goes on: it takes longest.
    from bridge.guest.guest import Guest

__all__ = ["load_modules", "set_up", "tear_down"]

logger = logging.getLogger(__name__)

_SET_UP_SECONDS = 60.0
_TEAR_DOWN_SECONDS = 10.0

_IMAGE_HINT = (
    "build an image that has it, and use it: kcov-bridge image build {option} {names}, "
    "then --image NAME with the name of the directory that it prints"
)


def load_modules(guest: Guest, modules: Sequence[str], who: str = "the target needs") -> None:
    """Load kernel modules in the guest.

    Args:
        who: wants them, for an error: "MODULE, which …".

    Raises:
        GuestSetupError: the image lacks one, or the kernel refuses it.
    """
    for module in modules:
        result = guest.run(["modprobe", "--", module], timeout=_SET_UP_SECONDS)
        if not result.exit_status:
            continue
        said = (result.stdout + result.stderr).decode(errors="replace")
        if "not found in directory" in said:
            raise GuestSetupError(
                f"the guest's image has no kernel module {module}, which {who}",
                evidence=said,
                hint=_IMAGE_HINT.format(option="--module", names=module),
            )
        raise GuestSetupError(
            f"the guest could not load the module {module} (exit status {result.exit_status})",
            evidence=said,
        )


def set_up(guest: Guest, target: Description, *, modules_loaded: bool) -> None:
    """Make the target usable in the guest.

    Args:
        modules_loaded: whether the guest was started from a snapshot, which has the modules.

    Raises:
        GuestSetupError: something is missing in the guest, or a script fails.
    """
    _require_packages(guest, target)
    if not modules_loaded:
        load_modules(guest, target.modules)
    for file in target.guest_files:
        guest.put(file.content, file.path, file.mode)
    # One command for all of them: each is a trip to the guest.
    links = "".join(f"(\nset -e\n{each.guest_setup})\n" for each in target.devices)
    if links:
        _step(guest, f"find the devices of the target {target.name}", f"set -e\n{links}")
    if target.guest_setup:
        _step(guest, f"set up the target {target.name}", target.guest_setup)


def tear_down(guest: Guest, target: Description) -> None:
    """Run the target's ``guest_teardown``, which may fail."""
    try:
        guest.run(target.guest_teardown, timeout=_TEAR_DOWN_SECONDS)
    except BridgeError as error:
        logger.debug("the target was not taken down in the guest: %s", error)


def _step(guest: Guest, what: str, command: str) -> None:
    result = guest.run(command, timeout=_SET_UP_SECONDS)
    if result.exit_status:
        raise GuestSetupError(
            f"the guest could not {what} (exit status {result.exit_status})",
            evidence=(result.stdout + result.stderr).decode(errors="replace"),
        )


def _require_packages(guest: Guest, target: Description) -> None:
    if not target.guest_packages:
        return
    words = shlex.join(target.guest_packages)
    found = guest.run(
        f"dpkg-query -W -f '${{db:Status-Status}} ${{Package}}\\n' -- {words} 2>/dev/null",
        timeout=_SET_UP_SECONDS,
    )
    installed = {
        line.partition(" ")[2] for line in found.text.splitlines() if line.startswith("installed ")
    }
    missing = [name for name in target.guest_packages if name not in installed]
    if missing:
        raise GuestSetupError(
            f"the guest's image lacks packages that the target {target.name} needs: "
            + ", ".join(missing),
            hint=_IMAGE_HINT.format(option="--include", names=",".join(missing)),
        )
