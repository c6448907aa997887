# SPDX-License-Identifier: Apache-2.0
"""Source packages of Debian, fetched by apt, which checks the archive's signature.

apt gets lists and a cache of its own, so neither root nor a ``deb-src`` in the system's sources is
needed. The mirror is what ``KCOV_BRIDGE_MIRROR`` names, or the system's.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bridge.errors import TargetError
from bridge.util.commands import Commands

__all__ = ["DebianSource"]

_KEYRING: Final = "/usr/share/keyrings/debian-archive-keyring.gpg"
_CHANGE: Final = re.compile(r"\S+ \(([^)]+)\)")
"""How ``debian/changelog`` begins, with the version: deb-changelog(5)."""


@dataclass(frozen=True)
class DebianSource:
    """A source package of a Debian release, with Debian's patches.

    Attributes:
        package: its name.
        release: the release's code name; the machine's own does not matter.
    """

    package: str
    release: str = "trixie"

    @property
    def tools(self) -> Mapping[str, str]:
        """As :class:`bridge.targets.programs.build.Source`."""
        return {
            "apt-get": "apt",
            "dpkg-source": "dpkg-dev",
            _KEYRING: "debian-archive-keyring",
        }

    def fetch(self, directory: Path, commands: Commands) -> tuple[Path, str]:
        """As :class:`bridge.targets.programs.build.Source`."""
        state, unpacked = directory / "apt", directory / "unpacked"
        for each in (state / "lists" / "partial", state / "cache" / "archives" / "partial"):
            each.mkdir(parents=True)
        unpacked.mkdir()
        sources = state / "sources.list"
        sources.write_text(f"deb-src {self._mirror()} {self.release} main\n", encoding="utf-8")
        settings = {
            "Dir::Etc::SourceList": sources,
            "Dir::Etc::SourceParts": "-",
            "Dir::State::Lists": state / "lists",
            "Dir::Cache": state / "cache",
            # Its own user may not enter the directory of a cache in /root.
            "APT::Sandbox::User": "root",
            "APT::Update::Error-Mode": "any",
        }
        options = [f"--option={name}={value}" for name, value in settings.items()]
        what = f"fetching the source of {self.package} from Debian {self.release}"
        commands.run(["apt-get", *options, "update"], what=what)
        commands.run(
            ["apt-get", *options, "source", "--only-source", self.package], what=what, cwd=unpacked
        )
        (top,) = (each for each in unpacked.iterdir() if each.is_dir())
        change = (top / "debian" / "changelog").read_text(encoding="utf-8", errors="replace")
        match = _CHANGE.match(change)
        if match is None:
            raise TargetError(f"the source of {self.package} does not say its version")
        return top, match[1]

    def _mirror(self) -> str:
        """Return options and URI of a mirror of Debian, as in a line of sources.list(5)."""
        wanted = os.environ.get("KCOV_BRIDGE_MIRROR", "")
        # mmdebstrap takes other things too, which say nothing about other releases.
        if "://" in wanted and len(wanted.split()) == 1:
            return f"[signed-by={_KEYRING}] {wanted}"
        # Origin and label are Debian's for its main archive alone.
        listed = subprocess.run(
            [
                *("apt-get", "indextargets", "--format", "$(LABEL) $(REPO_URI) $(SIGNED_BY)"),
                *("Created-By: Packages", "Origin: Debian"),
            ],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        ).stdout
        for line in listed.splitlines():
            label, uri, *key = line.split()
            if label == "Debian":
                by = f"[signed-by={key[0]}] " if key and key[0].startswith("/") else ""
                return f"{by}{uri}"
        raise TargetError(
            f"the source of {self.package} comes from Debian's archive, and apt knows none here",
            # A new container has no lists of packages.
            hint="on Debian run `sudo apt-get update`; elsewhere name a mirror of Debian: "
            "KCOV_BRIDGE_MIRROR=URI",
        )
