# SPDX-License-Identifier: Apache-2.0
"""The Debian packages that the bridge needs: which are missing, and how to install them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Package", "apt_line", "debian_packages", "found", "install", "kinds_for_running"]

_HERE = Path(__file__).parent
_SBIN = "/usr/sbin:/sbin"


@dataclass(frozen=True)
class Package:
    """A line of ``debian-packages.txt``; the columns are explained there."""

    name: str
    purpose: str
    probe: str
    what_for: str


def debian_packages(purpose: str | None = None) -> tuple[Package, ...]:
    """Return the Debian packages that the bridge needs, of one purpose or all, in file order."""
    packages = []
    for line in (_HERE / "debian-packages.txt").read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            name, kind, probe, what_for = line.split(None, 3)
            packages.append(Package(name, kind, probe, what_for.strip()))
    return tuple(each for each in packages if purpose in (None, each.purpose))


def kinds_for_running() -> tuple[str, ...]:
    """Return the purposes of the packages that this user needs to run the bridge."""
    return ("run",) if os.geteuid() == 0 else ("run", "user")


def found(probe: str) -> str | None:
    """Find a package's probe: a program on PATH, or a file. None if it is missing."""
    if probe.startswith("/"):
        return probe if Path(probe).exists() else None
    return shutil.which(probe) or shutil.which(probe, path=_SBIN)


def apt_line(*packages: str) -> str:
    """Return the command that installs packages."""
    return f"sudo apt-get install --no-install-recommends {' '.join(packages)}"


def install(kinds: Sequence[str], *, only_print: bool = False) -> int:
    """Install the missing packages of these purposes, with progress on stderr.

    If a password would be needed, or with ``only_print``, print the command to stdout instead.

    Returns:
        0 if nothing is missing now, 2 if the user must run the command, otherwise apt-get's status.
    """
    script = [str(_HERE / "install-packages.sh"), *(["--print"] if only_print else []), *kinds]
    done = subprocess.run(["sh", *script], stdin=subprocess.DEVNULL, check=False)
    return done.returncode
