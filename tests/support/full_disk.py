# SPDX-License-Identifier: Apache-2.0
"""A small disk of its own for a program."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

__all__ = ["run_on_small_disk"]


def run_on_small_disk(
    place: Path, size: str, program: str, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Run a Python program that finds an empty disk of the given size at ``place``."""
    user = () if os.geteuid() == 0 else ("--user", "--map-root-user")
    mount = f'mount -t tmpfs -o size={size} none {place} && exec "$@"'
    command = ["unshare", *user, "--mount", "sh", "-c", mount, "sh"]
    return subprocess.run(
        [*command, sys.executable, "-c", program, str(place), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
