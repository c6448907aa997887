# SPDX-License-Identifier: Apache-2.0
"""A guest that is booted when a campaign is prepared: ``kernel_obj``, and what the target offers.

The manager reads ``kernel_obj`` when it starts and does not take another one. So all blocks and
functions must be known before: those of the target are, as soon as it serves, and those of modules
once they are loaded. A guest that is like those of the campaign loads every module of its image.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from bridge.cli.syzkaller_directory import Campaign, Trial, public_key
from bridge.cli.syzkaller_guest import set_up
from bridge.cli.syzkaller_sandbox import look
from bridge.errors import BridgeError, InfrastructureError, MissingDependencyError
from bridge.results.kernel_object import write_kernel_object
from bridge.session.session import Session
from bridge.sources.guest_kernel import SYMBOLS_FILE

__all__ = ["KERNEL_OBJECT", "try_guest"]

logger = logging.getLogger(__name__)

KERNEL_OBJECT = "kernel_obj"
"""The directory, in that of the campaign."""

_LOAD_ALL = """\
find /lib/modules -name '*.ko*' | sed 's,.*/,,; s,\\.ko.*,,' |
while read -r module; do modprobe -q "$module"; done
true
"""
_LOAD_SECONDS = 300.0


def try_guest(directory: Path, campaign: Campaign) -> Trial:
    """Boot a guest, look what it reaches of the target, and make ``kernel_obj`` of what it knows.

    Raises:
        BridgeError: the guest does not start, so those of the manager would not, either; or a file
            cannot be written.
    """
    logger.info("booting a guest once, for the names of what the manager shows")
    offer = None
    with tempfile.TemporaryDirectory(prefix=".trial-", dir=directory) as part:
        with Session(campaign.machine_settings(), part) as session:
            if campaign.settings.target != "none":
                offer = look(session.guest, session.target)
            set_up(session, campaign, public_key(directory))
            recorded = session.kernel is not None
            if recorded:
                _load_all_modules(session)
        made = _make_object(Path(part), directory / KERNEL_OBJECT, kernel=recorded)
        return Trial(made, offer)


def _make_object(part: Path, directory: Path, *, kernel: bool) -> Path | None:
    """Make ``kernel_obj`` of what the guest has left; return None if there is nothing to show.

    Args:
        kernel: the kernel was recorded, so the names of its functions are there.

    Raises:
        InfrastructureError: they are missing, or the object cannot be written.
    """
    if kernel and not (part / SYMBOLS_FILE).is_file():
        # The session has said why.
        raise InfrastructureError(
            f"{directory} cannot be made: {SYMBOLS_FILE} was not saved",
            hint="does the disk have room left?",
        )
    try:
        shown = write_kernel_object(part, directory)
    except MissingDependencyError as error:
        logger.warning("the manager's /cover will show nothing: %s", error.report())
        return None
    if not shown:
        logger.warning(
            "the manager's /cover will show nothing: neither the kernel nor a target is recorded"
        )
        return None
    logger.info("the manager's /cover shows %s", shown)
    return directory


def _load_all_modules(session: Session) -> None:
    """Load all modules of the image, so that the names of their functions are known."""
    try:
        session.run(_LOAD_ALL, timeout=_LOAD_SECONDS)
        session.load_symbols()
    except BridgeError as error:
        logger.warning(
            "functions of modules that programs load have no names in the manager: %s",
            error.message,
        )
